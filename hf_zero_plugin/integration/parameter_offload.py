"""What ``optimizer.parameter_offload`` is at stage 3: where TRL takes hooks off a model that it has gathered.

TRL generates inside ``GatheredParameters``, with DeepSpeed's hooks taken off by hand so that they do not scatter the
weights again. FSDP2's hooks may stay: they gather for themselves and leave what is gathered outside of them alone. So
there are no hooks to take off here, and no parameters that know about them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["ParameterOffload"]


class _WithoutParameters(nn.Module):
    def ds_external_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())


class ParameterOffload:
    """Attributes:
    module: has no parameters.
    forward_hooks, backward_hooks: empty; callers set them.
    """

    def __init__(self) -> None:
        self.module = _WithoutParameters()
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        """Putting hooks back: there is nothing to put back."""
