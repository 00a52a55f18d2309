"""Ranks hear of each other through a store."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from hf_zero_plugin.engine.heartbeats import Heartbeats, Listener
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
