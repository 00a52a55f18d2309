"""The article's findings, each held against the rows: a headline with the verdict, the numbers, the reason."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from measure.rows import OK, OUT_OF_MEMORY, Row
from measure.spec import PLAIN, ZERO

SMALL, LARGE = 8, 64
"""Batch sizes up to the one and from the other on are "small" and "large" below."""
CARDS_GIB = (16, 24, 40, 80)


class Cells:
    """Rows of one number of GPUs, by (model, engine) and batch size per GPU; medians over rounds."""

    def __init__(self, rows: Sequence[Row], num_gpus: int = 1) -> None:
        self.num_gpus = num_gpus
        mine = [row for row in rows if row.num_gpus == num_gpus]
        self.rows = [row for row in mine if not row.gpu_memory_limit_gib]
        self.limited = [row for row in mine if row.gpu_memory_limit_gib]

    def models(self) -> list[str]:
        """Those measured both with and without the engine, in the order of the file."""
        names = dict.fromkeys(row.model for row in self.rows)
        return [
            name
            for name in names
            if all(any(r.status == OK for r in self.of(name, engine).values()) for engine in (PLAIN, ZERO))
        ]

    def of(self, model: str, engine: str) -> dict[int, Row]:
        """Batch size -> row; of several rounds the one with the median epoch."""
        found: dict[int, list[Row]] = {}
        for row in self.rows:
            if (row.model, row.engine) == (model, engine) and row.status in (OK, OUT_OF_MEMORY):
                found.setdefault(row.batch_size, []).append(row)
        by_time = {batch: sorted(rows, key=lambda row: row.epoch or 0.0) for batch, rows in sorted(found.items())}
        return {batch: rows[len(rows) // 2] for batch, rows in by_time.items()}

    def batches(self, model: str) -> list[int]:
        return sorted({*self.of(model, PLAIN), *self.of(model, ZERO)})

    def ratio(self, model: str, batch: int, name: str, to: str = PLAIN) -> float | None:
        """This engine over ``to``, or None where one of them has no value."""
        other, ours = (self.of(model, engine).get(batch) for engine in (to, ZERO))
        values = [getattr(row, name) if row is not None else None for row in (ours, other)]
        return values[0] / values[1] if values[0] is not None and values[1] else None

    def ratios(self, model: str, name: str, low: int = 1, high: int = 10**9, to: str = PLAIN) -> list[float]:
        found = [self.ratio(model, batch, name, to) for batch in self.batches(model) if low <= batch <= high]
        return [ratio for ratio in found if ratio is not None]


def verdict(agreeing: int, of: int, what: str = "cells") -> str:
    """In how many of the cells that can tell the article's finding is met."""
    if of == 0:
        return "not measured"
    if agreeing == of:
        return "agrees"
    return "does not agree" if agreeing == 0 else f"agrees in {agreeing} of {of} {what}"


def memory(cells: Cells) -> str:
    """Memory is lower with ZeRO."""
    ratios = {model: cells.ratios(model, "gpu_allocated_gib") for model in cells.models()}
    every = [ratio for found in ratios.values() for ratio in found]
    if not every:
        return "**Memory is lower with ZeRO: not measured.** There was no GPU."
    parts = [
        f"{model}: {min(found):.2f} to {max(found):.2f} of the Trainer's memory"
        for model, found in ratios.items()
        if found
    ]
    return (
        f"**Memory is lower with ZeRO: {verdict(sum(r < 1 for r in every), len(every))}.** {'; '.join(parts)}. "
        "The Trainer keeps fp32 weights, gradients and two moments on the GPU, 16 bytes a parameter, and under "
        "autocast half-precision copies besides; here the GPU keeps half-precision weights and gradients, 4 bytes, "
        "and the states only pass through it, piece by piece. What a batch adds, activations, offload does not touch; "
        "they are in half precision throughout, where autocast keeps some in fp32."
    )


def largest_batch(cells: Cells) -> str:
    """T5-base reaches a batch twice as large."""
    model = cells.models()[-1]
    title = f"**{model} reaches a batch twice as large"
    enforced = _enforced(cells, model)
    reached = {card: tuple(_fits(cells, model, engine, card) for engine in (PLAIN, ZERO)) for card in CARDS_GIB}
    if not any(row.gpu_reserved_gib for row in cells.of(model, PLAIN).values()):
        return f"{title}: not measured.** There was no GPU."
    pairs = list(enforced.values()) or list(reached.values())
    counted = [(plain, ours) for plain, ours in pairs if ours]
    told = verdict(sum(ours >= 2 * max(plain, 1) for plain, ours in counted), len(counted), "card sizes")
    text = [f"{title}: {told}.**"]
    for limit, (plain, ours) in enforced.items():
        text.append(f"Held to {limit:g} GiB, the Trainer reaches batch {plain or 'none'}, this one {ours or 'none'}.")
    shown = [f"{card} GiB: {plain or 'none'} and {ours or 'none'}" for card, (plain, ours) in reached.items()]
    text.append(
        "By the peaks of PyTorch's allocator in the sweep, the largest measured batches that fit (Trainer, this "
        f"engine) are, on a card of {'; '.join(shown)}."
    )
    lost = {e: [b for b, r in cells.of(model, e).items() if r.status == OUT_OF_MEMORY] for e in (PLAIN, ZERO)}
    if any(lost.values()):
        batches = [", ".join(map(str, lost[engine])) or "never" for engine in (PLAIN, ZERO)]
        text.append(f"Out of memory in the sweep itself: the Trainer {batches[0]}, this engine {batches[1]}.")
    text.append(
        "A factor of two needs a card that is small against the 16 bytes a parameter that go away; on a large one "
        "activations fill the memory, and offload leaves them alone."
    )
    return " ".join(text)


def _enforced(cells: Cells, model: str) -> dict[float, tuple[int, int]]:
    found: dict[float, dict[str, int]] = {}
    for row in cells.limited:
        if row.model == model and row.status in (OK, OUT_OF_MEMORY):
            reached = found.setdefault(row.gpu_memory_limit_gib, {})
            reached[row.engine] = max(reached.get(row.engine, 0), row.batch_size if row.status == OK else 0)
    return {limit: (r[PLAIN], r[ZERO]) for limit, r in sorted(found.items()) if {PLAIN, ZERO} <= set(r)}


def _fits(cells: Cells, model: str, engine: str, card_gib: float) -> int:
    rows = cells.of(model, engine).values()
    return max((row.batch_size for row in rows if row.gpu_reserved_gib and row.gpu_reserved_gib <= card_gib), default=0)


def cpu_load(cells: Cells) -> str:
    """The CPU is busier."""
    ratios = [ratio for model in cells.models() for ratio in cells.ratios(model, "cpu_seconds_per_second")]
    parts = []
    for model in cells.models():
        loads = [[row.cpu_percent_mean for row in cells.of(model, engine).values()] for engine in (PLAIN, ZERO)]
        plain, ours = (statistics.median(load for load in found if load is not None) for found in loads)
        parts.append(f"{model}: {plain:.0f} % of all cores with the Trainer, {ours:.0f} % here (medians)")
    return (
        f"**The CPU is busier: {verdict(sum(r > 1.1 for r in ratios), len(ratios))}** (busier meaning by more than a "
        f"tenth). {'; '.join(parts)}. DeepSpeed computes the update on host cores, which is what kept the article's "
        "CPU busy. On a GPU, this engine streams the states through it instead, so the host only starts copies "
        "and kernels; without a GPU the update does run on the host."
    )


def speed(cells: Cells) -> str:
    """It is slower at small batches, less so at large ones."""
    small = [ratio for model in cells.models() for ratio in cells.ratios(model, "epoch", high=SMALL)]
    large = [ratio for model in cells.models() for ratio in cells.ratios(model, "epoch", low=LARGE)]
    text = [f"**It is slower at small batches: {verdict(sum(r > 1.1 for r in small), len(small))}**"]
    text.append(f"(slower meaning by more than a tenth). Up to batch {SMALL} an epoch takes {spread(small)} of the")
    text.append(f"Trainer's time; from batch {LARGE} on, {spread(large)}." if large else "Trainer's time.")
    if large and small:
        less = statistics.median(large) <= statistics.median(small)
        text.append(f"**Less so at large ones: {'agrees' if less else 'does not agree'}.**")
    text.append(
        "The update is queued beside the backward pass and the next forward pass instead of after them. Times of "
        "launch-bound steps vary from run to run by tens of percent, so ratios near 1 mean equal."
    )
    return " ".join(text)


def spread(ratios: Sequence[float]) -> str:
    """Least to most, and the median."""
    if not ratios:
        return "(not measured)"
    return f"{min(ratios):.2f} to {max(ratios):.2f} (median {statistics.median(ratios):.2f})"
