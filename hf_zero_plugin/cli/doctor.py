"""``hf-zero doctor``: what this machine has, and what stands in the way of a run.

A table on a terminal, plain lines in a pipe, ``--json`` for programs. Exit code 1 if something is broken, else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_zero_plugin.cli.facts import Fact

__all__ = ["add_parser", "run"]

_MARKS = {"ok": "", "warning": "warning: ", "broken": "BROKEN: "}
_STYLES = {"ok": "dim", "warning": "yellow", "broken": "bold red"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``doctor`` to the ``hf-zero`` command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="print versions, devices and limits of this machine",
        description="Print versions, devices, memory and limits, and which engine --deepspeed will reach. "
        "Ends with code 1 if something is broken.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; sizes in bytes")
    return parser


def run(args: argparse.Namespace) -> int:
    """Collect all facts, print them, and return the exit code."""
    from hf_zero_plugin.cli.facts import SECTIONS

    report = {section: collect() for section, collect in SECTIONS.items()}
    if args.json:
        print(json.dumps(_as_json(report), indent=2))
    elif sys.stdout.isatty():
        _print_table(report)
    else:
        _print_lines(report)
    return 1 if any(fact.verdict == "broken" for facts in report.values() for fact in facts) else 0


def _as_json(report: dict[str, list[Fact]]) -> dict[str, Any]:
    values: dict[str, Any] = {
        section: {fact.name: {"value": fact.value, "remark": fact.remark, "verdict": fact.verdict} for fact in facts}
        for section, facts in report.items()
    }
    values["problems"] = [
        f"{fact.name}: {fact.remark}" for facts in report.values() for fact in facts if fact.verdict != "ok"
    ]
    return values


def _print_table(report: dict[str, list[Fact]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for section, facts in report.items():
        if facts:
            table.add_row(Text(section, style="bold"))
        for fact in facts:
            table.add_row(Text("  " + fact.name), Text(_shown(fact)), Text(_remark(fact), style=_STYLES[fact.verdict]))
    Console().print(table)


def _print_lines(report: dict[str, list[Fact]]) -> None:
    for section, facts in report.items():
        for fact in facts:
            remark = _remark(fact)
            print(f"{section}: {fact.name}: {_shown(fact)}" + (f" ({remark})" if remark else ""))


def _remark(fact: Fact) -> str:
    return _MARKS[fact.verdict] + fact.remark


def _shown(fact: Fact) -> str:
    if fact.text:
        return fact.text
    if isinstance(fact.value, bool):
        return "yes" if fact.value else "no"
    return "-" if fact.value is None else str(fact.value)
