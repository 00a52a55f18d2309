"""What the learning runs show, in words: loss and BLEU of each, how far apart they are, example translations."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from measure.spec import DEEPSPEED, PLAIN, ZERO

NAMES = {PLAIN: "Trainer alone", ZERO: "this engine", DEEPSPEED: "DeepSpeed"}
MAX_LOSS_GAP = 0.02
MAX_BLEU_GAP = 2.0
"""Curves within both are called the same. In fp32 on a CPU the two losses agree to rounding. In half precision on a GPU
they cannot: the engine computes with half-precision weights and the Trainer's autocast with fp32 ones that it rounds,
and kernels of another type may draw other dropout masks from the same seed.
BLEU of a few hundred sentences is uncertain by 1 or 2."""


class Distance(NamedTuple):
    """How far two runs are apart, over the steps at which both have a value."""

    loss: float
    """Mean of the loss entries' relative distances; an entry is itself a mean over its steps."""
    num_entries: int
    bleu: float
    """Largest distance of the last BLEU scores at the same step, over the test sets."""

    @property
    def is_same(self) -> bool:
        return self.loss <= MAX_LOSS_GAP and self.bleu <= MAX_BLEU_GAP


def distance(plain: dict[str, Any], ours: dict[str, Any]) -> Distance:
    """A run cut short by its time limit is compared as far as it went."""
    one, other = (dict(map(tuple, run["loss"])) for run in (plain, ours))
    both = sorted(set(one) & set(other))
    gaps = [abs(one[step] - other[step]) / one[step] for step in both]
    scores = []
    for name in plain["bleu"]:
        one, other = (dict(map(tuple, run["bleu"][name])) for run in (plain, ours))
        last = max(set(one) & set(other), default=None)
        if last is not None:
            scores.append(abs(one[last] - other[last]))
    return Distance(statistics.fmean(gaps) if gaps else float("nan"), len(both), max(scores, default=float("nan")))


def learning_section(learned: dict[str, Any], figures: str = "results/figures") -> str:
    """Markdown: loss, BLEU and translations of the runs, and how far the curves are apart.

    Args:
        figures: the folder of the figures as the page names it.
    """
    runs = {run["engine"]: run for run in learned["runs"]}
    first = next(iter(runs.values()))
    device = first.get("machine", {}).get("device", "")
    lines = ["", "## Is it learned, and the same?", ""]
    lines.append(
        f"From random weights ({first['num_parameters'] / 1e6:.0f} M parameters), {first['num_train_pairs']:,} pairs, "
        f"batch {first['batch_size']}, {first['precision']}{f', {device}' if device else ''}; the same seed, order and "
        "schedule. BLEU is sacrebleu's, of greedy translations, diacritics normalised to the comma below, on sentences "
        "that were not trained on."
    )
    lines += ["", *_table(runs)]
    if PLAIN in runs and ZERO in runs:
        lines += ["", _same(distance(runs[PLAIN], runs[ZERO]))]
    lines += ["", f"![Loss and BLEU over steps]({figures}/learning.png)", ""]
    shown = runs.get(ZERO, first)
    lines.append(f"Translations at the end of the run of {NAMES[shown['engine']]}:")
    lines.append("")
    for example in shown["examples"]:
        lines += [f"- {example['source']}", f"  - translated: {example['translation']}"]
        lines.append(f"  - reference: {example['reference']}")
    return "\n".join(lines) + "\n"


def _table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """A line an engine. Runs cut short by a time limit are compared at the last step that all of them have reached."""
    heads, columns = ["", "steps"], [[NAMES[engine], f"{run['steps']:,}"] for engine, run in runs.items()]
    curves = {"loss": ([run["loss"] for run in runs.values()], ".3f")}
    for name in next(iter(runs.values()))["bleu"]:
        curves[f"BLEU, {name}"] = ([run["bleu"][name] for run in runs.values()], ".1f")
    for what, (found, form) in curves.items():
        common = set.intersection(*({step for step, _ in curve} for curve in found))
        if common:
            heads.append(f"{what}, at step {max(common):,}")
            for column, curve in zip(columns, found):
                column.append(f"{dict(map(tuple, curve))[max(common)]:{form}}")
        if {curve[-1][0] for curve in found} != {max(common, default=None)}:
            heads.append(f"{what}, at its end")
            for column, curve in zip(columns, found):
                column.append(f"{curve[-1][1]:{form}}")
    return ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *columns)]


def _same(apart: Distance) -> str:
    found = "Yes" if apart.is_same else "No"
    return (
        f"**The same curve with and without the engine: {found}.** Over {apart.num_entries} common entries the losses "
        f"are {100 * apart.loss:.2f} % apart on average, and at the last common step BLEU by {apart.bleu:.1f}. The "
        f"same means here: losses within {100 * MAX_LOSS_GAP:.0f} %, BLEU within {MAX_BLEU_GAP:.0f}. Equal to the bit "
        "they cannot be in half precision: the engine computes with half-precision weights and keeps an fp32 master "
        "copy, the Trainer with fp32 weights that autocast rounds, and dropout may draw other masks in kernels of "
        "another type. In fp32 the curves do agree; a test holds it."
    )
