"""Saving sharded weights while they are collected: rank 0 asks for one parameter at a time, the others serve.

::

    rank 0     names, shapes, types | plan files | ask for 17 | write | ask for 3 | write | ... | finish
    others     serve ----------------------------- send 17 ------------ send 3 ---------------- return

Rank 0 alone knows the order in which a file wants its tensors, and whether it wants all of them, so it tells the
others what comes next: 8 bytes a parameter. The memory above the shards is one whole parameter on rank 0's host, and
a small part of it on each device. Every rank must come to ``weights``, and rank 0 must leave the context, whatever
happens in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from hf_zero_plugin.engine.pending import Pending
from hf_zero_plugin.engine.shards import Shards
from hf_zero_plugin.errors import CollectiveError, HfZeroError

__all__ = ["WeightServer", "serving"]

_FINISH = -1


class WeightServer:
    """One saving. ``weights`` is the collective beginning; on rank 0 ``finish`` is the end."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._is_open = False

    def weights(self, keep: Callable[[str], bool]) -> dict[str, Tensor]:
        """The state dict: pending tensors on rank 0, at once; elsewhere empty, when rank 0 has finished.

        Names that share a parameter share its tensor.
        """
        self._shards.reshard()
        if self._shards.rank != 0:
            self._serve()
            return {}
        self._is_open = True
        state: dict[str, Tensor] = {}
        done: dict[int, Tensor] = {}
        for name, value in self._shards.model.state_dict(keep_vars=True).items():
            if keep(name):
                if id(value) not in done:
                    done[id(value)] = self._pending(value) if isinstance(value, Tensor) else value
                state[name] = done[id(value)]
        return state

    def _pending(self, value: Tensor) -> Tensor:
        item = self._shards.find(value)
        if item is None:
            return Pending.of(value.shape, value.dtype, lambda: value.detach().cpu())
        index = self._shards.index(item)
        return Pending.of(self._shards.shape(item), item.padded.dtype, lambda: self._gather(index))

    def _gather(self, index: int) -> Tensor:
        if not self._is_open:
            raise HfZeroError(
                "weights were asked for after they were saved: the state dict of a streamed saving holds for the time "
                "of the saving. Call accelerator.get_state_dict(engine) for one that stays."
            )
        self._tell(index)
        return self._shards.collect(self._shards.params[index])

    def _tell(self, number: int) -> int:
        shards = self._shards
        if shards.world_size == 1:
            return number
        source = 0 if shards.group is None else dist.get_global_rank(shards.group, 0)
        told = torch.tensor([number], dtype=torch.int64, device=shards.device)
        during = shards.watchdog.during if shards.watchdog is not None else nullcontext
        with during("saving weights"):
            dist.broadcast(told, src=source, group=shards.group)
        return int(told.item())

    def _serve(self) -> None:
        while (index := self._tell(_FINISH)) != _FINISH:
            self._shards.collect(self._shards.params[index])

    def finish(self) -> None:
        """On rank 0: let the others go. Calling it again, or on other ranks, does nothing."""
        if self._is_open:
            self._is_open = False
            self._tell(_FINISH)


@contextmanager
def serving(shards: Shards) -> Iterator[WeightServer]:
    """A server that is finished on the way out."""
    server = WeightServer(shards)
    try:
        yield server
    except BaseException:
        with suppress(RuntimeError, CollectiveError):  # if the others are gone, what has happened is what to tell
            server.finish()
        raise
    server.finish()
