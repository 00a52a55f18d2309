"""Offload without host arithmetic: states rest in page-locked host memory and pass through the device to be updated.

Per piece three queues work at the same time, each a CUDA stream::

    upload      master + states  host -> slot        12 B/parameter (Adam)
    update      widen gradient, rule, narrow into the weights
    download    slot -> host                         12 B/parameter, while the next piece is uploaded

PCIe carries both directions at once, so a parameter costs 12 B of one direction; on a x16 gen5 link that is faster
than host cores can read and write the same 28 B, and it leaves the cores alone. Gradients never leave the device and
weights never come back from the host. The host thread only queues work (about six calls a piece) and waits for
nothing; the forward pass waits per bucket, on the device.

The first slots are filled while the backward pass still runs: states do not depend on gradients.

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
        self.is_free: torch.cuda.Event | None = None
        self.is_filled: torch.cuda.Event | None = None
        self.holds: int | None = None
        """Index of the piece that was uploaded ahead of time, if any."""

    def host_image(self, numel: int) -> Tensor:
        return self.buffer[: self.rows * numel]

    def row(self, row: int, numel: int) -> Tensor:
        return self.buffer[row * numel : (row + 1) * numel]


class StreamedHome(Home):
    """See the module. ``num_slots`` pieces are in flight at a time."""

    def __init__(self, context: Context, pieces: Sequence[Piece], *, pin_memory: bool = True, num_slots: int = 3) -> None:
        super().__init__(context, pieces)
        self._rows = 1 + len(context.rule.state_names)
        self._arena = PinnedArena(sum(piece.numel for piece in self.pieces) * self._rows, pin=pin_memory)
        self._slabs = [self._arena.take(piece.numel * self._rows) for piece in self.pieces]
        longest = max((piece.numel for piece in self.pieces), default=0)
        self._slots = [_Slot(self._rows, longest, context.device) for _ in range(num_slots)]
        self._upload = torch.cuda.Stream(context.device)
        self._update = torch.cuda.Stream(context.device)
        self._download = torch.cuda.Stream(context.device)
        self._bucket_done: dict[int, torch.cuda.Event] = {}
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
            self._fill(index)

    def forget_prefetched(self) -> None:
        for slot in self._slots:
            slot.holds = None

    def _fill(self, index: int) -> _Slot:
        slot = self._slots[index % len(self._slots)]
        if slot.holds != index:
            numel = self.pieces[index].numel
            with torch.cuda.stream(self._upload):
                if slot.is_free is not None:
                    self._upload.wait_event(slot.is_free)
                # The copies of one slab follow each other on different streams: never read a slab that is
                # still being written back from the step before.
                slot.host_image(numel).copy_(self._slabs[index], non_blocking=True)
                slot.is_filled = self._upload.record_event()
            slot.holds = index
        return slot

    def step(self, inputs: StepInputs) -> None:
        number = torch.full((), float(inputs.number), device=self.context.device)
        # Tensors of the compute stream that the update stream reads stay referenced until the next step.
        self._alive = (number, inputs)
        self._update.wait_stream(torch.cuda.current_stream(self.context.device))
        for index, piece in enumerate(self.pieces):
            slot = self._fill(index)
            assert slot.is_filled is not None
            with torch.cuda.stream(self._update):
                self._update.wait_event(slot.is_filled)
                self._step_piece(slot, piece, inputs, number)
                updated = self._update.record_event()
            with torch.cuda.stream(self._download):
                self._download.wait_event(updated)
                self._slabs[index].copy_(slot.host_image(piece.numel), non_blocking=True)
                slot.is_free = self._download.record_event()
            slot.holds = None
            if self.last_piece_of_bucket[piece.bucket] == index:
                with torch.cuda.stream(self._update):
                    self.context.finish_bucket(piece.bucket, self)
                    self._bucket_done[piece.bucket] = self._update.record_event()

    def _step_piece(self, slot: _Slot, piece: Piece, inputs: StepInputs, number: Tensor) -> None:
        master, *states = (slot.row(row, piece.numel) for row in range(self._rows))
        grad = slot.row(self._rows, piece.numel).copy_(self.context.grad_of(piece))
        if inputs.multiplier is not None:
            grad.mul_(inputs.multiplier)
        self.context.rule.update(master, grad, states, inputs.groups[piece.group], number, inputs.found_inf)
        self.context.weight_of(piece).copy_(master)

    def wait(self, bucket: int) -> None:
        event = self._bucket_done.get(bucket)
        if event is not None:
            torch.cuda.current_stream(self.context.device).wait_event(event)

    def synchronize(self) -> None:
        self._update.synchronize()
        self._download.synchronize()

    def tensors(self, index: int) -> dict[str, Tensor]:
        names = ("master", *self.context.rule.state_names)
        return dict(zip(names, self._slabs[index].view(self._rows, -1)))

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        super().load(index, tensors)
        self.forget_prefetched()

    def close(self) -> None:
        self.synchronize()
        self._upload.synchronize()
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
