"""``deepspeed.comm``: torch.distributed under its own names, and a process group even for one process."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (
    all_gather,
    all_gather_into_tensor,
    all_gather_object,
    all_reduce,
    barrier,
    broadcast,
    broadcast_object_list,
    gather,
    get_rank,
    get_world_size,
    is_available,
    is_initialized,
    new_group,
    reduce,
    reduce_scatter_tensor,
    scatter,
)

from hf_zero_plugin.engine.watchdog import asked_timeout

__all__ = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "describe_single_process",
    "gather",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "is_available",
    "is_initialized",
    "new_group",
    "reduce",
    "reduce_scatter_tensor",
    "scatter",
]


LONE_VARIABLE = "HF_ZERO_LONE"
"""Set where no launcher has described this process, but ``describe_single_process``; its children inherit that."""


def get_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe_single_process() -> None:
    """Without a launcher, say in the environment that this is rank 0 of 1.

    Otherwise accelerate makes no process group, and with two visible GPUs the Trainer takes DataParallel and never
    reaches the engine.
    """
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        return
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", LONE_VARIABLE: "1"})
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    timeout: timedelta | None = None,
    **ignored: Any,
) -> None:
    """Make the default process group if there is none; ``dist_backend`` None picks NCCL with a GPU, else gloo.

    The environment's HF_ZERO_COLLECTIVE_TIMEOUT (seconds) goes before ``timeout``.
    """
    if dist.is_initialized():
        return
    describe_single_process()
    backend = dist_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    timeout = asked_timeout() or timeout
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if backend == "nccl":
        torch.cuda.set_device(get_local_rank())
        options["device_id"] = torch.device("cuda", get_local_rank())
        # At a time-out NCCL's watchdog would hold every process for a while, to collect traces for its developers.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    if LONE_VARIABLE in os.environ and os.environ.get("WORLD_SIZE") == "1":
        # The port in the environment was free some time ago: another process may have it by now, such as a parent.
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        os.environ["MASTER_PORT"] = str(store.port)
        options |= {"store": store, "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **options)
