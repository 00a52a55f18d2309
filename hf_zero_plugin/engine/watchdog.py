"""Saying who waits for what when ranks do not meet.

A collective in which one rank is missing ends in the backend's time-out, whose message names neither the step nor the
model's part. Around every entry of the engine this file notes what is being done and what was gathered last, and turns
a failed collective into an error that says so. Ranks that still wait at nine tenths of the time-out say it, and what
they hear of the others (``heartbeats.py``). Gloo ends a wait with an exception. Nothing can interrupt a wait for NCCL,
and its own time-out was seen to leave processes alone for a minute and more, so when the time is over and another rank
has been silent nearly all the while, or somewhere else for as long as a time-out, this process is ended here.

``HF_ZERO_COLLECTIVE_TIMEOUT=seconds`` sets the time-out of the process group, and switches this watch on.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from hf_zero_plugin.engine.heartbeats import PATIENCE_S, Heartbeats, Listener
from hf_zero_plugin.errors import CollectiveError, ConfigError

__all__ = ["TIMEOUT_VARIABLE", "Watchdog", "asked_timeout", "steps_of", "watched"]

TIMEOUT_VARIABLE = "HF_ZERO_COLLECTIVE_TIMEOUT"
_SIGNS = ("timed out", "timeout", "connection closed by peer", "connection reset by peer", "gloo", "nccl")

LISTENS_FROM = 0.1
"""Of the time-out: so long an entry of the engine lasts before this rank listens to the others."""

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
    """Knows what one rank is doing.

    Args:
        rank: of this process in ``group``.
        world_size: of ``group``.
        step: asked, not stored: the engine counts.
        group: None for all processes.
    """

    def __init__(
        self, rank: int, world_size: int, step: Callable[[], int], group: dist.ProcessGroup | None = None
    ) -> None:
        self.ranks = dist.get_process_group_ranks(group) if group is not None else [*range(world_size)]
        """Global ones."""
        self.rank = self.ranks[rank]
        """Global, as the launcher and every other message name it."""
        self.world_size = world_size
        self._is_part = group is not None and world_size < dist.get_world_size()
        self.last_gathered = ""
        """The unit of the model that was gathered last (stage 3)."""
        self._step = step
        self._doing: list[tuple[str, float]] = []
        limit = asked_timeout()
        self._limit_s = limit.total_seconds() if limit is not None and world_size > 1 else None
        self.beats: Heartbeats | None = None
        """There if a time-out was asked for."""
        self.listener: Listener | None = None
        """Of the thread that watches, while this rank waits."""
        self.looked_at = time.monotonic()
        """When that thread has looked last."""
        if self._limit_s is not None:
            self.beats = Heartbeats(self.rank, self.ranks, min(PATIENCE_S, self._limit_s / 10))
            _watch_from_aside(self, self._limit_s)

    @property
    def where(self) -> str:
        last = f"; gathered last: {self.last_gathered}" if self.last_gathered else ""
        of = f"(in a group of {self.world_size})" if self._is_part else f"of {self.world_size}"
        return f"rank {self.rank} {of}, {self.place}{last}"

    @property
    def place(self) -> str:
        """Step and entry of the engine: the same on all ranks that go together."""
        inside = self._doing[-1:]  # another thread may be asking
        doing = inside[0][0] if inside else "between steps"
        return f"step {self._step() + 1}, {doing}"

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
        heard = self._listen_briefly()
        return CollectiveError(
            f"{self.where}: the other ranks did not come to this collective, or one of them has ended ({error}). "
            f"{heard}Look for the first error of another rank; if there is none, ranks took different branches or had "
            f"different numbers of batches. A rank that is only slow needs a larger {TIMEOUT_VARIABLE} (seconds)."
        )

    def _listen_briefly(self) -> str:
        """What the others say within two of their beats, with a space behind it; "" if nobody was asked to beat."""
        if self.beats is None or self._limit_s is None:
            return ""
        listener, period_s = self.beats.listen(), _period_s(self._limit_s)
        time.sleep(2.5 * period_s)
        listener.hear()
        heard = listener.report(2 * period_s)
        return heard + " " if heard else ""

    def waiting_since(self) -> float | None:
        doing = self._doing[-1:]
        return doing[0][1] if doing else None


def steps_of(engine: Any) -> Callable[[], int]:
    """Asks ``engine`` for its steps, and does not keep it alive."""
    reference = weakref.ref(engine)

    def steps() -> int:
        mine = reference()
        return mine.global_steps if mine is not None else 0

    return steps


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


def _period_s(limit_s: float) -> float:
    return min(1.0, limit_s / 20)


def _watch_from_aside(watchdog: Watchdog, limit_s: float) -> None:
    reference = weakref.ref(watchdog)

    def look() -> None:
        told: float | None = None
        while True:
            time.sleep(_period_s(limit_s))
            mine = reference()
            if mine is None:
                return
            told = _look_once(mine, limit_s, told)
            del mine

    threading.Thread(target=look, name="hf-zero-watchdog", daemon=True).start()


def _look_once(watchdog: Watchdog, limit_s: float, told: float | None) -> float | None:
    """Beat, and speak up or end if the time has come. Returns the beginning of the wait that was told last."""
    beats, since = watchdog.beats, watchdog.waiting_since()
    assert beats is not None
    place = watchdog.place
    beats.beat(place)
    waited = time.monotonic() - since if since is not None else 0.0
    stood_still = time.monotonic() - watchdog.looked_at > 0.5 * limit_s
    watchdog.looked_at = time.monotonic()
    # Where nobody listened there was no silence: this thread, or the whole job, may have been frozen.
    if waited < LISTENS_FROM * limit_s or stood_still:
        watchdog.listener = None
        return told
    if watchdog.listener is None:
        watchdog.listener = beats.listen()
    listener = watchdog.listener
    listener.hear()
    heard = f"{watchdog.where}: has waited {waited:.0f} s for the other ranks. {listener.report(0.5 * limit_s)}"
    if since != told and waited > 0.9 * limit_s:
        logger.error("%s", heard)
        told = since
    # Who lives, elsewhere, may be waiting for this rank, which is busy: for that it has a time-out of its own.
    is_in_vain = bool(listener.silent(0.8 * limit_s) or listener.elsewhere(place, limit_s))
    still_waits = watchdog.waiting_since() == since  # listening has taken its time
    if waited > limit_s and is_in_vain and still_waits and _waits_without_end():
        logger.critical("%s The time-out of %g s is over: this process ends.", heard, limit_s)
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1)
    return told


def _waits_without_end() -> bool:
    """With gloo, a wait ends in an exception, which can be explained and caught."""
    return dist.is_initialized() and dist.get_backend() == "nccl"
