"""Old spellings and switches of ds_config.json -> today's keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_zero_plugin.config.paths import lookup, put, show
from hf_zero_plugin.config.problems import Problem

__all__ = ["OLD_SWITCHES", "RENAMED", "Renaming", "apply_renames"]

_ZERO = "$.zero_optimization"

RENAMED: dict[str, str] = {
    "$.bfloat16": "$.bf16",
    f"{_ZERO}.stage3_gather_fp16_weights_on_model_save": f"{_ZERO}.stage3_gather_16bit_weights_on_model_save",
    **{
        f"{_ZERO}.{name}": f"{_ZERO}.stage3_{name}"
        for name in (
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
        )
    },
}
"""Other spellings that DeepSpeed takes -> the key that is meant."""

OLD_SWITCHES: dict[str, tuple[str, ...]] = {
    f"{_ZERO}.cpu_offload": (f"{_ZERO}.offload_optimizer.device",),
    f"{_ZERO}.cpu_offload_param": (f"{_ZERO}.offload_param.device",),
    f"{_ZERO}.cpu_offload_use_pin_memory": (
        f"{_ZERO}.offload_optimizer.pin_memory",
        f"{_ZERO}.offload_param.pin_memory",
    ),
}
"""Old switches, true or false -> the keys they set; true is "cpu" for a device."""


@dataclass(slots=True)
class Renaming:
    moved: dict[str, str] = field(default_factory=dict)
    """Today's path -> the path in the file."""
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def apply_renames(config: dict[str, Any]) -> Renaming:
    """Replace old keys by today's, in place."""
    done = Renaming()
    for old, new in RENAMED.items():
        parent_path, _, old_name = old.rpartition(".")
        new_name = new.rpartition(".")[2]
        parent = config if parent_path == "$" else lookup(config, parent_path)
        if not isinstance(parent, dict) or old_name not in parent:
            continue
        value = parent.pop(old_name)
        if new_name in parent:
            done.problems.append(_twice(old, new))
            continue
        parent[new_name] = value
        done.moved[new] = old
        done.warnings.append(f'{old}: an old spelling; read as "{new_name}".')
    for old, targets in OLD_SWITCHES.items():
        _apply_switch(config, old, targets, done)
    return done


def _apply_switch(config: dict[str, Any], old: str, targets: tuple[str, ...], done: Renaming) -> None:
    zero = config.get("zero_optimization")
    name = old.rpartition(".")[2]
    if not isinstance(zero, dict) or name not in zero:
        return
    switch = zero.pop(name)
    if not isinstance(switch, bool):
        what = f"{show(switch)} is not a switch, but true or false is needed"
        done.problems.append(Problem(path=old, what=what, fix=f"Remove it, and set {' or '.join(targets)}."))
        return
    for target in targets:
        wanted: Any = switch if target.endswith(".pin_memory") else "cpu" if switch else "none"
        section = lookup(config, target.rpartition(".")[0])
        if section is not None and not isinstance(section, dict):
            continue
        if lookup(config, target) not in (None, wanted):
            done.problems.append(_twice(old, target))
            continue
        put(config, target, wanted)
        done.moved[target] = old
    done.warnings.append(f"{old}: an old switch; read as {' and '.join(targets)}.")


def _twice(old: str, new: str) -> Problem:
    return Problem(
        path=old, what=f"this old key stands beside {new}", why="Both set the same thing.", fix=f"Keep {new} only."
    )
