"""``deepspeed.utils.safe_get_*`` and ``safe_set_*`` over ``engine/tensor_access.py``."""

from __future__ import annotations

from torch import Tensor, nn

from hf_zero_plugin.engine.tensor_access import (
    full_grad,
    full_state,
    local_grad,
    local_state,
    set_full_state,
    set_local_state,
)

__all__ = [
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_optimizer_state",
]


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    return full_state(param, "master")


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    set_full_state(param, value, "master")


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    return full_state(param, optim_state_key)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    set_full_state(param, value, optim_state_key)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    return full_grad(param)


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    return local_state(param, "master")


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    set_local_state(param, value, "master")


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    return local_state(param, optim_state_key)


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    set_local_state(param, value, optim_state_key)


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    return local_grad(param)
