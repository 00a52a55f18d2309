"""The three batch sizes: total = micro-batch x accumulation x ranks."""

from __future__ import annotations

from typing import Any

from hf_zero_plugin.config.problems import Problem

__all__ = ["batch_problem", "derive_batch"]

_TOTAL, _MICRO, _STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def _number(config: dict[str, Any], name: str) -> int | None:
    value = config.get(name)
    return int(value) if isinstance(value, (int, float)) else None


def batch_problem(config: dict[str, Any], world_size: int | None) -> Problem | None:
    """The file has all three, and they do not multiply out. ``world_size`` None: any number of ranks is fine."""
    total, micro, steps = (_number(config, name) for name in (_TOTAL, _MICRO, _STEPS))
    if total is None or micro is None or steps is None:
        return None
    product = micro * steps * (world_size or 1)
    if total == product or (world_size is None and total % product == 0):
        return None
    ranks = "the number of ranks" if world_size is None else f"{world_size} ranks"
    must_be = f"a multiple of {product}" if world_size is None else str(product)
    return Problem(
        path=f"$.{_TOTAL}",
        what=f"{total} is not {_MICRO} {micro} x {_STEPS} {steps} x {ranks}",
        why=f"A step takes exactly these samples, so it has to be {must_be}.",
        fix=f'Correct one of the three, or remove {_TOTAL} (or set it to "auto").',
    )


def derive_batch(config: dict[str, Any], world_size: int | None) -> tuple[dict[str, str], list[Problem]]:
    """Where no Trainer knows better: fill in the absent ones, in place.

    Returns:
        sources of what was filled in, and problems.
    """
    total, micro, steps = (_number(config, name) for name in (_TOTAL, _MICRO, _STEPS))
    if total is None:
        filled: dict[str, int] = {}
        if steps is None:
            filled[_STEPS] = 1
        if micro is not None and world_size is not None:
            filled[_TOTAL] = micro * (steps or 1) * world_size
        return _put(config, filled), []
    if micro is not None and steps is not None:
        return {}, []
    known = micro if micro is not None else steps or 1
    missing = _STEPS if micro is not None else _MICRO
    if world_size is None:
        if micro is None:
            return _put(config, {_STEPS: steps or 1}), []
        what = f"{_STEPS} cannot be derived from {_TOTAL} {total} and {_MICRO} {micro}"
        return {}, [
            Problem(path=f"$.{_STEPS}", what=what, why="The number of ranks is not known here.", fix="Write it.")
        ]
    value, rest = divmod(total, known * world_size)
    if rest or value == 0:
        what = f"{total} does not divide by {known} ({_MICRO if micro is not None else _STEPS}) x {world_size} ranks"
        why = f"{missing} is not in the file, and no whole number for it multiplies out."
        fix = f"Write a multiple of {known * world_size}."
        return {}, [Problem(path=f"$.{_TOTAL}", what=what, why=why, fix=fix)]
    return _put(config, {_STEPS: steps or 1, missing: value}), []


def _put(config: dict[str, Any], values: dict[str, int]) -> dict[str, str]:
    absent = {name: value for name, value in values.items() if name not in config}
    config.update(absent)
    return {f"$.{name}": "derived" if name != _STEPS or value != 1 else "default" for name, value in absent.items()}
