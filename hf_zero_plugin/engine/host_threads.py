"""How many threads of this process may compute on the host."""

from __future__ import annotations

import os

import torch

from hf_zero_plugin.host_limits import usable_cores

__all__ = ["host_threads"]


def host_threads(share: float = 1.0, spared: int = 0) -> int:
    """``share`` of torch's threads, less those that are ``spared``; 0 or less if that is nothing.

    Without OMP_NUM_THREADS torch takes all cores, whoever else is there: then the ranks of this machine divide them.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        threads = min(threads, max(1, usable_cores() // ranks))
    return int(share * threads) - spared
