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

    def take_first(
        self, num_bytes: int, *, among: set[int] | None = None, below: int | None = None
    ) -> LeavingBuffer | None:
        """Of the buffers that are large enough (smaller than ``below``, their ``id`` in ``among``), the one that is
        free soonest: whoever takes one for a piece after the other waits in the order in which downloads end."""
        for at, one in enumerate(self._buffers):
            numel = one.buffer.numel()
            if num_bytes <= numel < (below or numel + 1) and (among is None or id(one.buffer) in among):
                del self._buffers[at]
                return one
        return None

    @property
    def num_bytes(self) -> int:
        return sum(one.buffer.numel() for one in self._buffers)

    @property
    def buffers(self) -> list[Tensor]:
        return [one.buffer for one in self._buffers]
