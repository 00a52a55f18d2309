"""The tensors of a model on their way into FSDP2's hands: meta in between, storage under the shards, values at last.

What ``sharded_assembly.py`` does in order, this file does in detail.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.engine import initial_values
from hf_zero_plugin.engine.buckets import BucketLayout, Piece, Slot
from hf_zero_plugin.engine.master_weights import Home
from hf_zero_plugin.engine.parts import Assembly
from hf_zero_plugin.engine.pinned import PinnedArena
from hf_zero_plugin.engine.shards import Shards, span_of

__all__ = ["Fill", "drop_values", "make_real", "make_storage", "name_sharded", "place_the_rest", "swap_for_meta"]


OwnedPiece = tuple[Home, int, Piece]
"""Home, the piece's index in it, piece."""


def name_sharded(groups: Sequence[dict[str, Any]], module: nn.Module) -> None:
    """Groups may name parameters as they were before sharding, or while they were gathered."""
    shards: Shards | None = getattr(module, "_zero_shards", None)
    if shards is None:
        return
    for group in groups:
        found = [(shards.find(param), param) for param in group["params"]]
        group["params"] = [param if item is None else item.param for item, param in found]


def _replace_params(module: nn.Module, fresh: dict[int, nn.Parameter]) -> None:
    """Put parameters in the place of others, wherever they are used. ``fresh``: by id of the old one."""
    for owner in module.modules():
        for name, param in owner._parameters.items():
            if param is not None and id(param) in fresh:
                owner._parameters[name] = fresh[id(param)]


def _like(param: nn.Parameter, values: Tensor) -> nn.Parameter:
    fresh = nn.Parameter(values, requires_grad=param.requires_grad)
    vars(fresh).update(vars(param))
    return fresh


def make_real(module: nn.Module, cut: set[str]) -> dict[int, nn.Parameter]:
    """Memory for buffers and whole parameters that are on the meta device; rank 0's values come later.

    Returns the parameters that took the place of others, by id of those.
    """
    fresh = {
        id(param): _like(param, torch.empty_like(param, device="cpu"))
        for name, param in module.named_parameters()
        if name not in cut and param.is_meta
    }
    _replace_params(module, fresh)
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_meta:
                owner._buffers[name] = torch.empty_like(buffer, device="cpu")
    return fresh


def place_the_rest(
    module: nn.Module,
    device: torch.device,
    compute: torch.dtype | None,
    later: set[str],
    group: dist.ProcessGroup | None,
) -> None:
    skip = {id(param) for name, param in module.named_parameters() if name in later}
    initial_values.place_rest(module, device, compute, skip)
    if dist.get_world_size(group) > 1:
        initial_values.broadcast_rest(module, skip, group)


def swap_for_meta(module: nn.Module, originals: dict[str, nn.Parameter], compute: torch.dtype | None) -> None:
    """FSDP2 shall see shapes and the type to compute in, and move nothing."""
    _replace_params(
        module,
        {
            id(param): _like(param, torch.empty(param.shape, dtype=compute or param.dtype, device="meta"))
            for param in originals.values()
        },
    )


def make_storage(
    module: nn.Module, layouts: Sequence[BucketLayout], home: torch.device, settings: EngineSettings
) -> list[Tensor]:
    """One flat buffer per layout, zero between the slots; page-locked if it is to be read by a GPU."""
    if home.type != "cpu" or not torch.cuda.is_available():
        # Memory of the host is not touched before values come: until then it is the model's own that is in use.
        flats = [torch.empty(layout.padded_numel, dtype=layout.dtype, device=home) for layout in layouts]  # type: ignore[call-overload]
        for flat, layout in zip(flats, layouts):
            _zero_gaps(flat, layout)
        return flats
    arenas = {}
    for dtype in sorted({layout.dtype for layout in layouts}, key=str):
        numel = sum(layout.padded_numel for layout in layouts if layout.dtype == dtype)
        arenas[dtype] = PinnedArena(numel, pin=settings.offload_param.pin_memory, dtype=dtype)  # type: ignore[arg-type]
    # The model outlives its engine, and its storage must stay page-locked as long as it is used.
    module._zero_arenas = list(arenas.values())  # type: ignore[assignment]
    return [arenas[layout.dtype].take(layout.padded_numel).zero_() for layout in layouts]


def _zero_gaps(flat: Tensor, layout: BucketLayout) -> None:
    position = 0
    for slot in sorted(layout.slots, key=lambda slot: slot.start):
        flat[position : slot.start].zero_()
        position = slot.end
    flat[position:].zero_()


def drop_values(params: Iterable[nn.Parameter]) -> None:
    """Of shards that a model had before: they are remembered for who they are, and would keep their storage alive."""
    for param in params:
        local = getattr(param, "_local_tensor", None)
        if local is not None:
            local.data = local.new_empty(0)


class Fill:
    """Brings rank 0's values of a parameter into everybody's shards and masters."""

    def __init__(self, parts: Assembly, group: dist.ProcessGroup | None, rank: int, world_size: int) -> None:
        self._device = parts.device
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self._parts = parts

    def pieces_by_bucket(self) -> dict[int, list[OwnedPiece]]:
        """Pieces with their homes, once there are masters."""
        pieces: dict[int, list[OwnedPiece]] = {}
        for home, index, piece in self._parts.masters.pieces() if self._parts.masters is not None else ():
            pieces.setdefault(piece.bucket, []).append((home, index, piece))
        return pieces

    @torch.no_grad()
    def __call__(self, source: Tensor, flat: Tensor, slot: Slot, pieces: Sequence[OwnedPiece] = ()) -> None:
        """``pieces``: of the slot's bucket, if its masters are there already and must keep more than the weights."""
        rows = self._rows(source, slot)
        flat[slot.start : slot.end].copy_(rows)
        for home, index, piece in pieces:
            start, end = max(piece.start, slot.start), min(piece.end, slot.end)
            if start < end:
                with home.edit(index) as tensors:
                    master = tensors["master"].view(-1)[start - piece.start : end - piece.start]
                    master.copy_(rows[start - slot.start : end - slot.start])
        if isinstance(source, nn.Parameter) and not source.is_meta:
            source.data = source.data.new_empty(0)

    def _rows(self, source: Tensor, slot: Slot) -> Tensor:
        """This rank's elements (n,), in the type of ``source``."""
        numel = slot.spec.numel
        if not isinstance(source, nn.Parameter):
            return source[:numel]  # a shard already
        if self._world_size == 1:
            return source.detach().reshape(-1)
        mine = source.new_empty(0, device=self._device)
        for rank in range(self._world_size):
            span = span_of(slot.spec.full_shape, rank, self._world_size)
            if span.start == span.end:
                continue
            if self._rank == 0:
                part = source.detach().reshape(-1)[span.start : span.end].to(self._device)
            else:
                part = torch.empty(span.end - span.start, dtype=source.dtype, device=self._device)
            dist.broadcast(part, src=initial_values.source_rank(self._group), group=self._group)
            if rank == self._rank:
                mine = part
        return mine
