"""Gradients in flat buffers that stay: autograd adds in place, and a step can read the buffer as it is.

For every stage that keeps whole gradients. With several ranks a full buffer is all-reduced, or reduce-scattered into
this rank's shard of it, at the boundary; with one rank the buffers fill themselves and no hook runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import BucketLayout
from hf_zero_plugin.engine.flat import view_of
from hf_zero_plugin.engine.gradients import GradientStore
from hf_zero_plugin.engine.sharding import Sharding

__all__ = ["ResidentGrads"]


class ResidentGrads(GradientStore):
    """Flat gradient buffers that stay, shape (P,) each, in the type of the weights.

    With ``accumulate_fp32`` micro-steps are summed in fp32 beside them; those buffers appear with the first
    micro-step that is not the last, so runs without accumulation never pay for them.
    """

    shards_stay = True

    def __init__(self, *args: Any, flats: Sequence[Tensor], accumulate_fp32: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._flats = [torch.zeros_like(flat) for flat in flats]
        self._accumulate_fp32 = accumulate_fp32
        self._sums: list[Tensor] | None = None
        self._views = [view_of(self._flats[layout.index], slot) for layout, slot in self._ordered_slots()]
        self._reducing: list[tuple[BucketLayout, Tensor, Any]] = []
        # Parameters take their views with the first backward pass: here they may not have their final type yet.
        # One rank has nothing to launch: the buffers fill themselves and no hook has to run.
        if sharding_needs_hooks(self.sharding):
            self.attach()

    def _ordered_slots(self) -> list[tuple[BucketLayout, Any]]:
        return [self._slot_of[index] for index in range(len(self.params))]

    def begin_backward(self, *, boundary: bool) -> None:
        super().begin_backward(boundary=boundary)
        for index, (param, view) in enumerate(zip(self.params, self._views)):
            if param.grad is not view:  # the first pass, or somebody called zero_grad: what was summed is forgotten
                view.zero_()
                param.grad = view
                if self._sums is not None:
                    layout, slot = self._slot_of[index]
                    view_of(self._sums[layout.index], slot).zero_()

    def _on_grad(self, index: int, param: Tensor) -> None:
        layout, _ = self._slot_of[index]
        self._collect_stray(index)
        if self.boundary:
            self._mark(layout, index)

    def _collect_stray(self, index: int) -> None:
        param, view = self.params[index], self._views[index]
        if param.grad is not view:
            if param.grad is None:
                view.zero_()
            else:
                view.copy_(param.grad)
            param.grad = view

    def _launch(self, layout: BucketLayout) -> None:
        full = self._settle(layout.index)
        if self.sharding.reduction == "none":
            return
        out, dtype = None, self._wire_type(layout, full)
        if self.sharding.reduction == "reduce_scatter":
            out = full.new_empty(layout.shard_numel, dtype=dtype)
        result, work = self._start_reduction(full, out, dtype)
        self._reducing.append((layout, result, work))

    def _settle(self, bucket: int) -> Tensor:
        """The buffer that holds the whole sum of this bucket so far."""
        if self._sums is None:
            return self._flats[bucket]
        self._sums[bucket].add_(self._flats[bucket])
        self._flats[bucket].zero_()
        return self._sums[bucket]

    def end_backward(self) -> None:
        for index in range(len(self.params)):
            self._collect_stray(index)
        if not self.boundary:
            if self._accumulate_fp32:
                if self._sums is None:
                    self._sums = [torch.zeros_like(flat, dtype=torch.float32) for flat in self._flats]
                    self._norm_views = None
                for layout in self.layouts:
                    self._settle(layout.index)
            return
        self._launch_rest()
        for layout, result, work in self._reducing:
            work.wait()
            target = self.shard(layout.index)
            if result is not target:
                target.copy_(result.view(-1)[: target.numel()])
            if self.options.after != 1.0:
                target.mul_(self.options.after)
        self._reducing.clear()

    def shard(self, bucket: int) -> Tensor:
        full = (self._sums or self._flats)[bucket]
        low, high = self.layouts[bucket].shard_range(self.sharding.shard)
        return full if high - low == full.numel() else full[low:high]

    def clear_shard(self, bucket: int) -> None:
        (self._sums or self._flats)[bucket].zero_()

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in [*self._flats, *(self._sums or [])])


def sharding_needs_hooks(sharding: Sharding) -> bool:
    return sharding.world_size > 1
