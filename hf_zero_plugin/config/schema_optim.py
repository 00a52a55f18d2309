"""The ``optimizer`` and ``scheduler`` sections, and the parameters of every type they may name.

The tables of torch classes are written out because this package does not import torch; a test compares them with
the signatures of the torch that is installed.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import create_model

from hf_zero_plugin.config.fields import (
    AutoBetas,
    AutoCount,
    AutoNonNegative,
    AutoPerGroup,
    AutoPositive,
    Beta,
    Count,
    Integer,
    NonNegative,
    Opaque,
    PerGroup,
    Positive,
    Section,
    Share,
    applied,
    inert,
    refused,
)

__all__ = ["OPTIMIZERS", "REFUSED_OPTIMIZERS", "REFUSED_SCHEDULERS", "SCHEDULERS", "Optimizer", "Scheduler"]

_NOT_AN_OPTION = "Remove the key."
_KERNEL = "The engine chooses the kernel."


class Optimizer(Section):
    type: str = applied(
        ...,
        "Adam, AdamW, Adagrad, Lion, SGD, or the name of any class of torch.optim; the case does not matter.",
        note='"Adam" is AdamW unless adam_w_mode is false.',
    )
    params: Opaque = applied({}, "Parameters of the optimizer; see the table of its type.")
    legacy_fusion: bool = inert(False, "DeepSpeed's older fused kernels.", why=_KERNEL)


class Scheduler(Section):
    type: str = applied(
        ...,
        "WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, or a class of torch.optim.lr_scheduler.",
    )
    params: Opaque = applied({}, "Parameters of the schedule; see the table of its type.")


class _CommonParams(Section):
    """What every optimizer takes."""

    lr: AutoNonNegative = applied(1e-3, "Learning rate.")
    max_grad_norm: NonNegative = refused(
        0.0,
        "Clipping by the optimizer.",
        why="Clipping belongs to the engine; DeepSpeed ignores this key.",
        fix="Set gradient_clipping, at the top of the file.",
    )
    maximize: bool = refused(
        False, "Climb instead of descend.", why="The engine only descends.", fix="Negate the loss instead."
    )
    differentiable: bool = refused(
        False, "Backpropagate through the step.", why="The update runs outside autograd.", fix=_NOT_AN_OPTION
    )
    foreach: bool | None = inert(None, "torch's many-tensor kernels.", why=_KERNEL)
    fused: bool | None = inert(None, "torch's fused kernels.", why=_KERNEL)
    capturable: bool = inert(False, "Safe inside CUDA graphs.", why=_KERNEL)


class AdamParams(_CommonParams):
    betas: AutoBetas = applied([0.9, 0.999], "Decay rates of the first and second moment.")
    eps: AutoNonNegative = applied(1e-8, "Added to the denominator.")
    weight_decay: AutoNonNegative = applied(0.0, "Weight decay; 0.01 by default with torch_adam.")
    bias_correction: bool = applied(True, "Correct the moments for starting at zero.")
    adam_w_mode: bool = applied(True, "Decoupled weight decay (AdamW); false is Adam with L2 regularization.")
    torch_adam: bool = applied(
        False,
        "Use torch's Adam instead of DeepSpeed's.",
        note="The update is torch's in any case; only the default of weight_decay changes.",
    )
    fp32_optimizer_states: bool = applied(
        True, "Keep the moments in fp32; false keeps them in the type of the weights."
    )
    amsgrad: bool = refused(
        False,
        "AMSGrad variant.",
        why="It keeps a third state, which the engine has no room for; DeepSpeed refuses it as well.",
        fix=_NOT_AN_OPTION,
    )


class LionParams(_CommonParams):
    lr: AutoNonNegative = applied(1e-4, "Learning rate.")
    betas: AutoBetas = applied([0.9, 0.99], "Interpolation and decay rate of the momentum.")
    weight_decay: AutoNonNegative = applied(0.0, "Decoupled weight decay.")


_Numbers = list[float]

_TORCH_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adafactor": {"beta2_decay": float, "eps": list[float | None], "d": float, "weight_decay": AutoNonNegative},
    "Adadelta": {"rho": Beta, "eps": AutoNonNegative, "weight_decay": AutoNonNegative},
    "Adagrad": {
        "lr_decay": NonNegative,
        "weight_decay": AutoNonNegative,
        "initial_accumulator_value": NonNegative,
        "eps": AutoNonNegative,
    },
    "Adamax": {"betas": AutoBetas, "eps": AutoNonNegative, "weight_decay": AutoNonNegative},
    "ASGD": {"lambd": float, "alpha": float, "t0": float, "weight_decay": AutoNonNegative},
    "NAdam": {
        "betas": AutoBetas,
        "eps": AutoNonNegative,
        "weight_decay": AutoNonNegative,
        "momentum_decay": NonNegative,
        "decoupled_weight_decay": bool,
    },
    "RAdam": {
        "betas": AutoBetas,
        "eps": AutoNonNegative,
        "weight_decay": AutoNonNegative,
        "decoupled_weight_decay": bool,
    },
    "RMSprop": {
        "alpha": Share,
        "eps": AutoNonNegative,
        "weight_decay": AutoNonNegative,
        "momentum": NonNegative,
        "centered": bool,
    },
    "Rprop": {"etas": _Numbers, "step_sizes": _Numbers},
    "SGD": {"momentum": NonNegative, "dampening": float, "weight_decay": AutoNonNegative, "nesterov": bool},
}

_WARMUP_TYPE = Literal["log", "linear"]
_LAST_ITERATION = "The checkpoint says where a run goes on; nothing else does."


class _ScheduleParams(Section):
    last_batch_iteration: Integer = refused(-1, "Step to start from.", why=_LAST_ITERATION, fix=_NOT_AN_OPTION)


class WarmupParams(_ScheduleParams):
    warmup_min_lr: AutoPerGroup = applied(0.0, "Learning rate before the first step.")
    warmup_max_lr: AutoPerGroup | None = applied(None, "Learning rate after the warm-up; the optimizer's if absent.")
    warmup_num_steps: AutoCount = applied(1000, "Steps of the warm-up; 0 works.", note="0 is an error in DeepSpeed.")
    warmup_type: _WARMUP_TYPE = applied("log", "Shape of the warm-up.")


class WarmupDecayParams(WarmupParams):
    total_num_steps: AutoPositive | None = applied(None, "Step at which the rate has fallen to 0.")


class WarmupCosineParams(_ScheduleParams):
    total_num_steps: AutoPositive | None = applied(None, "Step at which the cosine ends.")
    warmup_min_ratio: Share = applied(0.0, "Share of the learning rate before the first step.")
    warmup_num_steps: AutoCount = applied(1000, "Steps of the warm-up; 0 works.", note="0 is an error in DeepSpeed.")
    cos_min_ratio: Share = applied(0.0001, "Share of the learning rate at the end.")
    warmup_type: _WARMUP_TYPE = applied("log", "Shape of the warm-up.")


_STAIRS = "The cycle is always continuous; it is in DeepSpeed as well."


class OneCycleParams(_ScheduleParams):
    cycle_min_lr: PerGroup = applied(..., "Lowest learning rate of the cycle.")
    cycle_max_lr: PerGroup = applied(..., "Highest learning rate of the cycle.")
    decay_lr_rate: NonNegative = applied(0.0, "Decay of the rate after the cycle.")
    cycle_first_step_size: Positive = applied(2000, "Steps of the rising half.")
    cycle_second_step_size: Positive | None = applied(None, "Steps of the falling half; as the first if absent.")
    cycle_first_stair_count: Count = inert(0, "Stairs in the rising half.", why=_STAIRS)
    cycle_second_stair_count: Count | None = inert(None, "Stairs in the falling half.", why=_STAIRS)
    decay_step_size: Count = applied(0, "Steps between decays after the cycle; 0 does not decay.")
    cycle_momentum: bool = applied(True, "Move the momentum against the learning rate.")
    cycle_min_mom: Share = applied(0.8, "Lowest momentum.")
    cycle_max_mom: Share = applied(0.9, "Highest momentum.")
    decay_mom_rate: float = applied(0.0, "Decay of the momentum after the cycle.")


class LRRangeTestParams(_ScheduleParams):
    lr_range_test_min_lr: PerGroup = applied(1e-3, "Learning rate at the start.")
    lr_range_test_step_size: Positive = applied(2000, "Steps between rises.")
    lr_range_test_step_rate: NonNegative = applied(1.0, "Size of a rise.")
    lr_range_test_staircase: bool = applied(False, "Rise in stairs instead of evenly.")


_TORCH_SCHEDULERS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": Positive, "gamma": float},
    "MultiStepLR": {"milestones": list[Count], "gamma": float},
    "ConstantLR": {"factor": float, "total_iters": Count},
    "LinearLR": {"start_factor": float, "end_factor": float, "total_iters": Count},
    "ExponentialLR": {"gamma": float},
    "CosineAnnealingLR": {"T_max": Positive, "eta_min": float},
    "CosineAnnealingWarmRestarts": {"T_0": Positive, "T_mult": Positive, "eta_min": float},
    "PolynomialLR": {"total_iters": Count, "power": float},
    "CyclicLR": {
        "base_lr": NonNegative,
        "max_lr": NonNegative,
        "step_size_up": Positive,
        "step_size_down": Positive,
        "mode": Literal["triangular", "triangular2", "exp_range"],
        "gamma": float,
        "scale_mode": Literal["cycle", "iterations"],
        "cycle_momentum": bool,
        "base_momentum": NonNegative,
        "max_momentum": NonNegative,
    },
    "OneCycleLR": {
        "max_lr": NonNegative,
        "total_steps": Positive,
        "epochs": Positive,
        "steps_per_epoch": Positive,
        "pct_start": Share,
        "anneal_strategy": Literal["cos", "linear"],
        "cycle_momentum": bool,
        "base_momentum": NonNegative,
        "max_momentum": NonNegative,
        "div_factor": float,
        "final_div_factor": float,
        "three_phase": bool,
    },
}
_TORCH_REQUIRED = {
    "StepLR": {"step_size"},
    "MultiStepLR": {"milestones"},
    "ExponentialLR": {"gamma"},
    "CosineAnnealingLR": {"T_max"},
    "CosineAnnealingWarmRestarts": {"T_0"},
    "CyclicLR": {"base_lr", "max_lr"},
    "OneCycleLR": {"max_lr"},
}


class _TorchScheduleParams(Section):
    last_epoch: Integer = refused(-1, "Step to start from.", why=_LAST_ITERATION, fix=_NOT_AN_OPTION)


def _torch_params(name: str, home: str, base: type[Section], keys: dict[str, Any]) -> type[Section]:
    required = _TORCH_REQUIRED.get(name, set())
    fields: dict[str, Any] = {}
    for key, kind in keys.items():
        description = f"Passed to {home}.{name}; its default if absent."
        is_required = key in required
        fields[key] = (kind if is_required else kind | None, applied(... if is_required else None, description))
    return create_model(f"{name}Params", __base__=base, **fields)


OPTIMIZERS: dict[str, type[Section]] = {
    "Adam": AdamParams,
    "AdamW": AdamParams,
    "Lion": LionParams,
    **{name: _torch_params(name, "torch.optim", _CommonParams, keys) for name, keys in _TORCH_OPTIMIZERS.items()},
}
"""Optimizer types by the spelling of their own class; look them up without regard to case."""

_CHANGES_MATH = "It compresses what the ranks exchange, which changes the mathematics."
_USE_ADAMW = "Use AdamW."
REFUSED_OPTIMIZERS: dict[str, tuple[str, str]] = {
    "Lamb": ("LAMB is not built.", _USE_ADAMW),
    "Muon": ("Muon is not built yet.", _USE_ADAMW),
    "OneBitAdam": (_CHANGES_MATH, _USE_ADAMW),
    "OneBitLamb": (_CHANGES_MATH, _USE_ADAMW),
    "ZeroOneAdam": (_CHANGES_MATH, _USE_ADAMW),
    "MuAdam": ("muP needs the mup package and shapes of a base model.", _USE_ADAMW),
    "MuAdamW": ("muP needs the mup package and shapes of a base model.", _USE_ADAMW),
    "MuSGD": ("muP needs the mup package and shapes of a base model.", "Use SGD."),
    "LBFGS": ("It evaluates the loss several times a step, which the Trainer does not do.", _USE_ADAMW),
    "SparseAdam": ("It takes sparse gradients, and gradients here are dense.", _USE_ADAMW),
}
"""Types that DeepSpeed or torch have and this engine has not: why, and what to use."""

SCHEDULERS: dict[str, type[Section]] = {
    "WarmupLR": WarmupParams,
    "WarmupDecayLR": WarmupDecayParams,
    "WarmupCosineLR": WarmupCosineParams,
    "OneCycle": OneCycleParams,
    "LRRangeTest": LRRangeTestParams,
    **{
        name: _torch_params(name, "torch.optim.lr_scheduler", _TorchScheduleParams, keys)
        for name, keys in _TORCH_SCHEDULERS.items()
    },
}

_NEEDS_CODE = "It is built from functions or other schedulers, which JSON cannot hold."
_IN_CODE = "Build it in your code and hand it to the Trainer (optimizers=...), without a scheduler section."
REFUSED_SCHEDULERS: dict[str, tuple[str, str]] = {
    "LambdaLR": (_NEEDS_CODE, _IN_CODE),
    "MultiplicativeLR": (_NEEDS_CODE, _IN_CODE),
    "SequentialLR": (_NEEDS_CODE, _IN_CODE),
    "ChainedScheduler": (_NEEDS_CODE, _IN_CODE),
    "ReduceLROnPlateau": (
        "It follows a metric, and the engine sees none.",
        "Use --lr_scheduler_type reduce_lr_on_plateau, without a scheduler section.",
    ),
}
