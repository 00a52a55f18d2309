"""Ranks hear of each other through a store."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_zero_plugin.engine import watchdog as watchdog_module
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.heartbeats import Heartbeats, Listener
from hf_zero_plugin.engine.watchdog import TIMEOUT_VARIABLE, Watchdog
from tests.helpers import run_ranks

from .harness import Tiny, decay_groups, settings_for


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


def _engine(group: dist.ProcessGroup | None) -> ZeroEngine:
    model = Tiny()
    return ZeroEngine(model, settings_for(1), device=torch.device("cpu"), param_groups=decay_groups(model), group=group)


def _two_groups() -> dict[str, Any]:
    """Ranks 0 and 2, and 1 and 3, each with an engine of their own; then one of all ranks."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[rank % 2]
    # The first group has made one more before: all ranks must find the same place for the last one nevertheless.
    earlier = [_engine(mine) for _ in range(2 - rank % 2)]
    engines = {"pair": earlier[-1], "all": _engine(None)}
    heard: dict[str, Any] = {}
    for name, engine in engines.items():
        beats = engine.watchdog.beats
        assert beats is not None
        with engine.watchdog.during(f"task {rank} of {name}"):
            beats.beat(engine.watchdog.place)
            dist.barrier()
            heard[name] = engine.watchdog.where, beats.listen().report(60.0)
            pair = engines["pair"].watchdog.beats
            assert pair is not None
            heard["pair, later"] = pair.listen().report(60.0)
            dist.barrier()
    return heard


def test_groups_of_processes_do_not_hear_each_other_and_ranks_are_global() -> None:
    played = run_ranks(_two_groups, 4, env={TIMEOUT_VARIABLE: "600"})
    for rank, heard in enumerate(played):
        other = (rank + 2) % 4
        assert heard["pair"] == (
            f"rank {rank} (in a group of 2), step 1, task {rank} of pair",
            f"Rank {other} lives: step 1, task {other} of pair.",
        )
        assert heard["pair, later"].startswith(f"Rank {other} lives: step 1, ")
        assert "of all" not in heard["pair, later"]
        where, report = heard["all"]
        assert where == f"rank {rank} of 4, step 1, task {rank} of all"
        assert report == " ".join(f"Rank {n} lives: step 1, task {n} of all." for n in range(4) if n != rank)


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
