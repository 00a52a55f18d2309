"""The tensors of a model on their way into an engine: moved, cast, and rank 0's values on every rank.

What is trained moves into flat buckets and leaves its fp32 values behind for the masters; the rest moves to the device.
Sharded parameters have their own way: ``sharded_values.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.engine.buckets import BucketLayout, Piece
from hf_zero_plugin.engine.flat import FlatWeights
from hf_zero_plugin.engine.sharding import Sharding

__all__ = ["adopt_bucket", "adopt_weights", "broadcast_rest", "place_rest", "source_rank"]


@torch.no_grad()
def place_rest(module: nn.Module, device: torch.device, compute: torch.dtype | None, skip: set[int]) -> None:
    """Move what is not trained. Buffers keep their type: rotary tables and running means need their precision."""
    for submodule in module.modules():
        for param in submodule._parameters.values():
            if param is not None and id(param) not in skip:
                cast = compute if compute is not None and param.is_floating_point() else param.dtype
                param.data = param.data.to(device, cast)
        for name, buffer in submodule._buffers.items():
            if buffer is not None:
                submodule._buffers[name] = buffer.to(device)


def broadcast_rest(module: nn.Module, skip: set[int], group: dist.ProcessGroup | None) -> None:
    for tensor in [*(p.data for p in module.parameters() if id(p) not in skip), *module.buffers()]:
        # Some backends only take contiguous tensors.
        whole = tensor.contiguous()
        dist.broadcast(whole, src=source_rank(group), group=group)
        if whole is not tensor:
            tensor.copy_(whole)


def adopt_bucket(
    weights: FlatWeights, layout: BucketLayout, sharding: Sharding, group: dist.ProcessGroup | None
) -> Callable[[Piece], Tensor]:
    """Move a bucket's parameters into its buffer, rank 0's values on every rank; return fp32 values by piece."""
    flat = weights.flats[layout.index]
    values = weights.adopt(layout)
    if sharding.world_size > 1:
        dist.broadcast(values, src=source_rank(group), group=group)
        if flat is not values:
            flat.copy_(values)
    low, high = layout.shard_range(sharding.shard)
    first = 0
    if high - low < layout.padded_numel and values is not flat:
        first, values = low, values[low:high].clone()  # a view would keep the other ranks' shards in memory
    return lambda piece: values[piece.start - first : piece.end - first]


def adopt_weights(
    weights: FlatWeights, layouts: Sequence[BucketLayout], sharding: Sharding, group: dist.ProcessGroup | None
) -> Callable[[Piece], Tensor]:
    """``adopt_bucket`` for all of ``layouts`` at once; buffers are made here."""
    exact = {}
    for layout in layouts:
        weights.allocate(layout, layout.dtype)  # type: ignore[arg-type]
        exact[layout.index] = adopt_bucket(weights, layout, sharding, group)
    return lambda piece: exact[piece.bucket](piece)


def source_rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_global_rank(group, 0) if group is not None else 0
