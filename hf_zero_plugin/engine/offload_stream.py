"""Offload without host arithmetic: states rest in page-locked host memory and pass through the device to be updated.

A piece of the states is uploaded into a buffer on the device, updated there, and downloaded again::

    backward          pieces 0, 1, 2 ... are uploaded: states do not depend on gradients
    step              they are updated
    launch_rest       they are downloaded, and the others follow, in the order of the forward pass, through the two
                      buffers that slots own: while one slot uploads, the other downloads
    next forward      waits per bucket, on the device; downloads end meanwhile

PCIe carries both directions at once, so a parameter costs 12 bytes of one direction (Adam); on a x16 gen5 link that is
faster than host cores can read and write the same 28 bytes, and it leaves the cores alone. Gradients never leave the
device and weights never come back from the host, unless they are offloaded too (stage 3): then new weights go down in
half precision, ahead of the states, and gradients that rest on the host come up. The host thread waits for nothing.

How much is staged ahead decides how soon the next forward pass finds new weights. As the backward pass goes on it frees
activations, and staging takes that memory: never more than the device held when the pass began, and no more than half
of the states, since the other half is needed later than it takes to bring it. A buffer is dropped when the host has
seen its download over: the compute stream may use it without waiting. What is still on its way down when the next pass
begins comes on top of that pass's own peak, and is the first to be filled again.

Downloads are cut, with a tiny kernel between the cuts. The copy engine serves what one stream has queued to its end
before it looks at another stream, unless that one must wait for something: without the kernels, a ``tensor.item()``
anywhere in the next forward pass would stand behind a gigabyte of states (measured: 20 ms; with them, half a
millisecond). Uploads do not have this trouble. Right after a step its caller reads numbers: the engine the norm, the
Trainer whether the loss is finite, twice. So that these find an empty queue, nothing is downloaded before the caller's
next word to the engine (``zero_grad``, a forward pass, a look at a weight).

Source of the idea of streaming states through the device: Deep Optimizer States (arXiv:2410.21316).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.master_weights import Context, Home, StepInputs
from hf_zero_plugin.engine.pinned import PinnedArena

__all__ = ["StreamedHome"]

MAX_AHEAD_SHARE = 0.5
"""Of the states, how much is staged during a backward pass at most."""

DOWNLOAD_BYTES = 72 * 2**20
"""Between two chances for other streams' copies: a millisecond and a half."""


class _Leaving(NamedTuple):
    """A buffer that copies may still read, and when they are over."""

    buffer: Tensor
    downloaded: torch.cuda.Event


class StreamedHome(Home):
    """See the module. Piece i belongs to slot i modulo ``num_slots``, whose stream does all that happens to it but for
    the download of what was staged ahead."""

    def __init__(
        self, context: Context, pieces: Sequence[Piece], *, pin_memory: bool = True, num_slots: int = 2
    ) -> None:
        super().__init__(context, pieces)
        self._rows = 1 + len(context.rule.state_names)
        self._total = sum(piece.numel for piece in self.pieces)
        self._types = context.types
        self._bytes_each = context.types.bytes_per_element(self._rows - 1)
        """Of a master and its states. Slabs and buffers are bytes; ``_types.rows`` knows what lies where."""
        self._arena = PinnedArena(self._total * self._bytes_each, pin=pin_memory, dtype=torch.uint8)
        self._slabs = [self._arena.take(piece.numel * self._bytes_each) for piece in self.pieces]
        self._slab_parts = [slab.split(DOWNLOAD_BYTES) for slab in self._slabs]
        self._longest = max((piece.numel for piece in self.pieces), default=0)
        self._slots = [torch.cuda.Stream(context.device) for _ in range(min(num_slots, len(self.pieces)))]
        self._returns, self._gathers = (torch.cuda.Stream(context.device) for _ in range(2))
        self._compute = torch.cuda.current_stream(context.device)
        # Belongs to its slot's stream, which uses it for one piece after the other.
        scratch = [torch.empty(self._longest, device=context.device) for _ in self._slots]
        self._wide = [scratch[index % len(scratch)][: piece.numel] for index, piece in enumerate(self.pieces)]
        self._max_ahead = self._count_ahead()
        self._tick = torch.zeros(1, device=context.device)
        self._staged: dict[int, Tensor] = {}
        """Buffers of pieces 0, 1, ... that are on the device, or on their way there."""
        self._leaving: deque[_Leaving] = deque()
        self._returned: torch.cuda.Event | None = None
        """After it, what was staged ahead of the last step is back in host memory."""
        self._ceiling = self._peak_staging = 0
        self._done: dict[int, list[torch.cuda.Event]] = {}
        self._alive: Any = None
        self._rest: tuple[StepInputs, Tensor] | None = None
        """What ``launch_rest`` has still to do, and with what."""

    def set_master(self, index: int, values: Tensor) -> None:
        master, *states = self._rows_of(self._slabs[index], self.pieces[index])
        master.copy_(values)
        rule, group = self.context.rule, self.context.groups[self.pieces[index].group]
        for name, state in zip(rule.state_names, states):
            state.fill_(rule.initial_state(name, group))
        self.forget_prefetched()

    # ---------------------------------------------------------------- ahead of the step

    def start_backward(self) -> None:
        self._compute = torch.cuda.current_stream(self.context.device)
        self._reap()
        # Buffers on their way down are no activations: counted here, they would let this pass stage as much on top of
        # what it stages anyway, and the next one more again.
        self._ceiling = _allocated_bytes(self.context.device) - sum(one.buffer.numel() for one in self._leaving)

    def prefetch(self) -> None:
        """Stage what fits now. Runs on autograd's thread, between two operations of the backward pass."""
        if len(self._staged) >= self._max_ahead:
            return
        self._reap()
        compute, before = self._compute, torch.cuda.current_stream(self.context.device)
        room = self._ceiling - _allocated_bytes(self.context.device)
        try:
            torch.cuda.set_stream(compute)  # whose memory it is
            fresh: dict[int, Tensor] = {}
            leaving = self._leaving.copy()
            for index in range(len(self._staged), self._max_ahead):
                is_slots_own = index < len(self._slots)
                num_bytes = self._bytes_each * (self._longest if is_slots_own else self.pieces[index].numel)
                buffer = self._take_leaving(leaving, num_bytes)
                if buffer is None:
                    room -= num_bytes
                    if room < 0 and not is_slots_own:
                        break
                    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.context.device)
                fresh[index] = buffer
            self._leaving = leaving  # not before all of the memory is there
            self._stage(fresh)
        finally:
            torch.cuda.set_stream(before)
        there = sum(b.numel() for b in [*self._staged.values(), *(one.buffer for one in self._leaving)])
        self._peak_staging = max(self._peak_staging, 4 * self._longest * len(self._slots) + there)

    def _take_leaving(self, leaving: deque[_Leaving], num_bytes: int) -> Tensor | None:
        """A buffer of this size that is on its way down: what is uploaded from now on waits for that."""
        for position, one in enumerate(leaving):
            if one.buffer.numel() == num_bytes:
                del leaving[position]
                for slot in self._slots:
                    slot.wait_event(one.downloaded)
                return one.buffer
        return None

    def _stage(self, fresh: dict[int, Tensor]) -> None:
        if not fresh:
            return
        # Whoever had this memory before has used it on the compute stream, up to here.
        free = self._compute.record_event()
        for number, slot in enumerate(self._slots):
            slot.wait_event(free)
            if self._returned is not None:
                slot.wait_event(self._returned)
            torch.cuda.set_stream(slot)
            for index, buffer in fresh.items():
                if index % len(self._slots) == number:
                    self._upload(index, buffer)
        self._staged.update(fresh)

    def _count_ahead(self) -> int:
        """How many pieces may be staged during a backward pass."""
        count = numel = 0
        for piece in self.pieces:
            numel += piece.numel
            if count >= len(self._slots) and numel > MAX_AHEAD_SHARE * self._total:
                break
            count += 1
        return count

    def _upload(self, index: int, buffer: Tensor) -> None:
        slab = self._slabs[index]
        buffer[: slab.numel()].copy_(slab, non_blocking=True)

    def forget_prefetched(self) -> None:
        self.launch_rest()
        if self._staged:
            for slot in self._slots:
                slot.synchronize()  # nobody may get this memory while copies into it are under way
            self._staged.clear()

    # ---------------------------------------------------------------- the step

    def step(self, inputs: StepInputs) -> None:
        self.prefetch()  # activations are all gone by now
        device = self.context.device
        number = torch.full((), float(inputs.number), device=device)
        # Tensors of the compute stream that updates read stay referenced until the next step has replaced them.
        self._alive = (number, inputs)
        compute = torch.cuda.current_stream(device)
        for slot in self._slots:
            slot.wait_stream(compute)
        self._done = {}
        try:
            for index in range(len(self._staged)):
                torch.cuda.set_stream(self._slots[index % len(self._slots)])
                self._update(index, self._staged[index], inputs, number)
        finally:
            torch.cuda.set_stream(compute)
        self._rest = inputs, number
        if not self.context.is_alone:
            self.launch_rest()  # ranks must gather in one order, whatever their callers do next

    def launch_rest(self) -> None:
        if self._rest is None:
            return
        (inputs, number), self._rest = self._rest, None
        before = torch.cuda.current_stream(self.context.device)
        started = self.timeline.begin() if self.timeline is not None else None
        try:
            self._launch(inputs, number)
        finally:
            torch.cuda.set_stream(before)
        if self.timeline is not None and started is not None:
            self.timeline.end_flight(started, list(self._done.values()))

    def _launch(self, inputs: StepInputs, number: Tensor) -> None:
        num_slots = len(self._slots)
        buffers = [self._staged[index] for index in range(num_slots)]
        num_staged = len(self._staged)
        self._return_staged(num_slots, num_staged)
        for index in range(num_slots):
            torch.cuda.set_stream(self._slots[index])
            self._download(index, buffers[index])
        for index in range(num_staged, len(self.pieces)):
            which = index % num_slots
            torch.cuda.set_stream(self._slots[which])
            self._upload(index, buffers[which])
            self._update(index, buffers[which], inputs, number)
            self._download(index, buffers[which])
        for slot, buffer in zip(self._slots, buffers):
            self._leaving.append(_Leaving(buffer, slot.record_event()))
        self._staged.clear()

    def _return_staged(self, start: int, end: int) -> None:
        """Download pieces [start, end), staged ahead, beside what the slots do."""
        torch.cuda.set_stream(self._returns)
        for slot in self._slots:
            self._returns.wait_event(slot.record_event())
        for index in range(start, end):
            self._download(index, self._staged[index])
            self._leaving.append(_Leaving(self._staged[index], self._returns.record_event()))
        self._returned = self._returns.record_event()

    def _update(self, index: int, buffer: Tensor, inputs: StepInputs, number: Tensor) -> None:
        piece = self.pieces[index]
        kept = self._rows_of(buffer, piece)
        master, *states = kept if self._types.are_wide else [row.float() for row in kept]
        wide = self._wide[index]
        self.context.widen_grad(piece, wide)
        if inputs.multiplier is not None:
            wide.mul_(inputs.multiplier)
        self.context.rule.update(master, wide, states, inputs.groups[piece.group], number, inputs.found_inf)
        for narrow, updated in zip(kept, (master, *states)):
            if narrow is not updated:
                narrow.copy_(updated)
        weight = self.context.weight_of(piece)
        if weight.device == master.device:
            weight.copy_(master)
        else:  # what crosses the link is the narrow type
            weight.copy_(master.to(weight.dtype, copy=True), non_blocking=True)
            self._tick.zero_()
        self.context.clear_grad(piece)
        self._done.setdefault(piece.bucket, []).append(self._slots[index % len(self._slots)].record_event())
        if not self.context.is_alone and self.last_piece_of_bucket[piece.bucket] == index:
            self._gather(piece.bucket)

    def _download(self, index: int, buffer: Tensor) -> None:
        image = buffer[: self._slabs[index].numel()]
        for host, device in zip(self._slab_parts[index], image.split(DOWNLOAD_BYTES)):
            host.copy_(device, non_blocking=True)
            self._tick.zero_()

    def _gather(self, bucket: int) -> None:
        with torch.cuda.stream(self._gathers):
            for event in self._done[bucket]:
                self._gathers.wait_event(event)
            self.context.finish_bucket(bucket, self)
            self._done[bucket] = [self._gathers.record_event()]

    # ---------------------------------------------------------------- after the step

    def wait(self, bucket: int) -> None:
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
        self.launch_rest()
        for stream in (*self._slots, self._returns, self._gathers):
            stream.synchronize()
        self._reap()

    def tensors(self, index: int) -> dict[str, Tensor]:
        names = ("master", *self.context.rule.state_names)
        return dict(zip(names, self._rows_of(self._slabs[index], self.pieces[index])))

    def _rows_of(self, memory: Tensor, piece: Piece) -> list[Tensor]:
        return self._types.rows(memory, piece.numel, self._rows - 1)

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        super().load(index, tensors)
        self.forget_prefetched()

    def close(self) -> None:
        self.synchronize()
        self._staged.clear()
        self._arena.release()

    def __del__(self) -> None:
        # The engine was dropped, but the model may stay: its weights are those of the last step, all of them.
        if not sys.is_finalizing():
            with suppress(Exception):  # it may not have been made to its end
                self.synchronize()

    @property
    def num_bytes(self) -> dict[str, int]:
        moments = self._total * (self._rows - 1) * self._types.states.itemsize
        return {"master weights": self._total * self._types.master.itemsize, "moments": moments}

    @property
    def staging_bytes(self) -> int:
        """The most that buffers have taken so far; before the first step, the least that they will."""
        return max(self._peak_staging, self._longest * (4 + self._bytes_each) * len(self._slots))

    @property
    def is_on_host(self) -> bool:
        return True


def _allocated_bytes(device: torch.device) -> int:
    """``torch.cuda.memory_allocated`` without sorting a hundred other numbers: it is asked a dozen times a step."""
    return int(torch._C._cuda_memoryStats(device.index)["allocated_bytes"]["all"]["current"])
