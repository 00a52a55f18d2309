"""What a training script's own arguments tell us before the script runs.

The arguments belong to the script. Two of them concern us: ``--deepspeed``, whose file is checked before
torch is loaded, and ``--overwrite_output_dir``, which transformers 5 removed and old commands still carry.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterable
from pathlib import Path

from hf_zero_plugin.cli.console import note
from hf_zero_plugin.integration.removed_flags import OVERWRITE_VARIABLE

__all__ = ["check_deepspeed_config", "deepspeed_value", "drop_removed_flags"]

_OVERWRITE_FLAGS = ("--overwrite_output_dir", "--overwrite-output-dir")
_BOOLEAN_WORDS = frozenset({"true", "false", "1", "0", "yes", "no", "y", "n", "t", "f"})

# A dataclass field, or the option's name as a string: the script has the option itself. Reading
# ``training_args.overwrite_output_dir`` is not having it.
_DEFINES_OVERWRITE = re.compile(r"""^\s*overwrite_output_dir\s*:|["'](--)?overwrite[_-]output[_-]dir["']""", re.M)
_IMPORTS = re.compile(r"^\s*(?:from|import)\s+\.?(\w+)", re.M)
_MAX_SOURCE_BYTES = 2**20


def deepspeed_value(script_args: Iterable[str]) -> str | None:
    """The value of the last ``--deepspeed X`` or ``--deepspeed=X``; None if there is none."""
    found: str | None = None
    expects_value = False
    for argument in script_args:
        if expects_value:
            found, expects_value = argument, False
        elif argument == "--deepspeed":
            expects_value = True
        elif argument.startswith("--deepspeed="):
            found = argument.partition("=")[2]
    return found


def check_deepspeed_config(script_args: Iterable[str]) -> None:
    """Validate the file behind ``--deepspeed``, cheaply and early.

    Raises:
        ConfigError: the file is missing, is not JSON, or asks for something that cannot be honoured.
    """
    value = deepspeed_value(script_args)
    if value is None:
        return
    from hf_zero_plugin.config.load import load_config

    load_config(value)


def drop_removed_flags(script_args: list[str], script: Path | None) -> list[str]:
    """The arguments without ``--overwrite_output_dir`` when neither transformers nor the script knows it.

    Args:
        script_args: the script's arguments, left as they are.
        script: the script's file; None if it cannot be found, then nothing is known about its options.
    """
    if not any(_is_overwrite_flag(argument) for argument in script_args):
        return script_args
    if _transformers_major() < 5 or (script is not None and _script_defines_overwrite(script)):
        return script_args
    os.environ[OVERWRITE_VARIABLE] = "1"
    kept: list[str] = []
    after_flag = False
    for argument in script_args:
        if _is_overwrite_flag(argument):
            after_flag = "=" not in argument
            continue
        is_its_value = after_flag and argument.lower() in _BOOLEAN_WORDS
        after_flag = False
        if not is_its_value:
            kept.append(argument)
    note(
        "--overwrite_output_dir was left out of the script's arguments: transformers 5 removed it "
        "(an output directory that exists is always written to), and the script does not define it."
    )
    return kept


def _is_overwrite_flag(argument: str) -> bool:
    return argument.partition("=")[0] in _OVERWRITE_FLAGS


def _transformers_major() -> int:
    try:
        return int(importlib.metadata.version("transformers").partition(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return 0


def _script_defines_overwrite(script: Path) -> bool:
    """Whether the script, or a module beside it that it imports, declares the option."""
    source = _source_of(script)
    if _DEFINES_OVERWRITE.search(source):
        return True
    beside = (script.parent / f"{name}.py" for name in set(_IMPORTS.findall(source)))
    return any(_DEFINES_OVERWRITE.search(_source_of(path)) for path in beside if path.is_file())


def _source_of(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_SOURCE_BYTES:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
