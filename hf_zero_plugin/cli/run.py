"""``hf-zero run``: DeepSpeed's launcher flags, torchrun's processes.

::

    hf-zero run script.py ARGS                          every visible GPU; one CPU process if there is none
    hf-zero run --num_gpus 2 script.py ARGS             the first two (two CPU processes if there is none)
    hf-zero run --include localhost:1 script.py ARGS    the GPU with index 1
    hf-zero run --hostfile hosts --node_rank 0 script.py ARGS     on each node, with its own rank

One process is run right here; more are started by ``launch.py``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_zero_plugin.cli.console import note
from hf_zero_plugin.cli.devices import VISIBLE_VARIABLE, count_usable_cores, count_visible_gpus, visible_value
from hf_zero_plugin.cli.launch import LaunchPlan, launch_ranks, single_process_environment
from hf_zero_plugin.cli.network import check_port_is_free, find_free_port
from hf_zero_plugin.cli.script import EXIT_USAGE, check_target, run_target
from hf_zero_plugin.cli.script_args import check_deepspeed_config
from hf_zero_plugin.cli.selection import LOCALHOST, parse_hostfile, select, select_cpu
from hf_zero_plugin.errors import LaunchError

__all__ = ["add_parser", "build_parser", "plan_launch", "run_from_arguments", "split_command"]

_MULTI_NODE_PORT = 29500
"""Nodes cannot agree on a random port before they have met; this is torchrun's and DeepSpeed's default."""

_PER_NODE_FLAGS = ("--node_rank", "--master_addr", "--master_port")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``run`` to the ``hf-zero`` command, for its help."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="run a Trainer script with this engine behind --deepspeed",
        usage="hf-zero run [options] script [script arguments]",
        description="Run a Hugging Face Trainer script with this engine behind --deepspeed, on one or more processes.",
        allow_abbrev=False,
    )
    _add_options(parser)
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything that stands before the script's name."""
    return add_parser(argparse.ArgumentParser(prog="hf-zero").add_subparsers())


def run_from_arguments(arguments: list[str]) -> int:
    """Run ``hf-zero run ARGUMENTS`` and return its exit code.

    Raises:
        LaunchError: hosts, devices, ports or the script cannot be used.
        ConfigError: the file behind the script's ``--deepspeed`` cannot be honoured.
    """
    parser = build_parser()
    own_arguments, target, script_args = split_command(arguments, parser)
    options = parser.parse_args(own_arguments)
    if target is None:
        parser.print_usage(sys.stderr)
        print("hf-zero: error: no script was named", file=sys.stderr)
        return EXIT_USAGE
    # Cheap checks first: a typo must not cost the seconds that torch takes to load.
    check_target(target, as_module=options.module)
    check_deepspeed_config(script_args)
    _forget_outer_launcher()

    plan = plan_launch(options, own_arguments, [target, *script_args])
    if plan.num_nodes == 1 and plan.num_processes == 1:
        os.environ.update(single_process_environment(plan))
        return run_target(target, script_args, as_module=options.module)
    return launch_ranks(plan, [*(["-m"] if options.module else []), target, *script_args])


def split_command(arguments: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], str | None, list[str]]:
    """Cut ``[options] script [script arguments]`` at the script, so that nothing after it is ever parsed.

    Returns:
        Our options; the script or module, None if there is none; its arguments, untouched.
    """
    takes_value = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("-"):
            return arguments[:position], argument, arguments[position + 1 :]
        position += 2 if argument in takes_value else 1
    return arguments, None, []


def plan_launch(options: argparse.Namespace, own_arguments: list[str], command: list[str]) -> LaunchPlan:
    """Decide which processes to start here.

    Args:
        options: the parsed launcher flags.
        own_arguments: the same flags as written, and ``command``, script and arguments: to print what other nodes run.
    """
    hosts = _read_hostfile(options.hostfile) if options.hostfile else None
    num_gpus = count_visible_gpus()
    if hosts is None:
        num_nodes, hosts_in_order = options.num_nodes or 1, [LOCALHOST]
        if num_nodes < 1:
            raise LaunchError(f"--num_nodes {num_nodes}: there is nothing to run on. Use 1 or more.")
        node_limit = options.num_nodes if options.include or options.exclude else None
        flags = {"include": options.include, "exclude": options.exclude, "num_gpus": options.num_gpus}
        if num_gpus:
            slots = select({LOCALHOST: num_gpus}, num_nodes=node_limit, **flags)[LOCALHOST]
        else:
            slots = select_cpu(**flags)[LOCALHOST]
        node_rank, master_addr = _place_in(num_nodes, options, own_arguments, command, hosts_in_order)
    else:
        chosen = select(
            hosts,
            include=options.include,
            exclude=options.exclude,
            num_nodes=options.num_nodes,
            num_gpus=options.num_gpus,
        )
        num_nodes, hosts_in_order = len(chosen), list(chosen)
        node_rank, master_addr = _place_in(num_nodes, options, own_arguments, command, hosts_in_order)
        slots = _slots_here(hosts_in_order[node_rank], chosen, num_gpus)

    environment = _environment(slots, num_gpus)
    port = _master_port(options.master_port, num_nodes=num_nodes, node_rank=node_rank)
    plan = LaunchPlan(
        num_processes=len(slots),
        num_nodes=num_nodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=port,
        environment=environment,
    )
    if num_nodes > 1 and node_rank == 0:
        others = _commands(plan.num_nodes, master_addr, port, own_arguments, command, hosts_in_order)[1:]
        note("waiting for the other nodes. Run there:\n" + "\n".join(others))
    return plan


def _add_options(parser: argparse.ArgumentParser) -> None:
    def option(*names: str, **settings: Any) -> None:
        dashed = [name.replace("_", "-") for name in names if "_" in name]
        parser.add_argument(*names, *dashed, **settings)

    option("--num_gpus", type=int, metavar="N", help="use the first N GPUs of each node (CPU processes without GPUs)")
    option("--num_nodes", type=int, metavar="N", help="number of nodes; start this command on each of them")
    option("-i", "--include", default="", metavar="SPEC", help="use these only: host:0,1@host2")
    option("-e", "--exclude", default="", metavar="SPEC", help="use all but these: host:0,1@host2")
    option("-H", "--hostfile", metavar="FILE", help="the nodes, one 'host slots=N' per line")
    option("--node_rank", type=int, metavar="R", help="which of the nodes this is, from 0")
    option("--master_addr", metavar="ADDR", help="node 0, as the others reach it (default: the hostfile's first host)")
    option("--master_port", type=int, metavar="PORT", help=f"default: a free one; {_MULTI_NODE_PORT} on several nodes")
    option("-m", "--module", action="store_true", help="the script is the name of a module, as in python -m")


def _read_hostfile(path: str) -> dict[str, int]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise LaunchError(f"--hostfile {path}: cannot be read ({reason}). Give the path of a text file.") from error
    return parse_hostfile(text, path)


def _place_in(
    num_nodes: int,
    options: argparse.Namespace,
    own_arguments: list[str],
    command: list[str],
    hosts_in_order: list[str],
) -> tuple[int, str]:
    """This node's rank and the address of node 0; the user must have said, for we do not log in anywhere."""
    if num_nodes == 1:
        if options.node_rank:
            raise LaunchError(f"--node_rank {options.node_rank}: there is one node only, and its rank is 0.")
        host = hosts_in_order[0]
        if options.node_rank is None and not _is_local(host):
            raise LaunchError(
                f"the only host selected is {host!r}, which is not this machine ({socket.gethostname()}). "
                f"Run the command there, or add --node_rank 0 if {host!r} is another name of this one."
            )
        return 0, options.master_addr or "127.0.0.1"
    master_addr = options.master_addr or (hosts_in_order[0] if options.hostfile else None)
    missing = [
        flag for flag, value in (("--node_rank", options.node_rank), ("--master_addr", master_addr)) if value is None
    ]
    if missing:
        port = options.master_port or _MULTI_NODE_PORT
        lines = _commands(num_nodes, master_addr or "ADDRESS_OF_NODE_0", port, own_arguments, command, hosts_in_order)
        raise LaunchError(
            f"{num_nodes} nodes, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. "
            "hf-zero does not log in to other machines: start it on each of them, with\n" + "\n".join(lines)
        )
    if not 0 <= options.node_rank < num_nodes:
        raise LaunchError(f"--node_rank {options.node_rank}: with {num_nodes} nodes it is 0 to {num_nodes - 1}.")
    return options.node_rank, str(master_addr)


def _slots_here(host: str, chosen: Mapping[str, tuple[int, ...]], num_gpus: int) -> tuple[int, ...]:
    slots = chosen[host]
    if num_gpus and slots[-1] >= num_gpus:
        raise LaunchError(
            f"the hostfile gives {host} a GPU {slots[-1]}, but this machine has {num_gpus}: "
            f"{', '.join(map(str, range(num_gpus)))}. Write slots={num_gpus} for it, or check --node_rank."
        )
    return slots


def _environment(slots: tuple[int, ...], num_gpus: int) -> dict[str, str]:
    """Device and thread settings for the ranks of this node."""
    environment: dict[str, str] = {}
    if num_gpus:
        visible = visible_value(os.environ, num_gpus, slots)
        if visible is not None:
            environment[VISIBLE_VARIABLE] = visible
    else:
        plural = "" if len(slots) == 1 else "es"
        note(f"no GPU is visible, so this runs on CPU in {len(slots)} process{plural} (hf-zero doctor says more)")
    if len(slots) > 1 and "OMP_NUM_THREADS" not in os.environ:
        num_cores = count_usable_cores()
        num_threads = max(1, num_cores // len(slots))
        environment["OMP_NUM_THREADS"] = str(num_threads)
        note(
            f"OMP_NUM_THREADS={num_threads} for each of {len(slots)} processes on {num_cores} cores; set it to override"
        )
    return environment


def _master_port(requested: int | None, *, num_nodes: int, node_rank: int) -> int:
    if requested is None and num_nodes == 1:
        return find_free_port()
    port = _MULTI_NODE_PORT if requested is None else requested
    if node_rank == 0:
        check_port_is_free(port)
    return port


def _commands(
    num_nodes: int, master_addr: str, port: int, own_arguments: list[str], command: list[str], hosts: list[str]
) -> list[str]:
    """One line per node: what to type there."""
    shared: list[str] = []
    skip_value = False
    for argument in own_arguments:
        flag = argument.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if skip_value:
            skip_value = False
        elif flag in _PER_NODE_FLAGS:
            skip_value = "=" not in argument
        else:
            shared.append(argument)
    lines: list[str] = []
    for rank in range(num_nodes):
        host = hosts[rank] if rank < len(hosts) and hosts[rank] != LOCALHOST else f"node {rank}"
        placed = ["--node_rank", str(rank), "--master_addr", master_addr, "--master_port", str(port)]
        lines.append(f"  on {host}: " + shlex.join(["hf-zero", "run", *shared, *placed, *command]))
    return lines


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


def _forget_outer_launcher() -> None:
    """A launch inside a rank of another one must not join that one's agent."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
