"""The ``hf-zero`` command, and what ``python -m hf_zero_plugin`` runs.

Starts fast: only the chosen subcommand's module is imported, and none of them imports torch to print its help.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import hf_zero_plugin
from hf_zero_plugin.cli.console import report_error
from hf_zero_plugin.cli.script import EXIT_USAGE, die_with_launcher, run_target
from hf_zero_plugin.errors import HfZeroError

__all__ = ["main", "main_run_module"]

_COMMANDS = {
    "run": ("hf_zero_plugin.cli.run", "run a Trainer script with this engine behind --deepspeed"),
    "explain": ("hf_zero_plugin.cli.explain", "print what every key of a ds_config.json does here"),
    "doctor": ("hf_zero_plugin.cli.doctor", "print versions, devices and limits of this machine"),
    "export": ("hf_zero_plugin.checkpoint.export", "write the weights of a checkpoint as safetensors"),
}

_RUN_MODULE_USAGE = """\
usage: python -m hf_zero_plugin [-m] script [script arguments]

Run a Hugging Face Trainer script in this process, with this engine behind --deepspeed.
torchrun -m hf_zero_plugin script.py ... does so on several processes; so does hf-zero run, with DeepSpeed's flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code; argparse ends the process itself on ``--help`` and on usage errors."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else None
    try:
        if command == "run":
            # Its arguments end in another program's, which argparse must not touch.
            from hf_zero_plugin.cli.run import run_from_arguments

            return run_from_arguments(arguments[1:])
        options = _build_parser(command).parse_args(arguments)
        return int(importlib.import_module(_COMMANDS[options.command][0]).run(options))
    except HfZeroError as error:
        report_error(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


def main_run_module() -> NoReturn:
    """``python -m hf_zero_plugin [-m] script args``: run the script in this process and exit with its code."""
    die_with_launcher()
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    if as_module:
        arguments = arguments[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(_RUN_MODULE_USAGE, end="")
        sys.exit(0)
    if arguments[:1] == ["--version"]:
        print(f"hf-zero {hf_zero_plugin.__version__}")
        sys.exit(0)
    if not arguments:
        print(_RUN_MODULE_USAGE, end="", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    sys.exit(run_target(arguments[0], arguments[1:], as_module=as_module))


def _build_parser(command: str | None) -> argparse.ArgumentParser:
    """The top-level parser; only ``command`` is given its real options, the others are names with a line of help."""
    parser = argparse.ArgumentParser(
        prog="hf-zero",
        description="ZeRO and offload for the Hugging Face Trainer, configured by the ds_config.json DeepSpeed reads.",
        epilog="hf-zero COMMAND --help tells the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"hf-zero {hf_zero_plugin.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        if name == command:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


if __name__ == "__main__":
    sys.exit(main())
