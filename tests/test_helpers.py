"""The helper that other tests trust: results by rank, failures with their rank, no hanging."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers import RankError, run_ranks


def _sum_of_ranks(offset: int) -> torch.Tensor:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return value


def _rank_one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def _rank_one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def _sleep() -> None:
    time.sleep(60)


def _environment() -> tuple[str, str, int, bool]:
    return os.environ["RANK"], os.environ["EXTRA"], torch.get_num_threads(), dist.is_initialized()


def test_every_ranks_result_comes_back() -> None:
    results = run_ranks(_sum_of_ranks, 2, 10)
    assert [value.item() for value in results] == [21.0, 21.0]


def test_environment_reaches_the_rank_and_nothing_leaks_back() -> None:
    before = dict(os.environ)
    assert run_ranks(_environment, 1, env={"EXTRA": "x"}, init_process_group=False) == [("0", "x", 1, False)]
    assert dict(os.environ) == before


def test_failure_is_shown_with_its_rank() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*ValueError: the reason"):
        run_ranks(_rank_one_raises, 2)


def test_death_is_shown_with_its_exit_code() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: died with exit code 3"):
        run_ranks(_rank_one_dies, 2)


def test_a_rank_that_hangs_is_ended() -> None:
    with pytest.raises(RankError, match=r"no result \(time-out of 8 s"):
        run_ranks(_sleep, 1, timeout_s=8)
