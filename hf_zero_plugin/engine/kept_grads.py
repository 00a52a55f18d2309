"""Several ranks, weights in host memory: what FSDP2 has reduced stays on the device.

FSDP2 sends gradients to where their parameters are. An update that streams through the device reads them there, so two
bytes a parameter would cross the link twice, and the host would have to add them up. For the time of a reduction FSDP2
is told that its parameters are on the device, and each result is handed over in the place of a ``.grad``, which a
parameter in host memory could not hold. Like ``fsdp.py`` this file knows its insides.

The stand-ins sit on the model's FSDP2 groups, which outlive an engine: they keep nothing of it alive, and once it is
gone they do what FSDP2 does. A later engine's take their place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

from hf_zero_plugin.engine.fsdp import ShardedParam

__all__ = ["give_back", "keep_on_device"]

Owner = TypeVar("Owner")

_OURS = {"group": "post_backward", "handle": "to_sharded_dtensor"}


def keep_on_device(items: Iterable[ShardedParam], owner: Owner, take: Callable[[Owner, str, Tensor], None]) -> None:
    """``take(owner, name, grad)`` with this rank's rows of each reduced gradient, on the stream that reduced it.

    ``take`` itself must not hold ``owner``. The memory of ``grad`` is given to others in that stream's order. All of
    ``items`` are offloaded.
    """
    reference = weakref.ref(owner)
    handles: dict[int, list[Any]] = {}
    groups: dict[int, Any] = {}
    for item in items:
        item.handle.to_sharded_dtensor = _hand_over(item, reference, take)
        groups[id(item.group)] = item.group
        handles.setdefault(id(item.group), []).append(item.handle)
    for key, group in groups.items():
        group.post_backward = _reduce_on_device(group, handles[key], reference)


def give_back(items: Iterable[ShardedParam]) -> None:
    """Undo ``keep_on_device``."""
    for item in items:
        vars(item.handle).pop(_OURS["handle"], None)
        vars(item.group).pop(_OURS["group"], None)


def _hand_over(item: ShardedParam, reference: Any, take: Callable[[Any, str, Tensor], None]) -> Callable[[Tensor], Any]:
    handle, name = item.handle, item.name

    def to_sharded_dtensor(tensor: Tensor) -> Any:
        owner = reference()
        if owner is None:
            return type(handle).to_sharded_dtensor(handle, tensor)
        take(owner, name, tensor)
        return None

    return to_sharded_dtensor


def _reduce_on_device(group: Any, handles: Iterable[Any], reference: Any) -> Callable[..., None]:
    """Of ``handles`` alone: what others of the group get, nobody takes, and it belongs where they are."""

    def post_backward(*unused: Any) -> None:
        stays = reference() is not None
        for handle in handles:
            handle.offload_to_cpu = not stays
        try:
            type(group).post_backward(group, *unused)
        finally:
            for handle in handles:
                handle.offload_to_cpu = True

    return post_backward
