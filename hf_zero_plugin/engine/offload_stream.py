"""Offload without host arithmetic: states rest in page-locked host memory and pass through the device to be updated.

Three CUDA streams carry a piece of the states through a staging buffer::

    uploads     host -> buffer      while the backward pass still runs: states do not depend on gradients
    updates     buffer -> weights   when the gradient norm is known
    downloads   buffer -> host      while the next forward pass runs

PCIe carries both directions at once, so a parameter costs 12 bytes of one direction (Adam); on a x16 gen5 link that is
faster than host cores can read and write the same 28 bytes, and it leaves the cores alone. Gradients never leave the
device and weights never come back from the host, unless they are offloaded too (stage 3): then the new weights go down
in half precision, ahead of the states, and gradients that rest on the host come up. The host thread waits for nothing;
the forward pass waits per bucket, on the device.

How much is staged ahead decides how soon the next forward pass finds new weights. As the backward pass goes on it frees
activations, and staging takes that memory: never more than the device held when the pass began, and no more than half
of the states, since the other half is needed later than it takes to bring it. ``num_slots`` buffers are there in any
case; what was not staged ahead passes through those, in the order of the forward pass. It is queued when the next
forward pass begins, not when the step ends: in between the Trainer copies the next batch to the device, and behind
3 GB of uploads those small copies would wait for tens of milliseconds.

Life of a buffer: allocated for the compute stream -> uploads -> updates -> downloads -> dropped when the host has seen
its download over, so that the compute stream may use the memory again without waiting.

Source of the idea of streaming states through the device: Deep Optimizer States (arXiv:2410.21316).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.master_weights import Context, Home, StepInputs
from hf_zero_plugin.engine.pinned import PinnedArena

__all__ = ["StreamedHome"]

MAX_AHEAD_SHARE = 0.5
"""Of the states, how much is staged during a backward pass at most."""


class _Staged(NamedTuple):
    """A piece on the device, or on its way there."""

    buffer: Tensor
    uploaded: torch.cuda.Event


class _Leaving(NamedTuple):
    """A buffer whose piece is on its way back to the host."""

    buffer: Tensor
    downloaded: torch.cuda.Event


class StreamedHome(Home):
    """See the module.

    ``deferred`` queues what was not staged when its result is first needed. Ranks must queue collectives in the same
    order, and need is not the same on every rank, so it is for one rank only.
    """

    def __init__(
        self,
        context: Context,
        pieces: Sequence[Piece],
        *,
        pin_memory: bool = True,
        num_slots: int = 3,
        deferred: bool = True,
    ) -> None:
        super().__init__(context, pieces)
        self._rows = 1 + len(context.rule.state_names)
        self._arena = PinnedArena(sum(piece.numel for piece in self.pieces) * self._rows, pin=pin_memory)
        self._slabs = [self._arena.take(piece.numel * self._rows) for piece in self.pieces]
        self._longest = max((piece.numel for piece in self.pieces), default=0)
        self._num_slots = num_slots
        self._deferred = deferred
        self._uploads, self._updates, self._downloads, self._gathers = (
            torch.cuda.Stream(context.device) for _ in range(4)
        )
        self._compute = torch.cuda.current_stream(context.device)
        self._staged: dict[int, _Staged] = {}
        self._next_to_stage = 0
        self._ring: deque[_Leaving] = deque()
        """Buffers of full size that may be used again in this step; ``num_slots`` of them at most."""
        self._leaving: deque[_Leaving] = deque()
        self._num_ring_buffers = 0
        self._written: list[torch.cuda.Event | None] = [None] * len(self.pieces)
        """When a piece's slab holds its newest states."""
        self._ceiling = 0
        self._peak_staging = 0
        self._pending: StepInputs | None = None
        self._next_to_update = 0
        self._number: Tensor | None = None
        self._scratch: Tensor | None = None
        self._done: dict[int, list[torch.cuda.Event]] = {}
        self._alive: Any = None

    def set_master(self, index: int, values: Tensor) -> None:
        slab = self._slabs[index].view(self._rows, -1)
        slab[0].copy_(values)
        group = self.context.groups[self.pieces[index].group]
        for row, name in enumerate(self.context.rule.state_names, start=1):
            slab[row].fill_(self.context.rule.initial_state(name, group))
        self.forget_prefetched()

    # ---------------------------------------------------------------- ahead of the step

    def start_backward(self) -> None:
        self._compute = torch.cuda.current_stream(self.context.device)
        self._ceiling = torch.cuda.memory_allocated(self.context.device)

    def prefetch(self) -> None:
        """Stage what fits now. Runs on autograd's thread, between two operations of the backward pass."""
        if self._pending is not None:
            return
        self._reap()
        while self._next_to_stage < len(self.pieces) and self._may_stage():
            index = self._next_to_stage
            self._next_to_stage += 1
            with torch.cuda.stream(self._compute):  # whose memory it is
                is_ring = self._num_ring_buffers < self._num_slots
                numel = self._rows * (self._longest if is_ring else self.pieces[index].numel)
                buffer = torch.empty(numel, dtype=torch.float32, device=self.context.device)
                self._num_ring_buffers += is_ring
                # Whoever had this memory before has used it on the compute stream, up to here.
                self._upload(index, buffer, self._compute.record_event())
        self._peak_staging = max(self._peak_staging, self._staging_bytes())

    def _may_stage(self) -> bool:
        if self._num_ring_buffers < self._num_slots:
            return True
        ahead = sum(self.pieces[index].numel for index in self._staged)
        wanted = self.pieces[self._next_to_stage].numel
        if ahead + wanted > MAX_AHEAD_SHARE * sum(piece.numel for piece in self.pieces):
            return False
        return torch.cuda.memory_allocated(self.context.device) + 4 * self._rows * wanted <= self._ceiling

    def _upload(self, index: int, buffer: Tensor, free: torch.cuda.Event) -> None:
        """Bring a piece into ``buffer``, which is free once ``free`` has passed."""
        written = self._written[index]
        numel = self._rows * self.pieces[index].numel
        with torch.cuda.stream(self._uploads):
            self._uploads.wait_event(free)
            if written is not None:
                self._uploads.wait_event(written)
            buffer[:numel].copy_(self._slabs[index], non_blocking=True)
            self._staged[index] = _Staged(buffer, self._uploads.record_event())

    def forget_prefetched(self) -> None:
        if self._staged:
            self._uploads.synchronize()  # nobody may get this memory while copies into it are under way
        self._staged.clear()
        self._next_to_stage = self._num_ring_buffers = 0

    # ---------------------------------------------------------------- the step

    def step(self, inputs: StepInputs) -> None:
        self._launch()
        self.prefetch()  # activations are all gone by now
        self._pending, self._next_to_update, self._done = inputs, 0, {}
        self._number = torch.full((), float(inputs.number), device=self.context.device)
        # Tensors of the compute stream that updates read stay referenced until the next step has replaced them.
        self._alive = (self._number, inputs)
        self._updates.wait_event(self._compute_event())
        started = self.timeline.begin() if self.timeline is not None else None
        self._update_next(self._next_to_stage)
        if not self._deferred:
            self._launch()
        if self.timeline is not None and started is not None:
            self.timeline.end_flight(started, list(self._done.values()))

    def _compute_event(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.context.device).record_event()

    def _launch(self) -> None:
        """Queue the rest of the step, if one is pending."""
        if self._pending is None:
            return
        started = self.timeline.begin() if self.timeline is not None else None
        done_before = set(self._done)
        for index in range(self._next_to_stage, len(self.pieces)):
            leaving = self._ring.popleft()
            self._upload(index, leaving.buffer, leaving.downloaded)
            self._update_next(index + 1)
        self._next_to_stage = self._num_ring_buffers = 0
        self._pending = self._scratch = None
        self._leaving.extend(self._ring)
        self._ring.clear()
        if self.timeline is not None and started is not None:
            rest = [events for bucket, events in self._done.items() if bucket not in done_before]
            self.timeline.end_flight(started, rest)

    def _update_next(self, end: int) -> None:
        """Update and send home the staged pieces before ``end``."""
        inputs, number = self._pending, self._number
        assert inputs is not None and number is not None
        for index in range(self._next_to_update, end):
            piece, staged = self.pieces[index], self._staged.pop(index)
            with torch.cuda.stream(self._updates):
                self._updates.wait_event(staged.uploaded)
                narrow = self._update(staged.buffer, piece, inputs, number)
                updated = self._updates.record_event()
            with torch.cuda.stream(self._downloads):
                self._downloads.wait_event(updated)
                if narrow is not None:  # ahead of the states: the forward pass waits for these
                    self.context.weight_of(piece).copy_(narrow, non_blocking=True)
                    narrow.record_stream(self._downloads)
                    updated = self._downloads.record_event()
                self._done.setdefault(piece.bucket, []).append(updated)
                self._slabs[index].copy_(staged.buffer[: self._rows * piece.numel], non_blocking=True)
                downloaded = self._written[index] = self._downloads.record_event()
            is_ring = staged.buffer.numel() == self._rows * self._longest and len(self._ring) < self._num_slots
            (self._ring if is_ring else self._leaving).append(_Leaving(staged.buffer, downloaded))
            if not self.context.is_alone and self.last_piece_of_bucket[piece.bucket] == index:
                self._gather(piece.bucket)
        self._next_to_update = end

    def _update(self, buffer: Tensor, piece: Piece, inputs: StepInputs, number: Tensor) -> Tensor | None:
        """Returns new weights, narrowed, if their place is on the host."""
        master, *states = buffer[: self._rows * piece.numel].view(self._rows, -1).unbind(0)
        if self._scratch is None:  # belongs to the stream of updates, which use it one after the other
            self._scratch = torch.empty(self._longest, dtype=torch.float32, device=self.context.device)
        wide = self._scratch[: piece.numel]
        grad = self.context.grad_of(piece)
        # What crosses the link is the narrow type: it is widened on the device.
        wide.copy_(grad if grad.device == wide.device else grad.to(wide.device, non_blocking=True))
        if inputs.multiplier is not None:
            wide.mul_(inputs.multiplier)
        self.context.rule.update(master, wide, states, inputs.groups[piece.group], number, inputs.found_inf)
        weight, narrow = self.context.weight_of(piece), None
        if weight.device == master.device:
            weight.copy_(master)
        else:
            narrow = master.to(weight.dtype, copy=True)
        self.context.clear_grad(piece)
        return narrow

    def _gather(self, bucket: int) -> None:
        with torch.cuda.stream(self._gathers):
            for event in self._done[bucket]:
                self._gathers.wait_event(event)
            self.context.finish_bucket(bucket, self)
            self._done[bucket] = [self._gathers.record_event()]

    # ---------------------------------------------------------------- after the step

    def wait(self, bucket: int) -> None:
        self._launch()
        self._reap()
        current = torch.cuda.current_stream(self.context.device)
        # The compute stream too, if the memory of gradients is its own and free for it from here on.
        streams = (current, self._compute) if self.context.grads.frees_when_released else (current,)
        for stream in dict.fromkeys(streams):
            for event in self._done.get(bucket, ()):
                stream.wait_event(event)

    def _reap(self) -> None:
        """Drop buffers whose downloads are over."""
        while self._leaving and self._leaving[0].downloaded.query():
            self._leaving.popleft()

    def synchronize(self) -> None:
        self._launch()
        for stream in (self._updates, self._downloads, self._gathers):
            stream.synchronize()
        self._reap()

    def tensors(self, index: int) -> dict[str, Tensor]:
        names = ("master", *self.context.rule.state_names)
        return dict(zip(names, self._slabs[index].view(self._rows, -1)))

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        super().load(index, tensors)
        self.forget_prefetched()

    def close(self) -> None:
        self.synchronize()
        self._uploads.synchronize()
        self._staged.clear()
        self._arena.release()

    @property
    def num_bytes(self) -> dict[str, int]:
        per_row = sum(piece.numel for piece in self.pieces) * 4
        return {"master weights": per_row, "moments": per_row * (self._rows - 1)}

    def _staging_bytes(self) -> int:
        buffers = [*(s.buffer for s in self._staged.values()), *(one.buffer for one in (*self._ring, *self._leaving))]
        return 4 * (self._longest + sum(buffer.numel() for buffer in buffers))

    @property
    def staging_bytes(self) -> int:
        """The most that buffers have taken so far; before the first step, the least that they will."""
        return max(self._peak_staging, 4 * self._longest * (1 + self._rows * min(self._num_slots, len(self.pieces))))

    @property
    def is_on_host(self) -> bool:
        return True
