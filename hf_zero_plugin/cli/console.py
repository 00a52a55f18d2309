"""What the command line says on stderr: notes, errors, and which rank is speaking."""

from __future__ import annotations

import os
import sys
import traceback

__all__ = ["TRACEBACK_VARIABLE", "note", "report_error", "wants_traceback"]

TRACEBACK_VARIABLE = "HF_ZERO_TRACEBACK"
"""Set to 1 to see the traceback of errors that are otherwise reported by their message alone."""


def note(message: str) -> None:
    """Say something that the user should know but need not act on; once per run, so only on rank 0."""
    if _rank() == 0:
        _write(f"hf-zero: note: {message}\n")


def report_error(error: BaseException) -> None:
    """Print the message of an error; its traceback too if ``HF_ZERO_TRACEBACK`` asks for it."""
    if wants_traceback():
        traceback.print_exception(error)
    rank = _rank()
    speaker = f"[rank {rank}] " if rank > 0 else ""
    _write(f"hf-zero: error: {speaker}{error}\n")


def wants_traceback() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "").lower() not in ("", "0", "false")


def _write(text: str) -> None:
    """In one piece: several ranks share the terminal."""
    sys.stderr.write(text)
    sys.stderr.flush()


def _rank() -> int:
    try:
        return int(os.environ.get("RANK", "0"))
    except ValueError:
        return 0
