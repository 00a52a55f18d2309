"""Device memory in which FSDP2 finds a gathered parameter that it has not gathered itself.

Like ``fsdp.py`` this file knows its insides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fill_room", "room_for_whole"]


def room_for_whole(handle: Any, num_shards: int, device: torch.device) -> Tensor:
    """Device memory for a whole parameter and its padding, flat: FSDP2 frees it when the unit is resharded."""
    shard = handle._sharded_param_data
    handle.init_all_gather_outputs([shard.numel()], [shard.dtype], num_shards, device)
    room: Tensor = handle.all_gather_outputs[0]
    num_bytes = room.numel() * room.element_size()
    if room.untyped_storage().size() != num_bytes:
        room.untyped_storage().resize_(num_bytes)
    return room


@torch.no_grad()
def fill_room(room: Tensor, source: Tensor) -> None:
    """Copy ``source``, which may lack the padding, into what ``room_for_whole`` gave; on the current stream."""
    target = room if room.numel() == source.numel() else room[: source.numel()]
    if room.is_inference():
        target.copy_(source.reshape(-1), non_blocking=True)
        return
    # Autograd has saved this very tensor; that it is filled again is no change of it.
    with torch.autograd._unsafe_preserve_version_counter(room):
        target.copy_(source.reshape(-1), non_blocking=True)
