"""One rank: the weights of a unit come up when it needs them and its gradients are handed on, without collectives.

With one rank FSDP2 has nothing to gather or to reduce, but it still copies: weights from the host on the compute
stream, behind everything queued there, and every gradient twice. Here a unit's weights travel on a stream of their own,
while the unit before it computes, and gradients go from autograd straight to the gradient store::

    compute     unit 0        | unit 1        | unit 2        | ...
    weights up         unit 1 |        unit 2 |        unit 3 |

FSDP2 keeps the hooks, the order of prefetching, and the states of parameters. Like ``fsdp.py`` this file knows its
insides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from hf_zero_plugin.engine.fsdp import fsdp_modules, groups_of
from hf_zero_plugin.engine.fsdp_rooms import fill_room, room_for_whole
from hf_zero_plugin.engine.gathered_units import take_off
from hf_zero_plugin.engine.master_weights import MasterWeights
from hf_zero_plugin.engine.shards import Shards

__all__ = ["UnitTransfers"]

_OURS = ("unshard", "wait_for_unshard", "post_backward")


class UnitTransfers:
    """Stands in for three methods of every ``FSDPParamGroup`` of a model; ``close`` gives them back.

    Args:
        masters: waited for, bucket by bucket, before weights are read; None for evaluation only.
        bucket_of: trained parameter -> bucket.
        take: given the name and the gradient of a parameter, on the compute stream, once per use of its unit in a
            backward pass; the gradient is its own from then on. None leaves gradients to FSDP2.
    """

    def __init__(
        self,
        shards: Shards,
        masters: MasterWeights | None = None,
        bucket_of: Mapping[str, int] | None = None,
        take: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        assert shards.world_size == 1
        self._shards = shards
        self._masters = masters
        self._take = take
        self._names = {id(item.handle): item.name for item in shards.params}
        self._device = shards.device
        from_host = self._device.type == "cuda" and any(not item.padded.is_cuda for item in shards.params)
        self._stream = torch.cuda.Stream(self._device) if from_host else None
        self._groups = [group for module in fsdp_modules(shards.model) for group in groups_of(module)]
        for group in self._groups:
            names = [self._names[id(handle)] for handle in group.fsdp_params]
            self._attach(group, sorted({bucket_of[name] for name in names if name in (bucket_of or {})}))  # type: ignore[index]

    def _attach(self, group: Any, buckets: list[int]) -> None:
        def unshard(async_op: bool = False) -> None:
            self._start(group, buckets)

        def wait_for_unshard() -> None:
            self._finish(group)

        def post_backward(*unused: Any) -> None:
            self._collect(group)

        vars(group).update(unshard=unshard, wait_for_unshard=wait_for_unshard)
        if self._take is not None:
            vars(group).update(post_backward=post_backward)

    def close(self) -> None:
        for group in self._groups:
            take_off(group, _OURS)
        self._groups = []

    # ---------------------------------------------------------------- weights

    def _start(self, group: Any, buckets: list[int]) -> None:
        if group._all_gather_result is not None or group.is_unsharded:
            return
        if self._shards.watchdog is not None:
            self._shards.watchdog.last_gathered = group._module_fqn or "the root"
        # Allocated, used and freed in the order of the compute stream: the copy waits for what that had queued when
        # the room was made, so with one unit fetched ahead it runs while the unit before it computes.
        rooms = [room_for_whole(handle, 1, self._device) for handle in group.fsdp_params]
        with self._behind_compute() as event:
            if self._masters is not None and self._masters.any_pending:
                for bucket in buckets:
                    self._masters.wait(bucket)
            for room, handle in zip(rooms, group.fsdp_params):
                fill_room(room, handle._sharded_param_data)
        group._all_gather_result = AllGatherResult(rooms[0], event[0] if event else None, None, [], [], [])

    @contextmanager
    def _behind_compute(self) -> Iterator[list[torch.cuda.Event]]:
        """The stream of the copies; the list holds an event at its end, once it has been left."""
        event: list[torch.cuda.Event] = []
        if self._stream is None:
            yield event
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield event
        # The caller reads the event after the block.
        event.append(self._stream.record_event())

    def _finish(self, group: Any) -> None:
        result = group._all_gather_result
        if result is None:
            return
        if result.all_gather_event is not None:
            torch.cuda.current_stream(self._device).wait_event(result.all_gather_event)
        for handle in group.fsdp_params:
            handle.init_unsharded_param()
        group._to_unsharded()
        group._all_gather_result = None

    # ---------------------------------------------------------------- gradients

    def _collect(self, group: Any) -> None:
        assert self._take is not None
        group._training_state = TrainingState.POST_BACKWARD
        found: list[tuple[str, Tensor]] = []
        for handle in group.fsdp_params:
            param = vars(handle).get("_unsharded_param")
            if param is not None and param.grad is not None:
                found.append((self._names[id(handle)], handle.unsharded_grad_data))
                param.grad = None
        if group.reshard_after_backward:
            group.reshard()
        for name, grad in found:
            self._take(name, grad)
        if self._masters is not None:
            self._masters.prefetch_if_due()
