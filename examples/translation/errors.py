"""The one exception of this example: a mistake that the user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable


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
