"""Gradients at stage 3: FSDP2 reduces them, this file collects the results into flat buckets.

After FSDP2's reduce-scatter, ``.grad`` of a sharded parameter is this rank's rows of the mean over ranks. They are
added to the parameter's slice of a flat buffer and dropped at once, on the stream that reduced them, so that the
memory above the buffers is one unit's. Shards that live in host memory arrive there by FSDP2's own copies, which run
on until the end of the backward pass: those are collected then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_zero_plugin.engine.buckets import BucketLayout
from hf_zero_plugin.engine.flat import view_of
from hf_zero_plugin.engine.gradients import GradientStore
from hf_zero_plugin.engine.lone_grads import LoneGrads
from hf_zero_plugin.engine.sharding import Sharding

__all__ = ["ShardedGrads", "Stage3Grads"]


class ShardedGrads(GradientStore):
    """Buckets of FSDP2's sharded gradients, shape (P,) each, nothing but this rank's part.

    Sums of micro-steps are kept in fp32 if ``accumulate_fp32``; the buffers widen at the first micro-step that is not
    the last, so runs without accumulation never pay for it.
    """

    def __init__(
        self,
        layouts: Sequence[BucketLayout],
        params: Sequence[nn.Parameter],
        sharding: Sharding,
        flats: Sequence[Tensor],
        *,
        accumulate_fp32: bool,
        factor: float = 1.0,
    ) -> None:
        self.layouts = list(layouts)
        self.params = list(params)
        self.sharding = sharding
        self.boundary = True
        self._handles = []
        self._factor = factor
        self._accumulate_fp32 = accumulate_fp32
        self._flats = {layout.index: torch.zeros_like(flat) for layout, flat in zip(layouts, flats)}
        self._places = {slot.spec.index: (layout.index, slot) for layout in self.layouts for slot in layout.slots}
        self._arrives_late = bool(flats) and flats[0].device.type == "cpu"
        if not self._arrives_late:
            self.attach()

    def attach(self) -> None:
        for index in self._places:
            self._attach_to(index, self.params[index])

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for index in self._places:
            self.params[index].grad = None

    def begin_backward(self, *, boundary: bool) -> None:
        self.boundary = boundary
        if not boundary and self._accumulate_fp32:
            self._flats = {bucket: flat.float() for bucket, flat in self._flats.items()}

    def end_backward(self) -> None:
        for index in self._places:
            if self.params[index].grad is not None:
                self._on_grad(index, self.params[index])

    def _on_grad(self, index: int, param: Tensor) -> None:
        bucket, slot = self._places[index]
        assert param.grad is not None
        local = param.grad.to_local()  # type: ignore[attr-defined]
        view_of(self._flats[bucket], slot).add_(local, alpha=self._factor)
        param.grad = None

    def shard(self, bucket: int) -> Tensor:
        return self._flats[bucket]

    @property
    def num_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self._flats.values())


class Stage3Grads(GradientStore):
    """Parameters that stay whole and parameters that are sharded, as one store."""

    def __init__(self, whole: GradientStore | None, sharded: ShardedGrads | LoneGrads) -> None:
        self.layouts = [*(whole.layouts if whole is not None else []), *sharded.layouts]
        self.sharding = sharded.sharding
        self.sharded = sharded
        self._stores: list[GradientStore] = [sharded] if whole is None else [whole, sharded]
        self._store_of = {layout.index: store for store in self._stores for layout in store.layouts}

    def attach(self) -> None:
        for store in self._stores:
            store.attach()

    def detach(self) -> None:
        for store in self._stores:
            store.detach()

    def begin_backward(self, *, boundary: bool) -> None:
        for store in self._stores:
            store.begin_backward(boundary=boundary)

    def end_backward(self) -> None:
        # FSDP2's collectives are all launched by now: those of whole parameters come after them on every rank.
        for store in self._stores:
            store.end_backward()

    def shard(self, bucket: int) -> Tensor:
        return self._store_of[bucket].shard(bucket)

    def clear_shard(self, bucket: int) -> None:
        self._store_of[bucket].clear_shard(bucket)

    def release(self, bucket: int) -> None:
        self._store_of[bucket].release(bucket)

    def clear_part(self, bucket: int, start: int, end: int) -> None:
        if self._is_lone(bucket):
            self.sharded.clear_part(bucket, start, end)
        else:
            super().clear_part(bucket, start, end)

    def part(self, bucket: int, start: int, end: int) -> Tensor:
        lone = self._is_lone(bucket)
        return self.sharded.part(bucket, start, end) if lone else super().part(bucket, start, end)

    def _is_lone(self, bucket: int) -> bool:
        return isinstance(self.sharded, LoneGrads) and self._store_of[bucket] is self.sharded

    def norm_views(self) -> list[Tensor]:
        return [view for store in self._stores for view in store.norm_views()]

    @property
    def num_bytes(self) -> int:
        return sum(store.num_bytes for store in self._stores)

    @property
    def is_on_host(self) -> bool:
        return self.sharded.is_on_host
