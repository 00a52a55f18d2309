"""Gradients: from autograd's hooks to one reduced shard per bucket. What every way to hold them has in common.

Three ways, one interface::

    LooseGrads       one rank, half precision: where autograd leaves them, until the update has read them
                     (loose_grads.py).
    ResidentGrads    .grad of every parameter is a view of a flat buffer that stays; autograd adds in place, and a step
                     can read the buffer as it is (resident_grads.py).
    TransientGrads   stage 2 with several ranks: a bucket's buffer is born with its first gradient, reduce-scattered
                     when full and dropped; only this rank's shard stays (transient_grads.py).

At stage 3 FSDP2 reduces them, into ``sharded_grads.py``; those of one rank go into ``lone_grads.py``.

Order that holds on every rank: buckets are reduced from the last to the first, never in the order of arrival, and a
parameter without a gradient counts as zero. So ranks that skip different branches still meet in the same collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_zero_plugin.engine.buckets import BucketLayout
from hf_zero_plugin.engine.collectives import reduce_scatter_flat
from hf_zero_plugin.engine.grad_hooks import when_grad_is_there
from hf_zero_plugin.engine.sharding import Sharding
from hf_zero_plugin.errors import HfZeroError

__all__ = ["GradientStore", "ReduceOptions"]


class ReduceOptions:
    """How gradients are averaged over ranks: scale before, scale after, and the type on the wire."""

    def __init__(
        self,
        world_size: int,
        *,
        op: str = "mean",
        prescale: bool = False,
        predivide_factor: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        divisor = float(world_size) if op == "mean" else 1.0
        # As DDP does, divide first by default: fp16 sums of many ranks overflow less easily.
        self.before = 1.0 / divisor
        self.after = 1.0
        if prescale and predivide_factor != 1.0:
            self.before, self.after = 1.0 / predivide_factor, predivide_factor / divisor
        self.dtype = dtype


class GradientStore:
    """Common part: hooks, readiness counting, launch order."""

    def __init__(
        self,
        layouts: Sequence[BucketLayout],
        params: Sequence[nn.Parameter],
        sharding: Sharding,
        options: ReduceOptions,
        *,
        group: dist.ProcessGroup | None = None,
        overlap: bool = True,
    ) -> None:
        self.layouts = list(layouts)
        self.params = list(params)
        self.sharding = sharding
        self.options = options
        self.group = group
        self.overlap = overlap
        self.boundary = True
        self._slot_of = {slot.spec.index: (layout, slot) for layout in self.layouts for slot in layout.slots}
        self._arrived: list[set[int]] = [set() for _ in self.layouts]
        self._next = len(self.layouts) - 1
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        for index, param in enumerate(self.params):
            self._attach_to(index, param)

    def _attach_to(self, index: int, param: nn.Parameter) -> None:
        self._handles.append(when_grad_is_there(param, self, lambda store, ready: store._on_grad(index, ready)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for param in self.params:
            param.grad = None

    def begin_backward(self, *, boundary: bool) -> None:
        self.boundary = boundary
        self._next = len(self.layouts) - 1
        for arrived in self._arrived:
            arrived.clear()

    def expect_sums(self) -> None:
        """Micro-steps will be summed: take the memory for that now, if it is not taken as they come."""

    def end_backward(self) -> None:
        """Reduce what is left; at a boundary, ``shard(bucket)`` is complete on the current stream afterwards."""
        raise NotImplementedError

    def shard(self, bucket: int) -> Tensor:
        """This rank's reduced gradient of a bucket, shape (S,), loss scale still in it."""
        raise NotImplementedError

    def part(self, bucket: int, start: int, end: int) -> Tensor:
        """Elements [start, end) of a bucket, inside this rank's shard; perhaps the store's own memory."""
        low, _ = self.layouts[bucket].shard_range(self.sharding.shard_of(self.layouts[bucket]))
        return self.shard(bucket)[start - low : end - low]

    def widen(self, bucket: int, start: int, end: int, out: Tensor) -> None:
        """Copy a part, as fp32, into ``out`` (end - start,): the same memory for the same part every time, please."""
        part = self.part(bucket, start, end)
        # What crosses the link is the narrow type: it is widened where ``out`` is.
        out.copy_(part if part.device == out.device else part.to(out.device, non_blocking=True))

    def clear_part(self, bucket: int, start: int, end: int) -> None:
        """Forget a consumed part, on the current stream, so call it where the gradient was consumed."""
        self.part(bucket, start, end).zero_()

    frees_when_released = False
    """Whether ``release`` gives memory back, so that the compute stream must come after who read it."""

    def release(self, bucket: int) -> None:
        """The compute stream is ordered after the update that has read this bucket's gradients: drop their memory."""

    def clear_shard(self, bucket: int) -> None:
        """Forget one bucket's gradient, consumed or not; on the current stream."""
        self.shard(bucket).zero_()

    def clear(self) -> None:
        for layout in self.layouts:
            self.clear_shard(layout.index)

    shards_stay = False
    """Whether ``shard`` is the same memory every step, so that parts of it are cut once. Who exchanges it all the same
    forgets ``_norm_views``."""
    _norm_views: list[Tensor] | None = None

    def norm_views(self) -> list[Tensor]:
        """Parts of the shards that belong to parameters (no padding), in parameter order."""
        if not self.shards_stay:
            return self._cut_norm_views()
        if self._norm_views is None:
            self._norm_views = self._cut_norm_views()
        return self._norm_views

    def _cut_norm_views(self) -> list[Tensor]:
        parts: list[tuple[int, Tensor]] = []
        for layout in self.layouts:
            mine = self.sharding.shard_of(layout)
            low, _ = layout.shard_range(mine)
            shard = self.shard(layout.index)
            parts += [
                (slot.spec.index, shard[start - low : end - low]) for slot, start, end in layout.slots_in_shard(mine)
            ]
        return [tensor for _, tensor in sorted(parts, key=lambda part: part[0])]

    def first_bad_parameter(self) -> tuple[int, str] | None:
        """(index, name) of the first parameter whose gradient is inf or nan, in this rank's shards. Syncs."""
        bad: list[tuple[int, str]] = []
        for layout in self.layouts:
            mine = self.sharding.shard_of(layout)
            low, _ = layout.shard_range(mine)
            shard = self.shard(layout.index)
            for slot, start, end in layout.slots_in_shard(mine):
                if not torch.isfinite(shard[start - low : end - low]).all():
                    bad.append((slot.spec.index, slot.spec.name))
        return min(bad, default=None)

    @property
    def num_bytes(self) -> int:
        raise NotImplementedError

    @property
    def is_on_host(self) -> bool:
        """Rather than where the model computes."""
        return False

    def _on_grad(self, index: int, param: Tensor) -> None:
        raise NotImplementedError

    def _mark(self, layout: BucketLayout, index: int) -> None:
        """Count an arrival and launch every bucket whose turn it is."""
        arrived = self._arrived[layout.index]
        if layout.index > self._next:
            raise HfZeroError(
                f"parameter {self._slot_of[index][1].spec.name!r} received a gradient after its bucket was reduced. "
                "A layer that runs more than once under re-entrant gradient checkpointing does this; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or set "
                "$.zero_optimization.overlap_comm to false."
            )
        arrived.add(index)
        if not self.overlap:
            return
        while self._next >= 0 and len(self._arrived[self._next]) == len(self.layouts[self._next].slots):
            self._launch(self.layouts[self._next])
            self._next -= 1

    def _launch_rest(self) -> None:
        while self._next >= 0:
            self._launch(self.layouts[self._next])
            self._next -= 1

    def _launch(self, layout: BucketLayout) -> None:
        raise NotImplementedError

    def _wire_type(self, layout: BucketLayout, full: Tensor) -> torch.dtype:
        """The type in which a bucket's gradients travel."""
        wire = layout.wire or self.options.dtype or full.dtype
        assert isinstance(wire, torch.dtype)
        return wire

    def _start_reduction(self, full: Tensor, out: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """Start averaging ``full`` (P,) over ranks; return (where the result will be, handle to wait for)."""
        if self.options.before != 1.0:
            full.mul_(self.options.before)
        wire = full.to(dtype)  # itself, if it has the type
        if out is None:
            return wire, dist.all_reduce(wire, group=self.group, async_op=True)
        return out, reduce_scatter_flat(out, wire, self.group)
