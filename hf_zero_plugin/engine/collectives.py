"""torch's flat collectives under one name: torch 2.13 renamed them and warns about the old names."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_flat", "reduce_scatter_flat"]

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_flat(whole: Tensor, shard: Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill ``whole`` (P,) with every rank's ``shard`` (S,), in rank order."""
    _gather(whole, shard, group=group)


def reduce_scatter_flat(shard: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> Any:
    """Sum ``whole`` (P,) over ranks into each rank's ``shard`` (S,); returns the handle to wait for."""
    return _scatter(shard, whole, group=group, async_op=True)
