"""Run a function on N gloo ranks and get every rank's result back.

::

    def _sum_of_ranks(offset: int) -> float:          # top level of a module, so that it can be pickled
        value = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(value)
        return value.item()

    assert run_ranks(_sum_of_ranks, 2, 10) == [21.0, 21.0]
"""

from __future__ import annotations

import io
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any

__all__ = ["RankError", "free_port", "run_ranks"]

_GRACE_S = 5.0
"""How long the other ranks may go on after one has failed, to tell their side of it."""


class RankError(AssertionError):
    """One or more ranks failed; the message holds each one's traceback."""


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on just now."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    env: dict[str, str] | None = None,
    init_process_group: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Call ``function(*args, **kwargs)`` in ``world_size`` fresh processes joined by gloo on CPU.

    Args:
        function: top level of an importable module (a spawned process unpickles it by name).
        timeout_s: for all ranks together, start-up included (about 3 s a rank, for importing torch).
        env: further environment variables, set before torch is imported.
        init_process_group: False leaves that to the function; RANK, WORLD_SIZE and MASTER_* are set either way.

    Returns:
        What each rank returned, by rank. Tensors come back as CPU tensors.

    Raises:
        RankError: a rank raised, died, or did not finish in time.
    """
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    results: Any = context.Queue()
    base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    base |= {"LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(world_size):
        rank_env = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})}
        call = (rank, rank_env, init_process_group, timeout_s, results, function, args, kwargs)
        processes.append(context.Process(target=_rank_main, args=call, daemon=True))
    saved = dict(os.environ)
    try:
        # A spawned interpreter imports torch before _rank_main runs: what torch reads at import must be inherited.
        os.environ.update(base | (env or {}))
        for process in processes:
            process.start()
    finally:
        os.environ.clear()
        os.environ.update(saved)
    outcomes: dict[int, tuple[bool, Any]] = {}
    try:
        outcomes = _collect(processes, results, timeout_s)
    finally:
        all_well = len(outcomes) == world_size and all(ok for ok, _ in outcomes.values())
        for process in processes:
            process.join(timeout=_GRACE_S if all_well else 0.0)
            process.kill()
            process.join()
    failures = [f"rank {rank} of {world_size}: {text}" for rank, (ok, text) in sorted(outcomes.items()) if not ok]
    if failures:
        raise RankError(f"{getattr(function, '__name__', function)}\n" + "\n".join(failures))
    return [_unpack(outcomes[rank][1]) for rank in range(world_size)]


def _collect(processes: list[Any], results: Any, timeout_s: float) -> dict[int, tuple[bool, Any]]:
    """Outcome by rank: (True, packed result) or (False, why)."""
    deadline = time.monotonic() + timeout_s
    outcomes: dict[int, tuple[bool, Any]] = {}
    while len(outcomes) < len(processes) and time.monotonic() < deadline:
        try:
            rank, ok, payload = results.get(timeout=0.1)
        except queue.Empty:
            for rank, process in enumerate(processes):
                # A rank that was killed leaves no message; one that has just ended may have its message in the pipe.
                if rank not in outcomes and process.exitcode not in (None, 0):
                    outcomes[rank] = (False, f"died with exit code {process.exitcode}")
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
            continue
        outcomes[rank] = (ok, payload)
        if not ok:
            deadline = min(deadline, time.monotonic() + _GRACE_S)
    for rank in range(len(processes)):
        outcomes.setdefault(rank, (False, f"no result (time-out of {timeout_s:g} s, or another rank failed first)"))
    return outcomes


def _rank_main(
    rank: int,
    env: dict[str, str],
    init_process_group: bool,
    timeout_s: float,
    results: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    os.environ.update(env)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if init_process_group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        results.put((rank, True, _pack(function(*args, **kwargs))))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        return
    if dist.is_initialized():
        dist.barrier()  # a rank that left early would break its neighbours' last collective
        dist.destroy_process_group()


def _pack(value: Any) -> bytes:
    """Bytes rather than shared memory: the sender may be gone when the receiver looks."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)
