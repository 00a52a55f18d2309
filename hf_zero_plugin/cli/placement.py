"""From launcher flags to a plan: which node this is, which devices it uses, where the ranks meet."""

from __future__ import annotations

import os
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path

from hf_zero_plugin.cli.console import note
from hf_zero_plugin.cli.devices import VISIBLE_VARIABLE, visible_value
from hf_zero_plugin.cli.launch import LaunchPlan
from hf_zero_plugin.cli.network import check_port_is_free, find_free_port
from hf_zero_plugin.cli.selection import LOCALHOST, Slots, check_flags, parse_hostfile, select, select_cpu
from hf_zero_plugin.errors import LaunchError
from hf_zero_plugin.host_limits import usable_cores

__all__ = ["MULTI_NODE_PORT", "LaunchRequest", "plan_launch"]

MULTI_NODE_PORT = 29500
"""Nodes cannot agree on a random port before they have met; this is torchrun's and DeepSpeed's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRequest:
    """What the user typed after ``hf-zero run``; None and "" mean that a flag was not given."""

    target: str
    script_args: tuple[str, ...] = ()
    module: bool = False
    num_gpus: int | None = None
    num_nodes: int | None = None
    include: str = ""
    exclude: str = ""
    hostfile: str | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None

    def command_for(self, node_rank: int, master_addr: str, master_port: int) -> str:
        """The same launch as one has to type it on another node."""
        words = ["hf-zero", "run"]
        for name in ("hostfile", "include", "exclude", "num_nodes", "num_gpus"):
            value = getattr(self, name)
            if value not in (None, ""):
                words += [f"--{name}", str(value)]
        words += ["--node_rank", str(node_rank), "--master_addr", master_addr, "--master_port", str(master_port)]
        if self.module:
            words.append("-m")
        return shlex.join([*words, self.target, *self.script_args])


def plan_launch(request: LaunchRequest, num_gpus: int) -> LaunchPlan:
    """Decide which processes to start on this machine.

    Args:
        request: the flags.
        num_gpus: how many GPUs are visible here; 0 plans CPU processes.

    Raises:
        LaunchError: the flags contradict each other, or ask for hosts, devices or ports that cannot be used.
    """
    nodes = _nodes(request, num_gpus)
    names = list(nodes)
    node_rank, master_addr = _place(request, names)
    slots = nodes[names[node_rank]]
    if num_gpus and slots[-1] >= num_gpus:
        raise LaunchError(
            f"hostfile {request.hostfile} gives {names[node_rank]} a GPU {slots[-1]}, but this machine has {num_gpus}: "
            f"{', '.join(map(str, range(num_gpus)))}. Write slots={num_gpus} for it, or check --node_rank."
        )
    master_port = _master_port(request.master_port, num_nodes=len(nodes), node_rank=node_rank)
    if len(nodes) > 1 and node_rank == 0:
        others = _commands(request, names, master_addr, master_port)[1:]
        note("this is node 0; it waits for the other nodes. Start them with\n" + "\n".join(others))
    return LaunchPlan(
        num_processes=len(slots),
        num_nodes=len(nodes),
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        environment=_environment(slots, num_gpus),
    )


def _nodes(request: LaunchRequest, num_gpus: int) -> Slots:
    """Every node of the launch and its slots, node 0 first."""
    if request.hostfile is not None:
        return select(
            _read_hostfile(request.hostfile),
            include=request.include,
            exclude=request.exclude,
            num_nodes=request.num_nodes,
            num_gpus=request.num_gpus,
        )
    check_flags(request.include, request.exclude, request.num_nodes, request.num_gpus)
    filters = (request.include, request.exclude)
    if num_gpus:
        here = select({LOCALHOST: num_gpus}, include=filters[0], exclude=filters[1], num_gpus=request.num_gpus)
    else:
        here = select_cpu(include=filters[0], exclude=filters[1], num_gpus=request.num_gpus)
    if (request.num_nodes or 1) == 1:
        return here
    # Without a hostfile the other nodes are nameless, and each decides about its own devices.
    return {f"node {rank}": here[LOCALHOST] for rank in range(request.num_nodes or 1)}


def _place(request: LaunchRequest, names: list[str]) -> tuple[int, str]:
    """This node's rank and the address of node 0. The user must have said: we do not log in anywhere."""
    num_nodes = len(names)
    if num_nodes == 1:
        if request.node_rank:
            raise LaunchError(f"--node_rank {request.node_rank}: there is one node only, and its rank is 0.")
        if request.node_rank is None and not _is_local(names[0]):
            raise LaunchError(
                f"the only host selected is {names[0]!r}, which is not this machine ({socket.gethostname()}). "
                f"Run the command there, or add --node_rank 0 if {names[0]!r} is another name of this one."
            )
        return 0, request.master_addr or "127.0.0.1"
    master_addr = request.master_addr or (names[0] if request.hostfile else None)
    needed = {"--node_rank": request.node_rank, "--master_addr": master_addr}
    missing = [flag for flag, value in needed.items() if value is None]
    if request.node_rank is None or master_addr is None:
        lines = _commands(request, names, master_addr or "ADDRESS_OF_NODE_0", request.master_port or MULTI_NODE_PORT)
        raise LaunchError(
            f"{num_nodes} nodes, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. "
            "hf-zero does not log in to other machines: start it on each of them, with\n" + "\n".join(lines)
        )
    if not 0 <= request.node_rank < num_nodes:
        raise LaunchError(f"--node_rank {request.node_rank}: with {num_nodes} nodes it is 0 to {num_nodes - 1}.")
    return request.node_rank, master_addr


def _commands(request: LaunchRequest, names: list[str], master_addr: str, master_port: int) -> list[str]:
    return [f"  on {name}: {request.command_for(rank, master_addr, master_port)}" for rank, name in enumerate(names)]


def _master_port(requested: int | None, *, num_nodes: int, node_rank: int) -> int:
    if requested is None and num_nodes == 1:
        return find_free_port()
    port = MULTI_NODE_PORT if requested is None else requested
    if node_rank == 0:
        check_port_is_free(port)
    return port


def _environment(slots: tuple[int, ...], num_gpus: int) -> dict[str, str]:
    """Device and thread settings for the ranks of this node."""
    environment: dict[str, str] = {}
    num_processes = len(slots)
    if num_gpus:
        visible = visible_value(os.environ, num_gpus, slots)
        if visible is not None:
            environment[VISIBLE_VARIABLE] = visible
    else:
        plural = "" if num_processes == 1 else "es"
        note(f"no GPU is visible, so this runs on CPU in {num_processes} process{plural} (hf-zero doctor says more)")
    if num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        num_cores = usable_cores()
        environment["OMP_NUM_THREADS"] = num_threads = str(max(1, num_cores // num_processes))
        note(f"OMP_NUM_THREADS={num_threads}: {num_processes} processes on {num_cores} cores. Set it to override.")
    return environment


def _read_hostfile(path: str) -> dict[str, int]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise LaunchError(f"--hostfile {path}: cannot be read ({reason}). Give the path of a text file.") from error
    return parse_hostfile(text, path)


def _is_local(host: str) -> bool:
    """Whether ``host`` names this machine: only then can a socket be bound to its address."""
    if host in (LOCALHOST, socket.gethostname()):
        return True
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((socket.gethostbyname(host), 0))
        return True
    except OSError:
        return False
