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

    def allocate(self, layout: BucketLayout, dtype: torch.dtype) -> Tensor:
        """Make the next bucket's buffer, shape (P,), zeroed; no parameter points into it yet."""
        assert layout.index == len(self.flats), "buckets are made in order"
        self.flats.append(torch.zeros(layout.padded_numel, dtype=dtype, device=self.device))
        return self.flats[-1]

    @torch.no_grad()
    def adopt(self, layout: BucketLayout) -> Tensor:
        """Move the bucket's parameters into its buffer; return their fp32 values, shape (P,), on the device.

        The fp32 values are taken from the parameters as they came, before any narrowing, so that master weights
        start from all the precision that the model was loaded with. An fp32 buffer is returned itself.
        """
        flat = self.flats[layout.index]
        exact = flat if flat.dtype == torch.float32 else torch.zeros_like(flat, dtype=torch.float32)
        for slot in layout.slots:
            view_of(exact, slot).copy_(self.params[slot.spec.index])
        if exact is not flat:
            flat.copy_(exact)
        for slot in layout.slots:
            self.params[slot.spec.index].data = view_of(flat, slot)
        return exact

    @property
    def num_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self.flats)
