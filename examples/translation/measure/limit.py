"""When a sweep must end: at its time limit, or when somebody interrupts it."""

from __future__ import annotations

import time

START_S = 15.0
"""A process is not started with less than this left: it would not come to its first cell."""


class SweepOver(Exception):
    """Time is up; what runs is not finished, and is no result."""


class TimeLimit:
    """Shared by the threads of a sweep."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def stop(self) -> None:
        """Now."""
        self._end = time.monotonic()

    def is_over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def has_time_to_start(self) -> bool:
        return self._end is None or time.monotonic() < self._end - START_S
