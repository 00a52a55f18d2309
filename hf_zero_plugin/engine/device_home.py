"""States that stay on the compute device and are updated in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.master_weights import Context, Home, StepInputs
from hf_zero_plugin.engine.piece_states import PieceStates

__all__ = ["DeviceHome"]


class DeviceHome(Home):
    """States on the compute device, updated in place on the current stream."""

    def __init__(self, context: Context, pieces: Sequence[Piece]) -> None:
        super().__init__(context, pieces)
        self._states = PieceStates(context.rule, self.pieces, context.types)
        self._scratch: Tensor | None = None

    def set_master(self, index: int, values: Tensor) -> None:
        piece = self.pieces[index]
        if self.context.types.master != values.dtype:
            weight, dtype = self.context.weight_of(piece), self.context.types.master
            # Narrow masters of weights of their type are the weights, as fp32 weights are their own masters.
            is_weight = weight.dtype == dtype and weight.device == self.context.device
            values = weight if is_weight else values.to(dtype)
        self._states.start(index, values, self.context.groups[piece.group])

    def step(self, inputs: StepInputs) -> None:
        number = torch.full((), float(inputs.number), device=self.context.device)
        for index, piece in enumerate(self.pieces):
            grad = self._widen(self.context.grad_of(piece))
            if inputs.multiplier is not None:
                grad.mul_(inputs.multiplier)
            self._states.update(index, grad, inputs.groups[piece.group], number, inputs.found_inf)
            self._write_weight(index)
            self.context.clear_grad(piece)
            if self.last_piece_of_bucket[piece.bucket] == index:
                self.context.finish_bucket(piece.bucket, self)

    def _write_weight(self, index: int) -> None:
        weight, master = self.context.weight_of(self.pieces[index]), self._states.masters[index]
        assert master is not None
        if weight.device != master.device:  # offloaded weights of states that are kept on the device
            weight.copy_(master.view(-1).to(weight.dtype), non_blocking=True)
        elif weight.data_ptr() != master.data_ptr():  # weights of the masters' type are their own masters
            weight.copy_(master.view(-1))

    def _widen(self, grad: Tensor) -> Tensor:
        if grad.dtype == torch.float32:
            return grad
        if self._scratch is None:
            longest = max(piece.numel for piece in self.pieces)
            self._scratch = torch.empty(longest, dtype=torch.float32, device=self.context.device)
        return self._scratch[: grad.numel()].copy_(grad)

    def synchronize(self) -> None:
        if self.context.device.type == "cuda" and any(
            self.context.weights[piece.bucket].device.type == "cpu" for piece in self.pieces
        ):
            torch.cuda.synchronize(self.context.device)

    def tensors(self, index: int) -> dict[str, Tensor]:
        return self._states.tensors(index)

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        self._states.load(index, tensors)

    @property
    def num_bytes(self) -> dict[str, int]:
        sizes = self._states.num_bytes()
        weights = [self.context.weights[piece.bucket] for piece in self.pieces]
        if all(
            weight.dtype == self.context.types.master and weight.device == self.context.device for weight in weights
        ):
            sizes["master weights"] = 0  # the weights themselves
        return sizes
