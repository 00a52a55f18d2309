"""Buffers on the device that are being downloaded: who may have them next, and after what."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LeavingBuffer", "LeavingBuffers"]


class LeavingBuffer(NamedTuple):
    """A buffer that a copy may still read, and when that is over."""

    buffer: Tensor
    downloaded: torch.cuda.Event


class LeavingBuffers:
    """In the order in which their downloads end."""

    def __init__(self, buffers: deque[LeavingBuffer] | None = None) -> None:
        self._buffers = buffers if buffers is not None else deque()

    def copy(self) -> LeavingBuffers:
        return LeavingBuffers(self._buffers.copy())

    def add(self, buffer: Tensor, downloaded: torch.cuda.Event) -> None:
        self._buffers.append(LeavingBuffer(buffer, downloaded))

    def reap(self) -> None:
        """Drop those whose downloads are over: their memory is anybody's."""
        while self._buffers and self._buffers[0].downloaded.query():
            self._buffers.popleft()

    def take_first(self, num_bytes: int, among: set[int]) -> LeavingBuffer | None:
        """Of the buffers whose ``id`` is in ``among`` and that are large enough, the one that is free soonest."""
        fits = (
            at for at, one in enumerate(self._buffers) if id(one.buffer) in among and one.buffer.numel() >= num_bytes
        )
        return self._take(next(fits, None))

    def take_closest(self, num_bytes: int) -> LeavingBuffer | None:
        """The smallest that is large enough: so a step after the other gets by with the same buffers."""
        sizes = [one.buffer.numel() for one in self._buffers]
        fits = [at for at, size in enumerate(sizes) if size >= num_bytes]
        return self._take(min(fits, key=sizes.__getitem__, default=None))

    def _take(self, at: int | None) -> LeavingBuffer | None:
        if at is None:
            return None
        one = self._buffers[at]
        del self._buffers[at]
        return one

    @property
    def num_bytes(self) -> int:
        return sum(one.buffer.numel() for one in self._buffers)

    @property
    def buffers(self) -> list[Tensor]:
        return [one.buffer for one in self._buffers]
