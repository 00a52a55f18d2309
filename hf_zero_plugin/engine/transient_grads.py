"""Gradients whose full buckets come and go, for ranks that keep shards of them (stage 2).

Life of a full bucket: zeros at its first gradient, reduce-scattered when its turn comes, dropped when the collective
has read it. Every micro-step does this; sums of micro-steps are made in the shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import BucketLayout
from hf_zero_plugin.engine.flat import view_of
from hf_zero_plugin.engine.gradients import GradientStore

__all__ = ["TransientGrads"]


class TransientGrads(GradientStore):
    """Full buckets live from their first gradient to their reduction; only shards (S,) stay, of the weights' type.

    With ``accumulate_fp32`` shards widen when something is to be added to them, so runs without accumulation never pay
    for it; they are that wide from the beginning if gradients travel in fp32, or ``expect_sums`` was called.

    At most ``max_in_flight`` full buckets wait for their collective at a time, which bounds the memory above the
    shards at ``(max_in_flight + 1) * P`` elements.
    """

    max_in_flight = 2
    shards_stay = True

    def __init__(self, *args: Any, flats: Sequence[Tensor], accumulate_fp32: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dtypes = [flat.dtype for flat in flats]
        self._accumulate_fp32 = accumulate_fp32
        self._holds_sums = False
        self._shards = [
            flat.new_zeros(layout.shard_numel, dtype=self._first_type(layout, flat))
            for layout, flat in zip(self.layouts, flats)
        ]
        self._full: dict[int, Tensor] = {}
        self._reducing: deque[tuple[BucketLayout, Tensor, Tensor, Any]] = deque()
        self.attach()

    def _first_type(self, layout: BucketLayout, flat: Tensor) -> torch.dtype:
        wire = self._wire_type(layout, flat)
        return torch.promote_types(flat.dtype, wire) if self._accumulate_fp32 else flat.dtype

    def begin_backward(self, *, boundary: bool) -> None:
        super().begin_backward(boundary=boundary)
        if not boundary or self._holds_sums:
            self.expect_sums()

    def expect_sums(self) -> None:
        if not self._accumulate_fp32:
            return
        for index in range(len(self._shards)):  # one after the other: activations may have left little room
            self._shards[index] = self._shards[index].float()
        self._norm_views = None

    def _buffer(self, layout: BucketLayout) -> Tensor:
        if layout.index not in self._full:
            self._full[layout.index] = self._shards[layout.index].new_zeros(
                layout.padded_numel, dtype=self._dtypes[layout.index]
            )
        return self._full[layout.index]

    def _on_grad(self, index: int, param: Tensor) -> None:
        layout, slot = self._slot_of[index]
        assert param.grad is not None
        view_of(self._buffer(layout), slot).add_(param.grad)
        param.grad = None
        self._mark(layout, index)

    def _launch(self, layout: BucketLayout) -> None:
        full = self._buffer(layout)
        dtype = self._wire_type(layout, full)
        out = full.new_empty(layout.shard_numel, dtype=dtype)
        result, work = self._start_reduction(full, out, dtype)
        # The full buffer stays referenced here until the collective has read it.
        self._reducing.append((layout, self._full.pop(layout.index), result, work))
        while len(self._reducing) > self.max_in_flight:
            self._land()

    def _land(self) -> None:
        layout, _, result, work = self._reducing.popleft()
        work.wait()
        if self.options.after != 1.0:
            result.mul_(self.options.after)
        self._shards[layout.index].add_(result)

    def end_backward(self) -> None:
        self._launch_rest()
        while self._reducing:
            self._land()
        self._holds_sums = True

    def clear_shard(self, bucket: int) -> None:
        super().clear_shard(bucket)
        self._holds_sums = False

    def shard(self, bucket: int) -> Tensor:
        return self._shards[bucket]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in [*self._shards, *self._full.values()])
