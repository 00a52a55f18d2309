"""fp32 master weights and optimizer states: what a home for them must do, and all homes of an engine together.

A home is given pieces of buckets and steps them. Three homes exist::

    DeviceHome     states stay on the device; the update runs on the compute stream       (device_home.py)
    StreamedHome   states stay in page-locked host memory and pass through the device     (offload_stream.py)
    HostHome       states stay on the host and a background thread updates them there     (offload_host.py)

``MasterWeights`` joins the homes of one engine and answers "is bucket b up to date?" for the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_zero_plugin.engine.buckets import BucketLayout, Piece
from hf_zero_plugin.engine.grad_hooks import when_grad_is_there
from hf_zero_plugin.engine.gradients import GradientStore
from hf_zero_plugin.engine.optimizers import UpdateRule
from hf_zero_plugin.engine.piece_states import FP32, StateTypes
from hf_zero_plugin.errors import HfZeroError

if TYPE_CHECKING:
    from hf_zero_plugin.engine.timeline import Timeline

__all__ = ["Context", "Home", "MasterWeights", "StepInputs"]


class StepInputs(NamedTuple):
    """Everything one optimizer step needs to know, fixed at the moment it is launched."""

    number: int
    """This update counted from 1; skipped steps do not count."""
    groups: list[dict[str, Any]]
    """Hyperparameters per param group, copied: the schedule may move on while the step still runs."""
    multiplier: Tensor | None
    """0-dim fp32: factor for the stored gradients (clip coefficient / loss scale); None means 1."""
    found_inf: Tensor | None
    """0-dim fp32 flag for rules that skip on the device; None when the host has looked already."""


class Context(NamedTuple):
    """What every home shares."""

    rule: UpdateRule
    weights: Sequence[Tensor]
    """Flat weights per bucket, shape (P,)."""
    grads: GradientStore
    finish_bucket: Callable[[int, object], None]
    """Called by a home, on its stream or thread, when it has updated its part of a bucket: the last home to do so
    clears the gradient and gathers the other ranks' shards."""
    device: torch.device
    is_alone: bool
    """One rank: nothing to gather, and clearing the gradient of one's own pieces clears all of it."""
    groups: Sequence[dict[str, Any]]
    """The param groups, for the initial values of states."""
    types: StateTypes = FP32
    sums_in_fp32: bool = False
    """Gradients of several micro-steps are added up in fp32, whatever the type of the weights."""

    def grad_of(self, piece: Piece) -> Tensor:
        return self.grads.part(piece.bucket, piece.start, piece.end)

    def widen_grad(self, piece: Piece, out: Tensor) -> None:
        """The gradient of a piece as fp32 (n,) in ``out``, which should be the same memory every time."""
        self.grads.widen(piece.bucket, piece.start, piece.end, out)

    def clear_grad(self, piece: Piece) -> None:
        """Forget a consumed gradient, on the current stream. With several ranks ``finish_bucket`` does it for all."""
        if self.is_alone:
            self.grads.clear_part(piece.bucket, piece.start, piece.end)

    def weight_of(self, piece: Piece) -> Tensor:
        return self.weights[piece.bucket][piece.start : piece.end]


class Home:
    """Holds masters and states of some pieces and updates them."""

    timeline: Timeline | None = None
    """Told when work begins and ends, if somebody watches."""
    is_broken = False
    """An error has interrupted an update."""

    def __init__(self, context: Context, pieces: Sequence[Piece]) -> None:
        self.context = context
        self.pieces = list(pieces)
        self.last_piece_of_bucket = {piece.bucket: index for index, piece in enumerate(self.pieces)}

    def set_master(self, index: int, values: Tensor) -> None:
        """Set the master of piece ``index`` from fp32 values and start its states afresh. ``values`` may be aliased."""
        raise NotImplementedError

    def step(self, inputs: StepInputs) -> None:
        """Launch the update of all pieces; may return before it is done."""
        raise NotImplementedError

    def launch_rest(self) -> None:
        """Launch what ``step`` has left for later, if there is any: its caller may read numbers first."""

    def start_backward(self) -> None:
        """A backward pass begins."""

    def prefetch(self) -> None:
        """A step follows the backward pass that is under way: fetch what it needs first, if there is room."""

    def forget_prefetched(self) -> None:
        """States were written from outside: what was fetched ahead is stale."""

    @property
    def skips_on_device(self) -> bool:
        return self.context.rule.skips_on_device

    def wait(self, bucket: int) -> None:
        """Order the current stream (or this thread) after the last update of ``bucket``."""

    def synchronize(self) -> None:
        """Block until the masters and states can be read by the host."""

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Master ("master") and states of a piece by name, (S,) in the types of the context, plus 0-dim extras.

        Call synchronize first.
        """
        raise NotImplementedError

    @contextmanager
    def edit(self, index: int) -> Iterator[dict[str, Tensor]]:
        """``tensors``, to be changed in place inside the context."""
        yield self.tensors(index)

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        for name, target in self.tensors(index).items():
            if name in tensors:
                target.copy_(tensors[name].view_as(target))

    def close(self) -> None:
        """Release threads and page-locked memory."""

    @property
    def num_bytes(self) -> dict[str, int]:
        raise NotImplementedError

    @property
    def is_on_host(self) -> bool:
        return False


class MasterWeights:
    """All homes of one engine. Pieces of one bucket may live in different homes."""

    def __init__(self, homes: Sequence[Home], grads: GradientStore, num_buckets: int) -> None:
        self.homes = [home for home in homes if home.pieces]
        self._grads = grads
        self.num_buckets = num_buckets
        self._pending = [False] * num_buckets
        self.any_pending = False
        # A bucket is finished by the last home that holds a part of it; earlier ones must not gather it.
        self.finisher = {piece.bucket: home for home in self.homes for piece in home.pieces}
        self._timeline: Timeline | None = None
        self._prefetches = False
        self._handles: list[RemovableHandle] = []

    def watch(self, timeline: Timeline) -> None:
        self._timeline = timeline
        for home in self.homes:
            home.timeline = timeline

    @property
    def skips_on_device(self) -> bool:
        """A step may be launched before the host knows whether it must be skipped."""
        return all(home.skips_on_device for home in self.homes)

    @property
    def is_broken(self) -> bool:
        return any(home.is_broken for home in self.homes)

    def _refuse_if_broken(self) -> None:
        if self.is_broken:
            raise HfZeroError(
                "an update of the weights was interrupted by an error, so that some have their new values and others "
                "do not: destroy this engine, make a new one, and load a checkpoint."
            )

    @contextmanager
    def _breaking(self, by: type[BaseException] = Exception) -> Iterator[None]:
        """An error inside leaves no home to go on with. Who only waits may be interrupted and wait again."""
        try:
            yield
        except by:
            for home in self.homes:
                home.is_broken = True
            raise

    def start_backward(self, *, prefetch: bool) -> None:
        """Gradients are about to be overwritten: the last update must have consumed them."""
        self._refuse_if_broken()
        self.wait_all()
        self._prefetches = prefetch
        for home in self.homes:
            home.start_backward()

    def prefetch_after(self, layouts: Sequence[BucketLayout], params: Sequence[nn.Parameter]) -> None:
        """Fetch states as the backward pass frees memory: when a bucket's last gradient is due."""
        for layout in layouts[::2]:  # looking for room has a price, and every second time is enough
            first = min(slot.spec.index for slot in layout.slots)
            self._handles.append(when_grad_is_there(params[first], self, lambda masters, _: masters.prefetch_if_due()))

    def prefetch_if_due(self) -> None:
        """Within a backward pass that a step follows: fetch states into memory that has become free."""
        if self._prefetches:
            for home in self.homes:
                home.prefetch()

    def step(self, inputs: StepInputs) -> None:
        self._refuse_if_broken()
        self._pending = [True] * self.num_buckets
        self.any_pending = True
        with self._breaking(BaseException):
            # Homes on the device first: the streamed and host homes order themselves after the compute stream.
            for home in self.homes:
                home.step(inputs)

    def launch_rest(self) -> None:
        """The caller of ``step`` goes on. Nobody needs to say so: whoever waits for a bucket does."""
        with self._breaking(BaseException):
            for home in self.homes:
                home.launch_rest()

    def wait(self, bucket: int) -> None:
        self._refuse_if_broken()
        if self._pending[bucket]:
            self.launch_rest()
            timeline = self._timeline
            started = timeline.begin() if timeline is not None else None
            with self._breaking():
                for home in self.homes:
                    home.wait(bucket)
            self._pending[bucket] = False  # not before: a wait may be interrupted, and then others must wait
            self._grads.release(bucket)
            if timeline is not None and started is not None:
                timeline.end("wait", started)

    def wait_all(self) -> None:
        if self.any_pending:
            for bucket in range(self.num_buckets):
                self.wait(bucket)
            self.any_pending = False

    def synchronize(self) -> None:
        self._refuse_if_broken()
        self.wait_all()
        with self._breaking():
            for home in self.homes:
                home.synchronize()

    def pieces(self) -> Iterator[tuple[Home, int, Piece]]:
        for home in self.homes:
            for index, piece in enumerate(home.pieces):
                yield home, index, piece

    @torch.no_grad()
    def refresh_from_weights(self, buckets: set[int] | None = None) -> None:
        """Somebody changed the weights (of ``buckets``, or all): take them as the new masters, keep the states."""
        self.synchronize()
        for home, index, piece in self.pieces():
            if buckets is not None and piece.bucket not in buckets:
                continue
            weight, master = home.context.weight_of(piece), home.tensors(index)["master"].view(-1)
            if weight.data_ptr() == master.data_ptr():
                continue
            # An element that still is the narrowed master keeps the master's extra bits.
            given = weight.to(master.device)
            kept = torch.where(given == master.to(given.dtype), master, given.float())
            home.load(index, {"master": kept})

    @torch.no_grad()
    def write_weights(self, buckets: set[int] | None = None) -> None:
        """Narrow the masters (of ``buckets``, or all) into the weights (this rank's shard of them)."""
        self.synchronize()
        for home, index, piece in self.pieces():
            if buckets is not None and piece.bucket not in buckets:
                continue
            master = home.tensors(index)["master"].view(-1)
            weight = home.context.weight_of(piece)
            if weight.data_ptr() != master.data_ptr():
                weight.copy_(master)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        with ExitStack() as stack:  # all of them, whatever one of them raises
            for home in self.homes:
                stack.callback(home.close)
