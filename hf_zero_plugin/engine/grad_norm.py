"""Global gradient norm, non-finite flag and clip coefficient, on the device, without a host sync; who is to blame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GradStats", "agreed_culprit", "grad_stats"]


BLOCK_NUMEL, ROW_NUMEL = 2**20, 2**12
"""A block is large enough for all cores and small enough for their caches; a row is what one running sum sees."""


class GradStats(NamedTuple):
    """0-dim fp32 tensors on the device of the gradients, equal on all ranks."""

    norm: Tensor
    """L2 norm of the unscaled gradients over all ranks, before clipping."""
    found_inf: Tensor
    """1.0 if any gradient of any rank is inf or nan, else 0.0."""
    multiplier: Tensor | None
    """What the stored gradients must be multiplied by: clip coefficient / loss scale. None means 1."""


def grad_stats(
    grads: Sequence[Tensor],
    *,
    device: torch.device,
    loss_scale: float = 1.0,
    max_norm: float = 0.0,
    sharded: bool = False,
    group: dist.ProcessGroup | None = None,
) -> GradStats:
    """Norm of many gradients in a handful of launches.

    Args:
        grads: any shapes, any float types; this rank's part if ``sharded``, else all gradients.
        loss_scale: the gradients carry this factor; it is taken out.
        max_norm: clip the global norm to this; 0 switches clipping off.
        sharded: ranks hold different parts, so squares are summed over ranks.

    The norm is the norm of the tensors' norms, as in ``torch.nn.utils.clip_grad_norm_``, so that an unsharded fp32
    run agrees with it to the bit. No gradients give norm 0.
    """
    if grads:
        # Half precision squares overflow: accumulate in fp32.
        norm = torch.linalg.vector_norm(_norms(grads, device), 2.0)
    else:
        norm = torch.zeros((), device=device)
    if sharded and dist.is_initialized() and dist.get_world_size(group) > 1:
        square = norm.square()
        dist.all_reduce(square, group=group)
        norm = square.sqrt()
    if loss_scale != 1.0:
        norm = norm / loss_scale
    found_inf = (~torch.isfinite(norm)).to(torch.float32)
    multiplier: Tensor | None = None
    if max_norm > 0:
        multiplier = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if loss_scale != 1.0:
        multiplier = (multiplier if multiplier is not None else torch.ones_like(norm)) / loss_scale
    return GradStats(norm, found_inf, multiplier)


def _norms(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Norm of each tensor, fp32, on ``device``; some may be on the host (stage 3 with offloaded parameters)."""
    parts = []
    for place in dict.fromkeys(grad.device for grad in grads):
        here = [grad for grad in grads if grad.device == place]
        if place.type == "cpu" and any(grad.dtype != torch.float32 for grad in here):
            norms = [_host_norm(grad) for grad in here]
        else:
            norms = list(torch._foreach_norm(here, 2.0, dtype=torch.float32))
        parts.append(torch.stack(norms).to(device))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _host_norm(grad: Tensor) -> Tensor:
    """Half precision on a CPU: torch sums 3 ns an element there, one after the other, and loses the third digit."""
    if grad.dtype == torch.float32:
        return torch.linalg.vector_norm(grad)
    flat = grad.reshape(-1)
    wide = torch.empty(min(BLOCK_NUMEL, flat.numel()))
    norms = []
    for part in flat.split(BLOCK_NUMEL):
        block = wide[: part.numel()].copy_(part)
        num_rows = block.numel() // ROW_NUMEL
        norms.append(torch.linalg.vector_norm(block[: num_rows * ROW_NUMEL].view(num_rows, ROW_NUMEL), dim=1))
        norms.append(torch.linalg.vector_norm(block[num_rows * ROW_NUMEL :]).view(1))
    return torch.linalg.vector_norm(torch.cat(norms))


def agreed_culprit(found: tuple[int, str] | None, num_shards: int, group: dist.ProcessGroup | None) -> str | None:
    """Name of the first parameter whose gradient is inf or nan on any rank. Collective, if there are shards.

    Args:
        found: index and name of the first in this rank's shards.
        num_shards: 1 if all ranks hold the same gradients, else the number of ranks.
    """
    if num_shards > 1:
        everywhere: list[tuple[int, str] | None] = [None] * num_shards
        dist.all_gather_object(everywhere, found, group=group)
        found = min((one for one in everywhere if one is not None), default=None)
    return found[1] if found is not None else None
