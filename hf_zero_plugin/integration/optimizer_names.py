"""Optimizer classes that accelerate builds by DeepSpeed's names. They carry hyperparameters; the engine steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hf_zero_plugin.engine.optimizers import AdagradRule, AdamRule, LionRule, UpdateRule

__all__ = ["DeepSpeedCPUAdagrad", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam"]


class _Named(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError(f"{type(self).__name__} only describes an optimizer to deepspeed.initialize; it cannot step")


class DeepSpeedCPUAdam(_Named):
    """Adam, or AdamW if ``adamw_mode``."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        self.adamw_mode = adamw_mode
        super().__init__(
            model_params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction},
        )

    def zero_rule(self) -> UpdateRule:
        return AdamRule(dict(self.defaults), decoupled=self.adamw_mode)


class FusedAdam(DeepSpeedCPUAdam):
    """The same rule; where it runs is the configuration's business."""

    def __init__(self, params: Iterable[Any], *, adam_w_mode: bool = True, set_grad_none: bool = True, **options: Any):
        super().__init__(params, adamw_mode=adam_w_mode, **options)


class DeepSpeedCPUAdagrad(_Named):
    def __init__(
        self, model_params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0.0, **_: Any
    ) -> None:
        super().__init__(model_params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def zero_rule(self) -> UpdateRule:
        return AdagradRule(dict(self.defaults))


class DeepSpeedCPULion(_Named):
    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__(model_params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def zero_rule(self) -> UpdateRule:
        return LionRule(dict(self.defaults))
