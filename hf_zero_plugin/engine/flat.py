"""Half-precision (or fp32) weights as views of flat buckets.

After ``FlatWeights`` every trainable parameter is still the same ``nn.Parameter`` object, of its own shape; only its
storage has moved into a bucket, so one call can update or gather hundreds of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_zero_plugin.engine.buckets import BucketLayout, Slot

__all__ = ["FlatWeights", "view_of"]


def view_of(flat: Tensor, slot: Slot) -> Tensor:
    """The slot's part of ``flat`` (P,) in the shape of its parameter; no copy."""
    return flat[slot.start : slot.end].view(slot.spec.shape)


class FlatWeights:
    """Owns one flat weight buffer per bucket, shape (P,), and keeps parameters pointing into them."""

    def __init__(self, layouts: Sequence[BucketLayout], params: Sequence[nn.Parameter], device: torch.device) -> None:
        self.layouts = list(layouts)
        self.params = list(params)
        """Indexed by ``ParamSpec.index``."""
        self.device = device
        self.flats: list[Tensor] = []

    @torch.no_grad()
    def adopt_bucket(self, layout: BucketLayout, dtype: torch.dtype) -> Tensor:
        """Move the bucket's parameters into a new flat buffer; return their fp32 values, shape (P,), on the device.

        The fp32 values are taken from the parameters as they came, before any narrowing, so that master weights
        start from all the precision that the model was loaded with.
        """
        exact = torch.zeros(layout.padded_numel, dtype=torch.float32, device=self.device)
        for slot in layout.slots:
            view_of(exact, slot).copy_(self.params[slot.spec.index])
        flat = exact if dtype == torch.float32 else exact.to(dtype)
        for slot in layout.slots:
            self.params[slot.spec.index].data = view_of(flat, slot)
        assert layout.index == len(self.flats), "buckets are adopted in order"
        self.flats.append(flat)
        return exact

    @property
    def num_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self.flats)
