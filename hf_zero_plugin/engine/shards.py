"""The sharded parameters of one stage 3 engine: gathering them whole, writing them back, waiting before they are read.

FSDP2 gathers for ``forward`` and ``backward``. Everybody else, who wants to see or change a whole parameter, comes
here. Letters: W = ranks, C = elements of rank 0's shard (the largest), so a gathered parameter has W * C elements with
padding at its end.
"""

from __future__ import annotations

import enum
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from hf_zero_plugin.engine.collectives import all_gather_flat
from hf_zero_plugin.engine.fsdp import (
    ShardedParam,
    describe_gathered,
    drop_pending,
    fsdp_modules,
    groups_of,
    reshard_all,
    sharded_params,
)
from hf_zero_plugin.engine.gathered_units import take_off
from hf_zero_plugin.engine.master_weights import MasterWeights
from hf_zero_plugin.engine.watchdog import Watchdog

__all__ = ["Shards", "Span", "ZeroParamStatus", "living_shards", "span_of", "watch_evaluation"]

FORWARD_METHODS = ("generate",)
"""Methods of Hugging Face models that run parts of the model without going through its ``forward`` first."""

PART_NUMEL = 2**19
"""Elements that travel at once when a parameter is collected: no more of it need be there twice."""

_numbers = itertools.count()
_living: weakref.WeakValueDictionary[int, Shards] = weakref.WeakValueDictionary()


def living_shards() -> list[Shards]:
    """Of every model that is sharded, engine or not, in the order in which they were made."""
    return [shards for _, shards in sorted(_living.items())]


class ZeroParamStatus(enum.Enum):
    """What ``param.ds_status`` says."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Span(NamedTuple):
    """This rank's part of a parameter: elements [start, end) of it flattened, and the padding behind them."""

    start: int
    end: int
    padding: int


def span_of(shape: Sequence[int], rank: int, world_size: int) -> Span:
    """How FSDP2 cuts: equal numbers of rows, rounded up; the last ranks may get fewer, or none."""
    rows, row = shape[0], torch.Size(shape[1:]).numel()
    share = -(-rows // world_size)
    start, end = min(rank * share, rows), min((rank + 1) * share, rows)
    return Span(start * row, end * row, (share - (end - start)) * row)


class Shards:
    """See the module. ``close`` takes off everything that this class has put on; FSDP2's own hooks stay."""

    def __init__(self, model: nn.Module, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self.model = model
        self.device = device
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.params = sharded_params(model)
        self.by_name = {item.name: item for item in self.params}
        self._by_id = {id(item.param): item for item in self.params}
        self._originals: list[nn.Parameter] = []
        self._shapes = {id(item.handle): item.param.shape for item in self.params}
        self._indices = {id(item.handle): index for index, item in enumerate(self.params)}
        self._guarded: list[Any] = []
        self.watchdog: Watchdog | None = None
        self.transfers: Any = None
        """``UnitTransfers`` of a lone rank."""
        self.number = next(_numbers)
        """Engines are made in the same order on every rank."""
        self._describe()
        # The model keeps this alive as long as it is sharded, and a later engine's takes its place.
        model._zero_shards = self  # type: ignore[assignment]
        _living[self.number] = self

    def _describe(self) -> None:
        """The attributes by which libraries tell what a parameter is, on every object that may stand for one."""
        handles = {id(item.param): item for item in self.params}
        for index, param in enumerate(self.model.parameters()):
            item = handles.get(id(param))
            known = {"ds_id": index, "ds_shape": param.shape, "ds_numel": param.shape.numel()}
            available = {**known, "ds_status": ZeroParamStatus.AVAILABLE}
            vars(param).update(available if item is None else {**known, "ds_status": ZeroParamStatus.NOT_AVAILABLE})
            if item is not None:
                describe_gathered(item, available)

    def remember(self, originals: dict[str, nn.Parameter]) -> None:
        """Parameters as they were before sharding, by name: whoever still holds one is understood."""
        self._originals += originals.values()  # kept, so that their ids are not given to others
        self._by_id.update({id(param): self.by_name[name] for name, param in originals.items()})

    def name_of(self, handle: Any) -> str:
        return self.params[self._indices[id(handle)]].name

    def index(self, item: ShardedParam) -> int:
        """The same on every rank."""
        return self._indices[id(item.handle)]

    def is_original(self, param: nn.Parameter) -> bool:
        return any(param is original for original in self._originals)

    def shape(self, item: ShardedParam) -> torch.Size:
        """Of the whole parameter."""
        return self._shapes[id(item.handle)]

    @property
    def ids(self) -> set[int]:
        """Of everything that ``find`` understands, but for gathered parameters."""
        return set(self._by_id)

    def find(self, param: Tensor) -> ShardedParam | None:
        """By the parameter as it is between uses, while it is gathered, or as it was before sharding."""
        found = self._by_id.get(id(param))
        if found is None:
            found = next((item for item in self.params if vars(item.handle).get("_unsharded_param") is param), None)
        return found

    def reshard(self) -> None:
        reshard_all(self.model)

    # ---------------------------------------------------------------- whole parameters

    @torch.no_grad()
    def gather(self, item: ShardedParam) -> Tensor:
        """The whole parameter on the compute device, in its own type. Collective."""
        padded = item.padded.to(self.device)
        shape = self.shape(item)
        if self.world_size == 1:
            return padded.clone().view(shape) if padded is item.padded else padded.view(shape)
        whole = padded.new_empty(padded.numel() * self.world_size)
        during = self.watchdog.during if self.watchdog is not None else nullcontext
        with during(f"gathering parameter {item.name}"):
            all_gather_flat(whole, padded, self.group)
        return whole[: shape.numel()].view(shape)

    @torch.no_grad()
    def collect(self, item: ShardedParam) -> Tensor:
        """The whole parameter in host memory on rank 0, nothing elsewhere. Collective.

        Rank 0's host has the parameter once; beside it every device has ``PART_NUMEL`` elements on their way.
        """
        if self.world_size == 1:
            return self.gather(item).cpu()
        shape = self.shape(item)
        whole = torch.empty(shape.numel() if self.rank == 0 else 0, dtype=item.padded.dtype)
        for rank in range(self.world_size):
            span = span_of(shape, rank, self.world_size)
            if rank > 0:
                self._send_rows(item, rank, span, whole)
            elif self.rank == 0:
                whole[: span.end].copy_(item.padded[: span.end])
        return whole.view(shape) if self.rank == 0 else whole

    def _send_rows(self, item: ShardedParam, source: int, span: Span, whole: Tensor) -> None:
        """From rank ``source`` into ``whole`` of rank 0. Collective: a backend may not send from one rank to one."""
        during = self.watchdog.during if self.watchdog is not None else nullcontext
        global_source = source if self.group is None else dist.get_global_rank(self.group, source)
        for start in range(span.start, span.end, PART_NUMEL):
            end = min(start + PART_NUMEL, span.end)
            if self.rank == source:
                part = item.padded[start - span.start : end - span.start].to(self.device)
            else:
                # Not ``whole`` itself: a backend's thread may hold on to it when everybody else has let it go.
                part = torch.empty(end - start, dtype=item.padded.dtype, device=self.device)
            with during(f"collecting parameter {item.name}"):
                dist.broadcast(part, src=global_source, group=self.group)
            if self.rank == 0:
                whole[start:end].copy_(part)

    @torch.no_grad()
    def write(self, item: ShardedParam, whole: Tensor) -> None:
        """Take this rank's rows of ``whole`` as the new shard. The caller sees to it that ranks agree."""
        span = span_of(self.shape(item), self.rank, self.world_size)
        drop_pending(item.group)
        item.padded[: span.end - span.start].copy_(whole.reshape(-1)[span.start : span.end])
        if item.group.is_unsharded:
            item.handle.unsharded_param.data.copy_(whole)

    def state_dict(self, keep: Callable[[str], bool]) -> dict[str, Tensor]:
        """The model's state dict with whole tensors in host memory on rank 0, nothing elsewhere. Collective.

        One parameter at a time is collected, so that ranks other than 0 need no memory but for some rows of one.
        Names that share a parameter share its tensor.
        """
        self.reshard()
        done: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if not keep(name):
                continue
            if not isinstance(value, Tensor):
                if self.rank == 0:
                    state[name] = value
                continue
            if id(value) not in done:
                item = self.find(value)
                whole = self.collect(item) if item is not None else value.detach()
                done[id(value)] = whole.cpu() if self.rank == 0 else torch.empty(0)
            if self.rank == 0:
                state[name] = done[id(value)]
        return state

    # ---------------------------------------------------------------- hooks

    def guard(self, masters: MasterWeights, bucket_of: dict[str, int]) -> None:
        """Let every gather wait for the updates of what it reads. ``bucket_of``: trained parameter -> bucket."""
        buckets_of = {id(self.by_name[name].handle): bucket for name, bucket in bucket_of.items()}
        for module in fsdp_modules(self.model):
            for group in groups_of(module):
                buckets = sorted({buckets_of[id(h)] for h in group.fsdp_params if id(h) in buckets_of})
                _guard_unshard(group, masters, buckets, self)
                self._guarded.append(group)

    def close(self) -> None:
        self.reshard()
        if self.transfers is not None:
            self.transfers.close()
            self.transfers = None
        for group in self._guarded:
            take_off(group, ["unshard"])
        self._guarded.clear()


class _Evaluation:
    """After a forward pass without gradients nothing stays gathered; methods that bypass ``forward`` count as one.

    Belongs to the model, not to an engine: a model stays sharded, and usable, when its engine is destroyed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._depth = 0
        model.register_forward_hook(self._after_forward, always_call=True)
        for name in FORWARD_METHODS:
            if callable(getattr(model, name, None)):
                register_fsdp_forward_method(model, name)
                vars(model)[name] = self._counted(model, vars(model)[name])

    def _after_forward(self, module: nn.Module, *_: Any) -> None:
        if not torch.is_grad_enabled() and not self._depth:
            reshard_all(module)

    def _counted(self, model: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                self._after_forward(model)

        return call


def watch_evaluation(model: nn.Module) -> None:
    """Once per model."""
    if not hasattr(model, "_zero_evaluation"):
        model._zero_evaluation = _Evaluation(model)  # type: ignore[assignment]


def _guard_unshard(group: Any, masters: MasterWeights, buckets: Iterable[int], shards: Shards) -> None:
    """Shadow ``group.unshard``: every gather, of forward, backward or prefetching, goes through it."""
    original, is_alone = type(group).unshard, shards.world_size == 1
    reference = weakref.ref(shards)
    names = [shards.name_of(handle) for handle in group.fsdp_params]
    parameters = f"parameters {names[0]} to {names[-1]}" if len(names) > 1 else f"parameter {names[0]}"

    def unshard(async_op: bool = False) -> Any:
        if masters.any_pending:
            with _reading_stream(group, async_op, is_alone):
                for bucket in buckets:
                    masters.wait(bucket)
        mine = reference()
        if mine is None or mine.watchdog is None:
            return original(group, async_op)
        unit = group._module_fqn or "the root"
        mine.watchdog.last_gathered = unit
        with mine.watchdog.during(f"gathering {unit} ({parameters})"):
            return original(group, async_op)

    group.unshard = unshard


def _reading_stream(group: Any, async_op: bool, is_alone: bool) -> AbstractContextManager[Any]:
    """FSDP2 reads shards on a stream of its own, ordered after the compute stream only when a forward pass begins."""
    if group.device.type != "cuda" or is_alone or not hasattr(group.comm_ctx, "all_gather_stream"):
        return nullcontext()
    return torch.cuda.stream(group.comm_ctx.get_all_gather_streams(async_op, group._training_state)[0])
