"""Gradients of sharded parameters when there is one rank: copied where they rest as soon as their unit is done.

They rest in flat buckets beside the optimizer states' way: on the device, or, where that would take too much of it, in
page-locked host memory::

    compute      backward of unit 2 | backward of unit 1 | backward of unit 0
    down                              gradients of 2       gradients of 1       gradients of 0

The norm of each is taken on the device on the way down, so no host core reads a gradient to know whether to clip. The
first micro-step writes and later ones add: nothing is cleared in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import BucketLayout
from hf_zero_plugin.engine.flat import view_of
from hf_zero_plugin.engine.gradients import GradientStore
from hf_zero_plugin.engine.pinned import PinnedArena
from hf_zero_plugin.engine.sharding import Sharding

__all__ = ["LoneGrads"]

_IN_FLIGHT = 8
"""Gradients on their way down at a time: the device must not fill with them when the link is slower than backward."""


class LoneGrads(GradientStore):
    """Buckets of whole gradients, shape (P,) each, in the type of the weights or, over micro-steps, in fp32.

    Args:
        flats: the weights' buckets, whose sizes and types the gradients' have.
        device: where gradients are computed.
        on_host: rest in page-locked host memory; on a CPU there is no other.
    """

    def __init__(
        self,
        layouts: Sequence[BucketLayout],
        sharding: Sharding,
        flats: Sequence[Tensor],
        *,
        device: torch.device,
        on_host: bool,
        accumulate_fp32: bool,
        pin_memory: bool = True,
    ) -> None:
        self.layouts = list(layouts)
        self.sharding = sharding
        self.boundary = True
        self._device = device
        self._pin = pin_memory
        self._accumulate_fp32 = accumulate_fp32
        self._travels = on_host and device.type == "cuda"
        self._arenas: list[PinnedArena] = []
        self._flats = self._make([flat.dtype for flat in flats])
        self._places = {slot.spec.name: (layout.index, slot) for layout in self.layouts for slot in layout.slots}
        self._filled: set[str] = set()
        """Parameters whose slot holds the sum of this step's micro-steps so far; what the others hold is old."""
        self._is_consumed = False
        self._is_open = False
        """A backward pass has begun and not ended: an error may have ended it."""
        self._stream = torch.cuda.Stream(device) if self._travels else None
        self._in_flight: deque[torch.cuda.Event] = deque()
        self._landed: torch.cuda.Event | None = None
        self._order = sorted(self._places, key=lambda name: self._places[name][1].spec.index)
        self._norms = torch.zeros(len(self._order), device=device) if self._travels else None
        self._position = {name: position for position, name in enumerate(self._order)}

    def _make(self, dtypes: Sequence[torch.dtype]) -> dict[int, Tensor]:
        if not self._travels:
            return {
                layout.index: torch.zeros(layout.padded_numel, dtype=dtype, device=self._device)
                for layout, dtype in zip(self.layouts, dtypes)
            }
        made: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(dtypes):
            mine = [layout for layout, its in zip(self.layouts, dtypes) if its == dtype]
            arena = PinnedArena(sum(layout.padded_numel for layout in mine), pin=self._pin, dtype=dtype)
            self._arenas.append(arena)
            made.update({layout.index: arena.take(layout.padded_numel).zero_() for layout in mine})
        return made

    def attach(self) -> None:
        """Nothing to do: ``UnitTransfers`` brings the gradients."""

    def detach(self) -> None:
        self._settle()
        for arena in self._arenas:
            arena.release()

    def begin_backward(self, *, boundary: bool) -> None:
        self.boundary = boundary
        self._is_open = True
        if self._is_consumed:
            self._is_consumed = False
            self._filled.clear()
        if not boundary and self._accumulate_fp32:
            self._widen()

    def _widen(self) -> None:
        if all(flat.dtype == torch.float32 for flat in self._flats.values()):
            return
        self._settle()
        narrow, arenas = self._flats, self._arenas
        self._arenas = []
        self._flats = self._make([torch.float32 for _ in self.layouts])
        for bucket, flat in narrow.items():
            self._flats[bucket].copy_(flat)
        for arena in arenas:
            arena.release()

    def take(self, name: str, grad: Tensor) -> None:
        """Add a gradient, whole and of any float type, that nobody else will use; on the compute stream."""
        if name not in self._places:
            return  # it requires a gradient, but the optimizer does not know it
        bucket, slot = self._places[name]
        place, is_first = view_of(self._flats[bucket], slot), name not in self._filled
        self._filled.add(name)
        if self._stream is not None:
            self._send(name, place, grad.view(place.shape), is_first)
        elif is_first:
            place.copy_(grad)
        else:
            place.add_(grad)

    def _send(self, name: str, place: Tensor, grad: Tensor, is_first: bool) -> None:
        assert self._stream is not None and self._norms is not None
        compute = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            total = grad.to(place.dtype)
            if not is_first:
                # The sum comes up to be added to: link bandwidth is there during backward, host cores may not be.
                total = place.to(self._device, non_blocking=True).add_(grad)
            if self.boundary:
                norm = torch.linalg.vector_norm(total, dtype=torch.float32)
                self._norms[self._position[name]].copy_(norm)
            place.copy_(total, non_blocking=True)
            self._in_flight.append(self._stream.record_event())
        # Its memory is not given to others before the copy has read it.
        grad.record_stream(self._stream)
        if len(self._in_flight) > _IN_FLIGHT:
            compute.wait_event(self._in_flight.popleft())

    def end_backward(self) -> None:
        self._is_open = False
        if self._stream is not None:
            self._in_flight.clear()
            self._landed = self._stream.record_event()
            torch.cuda.current_stream(self._device).wait_event(self._landed)
        if self.boundary:
            for name in self._order:
                if name not in self._filled:
                    self._forget(name)

    def _forget_all(self) -> None:
        if self._travels:
            torch.cuda.synchronize(self._device)  # the last update may still be reading what the host overwrites
        self._is_consumed = self._is_open = False
        self._filled.clear()
        for name in self._order:
            self._forget(name)

    def _forget(self, name: str) -> None:
        """A parameter without a gradient counts as zero."""
        bucket, slot = self._places[name]
        view_of(self._flats[bucket], slot).zero_()
        if self._norms is not None:
            self._norms[self._position[name]].zero_()

    def norm_views(self) -> list[Tensor]:
        """On the way down their norms were taken; a norm's norm is the norm."""
        if self._is_consumed or self._is_open:  # a step without a backward pass: there are no gradients
            self._forget_all()
        return super().norm_views() if self._norms is None else list(self._norms.unbind())

    def shard(self, bucket: int) -> Tensor:
        self._settle()
        return self._flats[bucket]

    def part(self, bucket: int, start: int, end: int) -> Tensor:
        """For updates: on streams behind the compute stream, or on the host after it has read the norm."""
        return self._flats[bucket][start:end]

    def _settle(self) -> None:
        """Let the host read what has been sent down."""
        if self._landed is not None:
            self._landed.synchronize()
            self._landed = None

    def clear_shard(self, bucket: int) -> None:
        self._is_consumed = True

    def clear_part(self, bucket: int, start: int, end: int) -> None:
        self._is_consumed = True

    @property
    def num_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self._flats.values())

    @property
    def is_on_host(self) -> bool:
        return self._travels
