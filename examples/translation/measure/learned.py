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


def learning_section(learned: dict[str, Any]) -> str:
    """Markdown: loss, BLEU and translations of the runs, and how far the curves are apart."""
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
    sets = list(first["bleu"])
    lines += ["", "| | steps | last loss | " + " | ".join(f"BLEU, {name}" for name in sets) + " |"]
    lines.append("|---" * (3 + len(sets)) + "|")
    for engine, run in runs.items():
        scores = [f"{run['bleu'][name][-1][1]:.1f}" for name in sets]
        lines.append(f"| {NAMES[engine]} | {run['steps']:,} | {run['loss'][-1][1]:.3f} | " + " | ".join(scores) + " |")
    if PLAIN in runs and ZERO in runs:
        lines += ["", _same(distance(runs[PLAIN], runs[ZERO]))]
    lines += ["", "![Loss and BLEU over steps](results/figures/learning.png)", ""]
    shown = runs.get(ZERO, first)
    lines.append(f"Translations at the end of the run of {NAMES[shown['engine']]}:")
    lines.append("")
    for example in shown["examples"]:
        lines += [f"- {example['source']}", f"  - translated: {example['translation']}"]
        lines.append(f"  - reference: {example['reference']}")
    return "\n".join(lines) + "\n"


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
