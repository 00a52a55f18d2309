"""The one exception of this example: a mistake that the user can mend."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input: the message says what is wrong, where, why, and how to mend it."""


def exit_code_of(main: Callable[[], object], program: str) -> int:
    """Run ``main``; a ``UserError`` becomes one message on stderr and exit code 2, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def missing_extra(package: str, purpose: str) -> UserError:
    """The error for a package of the ``examples`` extra that is not installed."""
    return UserError(
        f"the package '{package}' is not installed; {purpose} needs it. Run: pip install 'hf-zero-plugin[examples]'"
    )


def make_folder(path: Path, flag: str) -> None:
    """Make the folder that results will go to; asked before they are made, so that none is lost.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be made a folder ({error.strerror}). Name another one.") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path}: this folder cannot be written to. Name another one.")


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds.

    Raises:
        UserError: it is not JSON, as when its writing was cut short.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}). Restore the file, or delete it.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}). "
            "Restore the file, or delete it; it is written anew with what is measured next."
        ) from error
