"""A ready-made optimizer that we have no update rule for: step the object itself, on whole fp32 parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.master_weights import Context, Home, StepInputs

__all__ = ["ClientHome"]

_NUMBER = "number:"


class ClientHome(Home):
    """Puts fp32 master parameters in place of the model's in the client's param groups, and calls its ``step``.

    Works for any optimizer, elementwise or not, as long as no parameter is cut: one rank, or stage 0.
    ``device`` says where masters and the client's states live.
    """

    def __init__(
        self,
        context: Context,
        pieces: Sequence[Piece],
        client: torch.optim.Optimizer,
        params: Sequence[nn.Parameter],
        param_index_of: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__(context, pieces)
        self._client = client
        self._model_params = [params[index] for index in param_index_of]
        self._masters: list[nn.Parameter] = []
        self._device = device

    def set_master(self, index: int, values: Tensor) -> None:
        shape = self.pieces[index].shape
        assert shape is not None and index == len(self._masters), "whole parameters, in order"
        aliased = self.context.weight_of(self.pieces[index]).data_ptr() == values.data_ptr()
        on_device = values if aliased and self._device == values.device else values.to(self._device, copy=True)
        self._masters.append(nn.Parameter(on_device.view(shape)))
        if len(self._masters) == len(self.pieces):
            self._take_over()

    def _take_over(self) -> None:
        master_of = {id(param): master for param, master in zip(self._model_params, self._masters)}
        for group in self._client.param_groups:
            group["params"] = [master_of[id(param)] for param in group["params"] if id(param) in master_of]

    @property
    def skips_on_device(self) -> bool:
        return False

    def step(self, inputs: StepInputs) -> None:
        for piece, master in zip(self.pieces, self._masters):
            grad = self.context.grad_of(piece).to(self._device, torch.float32)
            if inputs.multiplier is not None:
                grad = grad * inputs.multiplier.to(self._device)
            master.grad = grad.view(master.shape)
        self._client.step()
        for index, (piece, master) in enumerate(zip(self.pieces, self._masters)):
            master.grad = None
            weight = self.context.weight_of(piece)
            if weight.data_ptr() != master.data_ptr():
                weight.copy_(master.detach().view(-1))
            self.context.clear_grad(piece)
            if self.last_piece_of_bucket[piece.bucket] == index:
                self.context.finish_bucket(piece.bucket, self)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Plain numbers among the states (Adafactor counts its steps in one) are given as 0-dim tensors."""
        master = self._masters[index]
        found = {"master": master.detach()}
        for name, value in self._client.state.get(master, {}).items():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, bool | int | float):
                found[_NUMBER + name] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        return found

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        master = self._masters[index]
        state = self._client.state[master]
        for name, value in tensors.items():
            if name.startswith(_NUMBER):
                state[name.removeprefix(_NUMBER)] = value.item()
            elif name == "master":
                master.detach().copy_(value.view_as(master))
            else:
                state[name] = value.to(self._device if value.ndim else "cpu").clone()

    @property
    def num_bytes(self) -> dict[str, int]:
        total = {"master weights": 0, "moments": 0}
        for index, piece in enumerate(self.pieces):
            for name, tensor in self.tensors(index).items():
                if name != "master":
                    total["moments"] += tensor.numel() * tensor.element_size()
                elif tensor.data_ptr() != self.context.weight_of(piece).data_ptr():
                    total["master weights"] += tensor.numel() * 4
        return total

    @property
    def is_on_host(self) -> bool:
        return self._device.type == "cpu" and self.context.device.type != "cpu"
