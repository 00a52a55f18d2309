"""The article's findings about two GPUs, held against the rows as those of ``findings.py``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from measure.findings import Cells, spread, verdict
from measure.spec import DATA_PARALLEL, PLAIN, ZERO

CROSSING = 52
"""The batch size above which the article's two GPUs were faster with ZeRO; of the measured ones, from 64 on."""
MEMORY = "gpu_allocated_sum_gib"


def two_gpu_findings(one: Cells, two: Cells) -> list[str]:
    """Every finding that has rows; at least one paragraph, which says so if there are none."""
    if not two.models():
        return [
            "Two GPUs were not measured: the CSV has no model both with and without the engine on two of them "
            "(`experiments.py --num-gpus 2`)."
        ]
    return [memory_saved(one, two), crossing(two), second_gpu(one, two)]


def memory_saved(one: Cells, two: Cells) -> str:
    """More memory is saved on two GPUs than on one."""
    title = "**More of the memory is saved on two GPUs than on one"
    pairs = {
        model: [
            (1 - single, 1 - both)
            for batch in two.batches(model)
            if (single := one.ratio(model, batch, MEMORY)) is not None
            and (both := two.ratio(model, batch, MEMORY)) is not None
        ]
        for model in two.models()
    }
    every = [pair for found in pairs.values() for pair in found]
    if not every:
        return f"{title}: not measured.** It needs cells of one GPU and of two with the same batch size, on GPUs."
    parts = []
    for model, found in pairs.items():
        if found:
            shares = [f"{100 * statistics.median(values):.0f} %" for values in zip(*found)]
            parts.append(f"{model}: {shares[0]} of the Trainer's memory saved on one GPU, {shares[1]} on two")
    return (
        f"{title}: {verdict(sum(both > single for single, both in every), len(every))}.** {'; '.join(parts)} (medians "
        f"over the batch sizes{_gib(two)}). On every further GPU the Trainer alone holds all weights, gradients and "
        "states once more, and DistributedDataParallel's buckets, another copy of the gradients. The engine holds only "
        "half-precision weights whole on each GPU; of the gradients each keeps its share, and the states are on the "
        "host."
    )


def _gib(two: Cells) -> str:
    saved = [
        (plain.gpu_allocated_sum_gib - ours.gpu_allocated_sum_gib, model, batch)
        for model in two.models()
        for batch, ours in two.of(model, ZERO).items()
        if (plain := two.of(model, PLAIN).get(batch)) is not None
        and plain.gpu_allocated_sum_gib is not None
        and ours.gpu_allocated_sum_gib is not None
    ]
    most = max(saved, default=None)
    return "" if most is None else f"; at most {most[0]:.1f} GiB of both GPUs together, {most[1]} at batch {most[2]}"


def crossing(two: Cells) -> str:
    """Faster than the Trainer alone above a batch of about 52."""
    large = [ratio for model in two.models() for ratio in two.ratios(model, "epoch", low=CROSSING)]
    text = [f"**On two GPUs it is faster than the Trainer alone above a batch of about {CROSSING}: "]
    text[0] += f"{verdict(sum(ratio < 1 for ratio in large), len(large))}.**"
    if large:
        text.append(f"Above that batch size (per GPU) an epoch takes {spread(large)} of the Trainer's time;")
    small = [ratio for model in two.models() for ratio in two.ratios(model, "epoch", high=CROSSING)]
    text.append(f"below it, {spread(small)}.")
    for model in two.models():
        text.append(f"{model} is {_faster_from(two, model)}.")
    without = [r for model in two.models() for r in two.ratios(model, "epoch", low=CROSSING, to=DATA_PARALLEL)]
    if without:
        text.append(
            "Started without a launcher, the Trainer drives both GPUs from one process (DataParallel): against that, "
            f"an epoch takes {spread(without)} of its time above batch {CROSSING}."
        )
    text.append(
        "The Trainer alone updates after its all-reduce; the engine's update runs beside the next forward pass, so "
        "that the longer a step computes, the less of it shows. In short steps its launches come on top."
    )
    return " ".join(text)


def _faster_from(two: Cells, model: str) -> str:
    ratios = {batch: two.ratio(model, batch, "epoch") for batch in two.batches(model)}
    known = {batch: ratio for batch, ratio in ratios.items() if ratio is not None}
    start = None
    for batch in sorted(known, reverse=True):
        if known[batch] >= 1:
            break
        start = batch
    if start is None:
        return f"not faster at the largest batch size that both reach, {max(known)}" if known else "not comparable"
    return "faster at every batch size" if start == min(known) else f"faster from batch {start} on"


def second_gpu(one: Cells, two: Cells) -> str:
    """One GPU and two: what the second one brings."""
    parts = []
    for engine, name in ((PLAIN, "the Trainer alone"), (ZERO, "this engine")):
        gains = _gains(one, two, engine)
        if gains:
            parts.append(f"{spread(gains)} times as fast with {name}")
    if not parts:
        return "**One GPU and two: not measured.** It needs cells of both with the same batch size per GPU."
    together = max((row.num_side_by_side for row in one.rows), default=1)
    caveat = (
        f" The cells of one GPU were measured {together} at a time, each with its share of the cores; those of two "
        "GPUs had the whole machine."
        if together > 1
        else ""
    )
    return (
        f"**One GPU and two.** A second GPU, at the same batch size per GPU, makes an epoch {', and '.join(parts)}; "
        "2 would be perfect. Part of what is missing goes to the exchange of gradients and weights, and times of short "
        f"steps vary.{caveat}"
    )


def _gains(one: Cells, two: Cells, engine: str) -> Sequence[float]:
    gains = []
    for model in two.models():
        single, both = one.of(model, engine), two.of(model, engine)
        for batch in sorted(set(single) & set(both)):
            before, after = single[batch].epoch, both[batch].epoch
            if before and after:
                gains.append(before / after)
    return gains
