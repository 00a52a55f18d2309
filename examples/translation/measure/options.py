"""Values on the command lines of ``experiments.py`` and ``learning.py``: read, checked, refused with a reason.

argparse puts the option's name before these messages and ends with exit code 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Collection
from pathlib import Path

from errors import UserError
from presets import PRESETS

from measure.spec import DEEPSPEED

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


def names_of(text: str) -> list[str]:
    """At least one name, separated by commas; a name that comes twice counts once."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("give at least one name; several are separated by commas")
    return names


def numbers_of(text: str) -> list[int]:
    """Positive whole numbers, separated by commas."""
    return [positive(name) for name in names_of(text)]


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def zero_or_more(text: str) -> int:
    return 0 if text == "0" else positive(text)


def length(text: str) -> int:
    if positive(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} leaves no room for a token and the end of the sentence; at least 2")
    return int(text)


def steps_or_auto(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return number


def check_models(names: Collection[str], flag: str) -> None:
    """Raises UserError: there is no such preset."""
    unknown = [name for name in names if name not in PRESETS]
    if unknown:
        raise UserError(f"{flag} {','.join(unknown)}: there are {', '.join(PRESETS)}.")


def check_engines(names: Collection[str], known: Collection[str]) -> None:
    """Raises UserError: there is no such engine, or the real DeepSpeed is asked for and not installed."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--engines {','.join(unknown)}: there are {', '.join(known)}.")
    if DEEPSPEED in names:
        try:
            importlib.metadata.version("deepspeed")
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"--engines {DEEPSPEED}: DeepSpeed itself is not installed. Run: pip install deepspeed. "
                "Or leave it out: figures and tables do without."
            ) from None


def check_tokenizer(folder: Path) -> None:
    """Raises UserError: it is no folder, or holds no tokenizer."""
    if not folder.is_dir():
        raise UserError(f"--tokenizer {folder}: no such folder (looked from {Path.cwd()}).")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"--tokenizer {folder}: no tokenizer in it, none of {', '.join(TOKENIZER_FILES)}.")
