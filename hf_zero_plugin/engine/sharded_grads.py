"""Gradients at stage 3: FSDP2 reduces them, this file collects the results into flat buckets.

After FSDP2's reduce-scatter, ``.grad`` of a sharded parameter is this rank's rows of the mean over ranks. They are
added to the parameter's slice of a flat buffer and dropped at once, on the stream that reduced them, so that the
memory above the buffers is one unit's. Shards that live in host memory arrive there by FSDP2's own copies, which run
on until the end of the backward pass: those are collected then. If the buffers are on the device all the same,
gradients are kept from leaving it (``kept_grads.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_zero_plugin.engine.buckets import BucketLayout, Slot
from hf_zero_plugin.engine.flat import view_of
from hf_zero_plugin.engine.fsdp import ShardedParam
from hf_zero_plugin.engine.gradients import GradientStore
from hf_zero_plugin.engine.kept_grads import give_back, keep_on_device
from hf_zero_plugin.engine.lone_grads import LoneGrads
from hf_zero_plugin.engine.sharding import Sharding

__all__ = ["ShardedGrads", "Stage3Grads"]


class ShardedGrads(GradientStore):
    """Buckets of FSDP2's sharded gradients, shape (P,) each, nothing but this rank's part.

    Sums of micro-steps are kept in fp32 if ``accumulate_fp32``; the buffers widen at the first micro-step that is not
    the last, so runs without accumulation never pay for it.

    Args:
        flats: the weights, bucket by bucket; gradients are of their types, and where they are.
        device: where the model computes.
        kept: FSDP2's parameters, if gradients stay there although the weights are in host memory.
    """

    def __init__(
        self,
        layouts: Sequence[BucketLayout],
        params: Sequence[nn.Parameter],
        sharding: Sharding,
        flats: Sequence[Tensor],
        *,
        device: torch.device,
        accumulate_fp32: bool,
        factor: float = 1.0,
        kept: Sequence[ShardedParam] = (),
    ) -> None:
        self.layouts = list(layouts)
        self.params = list(params)
        self.sharding = sharding
        self.boundary = True
        self._handles = []
        self._factor = factor
        self._accumulate_fp32 = accumulate_fp32
        self._device = device
        place = device if kept else None
        self._flats = {layout.index: torch.zeros_like(flat, device=place) for layout, flat in zip(layouts, flats)}
        self._places = {slot.spec.index: (layout.index, slot) for layout in self.layouts for slot in layout.slots}
        self._place_of = {place[1].spec.name: place for place in self._places.values()}
        self._kept = [item for item in kept if item.name in self._place_of]
        self._arrives_late = bool(flats) and flats[0].device.type == "cpu" and not self._kept
        if not self._arrives_late:
            self.attach()

    def attach(self) -> None:
        if self._kept:
            keep_on_device(self._kept, self, ShardedGrads._take)
            return
        for index in self._places:
            self._attach_to(index, self.params[index])

    def detach(self) -> None:
        give_back(self._kept)
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
        assert param.grad is not None
        self._add(self._places[index], param.grad.to_local())  # type: ignore[attr-defined]
        param.grad = None

    def _take(self, name: str, grad: Tensor) -> None:
        self._add(self._place_of[name], grad)

    def _add(self, place: tuple[int, Slot], grad: Tensor) -> None:
        bucket, slot = place
        view_of(self._flats[bucket], slot).add_(grad, alpha=self._factor)

    def shard(self, bucket: int) -> Tensor:
        return self._flats[bucket]

    @property
    def num_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self._flats.values())

    @property
    def is_on_host(self) -> bool:
        return any(flat.device.type != self._device.type for flat in self._flats.values())


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
