"""Whom the watchdog ends, and whom it leaves alone: on a clock that the test turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from hf_zero_plugin.engine import heartbeats as heartbeats_module
from hf_zero_plugin.engine import watchdog as watchdog_module
from hf_zero_plugin.engine.heartbeats import Heartbeats
from hf_zero_plugin.engine.watchdog import TIMEOUT_VARIABLE, Watchdog, _look_once
from tests.helpers import run_ranks

LIMIT_S = 100.0


class Rank:
    """Rank 0 of two, in its forward pass, and what it hears of rank 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.ended: list[int] = []
        monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=lambda _: None)
        for module in (watchdog_module, heartbeats_module):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(watchdog_module, "_waits_without_end", lambda: True)
        monkeypatch.setattr(watchdog_module.os, "_exit", self.ended.append)
        monkeypatch.setattr(watchdog_module.logging, "shutdown", lambda: None)
        self.store = dist.HashStore()
        self.watchdog = Watchdog(0, 2, lambda: 5)
        self.watchdog.beats = Heartbeats(0, 2)
        self.watchdog.beats._store = self.store  # type: ignore[assignment]
        self._told: float | None = None
        self._count = 0

    def look(self, until: float, place: str | None) -> None:
        """Once a second; rank 1 is at ``place``, or says nothing."""
        while self.now < until:
            self.now += 1.0
            if place is not None:
                self._count += 1
                self.store.set("hf_zero_plugin/alive/1", f"{self._count} {place}")
            self._told = _look_once(self.watchdog, LIMIT_S, self._told)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    return Rank(monkeypatch)


def test_a_rank_that_is_busy_is_not_ended_because_another_waits_for_it(rank: Rank) -> None:
    """Rank 1 has compiled for 15 seconds and waits for its turn to end in 100; rank 0 compiles for 110."""
    with rank.watchdog.during("forward"):
        rank.look(15, "step 6, forward")
        rank.look(110, "step 6, optimizer step")
    assert rank.ended == []


def test_a_rank_that_stays_elsewhere_ends_the_wait(rank: Rank) -> None:
    with rank.watchdog.during("forward"):
        rank.look(120, "step 6, between steps")
    assert rank.ended


def test_a_silent_rank_ends_the_wait_with_the_time_out(rank: Rank) -> None:
    with rank.watchdog.during("forward"):
        rank.look(100, None)
        assert rank.ended == []
        rank.look(102, None)
    assert rank.ended


def test_a_job_that_was_frozen_goes_on(rank: Rank) -> None:
    """Stopped as a whole by a batch system: nobody was silent while nobody listened."""
    with rank.watchdog.during("forward"):
        rank.look(30, "step 6, forward")
        rank.now += 1000.0
        rank.look(rank.now + 3, None)
        rank.look(rank.now + 60, "step 6, forward")
    assert rank.ended == []


def test_a_wait_that_has_just_ended_is_not(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = rank.watchdog.during("forward")
    waiting.__enter__()
    rank.look(100, None)
    report = heartbeats_module.Listener.report

    def arrives(listener: Any, at_least_s: float) -> str:
        if rank.watchdog._doing:
            waiting.__exit__(None, None, None)
        return report(listener, at_least_s)

    monkeypatch.setattr(heartbeats_module.Listener, "report", arrives)
    rank.look(102, None)
    assert rank.ended == []


def _two_engines() -> list[str]:
    number = dist.get_rank()
    first, second = Heartbeats(number, 2), Heartbeats(number, 2)
    first.beat(f"first of {number}")
    second.beat(f"second of {number}")
    dist.barrier()
    heard = [first.listen().report(60.0), second.listen().report(60.0)]
    dist.barrier()
    return heard


def test_engines_of_one_process_do_not_speak_for_each_other() -> None:
    assert run_ranks(_two_engines, 2) == [
        ["Rank 1 lives: first of 1.", "Rank 1 lives: second of 1."],
        ["Rank 0 lives: first of 0.", "Rank 0 lives: second of 0."],
    ]
