"""Large copies over the link that let small ones through.

The copy engine of a direction serves what one stream has queued to its end before it looks at another stream, unless
that one must wait for something. So behind a gigabyte of states, a ``tensor.item()`` anywhere in the model would wait
20 ms, and so would the next batch on its way up. Here every cut goes into the other one of two streams, which waits for
the cut before: nothing is ever queued behind a copy that runs, a small copy waits for one cut at most, and the link is
as busy as with one long copy. (A tiny kernel after each cut does the same, but waits for its turn among the model's
kernels: a fifth of the link is lost beside large matrix products.) Measured by ``benchmarks/copy_queue.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["CutCopies", "cut_bytes"]

HOST_SECONDS = 30e-6
"""What a cut costs the host: four calls."""
SMALL_COPIES = 5
"""Of a step, that wait for a cut each: three tensors of a batch, and two numbers that T5's attention masks read."""
LINK_BYTES = 50e9
"""A second, of one direction while both are in use."""
LEAST_BYTES, MOST_BYTES = 16 * 2**20, 256 * 2**20
"""Shorter cuts leave gaps on the link; longer ones save no time that anybody would see."""


def cut_bytes(total: int) -> int:
    """The most bytes of a cut, if a step moves ``total`` bytes each way: the host's time for all cuts and what small
    copies wait are together least there. 40 MB for t5-base, whose pieces make cuts of 34 to 37; 147 for 3 B parameters,
    whose pieces of 151 are halved."""
    best = math.sqrt(2 * total * HOST_SECONDS * LINK_BYTES / SMALL_COPIES)
    return min(MOST_BYTES, max(LEAST_BYTES, int(best)))


class CutCopies:
    """Copies between one device and page-locked memory, in one direction and in the order in which they are asked
    for, in cuts of no more than ``cut`` bytes."""

    def __init__(self, device: torch.device, cut: int) -> None:
        self.cut = cut
        self._streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]
        self._last: torch.cuda.Event | None = None

    def copy(self, target: Tensor, source: Tensor, *after: torch.cuda.Event) -> torch.cuda.Event:
        """Queue a copy of bytes that begins after these events; leaves another stream current.

        Returns:
            When it is over, and all before it are.
        """
        for event in after:
            self._streams[1].wait_event(event)  # that of the first cut; the others come after it
        count = max(1, -(-source.numel() // self.cut))
        for to, part in zip(target.chunk(count), source.chunk(count), strict=True):
            self._streams.reverse()
            stream = self._streams[0]
            if self._last is not None:
                stream.wait_event(self._last)
            torch.cuda.set_stream(stream)
            to.copy_(part, non_blocking=True)
            ended = self._last = stream.record_event()
        return ended

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()
