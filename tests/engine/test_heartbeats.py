"""Ranks hear of each other through a store."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from hf_zero_plugin.engine import watchdog as watchdog_module
from hf_zero_plugin.engine.heartbeats import Heartbeats, Listener
from hf_zero_plugin.engine.watchdog import TIMEOUT_VARIABLE, Watchdog
from tests.helpers import run_ranks


def test_who_beats_lives_and_who_does_not_is_silent() -> None:
    store = dist.HashStore()
    store.set("hf_zero_plugin/alive/1", "1 step 3, forward")
    store.set("hf_zero_plugin/alive/2", "1 step 3, backward")
    listener = Listener([1, 2, 3], store)
    time.sleep(0.02)
    store.set("hf_zero_plugin/alive/2", "2 step 4, forward")
    listener.hear()
    assert listener.silent(0.02) == [1, 3]
    assert listener.report(0.02) == (
        "Rank 1 gives no sign of life (last: step 3, forward). Rank 3 gives no sign of life. "
        "Rank 2 lives: step 4, forward."
    )
    assert listener.silent(60.0) == []


def test_a_rank_that_lives_but_stands_elsewhere_is_found() -> None:
    store = dist.HashStore()
    store.set("hf_zero_plugin/alive/1", "1 step 6, between steps")
    store.set("hf_zero_plugin/alive/2", "1 step 6, forward")
    listener = Listener([1, 2], store)
    time.sleep(0.02)
    store.set("hf_zero_plugin/alive/1", "2 step 6, between steps")
    store.set("hf_zero_plugin/alive/2", "2 step 6, forward")
    listener.hear()
    assert listener.elsewhere("step 6, forward", 0.02) == [1]
    assert listener.elsewhere("step 6, forward", 60.0) == []
    store.set("hf_zero_plugin/alive/1", "3 step 6, forward")
    listener.hear()
    assert listener.elsewhere("step 6, forward", 0.02) == []


class Gone:
    """A store whose host has ended."""

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Broken pipe")


def test_a_store_that_does_not_answer_is_named() -> None:
    listener = Listener([0], Gone())  # type: ignore[arg-type]
    assert "rank 0 or in its launcher, does not answer" in listener.report(1.0)


def test_without_a_process_group_nothing_is_heard() -> None:
    beats = Heartbeats(0, 2)
    beats.beat("step 1")
    assert beats.listen().silent(0.0) == []
    assert beats.listen().report(0.0) == ""


def _beat() -> dict[str, Any]:
    rank = dist.get_rank()
    beats = Heartbeats(rank, dist.get_world_size())
    beats.beat(f"here is {rank}")
    dist.barrier()
    return {"heard": beats.listen().report(60.0)}


def test_ranks_hear_each_other() -> None:
    first, second = run_ranks(_beat, 2)
    assert (first["heard"], second["heard"]) == ("Rank 1 lives: here is 1.", "Rank 0 lives: here is 0.")


def _is_ended() -> dict[str, Any]:
    """Rank 1 stays between steps; rank 0 waits in its forward pass, with a backend whose waits nothing ends."""
    ended: list[int] = []
    watchdog_module._waits_without_end = lambda: True
    watchdog_module.os._exit = ended.append  # type: ignore[assignment]
    watchdog = Watchdog(dist.get_rank(), 2, lambda: 5)
    if dist.get_rank() == 0:
        with watchdog.during("forward"):
            for _ in range(100):
                if ended:
                    break
                time.sleep(0.05)
    dist.barrier()
    return {"ended": ended[:1]}


def test_a_wait_that_nothing_interrupts_is_ended(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, "2")
    waiting, hanging = run_ranks(_is_ended, 2)
    assert (waiting["ended"], hanging["ended"]) == ([1], [])
