"""Which parameter lives where in which flat buffer, and who owns which slice. Pure arithmetic, no tensors.

A bucket is a run of neighbouring parameters of one type, laid end to end::

    bucket 3   | block.2.q.weight | block.2.k.weight | ... | block.2.norm |  pad  |
    segments   |<------- optimizer group 0 (decay) ------->|<- group 1 --->|
    shards     |<------ rank 0 ------>|<------ rank 1 ------>|

Buckets follow the order in which the model registers its modules, which is the order of the forward pass for
almost every model: bucket 0 is needed first. Inside a bucket parameters are ordered by optimizer group, so that
the update of a bucket is one call per group and not one per parameter.

Letters: P = padded length of a bucket, S = length of one rank's shard, W = number of shards (P = S * W).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    "BucketLayout",
    "ParamSpec",
    "Piece",
    "Segment",
    "Slot",
    "cut_evenly",
    "cut_pieces",
    "even_numel",
    "plan_buckets",
]

SMALL_NUMEL = 32 * 1024
"""Norms and biases up to this size share bucket 0: spread over all buckets, each would cost an update call of its own
for a few kilobytes. They are needed early, and being small they are ready first."""

SLOT_ALIGNMENT = 64
"""Every parameter starts at a multiple of this many elements, so that matrix kernels keep their fast paths."""

MAX_LOSS = 0.1
"""Of the elements of all pieces: see ``even_numel``."""

NUM_DIVISORS = 16
"""Pieces are not made shorter than the longest allowed by more than this factor."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What the layout must know of one parameter."""

    index: int
    name: str
    shape: tuple[int, ...]
    numel: int
    dtype: object
    """Only compared for equality: parameters of different types never share a bucket."""
    group: int
    """Index of its optimizer group."""
    wire: object = None
    """Type in which its gradient travels between ranks, if it has one of its own; such never share a bucket either."""
    offset: int = 0
    """First element of the flattened parameter that the slot holds; not 0 where FSDP2 has cut it (stage 3)."""
    reserve: int = 0
    """Elements kept free behind the slot: FSDP2 pads shards of one parameter to equal size."""
    whole_shape: tuple[int, ...] | None = None
    """Shape of the whole parameter, if ``shape`` is that of this rank's part of it."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        return self.shape if self.whole_shape is None else self.whole_shape

    @property
    def full_numel(self) -> int:
        return math.prod(self.full_shape)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one parameter in its bucket: elements [start, start + numel)."""

    spec: ParamSpec
    start: int

    @property
    def end(self) -> int:
        return self.start + self.spec.numel


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of one optimizer group: elements [start, end), padding between its slots included."""

    group: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class BucketLayout:
    index: int
    dtype: object
    slots: tuple[Slot, ...]
    segments: tuple[Segment, ...]
    num_shards: int
    padded_numel: int
    wire: object = None
    """See ``ParamSpec.wire``."""

    @property
    def shard_numel(self) -> int:
        return self.padded_numel // self.num_shards

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Elements [start, end) of the bucket that shard ``shard`` owns."""
        return shard * self.shard_numel, (shard + 1) * self.shard_numel

    def slots_in_shard(self, shard: int) -> Iterator[tuple[Slot, int, int]]:
        """Yield (slot, start, end) with [start, end) the part of the slot inside the shard, in bucket elements."""
        low, high = self.shard_range(shard)
        for slot in self.slots:
            start, end = max(low, slot.start), min(high, slot.end)
            if start < end:
                yield slot, start, end


@dataclass(frozen=True, slots=True)
class Piece:
    """What one optimizer call updates: elements [start, end) of a bucket, all of one optimizer group."""

    bucket: int
    group: int
    start: int
    end: int
    shape: tuple[int, ...] | None = None
    """Set when the piece is exactly one parameter and the optimizer must see its shape."""

    @property
    def numel(self) -> int:
        return self.end - self.start


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _even_step(numel: int, num_pieces: int) -> int:
    return _round_up(-(-numel // num_pieces), SLOT_ALIGNMENT)


def plan_buckets(specs: Sequence[ParamSpec], *, bucket_numel: int, num_shards: int) -> list[BucketLayout]:
    """Lay parameters out in buckets of about ``bucket_numel`` elements.

    Args:
        specs: parameters in the order in which the forward pass needs them; small ones go first, together.
        bucket_numel: a bucket is closed before it would exceed this; a larger parameter has a bucket of its own.
        num_shards: number of equal shards W each bucket is cut into, at least 1.

    Returns:
        Buckets numbered from 0, ordered by their first parameter. Padding is at most
        ``SLOT_ALIGNMENT`` elements per parameter and ``SLOT_ALIGNMENT * W`` per bucket.
    """
    runs: list[list[ParamSpec]] = []
    open_run: dict[object, list[ParamSpec]] = {}
    open_numel: dict[object, int] = {}
    small = min(SMALL_NUMEL, bucket_numel // 16)
    for spec in sorted(specs, key=lambda spec: spec.numel > small):
        kind = (spec.dtype, spec.wire)
        run = open_run.get(kind)
        if run is None or open_numel[kind] + spec.numel > bucket_numel:
            run = open_run[kind] = []
            open_numel[kind] = 0
            runs.append(run)
        run.append(spec)
        open_numel[kind] += spec.numel
    return [_lay_out(index, run, num_shards) for index, run in enumerate(runs)]


def _lay_out(index: int, run: list[ParamSpec], num_shards: int) -> BucketLayout:
    slots: list[Slot] = []
    segments: list[Segment] = []
    position = 0
    for spec in sorted(run, key=lambda spec: (spec.group, spec.index)):
        if not segments or segments[-1].group != spec.group:
            segments.append(Segment(spec.group, position, position))
        slots.append(Slot(spec, position))
        position = _round_up(position + spec.numel + spec.reserve, SLOT_ALIGNMENT)
        segments[-1] = Segment(spec.group, segments[-1].start, position)
    padded = _round_up(max(position, 1), SLOT_ALIGNMENT * num_shards)
    segments[-1] = Segment(segments[-1].group, segments[-1].start, padded)
    return BucketLayout(index, run[0].dtype, tuple(slots), tuple(segments), num_shards, padded, run[0].wire)


def cut_pieces(layout: BucketLayout, shard: int, *, max_numel: int | None = None) -> list[Piece]:
    """Cut one shard of a bucket into pieces of one optimizer group each, none longer than ``max_numel``.

    Those of one group are about equally long, if ``max_numel`` is a multiple of ``SLOT_ALIGNMENT``."""
    low, high = layout.shard_range(shard)
    pieces: list[Piece] = []
    for segment in layout.segments:
        start, end = max(low, segment.start), min(high, segment.end)
        step = max(end - start, 1)
        if max_numel is not None:
            step = min(max_numel, _even_step(step, -(-step // max_numel)))
        pieces.extend(
            Piece(layout.index, segment.group, begin, min(begin + step, end)) for begin in range(start, end, step)
        )
    return pieces


def even_numel(segments: Sequence[int], longest: int) -> int:
    """How long pieces should be so that buffers of one size hold nearly all of them, and are nearly full.

    Args:
        segments: elements of what is cut each for itself, as by ``cut_pieces``.
        longest: of a piece, at most; a multiple of ``SLOT_ALIGNMENT``.

    Returns:
        Of the lengths that divide a segment evenly the largest that loses at most ``MAX_LOSS``: what buffers of that
        length have too much, and all elements of pieces that are half as long or shorter. If there is none, the one
        that loses least.
    """
    counts = Counter(segments)
    total = max(1, sum(segments))

    def loss(numel: int) -> float:
        lost = 0
        for segment, times in counts.items():
            num_pieces = -(-segment // numel)
            is_short = 2 * segment <= numel * num_pieces
            lost += times * (segment if is_short else numel * num_pieces - segment)
        return lost / total

    found = {longest}
    for segment in counts:
        fewest = -(-segment // longest)
        for num_pieces in range(fewest, 2 * fewest + NUM_DIVISORS):
            numel = _even_step(segment, num_pieces)
            if longest // NUM_DIVISORS <= numel <= longest:
                found.add(numel)
    losses = {numel: loss(numel) for numel in found}
    good = [numel for numel in found if losses[numel] <= MAX_LOSS]
    return max(good, default=min(found, key=lambda numel: (losses[numel], -numel)))


def cut_evenly(layouts: Sequence[BucketLayout], shards: Sequence[int], longest: int) -> list[Piece]:
    """``cut_pieces`` of one shard of each bucket, in pieces of a length that suits all of them (``even_numel``)."""
    segments = [piece.numel for layout, shard in zip(layouts, shards) for piece in cut_pieces(layout, shard)]
    numel = even_numel(segments, longest)
    return [piece for layout, shard in zip(layouts, shards) for piece in cut_pieces(layout, shard, max_numel=numel)]


def cut_whole_parameters(layout: BucketLayout) -> list[Piece]:
    """One piece per parameter, with its shape: for optimizers that are not elementwise. Unsharded buckets only."""
    return [Piece(layout.index, slot.spec.group, slot.start, slot.end, slot.spec.shape) for slot in layout.slots]
