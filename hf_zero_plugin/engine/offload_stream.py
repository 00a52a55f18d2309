"""Offload without host arithmetic: states rest in page-locked host memory and pass through the device to be updated.

Each piece goes through one slot, in the order of one CUDA stream, and the slots' streams run side by side::

    slot 0   upload piece 0 | update | download        | upload piece 3 | ...
    slot 1                    upload piece 1  | update | download       | ...
    slot 2                                      upload piece 2 | update | ...

PCIe carries both directions at once, so a parameter costs 12 bytes of one direction (Adam); on a x16 gen5 link that is
faster than host cores can read and write the same 28 bytes, and it leaves the cores alone. Gradients never leave the
device and weights never come back from the host. The host thread queues about seven calls a piece and waits for
nothing; the forward pass waits per bucket, on the device.

Two things are timed with care. The first slots are filled while the backward pass still runs: states do not depend on
gradients. The rest is queued when the next forward pass begins, not when the step ends: in between the Trainer copies
the next batch to the device, and behind 3 GB of uploads those small copies would wait for tens of milliseconds.

Source of the idea of streaming states through the device: Deep Optimizer States (arXiv:2410.21316).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.master_weights import Context, Home, StepInputs
from hf_zero_plugin.engine.pinned import PinnedArena

__all__ = ["StreamedHome"]


class _Slot:
    """One staging buffer on the device, shape (K + 1, n): K rows as on the host, then the widened gradient."""

    def __init__(self, rows: int, numel: int, device: torch.device) -> None:
        self.rows = rows
        self.buffer = torch.empty((rows + 1) * numel, dtype=torch.float32, device=device)
        self.stream = torch.cuda.Stream(device)
        self.holds: int | None = None
        """Index of the piece that was uploaded ahead of time, if any."""

    def host_image(self, numel: int) -> Tensor:
        return self.buffer[: self.rows * numel]


class StreamedHome(Home):
    """See the module. ``num_slots`` pieces are in flight at a time.

    ``deferred`` queues a step when its result is first needed. Ranks must queue collectives in the same order, and
    need is not the same on every rank, so it is for one rank only.
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
        longest = max((piece.numel for piece in self.pieces), default=0)
        self._slots = [_Slot(self._rows, longest, context.device) for _ in range(num_slots)]
        self._deferred = deferred
        self._pending: StepInputs | None = None
        self._grads_ready: torch.cuda.Event | None = None
        self._done: dict[int, list[torch.cuda.Event]] = {}
        self._gathers = torch.cuda.Stream(context.device)
        self._alive: Any = None

    def set_master(self, index: int, values: Tensor) -> None:
        slab = self._slabs[index].view(self._rows, -1)
        slab[0].copy_(values)
        group = self.context.groups[self.pieces[index].group]
        for row, name in enumerate(self.context.rule.state_names, start=1):
            slab[row].fill_(self.context.rule.initial_state(name, group))
        self.forget_prefetched()

    def prefetch(self) -> None:
        for index in range(min(len(self._slots), len(self.pieces))):
            slot = self._slots[index]
            with torch.cuda.stream(slot.stream):
                self._upload(slot, index)

    def forget_prefetched(self) -> None:
        for slot in self._slots:
            slot.holds = None

    def _upload(self, slot: _Slot, index: int) -> None:
        # In its stream's order the slot's last download is over, and with it the slab's own last write-back.
        if slot.holds != index:
            slot.host_image(self.pieces[index].numel).copy_(self._slabs[index], non_blocking=True)
            slot.holds = index

    def step(self, inputs: StepInputs) -> None:
        self._pending = inputs
        self._grads_ready = torch.cuda.current_stream(self.context.device).record_event()
        if not self._deferred:
            self._launch()

    def _launch(self) -> None:
        inputs, ready = self._pending, self._grads_ready
        if inputs is None or ready is None:
            return
        self._pending = None
        started = self.timeline.begin() if self.timeline is not None else None
        number = torch.full((), float(inputs.number), device=self.context.device)
        # Tensors of the compute stream that slots read stay referenced until the next step has replaced them.
        self._alive = (number, inputs)
        filled = torch.cuda.current_stream(self.context.device).record_event()
        for slot in self._slots:
            slot.stream.wait_event(ready)
            slot.stream.wait_event(filled)
        self._done = {}
        for index, piece in enumerate(self.pieces):
            slot = self._slots[index % len(self._slots)]
            with torch.cuda.stream(slot.stream):
                self._upload(slot, index)
                self._update(slot, piece, inputs, number)
                self._done.setdefault(piece.bucket, []).append(slot.stream.record_event())
                self._slabs[index].copy_(slot.host_image(piece.numel), non_blocking=True)
                slot.holds = None
            if not self.context.is_alone and self.last_piece_of_bucket[piece.bucket] == index:
                self._gather(piece.bucket)
        if self.timeline is not None and started is not None:
            self.timeline.end_flight(started, list(self._done.values()))

    def _update(self, slot: _Slot, piece: Piece, inputs: StepInputs, number: Tensor) -> None:
        rows = slot.buffer[: (self._rows + 1) * piece.numel].view(self._rows + 1, -1)
        master, *states, wide = rows.unbind(0)
        wide.copy_(self.context.grad_of(piece))
        if inputs.multiplier is not None:
            wide.mul_(inputs.multiplier)
        self.context.rule.update(master, wide, states, inputs.groups[piece.group], number, inputs.found_inf)
        self.context.weight_of(piece).copy_(master)
        self.context.clear_grad(piece)

    def _gather(self, bucket: int) -> None:
        with torch.cuda.stream(self._gathers):
            for event in self._done[bucket]:
                self._gathers.wait_event(event)
            self.context.finish_bucket(bucket, self)
            self._done[bucket] = [self._gathers.record_event()]

    def wait(self, bucket: int) -> None:
        self._launch()
        current = torch.cuda.current_stream(self.context.device)
        for event in self._done.get(bucket, ()):
            current.wait_event(event)

    def synchronize(self) -> None:
        self._launch()
        for slot in self._slots:
            slot.stream.synchronize()
        self._gathers.synchronize()

    def tensors(self, index: int) -> dict[str, Tensor]:
        names = ("master", *self.context.rule.state_names)
        return dict(zip(names, self._slabs[index].view(self._rows, -1)))

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        super().load(index, tensors)
        self.forget_prefetched()

    def close(self) -> None:
        self.synchronize()
        self._arena.release()

    @property
    def num_bytes(self) -> dict[str, int]:
        per_row = sum(piece.numel for piece in self.pieces) * 4
        return {"master weights": per_row, "moments": per_row * (self._rows - 1)}

    @property
    def staging_bytes(self) -> int:
        return sum(slot.buffer.numel() * 4 for slot in self._slots)

    @property
    def is_on_host(self) -> bool:
        return True
