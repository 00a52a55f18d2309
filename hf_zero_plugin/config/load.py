"""A path, a dict, inline JSON or base64 -> ``LoadedConfig``, or every mistake in it at once.

Takes the same forms as the Trainer's ``--deepspeed``. Nothing is filled in here; see ``auto.resolve``.
"""

from __future__ import annotations

import base64
import binascii
import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_zero_plugin.config.json_scan import JsonSyntaxError, scan_json
from hf_zero_plugin.config.problems import Position, Problem, did_you_mean, raise_problems
from hf_zero_plugin.config.renames import apply_renames
from hf_zero_plugin.config.validate import refusals, schema_problems
from hf_zero_plugin.errors import ConfigError

__all__ = ["LoadedConfig", "load_config"]

Source = str | os.PathLike[str] | dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A configuration that fits the schema. ``"auto"`` may still be in it."""

    raw: dict[str, Any]
    """As the user wrote it."""
    config: dict[str, Any]
    """With old spellings replaced by today's."""
    origin: str
    """File name, or a description of where the text came from."""
    positions: dict[str, Position] = field(default_factory=dict)
    """Place of every key in the text, old spellings under their new names too; empty for a dict."""
    warnings: tuple[str, ...] = ()


def load_config(source: Source, *, allow_refused: bool = False) -> LoadedConfig:
    """Read and check a configuration.

    Args:
        source: path of a file, a dict (not changed), or JSON text, plain or in URL-safe base64.
        allow_refused: let features pass that this engine does not have, to show them (``hf-zero explain``).

    Raises:
        ConfigError: with every mistake found, in the order of the file.
    """
    if isinstance(source, dict):
        return _checked(copy.deepcopy(source), "ds_config (a dict)", {}, [], allow_refused)
    text, origin = _read(source)
    try:
        scanned = scan_json(text)
    except JsonSyntaxError as error:
        raise_problems(origin, [error.problem], {})
        raise
    if not isinstance(scanned.value, dict):
        kind = "a list" if isinstance(scanned.value, list) else "a single value"
        problem = Problem(
            path="$",
            what=f"the configuration is {kind}, not an object",
            why="It is made of named keys.",
            fix='Put it in braces: {"zero_optimization": ...}.',
        )
        raise_problems(origin, [problem], scanned.positions)
    return _checked(scanned.value, origin, scanned.positions, scanned.duplicates, allow_refused)


def _checked(
    raw: dict[str, Any],
    origin: str,
    positions: dict[str, Position],
    problems: list[Problem],
    allow_refused: bool,
) -> LoadedConfig:
    config = _without_nulls(copy.deepcopy(raw))
    renaming = apply_renames(config)
    positions = {**positions, **_moved_positions(positions, renaming.moved)}
    found = [*problems, *renaming.problems, *schema_problems(config)]
    if found or not allow_refused:
        seen = {problem.path for problem in found}
        found += [problem for problem in refusals(config) if problem.path not in seen]
    raise_problems(origin, found, positions)
    return LoadedConfig(raw=raw, config=config, origin=origin, positions=positions, warnings=tuple(renaming.warnings))


def _moved_positions(positions: dict[str, Position], moved: dict[str, str]) -> dict[str, Position]:
    """Positions of renamed keys, and of what is inside them, under their new names."""
    return {
        new + path[len(old) :]: position
        for new, old in moved.items()
        for path, position in positions.items()
        if path == old or path.startswith(f"{old}.")
    }


def _without_nulls(config: dict[str, Any]) -> dict[str, Any]:
    """``"offload_param": null`` is how DeepSpeed and accelerate write an absent section."""
    zero = config.get("zero_optimization")
    for holder in (config, zero if isinstance(zero, dict) else {}):
        for key in [key for key, value in holder.items() if value is None]:
            del holder[key]
    return config


def _read(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Text and display name."""
    is_text = isinstance(source, str)
    stripped = source.strip() if isinstance(source, str) else ""
    if stripped.startswith(("{", "[")):
        return stripped, "inline JSON"
    path = Path(source)
    try:
        if path.is_file():
            return _decode(path.read_bytes(), str(path)), str(path)
        is_directory = path.is_dir()
    except (OSError, ValueError) as error:
        is_directory = False
        if not is_text or os.sep in stripped or stripped.endswith(".json"):
            raise ConfigError(f"{_shortened(str(source))}: cannot be read: {error}. Check the path.") from None
    if is_directory:
        raise ConfigError(f"{path}: is a directory, but a configuration is one JSON file. Name the file in it.")
    decoded = _from_base64(stripped) if is_text else None
    if decoded is not None:
        return decoded, "base64 JSON"
    raise ConfigError(_missing(path))


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}: the file is not UTF-8 text (byte {error.start}). JSON is always UTF-8: save it so."
        ) from None


def _from_base64(text: str) -> str | None:
    """JSON text, or None if this is not base64 of an object."""
    try:
        decoded = base64.urlsafe_b64decode(text).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _missing(path: Path) -> str:
    name = _shortened(str(path))
    try:
        neighbours = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".json"][:1000]
        why = "There is no such file"
    except (OSError, ValueError):
        neighbours, why = [], f"There is no directory {_shortened(str(path.parent))}"
    near = did_you_mean(path.name, neighbours)
    relative = "" if path.is_absolute() else f" (looked for from {Path.cwd()})"
    hint = f"Did you mean {path.parent / near}?" if near else "Check the path."
    return f"{name}: the configuration file does not exist. {why}{relative}, and it is no JSON text. {hint}"


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
