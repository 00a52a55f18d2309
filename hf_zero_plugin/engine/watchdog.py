"""Saying who waits for what when ranks do not meet.

A collective in which one rank is missing ends in the backend's time-out, whose message names neither the step nor the
model's part. Around every entry of the engine this file notes what is being done and what was gathered last, turns a
failed collective into an error that says so, and writes a warning, at nine tenths of the time-out, on ranks that still
wait: with NCCL that is all a rank can say, because the backend ends the process.

``HF_ZERO_COLLECTIVE_TIMEOUT=seconds`` sets the time-out of the process group and of the warning.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

from hf_zero_plugin.errors import CollectiveError, ConfigError

__all__ = ["TIMEOUT_VARIABLE", "Watchdog", "asked_timeout", "watched"]

TIMEOUT_VARIABLE = "HF_ZERO_COLLECTIVE_TIMEOUT"
_SIGNS = ("timed out", "timeout", "connection closed by peer", "connection reset by peer", "gloo", "nccl")

logger = logging.getLogger("hf_zero_plugin")
P = ParamSpec("P")
R = TypeVar("R")


def asked_timeout() -> timedelta | None:
    """What the environment asks for.

    Raises:
        ConfigError: it is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"{TIMEOUT_VARIABLE}={text!r}: expected a number of seconds above 0, such as 600.")
    return timedelta(seconds=seconds)


class Watchdog:
    """Knows what one rank is doing. ``step`` is asked, not stored: the engine counts."""

    def __init__(self, rank: int, world_size: int, step: Callable[[], int]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.last_gathered = ""
        """The unit of the model that was gathered last (stage 3)."""
        self._step = step
        self._doing: list[tuple[str, float]] = []
        limit = asked_timeout()
        if limit is not None and world_size > 1:
            _watch_from_aside(self, limit.total_seconds())

    @property
    def where(self) -> str:
        last = f"; gathered last: {self.last_gathered}" if self.last_gathered else ""
        doing = self._doing[-1][0] if self._doing else "between steps"
        return f"rank {self.rank} of {self.world_size}, step {self._step() + 1}, {doing}{last}"

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        if self.world_size == 1:
            yield
            return
        self._doing.append((what, time.monotonic()))
        try:
            yield
        except RuntimeError as error:
            explained = self.explain(error)
            if explained is None:
                raise
            raise explained from error
        finally:
            self._doing.pop()

    def explain(self, error: RuntimeError) -> CollectiveError | None:
        """What a failed collective means, if ``error`` is torch's word for one and nobody has explained it yet."""
        told = isinstance(error, CollectiveError) or self.world_size == 1
        if told or not any(sign in str(error).lower() for sign in _SIGNS):
            return None
        return CollectiveError(
            f"{self.where}: the other ranks did not come to this collective, or one of them has ended ({error}). "
            "Look for the first error of another rank; if there is none, ranks took different branches or had "
            f"different numbers of batches. A rank that is only slow needs a larger {TIMEOUT_VARIABLE} (seconds)."
        )

    def waiting_since(self) -> float | None:
        doing = self._doing[-1:]
        return doing[0][1] if doing else None


def watched(what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For methods of an object with a ``watchdog``."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            engine: Any = args[0]
            with engine.watchdog.during(what):
                return method(*args, **kwargs)

        return call

    return decorate


def _watch_from_aside(watchdog: Watchdog, limit_s: float) -> None:
    reference = weakref.ref(watchdog)

    def look() -> None:
        told: float | None = None
        while True:
            time.sleep(min(1.0, limit_s / 20))
            mine = reference()
            if mine is None:
                return
            since = mine.waiting_since()
            if since is not None and since != told and time.monotonic() - since > 0.9 * limit_s:
                told = since
                logger.error("%s: has waited %.0f s for the other ranks", mine.where, time.monotonic() - since)
            del mine

    threading.Thread(target=look, name="hf-zero-watchdog", daemon=True).start()
