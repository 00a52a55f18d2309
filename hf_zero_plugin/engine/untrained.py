"""What a checkpoint holds beside trained parameters, frozen weights and buffers: written and read one at a time.

::

    every rank       names, shapes, types: the order of the file
    one that writes  header | ask for "a" | write | ask for "b" | write | ...
    the others              | rows of "a" |       | rows of "b" |

Every rank knows the order, so nobody has to say what comes next. The memory above the shards is one whole parameter
on the host of a rank that writes; on every device a part of it, or all of it where several ranks write.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor

from hf_zero_plugin.checkpoint.format import reading
from hf_zero_plugin.checkpoint.stream import order_in_file, stream_safetensors
from hf_zero_plugin.engine.fsdp import ShardedParam
from hf_zero_plugin.engine.pending import Pending, values_of

if TYPE_CHECKING:
    from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["load_untrained", "write_untrained"]


def write_untrained(engine: ZeroEngine, file: Path, *, writes: bool, exclude_frozen: bool) -> None:
    """Collective at stage 3. ``writes``: this rank writes ``file``; elsewhere it is not touched.

    Raises:
        CheckpointError: a tensor is of a type that the file does not store.
    """
    engine.parts.reshard()
    tensors = {
        name: _pending(engine, name, t) for name, t in _untrained(engine, with_frozen=not exclude_frozen).items()
    }
    rest = order_in_file(tensors)

    def values(tensor: Tensor) -> Tensor:
        rest.pop(0)
        return values_of(tensor)

    try:
        if writes:
            stream_safetensors(tensors, file, values=values)
    finally:  # also where writing fails: the other ranks serve until all have been asked for
        for name in rest:
            values_of(tensors[name])


def load_untrained(engine: ZeroEngine, file: Path, stored: safe_open) -> None:
    """Take over what ``stored``, the opened ``file``, has for this model. Every rank reads its own rows."""
    engine.parts.reshard()
    shards, targets = engine.parts.shards, _untrained(engine, with_frozen=True)
    for name in stored.keys():  # noqa: SIM118 - not a dict
        item = shards.by_name.get(name) if shards is not None else None
        if item is None and name not in targets:
            continue
        with reading(file):
            values = stored.get_tensor(name)
        if shards is not None and item is not None:
            shards.write(item, values)
        else:
            targets[name].copy_(values)


def _untrained(engine: ZeroEngine, *, with_frozen: bool) -> dict[str, Tensor]:
    """Buffers and frozen parameters as they are on this rank, by name; the same names on every rank."""
    tensors = dict(engine.module.named_buffers())
    if with_frozen:
        trained = {slot.spec.name for layout in engine.parts.layouts for slot in layout.slots}
        tensors.update({name: p.data for name, p in engine.module.named_parameters() if name not in trained})
    return tensors


def _pending(engine: ZeroEngine, name: str, tensor: Tensor) -> Tensor:
    shards = engine.parts.shards
    if shards is None or name not in shards.by_name:
        return Pending.of(tensor.shape, tensor.dtype, lambda: tensor)
    item = shards.by_name[name]
    # ``collect`` serves rank 0 alone; with storage of its own, a rank of every node writes.
    gather: Callable[[ShardedParam], Tensor]
    gather = shards.gather if engine.settings.use_node_local_storage else shards.collect
    return Pending.of(shards.shape(item), item.padded.dtype, lambda: gather(item))
