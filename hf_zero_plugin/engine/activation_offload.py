"""``activation_checkpointing.cpu_checkpointing``: inputs of checkpointed layers rest in page-locked host memory.

Gradient checkpointing keeps the input of every layer until the backward pass recomputes the layer. Here each of them
leaves the device on a side stream while the layer runs, and comes back one layer ahead of its use::

    forward     layer 0 | layer 1      | layer 2      |         backward   layer 2 | layer 1      | layer 0
    down                  input of 0     input of 1                up   input of 2   input of 1     input of 0

Works on layers of transformers, which call ``_gradient_checkpointing_func``. Values do not change. Only what takes
part in the gradient travels: masks and positions, which all layers share, stay. On a CPU nothing has to travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["ActivationOffload"]

_FUNCTION = "_gradient_checkpointing_func"


class _Trip:
    """One saved tensor: on its way down, on the host, or on its way up again."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        self._device = tensor.device
        self._stream = stream
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
        # The device memory is not given to others before the copy has read it.
        tensor.record_stream(stream)

    def start_back(self) -> None:
        if self._back is None:
            with torch.cuda.stream(self._stream):
                self._back = self._host.to(self._device, non_blocking=True)
                self._arrived = self._stream.record_event()

    def take(self) -> Tensor:
        """The tensor on the device, ready for the current stream."""
        self.start_back()
        assert self._back is not None
        assert self._arrived is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._arrived)
        self._back.record_stream(current)
        back, self._back = self._back, None
        return back


class ActivationOffload:
    """Wraps the checkpointing function of every layer that has one; ``close`` unwraps."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._trips: list[_Trip] = []
        # Checkpointing may be switched on after the engine was made.
        self._handle = model.register_forward_pre_hook(self._wrap_new, prepend=True)
        self.num_packed = 0
        """Tensors seen so far, on any device."""

    def _wrap_new(self, *_: Any) -> None:
        self._trips.clear()
        for module in self._model.modules():
            function = vars(module).get(_FUNCTION)
            if function is not None and not hasattr(function, "zero_offload"):
                vars(module)[_FUNCTION] = self._wrapped(function)

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self._pack, self._unpack):
                return function(*args, **kwargs)

        call.zero_offload = function  # type: ignore[attr-defined]
        return call

    def _pack(self, tensor: Tensor) -> Tensor | int:
        if not tensor.requires_grad:
            return tensor
        self.num_packed += 1
        if self._stream is None or not tensor.is_cuda:
            return tensor
        self._trips.append(_Trip(tensor.detach(), self._stream))
        return len(self._trips) - 1

    def _unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = self._trips[packed].take()
        if packed > 0:
            self._trips[packed - 1].start_back()
        return tensor

    def close(self) -> None:
        self._handle.remove()
        for module in self._model.modules():
            original = getattr(vars(module).get(_FUNCTION), "zero_offload", None)
            if original is not None:
                vars(module)[_FUNCTION] = original
        self._trips.clear()
