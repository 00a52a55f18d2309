"""Making sharded parameters look whole for a while, to whoever holds them.

Between uses a sharded parameter is a DTensor, in the model and in everybody's lists. Inside ``gathered`` the very same
object answers every torch function as the whole tensor: its class is changed to one that puts the whole tensor in its
place. On the way out one rank's version is given to all and cut again, and the fp32 masters follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from hf_zero_plugin.engine.fsdp import ShardedParam
from hf_zero_plugin.engine.gathered_units import running_on
from hf_zero_plugin.engine.shards import Shards, ZeroParamStatus, living_shards
from hf_zero_plugin.errors import HfZeroError

__all__ = ["find_sharded", "gathered"]

_WHOLE = "_zero_whole"


class _Whole(DTensor):
    """A sharded parameter while it is gathered. Without slots of its own, so that an object may change into it."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_unwrap, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        whole: nn.Parameter = vars(self)[_WHOLE]
        return memo.setdefault(id(self), nn.Parameter(whole.detach().clone(), self.requires_grad))


def _unwrap(value: Any) -> Any:
    return vars(value)[_WHOLE] if type(value) is _Whole else value


def _whole_of(handle: Any) -> Tensor | None:
    found: Tensor | None = vars(handle.sharded_param).get(_WHOLE)
    return found


class _Found(NamedTuple):
    shards: Shards
    item: ShardedParam
    given: nn.Parameter

    @property
    def order(self) -> tuple[int, int]:
        """The same on every rank, whatever the order in which the caller named parameters."""
        return self.shards.number, self.shards.index(self.item)


def find_sharded(params: Iterable[nn.Parameter]) -> list[_Found]:
    """Those of ``params`` that FSDP2 holds, each once, in an order that all ranks share."""
    found: dict[tuple[int, int], _Found] = {}
    for param in params:
        for shards in living_shards():
            item = shards.find(param)
            if item is not None:
                place = _Found(shards, item, param)
                found.setdefault(place.order, place)
    return [found[order] for order in sorted(found)]


@contextmanager
def gathered(params: Iterable[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
    """Collective, on the way in and out. What is gathered already, by a context around this one, stays so.

    Args:
        modifier_rank: global rank whose changes everybody takes over; None: changes are dropped.

    Raises:
        HfZeroError: a parameter came back with another shape.
    """
    found = find_sharded(params)
    opened = [place for place in found if _open(place)]
    try:
        with ExitStack() as stack:
            for model in {id(place.shards): place.shards.model for place in opened}.values():
                stack.enter_context(running_on(model, _whole_of))
            yield
        if modifier_rank is not None:
            for place in found:
                _write_back(place, modifier_rank)
    finally:
        for place in opened:
            _close(place)


def _open(place: _Found) -> bool:
    param = place.item.param
    if type(param) is not DTensor:
        return False
    whole = nn.Parameter(place.shards.gather(place.item), requires_grad=param.requires_grad)
    vars(param)[_WHOLE] = whole
    vars(param)["ds_status"] = ZeroParamStatus.AVAILABLE
    param.__class__ = _Whole  # type: ignore[assignment]
    if place.shards.is_original(place.given):
        place.given.data = whole.data
    return True


def _close(place: _Found) -> None:
    param = place.item.param
    param.__class__ = DTensor  # type: ignore[assignment]
    vars(param).pop(_WHOLE, None)
    vars(param)["ds_status"] = ZeroParamStatus.NOT_AVAILABLE
    if place.shards.is_original(place.given):
        place.given.data = place.given.data.new_empty(0)


def _changed(place: _Found) -> Tensor:
    param = place.item.param
    if place.given is not param and place.given.shape == place.shards.shape(place.item):
        return place.given.data
    return vars(param)[_WHOLE].data if _WHOLE in vars(param) else place.shards.gather(place.item)


@torch.no_grad()
def _write_back(place: _Found, modifier_rank: int) -> None:
    shards, shape = place.shards, place.shards.shape(place.item)
    values = _changed(place)
    if values.shape != shape:
        raise HfZeroError(
            f"GatheredParameters: {place.item.name!r} came back with shape {tuple(values.shape)}, it had "
            f"{tuple(shape)}. A sharded parameter cannot change its shape; resize the model before the engine is made."
        )
    values = values.to(shards.device, place.item.padded.dtype).contiguous()
    if shards.world_size > 1:
        dist.broadcast(values, src=modifier_rank, group=shards.group)
    shards.write(place.item, values)
    whole = vars(place.item.param).get(_WHOLE)
    if whole is not None:  # a context around this one goes on with it
        whole.data.copy_(values)
