"""Page-locked host memory in which gradients come down from a device, piece by piece, and new weights go up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zero_plugin.engine.pinned import PinnedArena

__all__ = ["Carriers"]


class Carriers:
    """One buffer a piece: its gradient first and, once that is consumed, its weights.

    Args:
        weights: of every piece, shape (n,): what goes up has their types.
        sums_in_fp32: gradients are sums of micro-steps in fp32. Without that buffers are as narrow as the weights,
            until ``widen`` is called.
        pin: page-lock them.
    """

    def __init__(self, weights: Sequence[Tensor], *, sums_in_fp32: bool, pin: bool) -> None:
        self._weights = list(weights)
        self._pin = pin
        self._arenas: dict[torch.dtype, PinnedArena] = {}
        """By the weights' type."""
        self.down: dict[int, Tensor] = {}
        """By piece: a gradient's type is this one or narrower."""
        self.up: dict[int, Tensor] = {}
        """By piece, the same memory: weights in their own type."""
        for dtype in sorted({weight.dtype for weight in weights}, key=str):
            self._make(dtype, torch.float32 if sums_in_fp32 else dtype)

    def _make(self, dtype: torch.dtype, carried: torch.dtype) -> None:
        sizes = {index: weight.numel() for index, weight in enumerate(self._weights) if weight.dtype == dtype}
        arena = self._arenas[dtype] = PinnedArena(sum(sizes.values()), pin=self._pin, dtype=carried)
        self.down.update({index: arena.take(numel) for index, numel in sizes.items()})
        self.up.update({index: self.down[index].view(dtype)[:numel] for index, numel in sizes.items()})

    def widen(self, index: int) -> None:
        """Let gradients of the type of piece ``index``'s weights come down in fp32. No copy may be under way.

        Those that have come down already are kept.
        """
        dtype, down = self._weights[index].dtype, dict(self.down)
        self._arenas[dtype].release()
        self._make(dtype, torch.float32)
        for one, narrow in down.items():
            if narrow is not self.down[one]:
                self.down[one].copy_(narrow)

    def release(self) -> None:
        """Unlock the pages."""
        for arena in self._arenas.values():
            arena.release()

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.down.values())
