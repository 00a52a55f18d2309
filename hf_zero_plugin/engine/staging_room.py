"""How much of the device's memory buffers of streamed states may take: during a backward pass, and during the next
forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.device_memory import allocated_bytes, capacity_bytes

__all__ = ["StagingRoom", "pieces_ahead"]

MAX_AHEAD_SHARE = 0.5
"""Of the states, how much is staged during a backward pass at most."""

FULL_SHARE = 0.9
"""Of the device: what activations and staged buffers may take together. The rest is for what the former need at their
peak, between two looks, and for gaps in the allocator's memory."""

HELD_SHARE = 0.2
"""Of what the device holds when a backward pass begins: buffers that may be on the device during the next forward pass
for as long as that takes, at least. With none, a forward pass would wait until nearly all states have gone down."""


class StagingRoom:
    """Measured when a backward pass begins; no room before that. All sizes are bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._capacity = int(FULL_SHARE * capacity_bytes(device))
        self.ceiling = 0
        """What the device held when the pass began."""
        self.most_staged = 0
        """Of all buffers together, so that the device does not become full."""
        self.most_held = 0
        """Of buffers that bring up further pieces after the step."""

    def measure(self, leaving: int) -> None:
        """A backward pass begins; ``leaving`` is what buffers on their way down take.

        Those are no activations: counted as such, they would let this pass stage as much on top of what it stages
        anyway, and the next one more again. But they were there all through the forward pass, since a host that runs
        ahead of the device sees no download end: the next step may fill as many anew at no cost.
        """
        self.ceiling = allocated_bytes(self._device) - leaving
        self.most_staged = self._capacity - self.ceiling
        self.most_held = max(int(HELD_SHARE * self.ceiling), leaving)

    @property
    def free(self) -> int:
        """What the pass has given back so far."""
        return self.ceiling - allocated_bytes(self._device)


def pieces_ahead(pieces: Sequence[Piece], num_slots: int) -> int:
    """How many pieces may be staged during a backward pass: at least as many as there are slots."""
    total = sum(piece.numel for piece in pieces)
    count = numel = 0
    for piece in pieces:
        numel += piece.numel
        if count >= num_slots and numel > MAX_AHEAD_SHARE * total:
            break
        count += 1
    return count
