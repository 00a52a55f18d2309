"""Masters and optimizer states of many pieces that stay where they are, and their update in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.optimizers import TorchRule, UpdateRule

__all__ = ["FP32", "PieceStates", "StateTypes", "update_rows"]


class StateTypes(NamedTuple):
    """Types in which masters and states rest between steps. Arithmetic is fp32 whatever they are."""

    master: torch.dtype = torch.float32
    states: torch.dtype = torch.float32

    @property
    def are_wide(self) -> bool:
        return self.master == self.states == torch.float32

    def bytes_per_element(self, num_states: int) -> int:
        return self.master.itemsize + num_states * self.states.itemsize

    def rows(self, memory: Tensor, numel: int, num_states: int) -> list[Tensor]:
        """Cut ``memory``, bytes, into the master and ``num_states`` states of ``numel`` elements each."""
        if self.master == self.states:
            return list(
                memory[: numel * self.bytes_per_element(num_states)].view(self.master).view(-1, numel).unbind(0)
            )
        size = numel * self.master.itemsize
        states = memory[size : numel * self.bytes_per_element(num_states)].view(self.states)
        return [memory[:size].view(self.master), *states.view(num_states, numel).unbind(0)]


FP32 = StateTypes()


def update_rows(
    rule: UpdateRule,
    types: StateTypes,
    rows: Sequence[Tensor],
    grad: Tensor,
    group: Mapping[str, Any],
    number: Tensor,
    found_inf: Tensor | None,
) -> None:
    """Apply one step to a master and its states, ``rows``, in place."""
    if types.are_wide:
        rule.update(rows[0], grad, rows[1:], group, number, found_inf)
        return
    wide = [row.float() for row in rows]
    rule.update(wide[0], grad.view_as(wide[0]), wide[1:], group, number, found_inf)
    for narrow, updated in zip(rows, wide):
        if narrow is not updated:
            narrow.copy_(updated)


class PieceStates:
    """States of an ``UpdateRule`` as plain tensors, or one torch optimizer per piece for a ``TorchRule``.

    Narrow masters or states are widened for the update of a piece and rounded to nearest after it, which costs fp32
    copies of one piece for as long as it takes.
    """

    def __init__(self, rule: UpdateRule, pieces: Sequence[Piece], types: StateTypes = FP32) -> None:
        self.rule = rule
        self.pieces = pieces
        self.types = types
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
        states = (
            list(storage) if storage is not None else [torch.empty_like(master, dtype=self.types.states) for _ in names]
        )
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
            update_rows(self.rule, self.types, [master, *self._states[index]], grad, group, number, found_inf)

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
