"""Gradients of one rank in half precision: left where autograd puts them, read when they are consumed.

Nobody adds to a buffer, nobody clears one: autograd hands over the tensor it has just computed, which costs no kernel,
and a gradient's memory exists from the moment it is computed to the moment its update has read it. Life of one::

    backward        ``param.grad``, as autograd leaves it
    end_backward    held here, by bucket; ``param.grad`` is None again
    step            read piece by piece, perhaps on another stream
    release         dropped, once the compute stream is ordered after the update that has read it

Only sums of micro-steps in fp32, if those are asked for, live in flat buffers; they appear with the first micro-step
that is not the last. Between micro-steps ``param.grad`` is then a mark, zeros without memory of their own: where it is
gone, somebody has called the model's ``zero_grad``, and the sum is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_zero_plugin.engine.buckets import BucketLayout, Slot
from hf_zero_plugin.engine.flat import view_of
from hf_zero_plugin.engine.gradients import GradientStore, ReduceOptions
from hf_zero_plugin.engine.sharding import Sharding

__all__ = ["LooseGrads"]


class _Targets(NamedTuple):
    """Where the gradients of a part go: views of one flat buffer in the parameters' shapes."""

    indices: list[int]
    views: list[Tensor]
    has_gaps: bool
    """Some elements of the buffer belong to no parameter."""


def _targets(layout: BucketLayout, start: int, end: int, out: Tensor) -> _Targets | None:
    """None if the part cuts a parameter."""
    slots = [slot for slot in layout.slots if slot.start < end and slot.end > start]
    if any(slot.start < start or slot.end > end for slot in slots):
        return None
    views = [view_of(out, replace(slot, start=slot.start - start)) for slot in slots]
    return _Targets([slot.spec.index for slot in slots], views, sum(view.numel() for view in views) < end - start)


class LooseGrads(GradientStore):
    """See the module. For one rank: nothing is reduced. A parameter without a gradient counts as zero."""

    frees_when_released = True

    def __init__(
        self,
        layouts: Sequence[BucketLayout],
        params: Sequence[nn.Parameter],
        sharding: Sharding,
        options: ReduceOptions,
        *,
        accumulate_fp32: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(layouts, params, sharding, options)
        self._accumulate_fp32 = accumulate_fp32
        self._held: dict[int, dict[int, Tensor]] = {}
        """Bucket -> parameter index -> its gradient; a bucket is missing once it was released."""
        self._sums: list[Tensor] | None = None
        """Per bucket, shape (P,), fp32."""
        self._targets: dict[tuple[int, int, int], _Targets | None] = {}
        self._marks: list[Tensor] = []
        """Per parameter, while a sum of earlier micro-steps is kept."""
        for param in self.params:
            param.grad = None

    def begin_backward(self, *, boundary: bool) -> None:
        self.boundary = boundary
        # Held and not released means not consumed: a second backward pass before the step adds to it.
        for held in self._held.values():
            for index, grad in held.items():
                self.params[index].grad = grad
        self._held = {}
        for index, mark in enumerate(self._marks):
            if self.params[index].grad is not mark:
                layout, slot = self._slot_of[index]
                self.clear_part(layout.index, slot.start, slot.end)
            else:
                self.params[index].grad = None
        self._marks = []

    def end_backward(self) -> None:
        if not self.boundary and not self._accumulate_fp32:
            return  # autograd adds the next micro-step where this one is
        if not self.boundary and self._sums is None:
            self._sums = [
                torch.zeros(layout.padded_numel, dtype=torch.float32, device=self.params[0].device)
                for layout in self.layouts
            ]
        for layout in self.layouts:
            held = self._take(layout)
            if self._sums is not None:
                self._sums[layout.index].add_(self._lay_end_to_end(layout, held, 0, layout.padded_numel))
            else:
                self._held[layout.index] = held
        if not self.boundary:
            self._marks = [torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for p in self.params]
            for param, mark in zip(self.params, self._marks):
                param.grad = mark

    def _take(self, layout: BucketLayout) -> dict[int, Tensor]:
        held: dict[int, Tensor] = {}
        for slot in layout.slots:
            param = self.params[slot.spec.index]
            if param.grad is not None:
                held[slot.spec.index] = param.grad
                param.grad = None
        return held

    def _lay_end_to_end(self, layout: BucketLayout, held: dict[int, Tensor], start: int, end: int) -> Tensor:
        """Elements [start, end) of a bucket, one copy; none if a single gradient holds all of them."""
        parts: list[Tensor] = []
        position = start
        for slot in layout.slots:
            low, high = max(slot.start, start), min(slot.end, end)
            grad = held.get(slot.spec.index)
            if low >= high or grad is None:
                continue
            if low > position:
                parts.append(self._zeros(slot, low - position))
            parts.append(grad.reshape(-1)[low - slot.start : high - slot.start])
            position = high
        if position < end:
            parts.append(self._zeros(layout.slots[0], end - position))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _zeros(self, like: Slot, numel: int) -> Tensor:
        param = self.params[like.spec.index]
        return torch.zeros(numel, dtype=param.dtype, device=param.device)

    def part(self, bucket: int, start: int, end: int) -> Tensor:
        if self._sums is not None:
            return self._sums[bucket][start:end]
        return self._lay_end_to_end(self.layouts[bucket], self._held.get(bucket, {}), start, end)

    def widen(self, bucket: int, start: int, end: int, out: Tensor) -> None:
        """One kernel for all gradients of a part, into views of ``out`` that are made once."""
        key = (bucket, start, out.data_ptr())
        if self._sums is not None:
            super().widen(bucket, start, end, out)
            return
        if key not in self._targets:
            self._targets[key] = _targets(self.layouts[bucket], start, end, out)
        targets, held = self._targets[key], self._held.get(bucket, {})
        if targets is None:  # a slice of one parameter
            super().widen(bucket, start, end, out)
            return
        if targets.has_gaps or any(index not in held for index in targets.indices):
            out.zero_()
        present = [number for number, index in enumerate(targets.indices) if index in held]
        if present:
            torch._foreach_copy_(
                [targets.views[number] for number in present], [held[targets.indices[number]] for number in present]
            )

    def clear_part(self, bucket: int, start: int, end: int) -> None:
        if self._sums is not None:
            self._sums[bucket][start:end].zero_()

    def release(self, bucket: int) -> None:
        self._held.pop(bucket, None)

    def shard(self, bucket: int) -> Tensor:
        return self.part(bucket, 0, self.layouts[bucket].padded_numel)

    def clear_shard(self, bucket: int) -> None:
        self.release(bucket)
        self.clear_part(bucket, 0, self.layouts[bucket].padded_numel)

    def norm_views(self) -> list[Tensor]:
        if self._sums is not None:
            return super().norm_views()
        held = {index: grad for bucket in self._held.values() for index, grad in bucket.items()}
        return [held[index] for index in sorted(held)]

    @property
    def num_bytes(self) -> int:
        """At the end of a backward pass, padding counted."""
        loose = sum(layout.padded_numel * self.params[0].element_size() for layout in self.layouts)
        return loose + sum(t.numel() * t.element_size() for t in self._sums or [])
