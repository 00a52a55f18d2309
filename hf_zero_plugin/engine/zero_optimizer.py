"""The optimizer object that schedulers, callbacks and accelerate see.

It owns the param groups, which schedules write to, and nothing else: states live in the engine's homes. ``step`` and
``zero_grad`` do nothing because ``engine.step`` does both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["ZeroOptimizer", "trainable_groups"]


class ZeroOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` over the model's own parameters.

    Attributes:
        overflow: the last step was skipped because a gradient was inf or nan.
        optimizer: the user's optimizer object if there was one; its param groups are shared, not copied.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        client: torch.optim.Optimizer | None = None,
    ) -> None:
        super().__init__(groups, defaults)
        self.optimizer = client if client is not None else self
        self.overflow = False
        self.engine: ZeroEngine | None = None
        if client is not None:
            # A scheduler built earlier writes to the client's own dicts: use those.
            self.param_groups = client.param_groups
        # torch's schedulers warn when they step before any optimizer step; the engine steps instead.
        self._opt_called = True
        if client is not None:
            client._opt_called = True  # type: ignore[attr-defined]

    def hyperparameters(self) -> list[dict[str, Any]]:
        """The groups without their parameters, copied: tensors too, because schedules write into them."""
        return [{key: _copy(value) for key, value in group.items() if key != "params"} for group in self.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Nothing to do: ``engine.step`` steps."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: ``engine.step`` clears gradients."""

    @property
    def cur_scale(self) -> float:
        return 1.0 if self.engine is None else self.engine.loss_scale

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters only; the states are saved by ``engine.save_checkpoint``."""
        return {"param_groups": self.hyperparameters(), "state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "param_groups": self.param_groups}


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def trainable_groups(params: Sequence[nn.Parameter] | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Torch-style param groups without frozen parameters and empty groups."""
    raw: list[Any] = list(params)
    as_groups = raw if raw and isinstance(raw[0], dict) else [{"params": raw}]
    groups: list[dict[str, Any]] = [dict(group) for group in as_groups]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return [group for group in groups if group["params"]]
