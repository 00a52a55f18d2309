"""``hf-zero explain``: every key of a ds_config.json, its value, where it came from, and what becomes of it.

Needs no GPU, starts no process group, and imports transformers only when training arguments or a model are given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import Any, TextIO

from hf_zero_plugin.cli.training_flags import ExplainArguments, read_arguments
from hf_zero_plugin.config.auto import Examination, ModelFacts, TrainingFacts, examine
from hf_zero_plugin.config.json_schema import json_schema
from hf_zero_plugin.config.load import load_config
from hf_zero_plugin.config.paths import show
from hf_zero_plugin.config.report import short_table
from hf_zero_plugin.config.resolved import Entry
from hf_zero_plugin.errors import ConfigError

__all__ = ["add_parser", "run", "short_table"]

_HELP = """\
usage: hf-zero explain CONFIG [--model MODEL] [--num_gpus N] [--all] [--json] [training arguments]
       hf-zero explain --schema

Print every key of a ds_config.json: its value, where it came from, and whether it is applied, accepted without
effect (and why), or refused. Absent keys that TrainingArguments decides are shown as well.

  CONFIG          the file that --deepspeed would be given (inline and base64 JSON work too)
  --model MODEL   directory, config.json or hub name, for sizes that depend on the model
  --num_gpus N    number of ranks, 1 by default
  --all           every key there is, not only those of the file
  --json          the same as JSON
  --schema        print the JSON Schema (draft 2020-12) of ds_config.json, for editors

Training arguments are those of the Trainer (--fp16, --learning_rate 3e-5, ...). A whole command line may be
pasted: the script's name and its own arguments are left out.

  hf-zero explain configs/zero2_offload.json --model t5-small --fp16 --per_device_train_batch_size 16
"""

_NO_PREFIX = "\0"
"""argparse must not look at the Trainer's flags: no word begins with this."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the subcommand; its words are read by ``training_flags``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain", help="print what every key of a ds_config.json does here", prefix_chars=_NO_PREFIX, add_help=False
    )
    parser.add_argument("words", nargs="*")
    return parser


def run(args: argparse.Namespace, out: TextIO | None = None) -> int:
    """Print the table.

    Raises:
        ConfigError: the configuration has mistakes; what can be shown is printed before.
    """
    stream = out if out is not None else sys.stdout
    options = read_arguments(args.words)
    if options.help:
        stream.write(_HELP)
        return 0
    if options.schema:
        stream.write(json.dumps(json_schema(), indent=2) + "\n")
        return 0
    if options.config is None:
        raise ConfigError("hf-zero explain: no configuration is named. Name the file: hf-zero explain ds_config.json")
    loaded = load_config(options.config, allow_refused=True)
    examination = examine(loaded, _training_facts(options), _model_facts(options))
    entries = [entry for entry in examination.entries if options.all or entry.matters]
    if options.json:
        _print_json(examination, entries, stream)
    else:
        _print_table(examination, entries, options, stream)
    examination.resolved()
    return 0


def _training_facts(options: ExplainArguments) -> TrainingFacts:
    return TrainingFacts(world_size=options.num_gpus, given=frozenset(options.training), **options.training)


def _model_facts(options: ExplainArguments) -> ModelFacts | None:
    """Facts of the model named by --model, or by --model_name_or_path if that is at hand."""
    if options.model is not None:
        return _load_model_facts(options.model)
    if options.script_model is not None and os.path.isdir(options.script_model):
        return _load_model_facts(options.script_model)
    return None


def _load_model_facts(name: str) -> ModelFacts:
    from transformers import AutoConfig

    try:
        return ModelFacts.of(AutoConfig.from_pretrained(name))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--model {name}: its configuration cannot be read. {reason} "
            "Name a directory with a config.json, that file itself, or a hub model that is downloaded or reachable."
        ) from error


def _print_json(examination: Examination, entries: list[Entry], stream: TextIO) -> None:
    document = {
        "origin": examination.loaded.origin,
        "keys": [
            {
                "path": entry.path,
                "value": entry.value,
                "source": entry.source,
                "verdict": entry.verdict,
                "note": entry.note,
                "in_file": entry.in_file,
                "was_auto": entry.was_auto,
            }
            for entry in entries
        ],
        "warnings": list(examination.warnings),
        "problems": [
            {"path": problem.path, "what": problem.what, "why": problem.why, "fix": problem.fix}
            for problem in examination.problems
        ],
    }
    stream.write(json.dumps(document, indent=2) + "\n")


def _print_table(examination: Examination, entries: list[Entry], options: ExplainArguments, stream: TextIO) -> None:
    if stream.isatty():
        _print_rich(examination, entries, stream)
    else:
        stream.write(f"{examination.loaded.origin}\n")
        for line in _plain_lines(entries):
            stream.write(f"{line}\n")
    counts = {verdict: sum(entry.verdict == verdict for entry in entries) for verdict in _WORDS}
    told = ", ".join(f"{number} {_WORDS[verdict]}" for verdict, number in counts.items() if number)
    stream.write(f"\n{told}.{'' if options.all else ' --all shows every key there is.'}\n")
    if options.ignored:
        flags = ", ".join(dict.fromkeys(options.ignored))
        stream.write(f"note: left out, because they belong to the script or the launcher: {flags}\n")
    for warning in examination.warnings:
        stream.write(f"warning: {warning}\n")


_WORDS = {"applied": "applied", "inert": "without effect", "refused": "refused"}
_COLORS = {"applied": "green", "inert": "dim", "refused": "bold red"}
_HEADINGS = ("key", "value", "from", "verdict", "remark")


def _groups(entries: list[Entry]) -> Iterator[tuple[str, list[tuple[str, Entry]]]]:
    """Sections in the order of the schema, keys of the top level together at the head of each run."""
    for section, group in groupby(entries, key=_section):
        prefix = "$." if section == "top level" else f"$.{section}."
        yield section, [(entry.path.removeprefix(prefix), entry) for entry in group]


def _section(entry: Entry) -> str:
    parts = entry.path.split(".")
    return parts[1] if len(parts) > 2 else "top level"


def _cells(name: str, entry: Entry) -> tuple[str, str, str, str, str]:
    value = "-" if entry.value is None else show(entry.value).strip('"')
    source = f"{entry.source} (auto)" if entry.was_auto else entry.source
    return name, value, source, _WORDS[entry.verdict], entry.note


def _ordered(entries: list[Entry]) -> list[Entry]:
    """Keys of the top level first, so that each section stands in one piece."""
    return sorted(entries, key=lambda entry: _section(entry) != "top level")


def _plain_lines(entries: list[Entry]) -> Iterator[str]:
    groups = list(_groups(_ordered(entries)))
    rows = [_cells(name, entry) for _, group in groups for name, entry in group]
    widths = [max((len(row[column]) for row in [_HEADINGS, *rows]), default=0) for column in range(4)]

    def line(cells: tuple[str, ...]) -> str:
        padded = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths))
        return f"  {padded}  {cells[4]}".rstrip()

    yield line(_HEADINGS)
    for section, group in groups:
        yield section
        for name, entry in group:
            yield line(_cells(name, entry))


def _print_rich(examination: Examination, entries: list[Entry], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(examination.loaded.origin), title_justify="left", expand=False)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold", ratio=2 if heading == "remark" else None)
    for section, group in _groups(_ordered(entries)):
        table.add_section()
        table.add_row(Text(section, style="bold"))
        for name, entry in group:
            style = _COLORS[entry.verdict]
            cells = _cells(name, entry)
            table.add_row(*(Text(cell, style=style if column == 3 else "") for column, cell in enumerate(cells)))
    Console(file=stream).print(table)
