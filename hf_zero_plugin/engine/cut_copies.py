"""Large copies over the link that let small ones through.

The copy engine of a direction serves what one stream has queued to its end before it looks at another stream, unless
that one must wait for something. So behind a gigabyte of states, a ``tensor.item()`` anywhere in the model would wait
20 ms, and so would the next batch on its way up. Here every cut goes into the other one of two streams, which waits for
the cut before: nothing is ever queued behind a copy that runs, a small copy waits for one cut at most, and the link is
as busy as with one long copy. (A tiny kernel after each cut does the same, but waits for its turn among the model's
kernels: a fifth of the link is lost beside large matrix products.) Measured by ``benchmarks/copy_queue.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CutCopies"]

CUT_BYTES = 72 * 2**20
"""A millisecond and a half of a x16 gen5 link; a cut costs the host four calls."""


class CutCopies:
    """Copies between one device and page-locked memory, in one direction and in the order in which they are asked
    for."""

    def __init__(self, device: torch.device) -> None:
        self._streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]
        self._last: torch.cuda.Event | None = None

    def copy(self, target: Tensor, source: Tensor, *after: torch.cuda.Event) -> torch.cuda.Event:
        """Queue a copy of bytes that begins after these events; leaves another stream current.

        Returns:
            When it is over, and all before it are.
        """
        for event in after:
            self._streams[1].wait_event(event)  # that of the first cut; the others come after it
        for to, part in zip(target.split(CUT_BYTES), source.split(CUT_BYTES), strict=True):
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
