"""Offload without host arithmetic: states rest in page-locked host memory and pass through the device to be updated.

A piece of the states is uploaded into a buffer on the device, updated there, and downloaded again::

    backward          pieces 0, 1, 2 ... are uploaded: states do not depend on gradients
    step              they are updated
    launch_rest       they are downloaded, one after the other; buffers that become empty bring the other pieces up,
                      which are updated and downloaded in their turn
    next forward      waits per bucket, on the device; downloads end meanwhile

PCIe carries both directions at once, so a parameter costs 12 bytes of one direction (Adam); on a x16 gen5 link that is
faster than host cores can read and write the same 28 bytes, and it leaves the cores alone. Gradients never leave the
device and weights never come back from the host, unless they are offloaded too (stage 3): then new weights go down in
half precision, ahead of the states, and gradients that rest on the host come up. The host thread waits for nothing.

How much is staged ahead decides how soon the next forward pass finds new weights. As the backward pass goes on it frees
activations, and staging takes that memory: never more than the device held when the pass began, and no more than half
of the states, since the other half is needed later than it takes to bring it. A buffer is dropped when the host has
seen its download over: the compute stream may use it without waiting. What is still on its way down at the end of the
next forward pass comes on top of that pass's own peak, and is the first to be filled again. So buffers are filled anew
only up to a share of that peak, or up to what was on its way down then anyway, and on a device that is nearly full no
more than two are staged (``staging_room.py``).
New weights are all there once the link has brought down what the device may not hold.

Right after a step its caller reads numbers: the engine the norm, the Trainer whether the loss is finite, twice.
Copies let such reads, and the next batch, through (``cut_copies.py``), but best is an empty queue: nothing is
downloaded before the caller's next word to the engine (``zero_grad``, a forward pass, a look at a weight).

Source of the idea of streaming states through the device: Deep Optimizer States (arXiv:2410.21316).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.cut_copies import CutCopies, cut_bytes
from hf_zero_plugin.engine.leaving import LeavingBuffers
from hf_zero_plugin.engine.master_weights import Context, Home, StepInputs
from hf_zero_plugin.engine.pinned import PinnedArena
from hf_zero_plugin.engine.staging_room import StagingRoom, pieces_ahead

__all__ = ["StreamedHome"]


class StreamedHome(Home):
    """See the module. Piece i belongs to slot i modulo ``num_slots``, whose stream updates it; copies in each direction
    keep the order of the pieces."""

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
        self._longest = max((piece.numel for piece in self.pieces), default=0)
        self._slots = [torch.cuda.Stream(context.device) for _ in range(min(num_slots, len(self.pieces)))]
        cut = cut_bytes(self._total * self._bytes_each)
        self._uploads, self._downloads = CutCopies(context.device, cut), CutCopies(context.device, cut)
        self._gathers = torch.cuda.Stream(context.device)
        self._compute = torch.cuda.current_stream(context.device)
        # Belongs to its slot's stream, which uses it for one piece after the other.
        scratch = [torch.empty(self._longest, device=context.device) for _ in self._slots]
        self._wide = [scratch[index % len(scratch)][: piece.numel] for index, piece in enumerate(self.pieces)]
        self._max_ahead = pieces_ahead(self.pieces, len(self._slots))
        self._staged: dict[int, Tensor] = {}
        """Buffers of pieces 0, 1, ... that are on the device, or on their way there."""
        self._leaving = LeavingBuffers()
        self._room = StagingRoom(context.device)
        self._peak_staging = 0
        self._done: dict[int, list[torch.cuda.Event]] = {}
        self._updated: dict[int, torch.cuda.Event] = {}
        self._returned: dict[int, torch.cuda.Event] = {}
        """By piece: after it, its states of the last step are back in host memory."""
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
        self._leaving.reap()
        self._room.measure(self._leaving.num_bytes)

    def prefetch(self) -> None:
        """Stage what fits now. Runs on autograd's thread, between two operations of the backward pass."""
        if len(self._staged) >= self._max_ahead or self._rest is not None:
            return
        self._leaving.reap()
        compute, before = self._compute, torch.cuda.current_stream(self.context.device)
        room = self._room.free
        staged = sum(buffer.numel() for buffer in self._staged.values())
        try:
            torch.cuda.set_stream(compute)  # whose memory it is
            fresh: dict[int, Tensor] = {}
            leaving, empty = self._leaving.copy(), dict[int, torch.cuda.Event]()
            whole = self._capacity(0)
            for index in range(len(self._staged), self._max_ahead):
                is_slots_own = index < len(self._slots)
                num_bytes = self._capacity(index)
                staged += num_bytes
                if staged > self._room.most_staged and not is_slots_own:
                    break
                one = leaving.take_first(num_bytes, below=whole if num_bytes < whole else None)
                if one is None and (num_bytes <= room or is_slots_own):
                    try:
                        fresh[index] = torch.empty(num_bytes, dtype=torch.uint8, device=self.context.device)
                        room -= num_bytes
                        continue
                    except torch.OutOfMemoryError:  # free, but in pieces
                        if is_slots_own:
                            raise
                if one is None and (one := leaving.take_first(num_bytes)) is None:
                    break
                fresh[index], empty[index] = one
                staged += one.buffer.numel() - num_bytes
            self._leaving = leaving  # not before all of the memory is there
            self._stage(fresh, empty)
        finally:
            torch.cuda.set_stream(before)
        there = sum(buffer.numel() for buffer in self._staged.values()) + self._leaving.num_bytes
        self._peak_staging = max(self._peak_staging, 4 * self._longest * len(self._slots) + there)

    def _capacity(self, index: int) -> int:
        """Bytes of a piece's buffer. Buffers are of one size, so that any piece can have the one that is free next; if
        each had its own, one that waits for the buffer of its size would hold up all that follow. Only pieces of half
        that size and less have smaller ones; ``even_numel`` sees to it that there are few."""
        numel = self.pieces[index].numel
        return self._bytes_each * (self._longest if index < len(self._slots) or 2 * numel > self._longest else numel)

    def _stage(self, fresh: dict[int, Tensor], empty: dict[int, torch.cuda.Event]) -> None:
        """Upload into ``fresh``, by piece; buffers that were downloaded from are empty after an event."""
        if not fresh:
            return
        # Whoever had this memory before has used it on the compute stream, up to here.
        free = self._compute.record_event()
        try:
            for index, buffer in fresh.items():
                self._bring(index, buffer, free, empty.get(index))
        except BaseException:
            self._end_copies()
            raise
        self._staged.update(fresh)

    def _bring(self, index: int, buffer: Tensor, *after: torch.cuda.Event | None) -> None:
        """Upload a piece after these events and its own last download; its slot's stream, which waits for it, becomes
        the current one."""
        slot = self._slots[index % len(self._slots)]
        events = [event for event in (*after, self._returned.get(index)) if event is not None]
        slot.wait_event(self._upload(index, buffer, *events))
        torch.cuda.set_stream(slot)

    def _upload(self, index: int, buffer: Tensor, *after: torch.cuda.Event) -> torch.cuda.Event:
        slab = self._slabs[index]
        return self._uploads.copy(buffer[: slab.numel()], slab, *after)

    def forget_prefetched(self) -> None:
        self.launch_rest()
        if self._staged:
            self._end_copies()
            self._staged.clear()

    def _end_copies(self) -> None:
        """Nobody may get the memory of a buffer while copies use it; but for them, staged ones have no users."""
        for copies in (self._uploads, self._downloads):
            copies.synchronize()

    # ---------------------------------------------------------------- the step

    def step(self, inputs: StepInputs) -> None:
        self.launch_rest()
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
                self._finish(index, self._staged[index], inputs, number)
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
        except BaseException:
            self.is_broken = True
            self.synchronize()  # nobody may get the memory of a buffer that copies still use
            raise
        finally:
            torch.cuda.set_stream(before)
        if self.timeline is not None and started is not None:
            self.timeline.end_flight(started, list(self._done.values()))

    def _launch(self, inputs: StepInputs, number: Tensor) -> None:
        num_staged, held, kept = len(self._staged), 0, set[int]()
        for index, buffer in self._staged.items():
            self._return(index, buffer)
            held += buffer.numel()
            if index < len(self._slots) or held <= self._room.most_held:
                kept.add(id(buffer))
        self._staged.clear()
        for index in range(num_staged, len(self.pieces)):
            one = self._leaving.take_first(self._bytes_each * self.pieces[index].numel, among=kept)
            assert one is not None  # the two that slots begin with hold any piece
            self._bring(index, one.buffer, one.downloaded)
            self._finish(index, one.buffer, inputs, number)
            self._return(index, one.buffer)

    def _return(self, index: int, buffer: Tensor) -> None:
        """Download a piece once it is updated; its buffer leaves."""
        self._returned[index] = self._download(index, buffer, self._updated[index])
        self._leaving.add(buffer, self._returned[index])

    def _finish(self, index: int, buffer: Tensor, inputs: StepInputs, number: Tensor) -> None:
        """Update a piece on its slot's stream, which is the current one, and say so to those who wait for it."""
        bucket = self.pieces[index].bucket
        self._update(index, buffer, inputs, number)
        self._updated[index] = self._slots[index % len(self._slots)].record_event()
        self._done.setdefault(bucket, []).append(self._updated[index])
        if not self.context.is_alone and self.last_piece_of_bucket[bucket] == index:
            self._gather(bucket)

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
        self.context.clear_grad(piece)

    def _download(self, index: int, buffer: Tensor, ready: torch.cuda.Event) -> torch.cuda.Event:
        slab = self._slabs[index]
        return self._downloads.copy(slab, buffer[: slab.numel()], ready)

    def _gather(self, bucket: int) -> None:
        with torch.cuda.stream(self._gathers):
            for event in self._done[bucket]:
                self._gathers.wait_event(event)
            self.context.finish_bucket(bucket, self)
            self._done[bucket] = [self._gathers.record_event()]

    # ---------------------------------------------------------------- after the step

    def wait(self, bucket: int) -> None:
        self._leaving.reap()
        current = torch.cuda.current_stream(self.context.device)
        # The compute stream too, if the memory of gradients is its own and free for it from here on.
        streams = (current, self._compute) if self.context.grads.frees_when_released else (current,)
        for stream in dict.fromkeys(streams):
            for event in self._done.get(bucket, ()):
                stream.wait_event(event)

    def synchronize(self) -> None:
        if self.is_broken:
            self._rest = None  # nothing further is begun
        self.launch_rest()
        for stream in (*self._slots, self._gathers):
            stream.synchronize()
        self._end_copies()
        self._leaving.reap()

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
