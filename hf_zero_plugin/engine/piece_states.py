"""Masters and optimizer states of many pieces that stay where they are, and their update in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.optimizers import TorchRule, UpdateRule

__all__ = ["PieceStates"]


class PieceStates:
    """States of an ``UpdateRule`` as plain tensors, or one torch optimizer per piece for a ``TorchRule``."""

    def __init__(self, rule: UpdateRule, pieces: Sequence[Piece]) -> None:
        self.rule = rule
        self.pieces = pieces
        self.masters: list[Tensor | None] = [None] * len(pieces)
        self._states: list[list[Tensor]] = [[] for _ in pieces]
        self._optimizers: dict[int, torch.optim.Optimizer] = {}

    def start(
        self, index: int, master: Tensor, group: Mapping[str, Any], storage: Sequence[Tensor] | None = None
    ) -> None:
        """Give piece ``index`` its master (kept, not copied) and fresh states, in ``storage`` if given."""
        shape = self.pieces[index].shape
        master = master if shape is None else master.view(shape)
        self.masters[index] = master
        if isinstance(self.rule, TorchRule):
            self._optimizers[index] = self.rule.make(master, group)
            return
        names = self.rule.state_names
        states = list(storage) if storage is not None else [torch.empty_like(master) for _ in names]
        for name, state in zip(names, states):
            state.fill_(self.rule.initial_state(name, group))
        self._states[index] = states

    def update(
        self, index: int, grad: Tensor, group: Mapping[str, Any], number: Tensor, found_inf: Tensor | None
    ) -> None:
        """Apply one step to piece ``index``; ``grad`` is fp32, flat, already unscaled and clipped."""
        master = self.masters[index]
        assert master is not None
        if index in self._optimizers:
            TorchRule.step(self._optimizers[index], grad.view_as(master), group)
        else:
            self.rule.update(master, grad, self._states[index], group, number, found_inf)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """ "master" and every state tensor by name."""
        master = self.masters[index]
        assert master is not None
        if index not in self._optimizers:
            return {"master": master, **dict(zip(self.rule.state_names, self._states[index]))}
        state = self._torch_state(index)
        return {"master": master, **{name: value for name, value in state.items() if isinstance(value, Tensor)}}

    def load(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors in, by name; names that are not there stay as they are."""
        if index in self._optimizers:
            self._restore_torch_state(index, tensors)
        for name, target in self.tensors(index).items():
            if name in tensors:
                target.copy_(tensors[name].view_as(target))

    def _torch_state(self, index: int) -> dict[str, Any]:
        optimizer = self._optimizers[index]
        return optimizer.state[optimizer.param_groups[0]["params"][0]]

    def _restore_torch_state(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        # Before its first step a torch optimizer has no state tensors to copy into: hand it the saved ones.
        master, state = self.masters[index], self._torch_state(index)
        assert master is not None
        for name, value in tensors.items():
            if name == "master" or name in state:
                continue
            state[name] = value.to(master.device if value.ndim else value.device).clone()

    def num_bytes(self) -> dict[str, int]:
        masters = moments = 0
        for index in range(len(self.pieces)):
            for name, tensor in self.tensors(index).items():
                size = tensor.numel() * tensor.element_size()
                masters, moments = (masters + size, moments) if name == "master" else (masters, moments + size)
        return {"master weights": masters, "moments": moments}
