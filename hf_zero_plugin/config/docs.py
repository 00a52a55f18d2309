"""docs/config.md, written from the schema: ``python -m hf_zero_plugin.config.docs > docs/config.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import groupby

from hf_zero_plugin.config.fields import Section
from hf_zero_plugin.config.paths import show
from hf_zero_plugin.config.renames import OLD_SWITCHES, RENAMED
from hf_zero_plugin.config.schema import DsConfig, KnownKey, known_keys
from hf_zero_plugin.config.schema_optim import (
    OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    REFUSED_SCHEDULERS,
    SCHEDULERS,
)

__all__ = ["render"]

_INTRO = """\
# ds_config.json: every key

<!-- Written by `python -m hf_zero_plugin.config.docs > docs/config.md`. Do not edit: change the schema instead. -->

The engine reads the file that DeepSpeed reads. Every key DeepSpeed 0.19 knows is known here, and each is one of

- **applied**: the engine does it;
- **no effect**: accepted, and the remark says why nothing needs doing;
- **refused**: an error when asked for, with the reason and a remedy. Left out or switched off, it is accepted.

Any other key is an error, with the nearest known name. Values are taken as they are written: `"0.5"` and `true` are
not numbers. Large integers may be written `5e8`.

`hf-zero explain ds_config.json` prints the same for a file of yours, with the values that a run would have.
`hf-zero explain --schema` prints a JSON Schema, with which editors complete and check the file.

## Where values come from

1. A value in the file.
2. `"auto"`, where the tables below allow it, is the value of TrainingArguments, or is computed from the model.
   Anywhere else `"auto"` is an error, because nothing would fill it in.
3. A key that is absent and that TrainingArguments knows as well is **inherited** from there: batch sizes,
   accumulation, clipping (`max_grad_norm`), fp16 and bf16, and in sections that exist, the optimizer's lr, betas, eps
   and weight_decay and the schedule's warm-up, rate and length. (DeepSpeed under the Trainer would take its own
   defaults, whatever the command line says.)
4. Otherwise the default in the tables.

A value in the file that differs from the one in TrainingArguments is an error that lists every such key: the Trainer
would follow one and the engine the other. Sizes called `*_size` and `*_threshold` count elements, not bytes.
"""

_TITLES = {"$": "Top level", "$.optimizer": "optimizer", "$.scheduler": "scheduler"}
_VERDICTS = {"applied": "applied", "inert": "no effect", "refused": "refused"}
_HEAD = ("| key | default | verdict | meaning |", "|---|---|---|---|")


def render() -> str:
    """The whole document."""
    return "\n".join(_lines()).rstrip() + "\n"


def _lines() -> Iterator[str]:
    yield _INTRO
    keys = list(known_keys())
    top = [key for key in keys if _section(key) == "$"]
    nested = sorted((key for key in keys if _section(key) != "$"), key=_order)
    yield "## Top level\n"
    yield from _table(top, "$")
    for section, group in groupby(nested, key=_section):
        yield f"## `{section.removeprefix('$.')}`\n"
        yield from _table(group, section)
        if section == "$.optimizer":
            yield from _types("optimizer", OPTIMIZERS, REFUSED_OPTIMIZERS)
        if section == "$.scheduler":
            yield from _types("scheduler", SCHEDULERS, REFUSED_SCHEDULERS)
    yield from _old_keys()


def _section(key: KnownKey) -> str:
    parts = key.path.split(".")
    return "$" if len(parts) == 2 else f"$.{parts[1]}"


def _order(key: KnownKey) -> int:
    """Sections in the order of the model, those that are used most first."""
    first = (
        "zero_optimization",
        "fp16",
        "bf16",
        "optimizer",
        "scheduler",
        "torch_autocast",
        "data_types",
        "checkpoint",
    )
    name = key.path.split(".")[1]
    return first.index(name) if name in first else len(first) + list(DsConfig.model_fields).index(name)


def _table(keys: Iterable[KnownKey], section: str) -> Iterator[str]:
    yield from _HEAD
    for key in keys:
        yield _row(key, section)
    yield ""


def _row(key: KnownKey, section: str) -> str:
    default = "absent" if key.default is None else f"`{show(key.default)}`"
    if key.field.is_required():
        default = "required"
    if key.path == "$.zero_optimization.overlap_comm":
        default = "`true`"
    if key.allows_auto:
        default += ' (or `"auto"`)'
    ruling = key.ruling
    verdict = _VERDICTS[ruling.verdict]
    remark = f"{ruling.why} Remedy: {ruling.fix}" if ruling.fix else ruling.why
    fine = [value for value in ruling.accepted if value not in (False, None, key.default)]
    if ruling.verdict == "refused" and fine:
        verdict = f"`{'`, `'.join(show(value) for value in (key.default, *fine))}` applied, else refused"
        verdict = verdict if ruling.otherwise == "applied" else f"refused, but `{show(fine[0])}` is fine"
    meaning = f"{key.field.description} *{remark}*" if remark else str(key.field.description)
    return f"| `{key.path.removeprefix(f'{section}.')}` | {default} | {verdict} | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _types(kind: str, types: dict[str, type[Section]], refused: dict[str, tuple[str, str]]) -> Iterator[str]:
    by_model: dict[type[Section], list[str]] = {}
    for name, model in types.items():
        by_model.setdefault(model, []).append(name)
    for model, names in by_model.items():
        yield f"### {kind} `{'`, `'.join(names)}`: params\n"
        yield from _table(known_keys(model), "$")
    yield f"### {kind} types that are refused\n"
    yield "| type | why | instead |"
    yield "|---|---|---|"
    for name, (why, fix) in refused.items():
        yield f"| `{name}` | {why} | {fix} |"
    yield ""


def _old_keys() -> Iterator[str]:
    yield "## Old spellings\n"
    yield "Read as today's keys, with a warning. An old and a new key for the same thing are an error.\n"
    yield "| old | read as |"
    yield "|---|---|"
    for old, new in RENAMED.items():
        yield f"| `{old.removeprefix('$.')}` | `{new.removeprefix('$.')}` |"
    for old, targets in OLD_SWITCHES.items():
        yield f"| `{old.removeprefix('$.')}` | `{'`, `'.join(target.removeprefix('$.') for target in targets)}` |"
    yield ""


if __name__ == "__main__":
    sys.stdout.write(render())
