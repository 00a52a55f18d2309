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
import sys
from typing import Any

from hf_zero_plugin.cli.devices import count_visible_gpus
from hf_zero_plugin.cli.launch import launch_ranks, single_process_environment
from hf_zero_plugin.cli.placement import MULTI_NODE_PORT, LaunchRequest, plan_launch
from hf_zero_plugin.cli.script import EXIT_USAGE, check_target, run_target
from hf_zero_plugin.cli.script_args import check_deepspeed_config, deepspeed_value
from hf_zero_plugin.integration.use_cpu import hide_gpus_instead_of_use_cpu

__all__ = ["add_parser", "run_from_arguments", "split_command"]


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``run`` and the flags that stand before the script's name."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="run a Trainer script with this engine behind --deepspeed",
        usage="hf-zero run [options] script [script arguments]",
        description="Run a Hugging Face Trainer script with this engine behind --deepspeed, on one or more processes.",
        epilog="Device indices count the visible GPUs (CUDA_VISIBLE_DEVICES) from 0. On a machine without any GPU "
        "the same flags run as many CPU processes.",
        allow_abbrev=False,
    )

    def option(*names: str, **settings: Any) -> None:
        dashed = [name.replace("_", "-") for name in names if "_" in name]
        parser.add_argument(*names, *dashed, **settings)

    option("--num_gpus", type=int, metavar="N", help="use the first N GPUs of each node")
    option("--num_nodes", type=int, metavar="N", help="number of nodes; start this command on each of them")
    option("-i", "--include", default="", metavar="SPEC", help="use these only: host:0,1@host2")
    option("-e", "--exclude", default="", metavar="SPEC", help="use all but these: host:0,1@host2")
    option("-H", "--hostfile", metavar="FILE", help="the nodes, one 'host slots=N' per line")
    option("--node_rank", type=int, metavar="R", help="which of the nodes this is, from 0")
    option("--master_addr", metavar="ADDR", help="node 0, as the others reach it (default: the hostfile's first host)")
    option("--master_port", type=int, metavar="PORT", help=f"default: a free one; {MULTI_NODE_PORT} on several nodes")
    option("-m", "--module", action="store_true", help="the script is the name of a module, as in python -m")
    return parser


def run_from_arguments(arguments: list[str]) -> int:
    """Run ``hf-zero run ARGUMENTS`` and return its exit code.

    Raises:
        LaunchError: hosts, devices, ports or the script cannot be used.
        ConfigError: the file behind the script's ``--deepspeed`` cannot be honoured.
    """
    parser = add_parser(argparse.ArgumentParser(prog="hf-zero").add_subparsers())
    own_arguments, target, script_args = split_command(arguments, parser)
    options = parser.parse_args(own_arguments)
    if target is None:
        parser.print_usage(sys.stderr)
        print("hf-zero: error: no script was named", file=sys.stderr)
        return EXIT_USAGE
    request = LaunchRequest(target=target, script_args=tuple(script_args), **vars(options))

    # Cheap checks first: a typo must not cost the seconds that torch takes to load.
    check_target(target, as_module=request.module)
    check_deepspeed_config(script_args)
    _forget_outer_launcher()
    if deepspeed_value(script_args) is not None:
        hide_gpus_instead_of_use_cpu()

    plan = plan_launch(request, count_visible_gpus())
    if plan.num_nodes == 1 and plan.num_processes == 1:
        os.environ.update(single_process_environment(plan))
        return run_target(target, script_args, as_module=request.module)
    return launch_ranks(plan, [*(["-m"] if request.module else []), target, *script_args])


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


def _forget_outer_launcher() -> None:
    """A launch inside a rank of another one must not join that one's agent."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
