"""Reading and writing the fp32 master, the gradient and the optimizer states of one named parameter.

"local" is this rank's slice, flat, shape (n,), n may be 0; "full" is the whole parameter in its own shape, gathered
from all ranks (collective: every rank must call, in the same order). Setting is local only where no other rank has what
changes: the states of a part (stages 1 to 3), and the master of a part whose weight is sharded, too (stage 3). The
weight of any other parameter is on every rank, and so are its states at stage 0: that is collective.

Where all ranks call, they agree on sizes before anything is changed: a mistake of one is an error on each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.engine.buckets import BucketLayout, Slot
from hf_zero_plugin.engine.collectives import all_gather_flat
from hf_zero_plugin.engine.registry import engines_of
from hf_zero_plugin.errors import HfZeroError

if TYPE_CHECKING:
    from hf_zero_plugin.engine.engine import ZeroEngine
    from hf_zero_plugin.engine.master_weights import Home

__all__ = ["full_grad", "full_state", "local_grad", "local_state", "set_full_state", "set_local_state"]


def _find(param: nn.Parameter) -> tuple[ZeroEngine, BucketLayout, Slot] | None:
    for engine in engines_of([param]):
        index = engine.parts.index_of(param)
        for layout in engine.parts.layouts:
            for slot in layout.slots:
                if slot.spec.index == index:
                    return engine, layout, slot
    return None


def _slices(engine: ZeroEngine, layout: BucketLayout, slot: Slot, kind: str) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, end, tensor) of this rank's parts of a state, in elements of the parameter; to be read only."""
    for home, index, start, end, part in _places(engine, layout, slot):
        tensors = home.tensors(index)
        if kind in tensors:
            yield start, end, tensors[kind].reshape(-1)[part]


def _editable(engine: ZeroEngine, layout: BucketLayout, slot: Slot, kind: str) -> Iterator[tuple[int, int, Tensor]]:
    """As ``_slices``, to be changed in place before the next one is asked for."""
    for home, index, start, end, part in _places(engine, layout, slot):
        with home.edit(index) as tensors:
            if kind in tensors:
                yield start, end, tensors[kind].view(-1)[part]


def _check_kind(engine: ZeroEngine, slot: Slot, kind: str) -> None:
    """Ranks agree, whether they own a part of the parameter or not: any piece of theirs tells."""
    assert engine.parts.masters is not None
    known: set[str] = set()
    for home, index, _ in engine.parts.masters.pieces():
        known |= home.tensors(index).keys()
        if kind in known:
            return
    # Some optimizers make their states in the first step.
    if known and engine.global_steps > engine.skipped_steps:
        names = ", ".join(repr(name) for name in sorted(known - {"master"}))
        raise HfZeroError(f"{slot.spec.name}: the optimizer has no state {kind!r}; it has {names or 'none'}.")


def _check_size(engine: ZeroEngine, slot: Slot, value: Tensor, wanted: int, *, is_part: bool, together: bool) -> None:
    """``together``: every rank of the engine calls, and where one is wrong, all raise."""
    given, name = value.numel(), slot.spec.name
    fix = (
        "safe_set_local_* takes this rank's part, as safe_get_local_* gives it; safe_set_full_* the whole parameter, "
        "on every rank."
    )
    others = _sizes_of_all(engine, slot, given, wanted) if together and engine.world_size > 1 else {}
    if given != wanted:
        what = "this rank's part of the parameter" if is_part else "the parameter"
        raise HfZeroError(f"{name}: the value to set has {given} elements, {what} has {wanted}. {fix}")
    for rank, (theirs, due) in others.items():
        if theirs != due:
            what = "that rank's part of the parameter" if is_part else "the parameter"
            raise HfZeroError(
                f"{name}: the value to set has {theirs} elements on rank {rank}, {what} has {due}; no rank has changed "
                f"anything. {fix}"
            )


def _sizes_of_all(engine: ZeroEngine, slot: Slot, given: int, wanted: int) -> dict[int, tuple[int, int]]:
    """(elements given, elements wanted) by global rank. Collective."""
    sizes = torch.empty(2 * engine.world_size, dtype=torch.int64, device=engine.device)
    with engine.watchdog.during(f"setting values of {slot.spec.name}"):
        all_gather_flat(sizes, sizes.new_tensor([given, wanted]), engine.group)
    ranks = dist.get_process_group_ranks(engine.group or dist.group.WORLD)
    return {rank: (theirs, due) for rank, (theirs, due) in zip(ranks, sizes.view(-1, 2).tolist())}


def _places(engine: ZeroEngine, layout: BucketLayout, slot: Slot) -> Iterator[tuple[Home, int, int, int, slice]]:
    """Yield (home, index of the piece, start, end, what of the piece) of this rank's parts of a parameter."""
    assert engine.parts.masters is not None
    for home, index, piece in engine.parts.masters.pieces():
        start, end = max(piece.start, slot.start), min(piece.end, slot.end)
        if piece.bucket == layout.index and start < end:
            first = slot.spec.offset - slot.start
            yield home, index, start + first, end + first, slice(start - piece.start, end - piece.start)


def local_state(param: nn.Parameter, kind: str) -> Tensor | None:
    """This rank's slice of "master" or an optimizer state, fp32 on the host or device where it lives; a copy."""
    found = _find(param)
    if found is None:
        return None
    engine, layout, slot = found
    engine.synchronize()
    _check_kind(engine, slot, kind)
    parts = [tensor for _, _, tensor in _slices(engine, layout, slot, kind)]
    return torch.cat(parts).float() if parts else torch.empty(0)


def full_state(param: nn.Parameter, kind: str) -> Tensor | None:
    """The whole "master" or optimizer state in the parameter's shape, fp32, on the engine's device."""
    found = _find(param)
    if found is None:
        return None
    engine, layout, slot = found
    engine.synchronize()
    _check_kind(engine, slot, kind)
    out = torch.zeros(slot.spec.full_numel, device=engine.device)
    for start, end, tensor in _slices(engine, layout, slot, kind):
        out[start:end] = tensor.to(engine.device)
    if engine.parts.sharding.num_shards > 1:
        dist.all_reduce(out, group=engine.group)
    return out.view(slot.spec.full_shape)


def set_local_state(param: nn.Parameter, value: Tensor, kind: str) -> None:
    """Overwrite this rank's slice of "master" or an optimizer state.

    Raises:
        HfZeroError: the value has another size than the slice; on every rank alike where setting is collective.
    """
    found = _find(param)
    if found is None:
        return
    engine, layout, slot = found
    engine.synchronize()
    _check_kind(engine, slot, kind)
    numel = sum(end - start for *_, start, end, _ in _places(engine, layout, slot))
    together = slot.spec.whole_shape is None and (kind == "master" or engine.parts.sharding.num_shards == 1)
    _check_size(engine, slot, value, numel, is_part=True, together=together)
    offset = 0
    for start, end, tensor in _editable(engine, layout, slot, kind):
        tensor.copy_(value.reshape(-1)[offset : offset + end - start])
        offset += end - start
    _publish(engine, layout, kind)


def set_full_state(param: nn.Parameter, value: Tensor, kind: str) -> None:
    """Overwrite the whole master or state; every rank must call with the same value.

    Raises:
        HfZeroError: the value has another size than the parameter, here or on another rank.
    """
    found = _find(param)
    if found is None:
        return
    engine, layout, slot = found
    engine.synchronize()
    _check_kind(engine, slot, kind)
    _check_size(engine, slot, value, slot.spec.full_numel, is_part=False, together=True)
    for start, end, tensor in _editable(engine, layout, slot, kind):
        tensor.copy_(value.reshape(-1)[start:end])
    _publish(engine, layout, kind)


def _publish(engine: ZeroEngine, layout: BucketLayout, kind: str) -> None:
    engine.parts.states_changed()
    if kind == "master":
        engine.parts.publish_masters({layout.index})


def local_grad(param: nn.Parameter) -> Tensor | None:
    """This rank's slice of the reduced gradient between backward and step, loss scale taken out, fp32, flat."""
    found = _find(param)
    if found is None or found[0].parts.grads is None:
        return None
    engine, layout, slot = found
    low, high = layout.shard_range(engine.parts.sharding.shard_of(layout))
    start, end = max(low, slot.start), min(high, slot.end)
    assert engine.parts.grads is not None
    shard = engine.parts.grads.shard(layout.index)
    return shard[start - low : max(start, end) - low].float() / engine.loss_scale


def full_grad(param: nn.Parameter) -> Tensor | None:
    """The whole reduced gradient between backward and step, in the parameter's shape, fp32."""
    found = _find(param)
    local = local_grad(param)
    if found is None or local is None:
        return None
    engine, layout, slot = found
    low, _ = layout.shard_range(engine.parts.sharding.shard_of(layout))
    out = torch.zeros(slot.spec.full_numel, device=engine.device)
    start = max(low, slot.start) - slot.start + slot.spec.offset
    if local.numel():
        out[start : start + local.numel()] = local
    if engine.parts.sharding.num_shards > 1:
        dist.all_reduce(out, group=engine.group)
    return out.view(slot.spec.full_shape)
