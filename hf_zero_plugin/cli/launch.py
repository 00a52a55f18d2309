"""Start the ranks of this node with torchrun's agent, and end them all when one dies or the user says so.

What torchrun leaves open and this module closes: the exit code of the rank that died is the launcher's (torchrun's
is always 1), ranks that ignore the request to end are killed after seconds instead of half a minute, and a second
Ctrl-C kills at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_zero_plugin.cli.console import wants_traceback
from hf_zero_plugin.cli.network import wait_for_master
from hf_zero_plugin.cli.script import LAUNCHER_PID_VARIABLE
from hf_zero_plugin.errors import LaunchError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

__all__ = ["LaunchPlan", "launch_ranks", "single_process_environment"]

JOIN_TIMEOUT_VARIABLE = "HF_ZERO_JOIN_TIMEOUT"
"""Seconds that a node waits for the others before it gives up."""

_JOIN_TIMEOUT_S = 600
_GRACE_S = 5
"""Between asking ranks to end and killing them, after Ctrl-C or after a rank died."""

_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """The processes of one launch, as seen from this node."""

    num_processes: int
    """On this node."""
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int
    environment: Mapping[str, str]
    """What every rank of this node gets beside the variables that name its rank."""


def single_process_environment(plan: LaunchPlan) -> dict[str, str]:
    """What torchrun would set for the only rank of a launch, so that it can run without torchrun."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": plan.master_addr,
        "MASTER_PORT": str(plan.master_port),
        **plan.environment,
    }


def launch_ranks(plan: LaunchPlan, command: list[str]) -> int:
    """Run ``python -m hf_zero_plugin COMMAND`` as every rank of this node and wait for the end.

    Returns:
        0 if every rank returned 0; the exit code of the rank that failed first, 128 + n if signal n ended it; 128 + n
        if signal n ended the launcher.

    Raises:
        LaunchError: the nodes did not find each other in time.
    """
    timeout_s = _join_timeout_s()
    if plan.node_rank > 0:
        wait_for_master(plan.master_addr, plan.master_port, timeout_s)
    os.environ.update(plan.environment)
    os.environ[LAUNCHER_PID_VARIABLE] = str(os.getpid())

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if not wants_traceback():
        _silence_elastic()
    with tempfile.TemporaryDirectory(prefix="hf-zero-") as log_dir, _all_ranks_end() as ending:
        try:
            elastic_launch(_launch_config(plan, timeout_s, log_dir), sys.executable)(
                "-u", "-m", "hf_zero_plugin", *command
            )
        except ChildFailedError as error:
            return _report_failure(error.failures, ending.failed_pids)
        except SignalException as error:
            return 128 + int(error.sigval)
        except DistError as error:
            raise LaunchError(_join_error(plan, timeout_s, error)) from error
        ending.rank_pids.clear()
    return 0


def _silence_elastic() -> None:
    """torchrun's warnings and its closing table repeat, at length, what this module says."""
    package = "torch.distributed.elastic"
    logging.getLogger(package).setLevel(logging.CRITICAL)
    # Some of its modules have given their loggers a level of their own.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(f"{package}."):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _launch_config(plan: LaunchPlan, timeout_s: int, log_dir: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    host = f"[{plan.master_addr}]" if ":" in plan.master_addr else plan.master_addr
    return LaunchConfig(
        min_nodes=plan.num_nodes,
        max_nodes=plan.num_nodes,
        nproc_per_node=plan.num_processes,
        run_id="hf-zero",
        rdzv_backend="static",
        rdzv_endpoint=f"{host}:{plan.master_port}",
        rdzv_configs={"rank": plan.node_rank, "timeout": timeout_s},
        max_restarts=0,
        monitor_interval=_POLL_S,
        local_addr="127.0.0.1" if plan.num_nodes == 1 else None,
        logs_specs=DefaultLogsSpecs(log_dir=log_dir),
    )


@dataclass(frozen=True, slots=True)
class _Ending:
    """What is known when the agent begins to end ranks."""

    rank_pids: set[int]
    """All of them. Every rank leads a session of its own, so they also name the sessions of what ranks have started."""
    failed_pids: set[int]
    """Those that had failed by themselves: whatever fails later may fail because it is being ended."""


@contextmanager
def _all_ranks_end() -> Iterator[_Ending]:
    """Bound the agent's patience with ranks, and on leaving kill whatever is left of them."""
    from torch.distributed.elastic.multiprocessing.api import PContext

    ending = _Ending(set(), set())
    close = PContext.close
    is_ending = False

    def close_soon(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        nonlocal is_ending
        if not ending.rank_pids:
            ending.failed_pids.update(failure.pid for failure in getattr(self, "_failures", {}).values())
        ending.rank_pids.update(self.pids().values())
        if is_ending:
            # A second signal cut the wait below short: patience is over.
            death_sig, timeout = signal.SIGKILL, _GRACE_S
        elif death_sig == signal.SIGINT:
            print("hf-zero: interrupted, ending all ranks (Ctrl-C again kills them)", file=sys.stderr, flush=True)
        # SIGTERM is named only when somebody sent it to us: a scheduler that leaves time to save a checkpoint.
        is_forwarded = death_sig == signal.SIGTERM
        is_ending = True
        close(self, death_sig, timeout if is_forwarded else min(timeout, _GRACE_S))
        is_ending = False

    PContext.close = close_soon  # type: ignore[method-assign]
    try:
        yield ending
    finally:
        PContext.close = close  # type: ignore[method-assign]
        _kill_sessions(ending.rank_pids)


def _kill_sessions(session_ids: set[int]) -> None:
    """SIGKILL every process of these sessions and reap those that are our children."""
    import psutil

    if not session_ids:
        return
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in session_ids:
                process.kill()
        except (OSError, psutil.Error):
            continue
    psutil.wait_procs(psutil.Process().children(), timeout=_GRACE_S)


def _report_failure(failures: Mapping[int, ProcessFailure], failed_pids: Container[int]) -> int:
    rank, failure = min(failures.items(), key=lambda item: _suspicion(item[1], failed_pids))
    code = int(failure.exitcode)
    if code < 0:
        code = 128 - code
        how = f"was ended by {failure.signal_name()}"
    else:
        how = f"exited with code {code}"
    print(f"hf-zero: rank {rank} {how}; the other ranks were ended", file=sys.stderr, flush=True)
    return code


def _suspicion(failure: ProcessFailure, failed_pids: Container[int]) -> tuple[bool, int, bool]:
    """Sorts the cause before its consequences: ranks that the agent ended, and a rank that lost its peer.

    The latter raises, and exits with code 1. Times are whole seconds, so they often tell nothing.
    """
    return failure.pid not in failed_pids, failure.timestamp, failure.exitcode == 1


def _join_timeout_s() -> int:
    value = os.environ.get(JOIN_TIMEOUT_VARIABLE, str(_JOIN_TIMEOUT_S))
    if not value.isdecimal() or int(value) == 0:
        raise LaunchError(f"{JOIN_TIMEOUT_VARIABLE}={value!r}: write a number of seconds, such as {_JOIN_TIMEOUT_S}.")
    return int(value)


def _join_error(plan: LaunchPlan, timeout_s: int, error: Any) -> str:
    first_line = (str(error).splitlines() or ["no reason given"])[0]
    if plan.num_nodes == 1:
        return (
            f"the ranks cannot meet at {plan.master_addr}:{plan.master_port} ({first_line}). "
            "Choose another --master_port, or leave it out to get a free one."
        )
    return (
        f"not all {plan.num_nodes} nodes met at {plan.master_addr}:{plan.master_port} within {timeout_s} s "
        f"({first_line}). Start the launcher on every node; {JOIN_TIMEOUT_VARIABLE} sets how long to wait."
    )
