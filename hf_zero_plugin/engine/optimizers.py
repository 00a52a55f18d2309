"""Optimizer names and objects -> update rules that work on flat fp32 pieces.

An update rule knows nothing of buckets, devices or ranks. It is given one piece of the master weights, the gradient of
that piece and the states it named, and changes them in place. Hyperparameters come with every call, from the param
group that the learning-rate schedule writes to.

The Adam family, SGD and Adagrad use torch's own fused kernels where torch has them, so a flat piece is updated to the
bit as the tensors it holds would be. Every other class of ``torch.optim`` runs through ``TorchRule``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_zero_plugin.config.settings import OptimizerSettings
from hf_zero_plugin.errors import ConfigError

__all__ = ["AdagradRule", "AdamRule", "LionRule", "SGDRule", "TorchRule", "UpdateRule", "rule_for", "rule_from_config"]

Group = Mapping[str, Any]


class UpdateRule:
    """Elementwise update of one flat piece.

    Attributes:
        state_names: states kept per element, in fp32, all starting at ``initial_state``.
        skips_on_device: the kernel itself honours ``found_inf``, so no host has to look at it first.
        elementwise: the update of an element depends on that element alone, so pieces may be cut anywhere.
    """

    state_names: tuple[str, ...] = ()
    skips_on_device = False
    elementwise = True

    def __init__(self, defaults: dict[str, Any]) -> None:
        self.defaults = defaults

    def initial_state(self, name: str, group: Group) -> float:
        return 0.0

    def update(
        self,
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        group: Group,
        step: Tensor,
        found_inf: Tensor | None,
    ) -> None:
        """Update ``master`` and ``states`` in place.

        Args:
            master, grad, states: fp32, all of one shape and device. ``grad`` may be overwritten.
            group: hyperparameters of the param group, ``lr`` included.
            step: number of this update counted from 1, 0-dim fp32 on the same device.
            found_inf: 0-dim fp32 on the same device; 1.0 means "leave everything as it is".
                Only passed to rules with ``skips_on_device``.
        """
        raise NotImplementedError


_NO_BIAS_CORRECTION_STEP = 1e9
"""beta ** 1e9 is 0 in fp32, which makes Adam's bias corrections exactly 1."""


class AdamRule(UpdateRule):
    """Adam and AdamW through torch's fused kernels (CPU and CUDA)."""

    state_names = ("exp_avg", "exp_avg_sq")
    skips_on_device = True

    def __init__(self, defaults: dict[str, Any], *, decoupled: bool) -> None:
        super().__init__(defaults)
        self._kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def update(
        self,
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        group: Group,
        step: Tensor,
        found_inf: Tensor | None,
    ) -> None:
        if not group.get("bias_correction", True):
            step = torch.full_like(step, _NO_BIAS_CORRECTION_STEP)
        beta1, beta2 = group["betas"]
        self._kernel(
            [master],
            [grad],
            [states[0]],
            [states[1]],
            [],
            [step],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )


class SGDRule(UpdateRule):
    """SGD with momentum. The first step sets the buffer to the gradient, as torch.optim.SGD does."""

    skips_on_device = False

    def __init__(self, defaults: dict[str, Any]) -> None:
        super().__init__(defaults)
        self.state_names = ("momentum_buffer",) if defaults.get("momentum", 0.0) else ()

    def update(
        self,
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        group: Group,
        step: Tensor,
        found_inf: Tensor | None,
    ) -> None:
        if group["weight_decay"]:
            grad.add_(master, alpha=group["weight_decay"])
        if states:
            momentum, buffer = group["momentum"], states[0]
            # Step 1 stores the gradient undamped. A host number would need a sync, so choose on the device.
            damped = torch.where(step == 1, 1.0, 1.0 - group.get("dampening", 0.0))
            buffer.mul_(momentum).add_(grad * damped)
            if group.get("nesterov", False):
                grad.add_(buffer, alpha=momentum)
            else:
                grad = buffer
        master.add_(grad, alpha=-group["lr"])


class AdagradRule(UpdateRule):
    state_names = ("sum",)

    def initial_state(self, name: str, group: Group) -> float:
        return float(group.get("initial_accumulator_value", 0.0))

    def update(
        self,
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        group: Group,
        step: Tensor,
        found_inf: Tensor | None,
    ) -> None:
        if group["weight_decay"]:
            grad.add_(master, alpha=group["weight_decay"])
        states[0].addcmul_(grad, grad)
        rate = group["lr"] / (1 + (step - 1) * group.get("lr_decay", 0.0))
        master.sub_(grad.mul_(rate).div_(states[0].sqrt().add_(group["eps"])))


class LionRule(UpdateRule):
    """Lion (arXiv:2302.06675, program 1): the sign of an interpolated momentum, decoupled weight decay."""

    state_names = ("exp_avg",)

    def update(
        self,
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        group: Group,
        step: Tensor,
        found_inf: Tensor | None,
    ) -> None:
        beta1, beta2 = group["betas"]
        direction = torch.lerp(grad, states[0], beta1).sign_()
        master.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        states[0].lerp_(grad, 1 - beta2)


_NOT_ELEMENTWISE = {"adafactor", "muon", "lbfgs"}
_CANNOT_SHARD = {"lbfgs", "sparseadam"}


class TorchRule(UpdateRule):
    """Any other class of torch.optim: one optimizer object per piece, holding its own states."""

    def __init__(self, cls: type[torch.optim.Optimizer], defaults: dict[str, Any]) -> None:
        super().__init__(defaults)
        self.cls = cls
        self.elementwise = cls.__name__.lower() not in _NOT_ELEMENTWISE
        self._accepted = set(inspect.signature(cls).parameters) - {"params"}

    def make(self, master: Tensor, group: Group) -> torch.optim.Optimizer:
        """One torch optimizer over one piece; ``master`` becomes its parameter without a copy."""
        options = {key: value for key, value in group.items() if key in self._accepted}
        return self.cls([torch.nn.Parameter(master, requires_grad=True)], **options)

    @staticmethod
    def step(optimizer: torch.optim.Optimizer, grad: Tensor, group: Group) -> None:
        own = optimizer.param_groups[0]
        own.update({key: value for key, value in group.items() if key in own and key != "params"})
        own["params"][0].grad = grad
        optimizer.step()
        own["params"][0].grad = None


def _adam_defaults(params: Mapping[str, Any], *, decoupled_by_default: bool) -> tuple[dict[str, Any], bool]:
    decoupled = bool(params.get("adam_w_mode", decoupled_by_default))
    decay = 0.01 if params.get("torch_adam", False) and decoupled else 0.0
    defaults: dict[str, Any] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": decay,
        "bias_correction": True,
    }
    defaults.update({key: value for key, value in params.items() if key in defaults})
    defaults["betas"] = tuple(defaults["betas"])
    return defaults, decoupled


def _known_defaults(defaults: dict[str, Any], params: Mapping[str, Any], type_name: str) -> dict[str, Any]:
    for key in params:
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" {type_name} takes {', '.join(sorted(defaults))}."
            raise ConfigError(f"$.optimizer.params.{key}: {type_name} has no such parameter.{hint}")
    merged = {**defaults, **params}
    if "betas" in merged:
        merged["betas"] = tuple(merged["betas"])
    return merged


def _adam(params: Mapping[str, Any]) -> UpdateRule:
    defaults, decoupled = _adam_defaults(params, decoupled_by_default=True)
    return AdamRule(defaults, decoupled=decoupled)


def _sgd(params: Mapping[str, Any]) -> UpdateRule:
    defaults = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
    return SGDRule(_known_defaults(defaults, params, "SGD"))


def _adagrad(params: Mapping[str, Any]) -> UpdateRule:
    defaults = {"lr": 1e-2, "lr_decay": 0.0, "weight_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10}
    return AdagradRule(_known_defaults(defaults, params, "Adagrad"))


def _lion(params: Mapping[str, Any]) -> UpdateRule:
    return LionRule(_known_defaults({"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}, params, "Lion"))


_BY_NAME: dict[str, Callable[[Mapping[str, Any]], UpdateRule]] = {
    "adam": _adam,
    "adamw": _adam,
    "sgd": _sgd,
    "adagrad": _adagrad,
    "lion": _lion,
}


def _torch_classes() -> dict[str, type[torch.optim.Optimizer]]:
    return {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }


def rule_from_config(settings: OptimizerSettings) -> UpdateRule:
    """Find the update rule for ``$.optimizer``.

    Raises:
        ConfigError: no such optimizer, a parameter it does not take, or one that cannot work on flat buffers.
    """
    name = settings.type.lower()
    if name in _BY_NAME:
        return _BY_NAME[name](settings.params)
    classes = _torch_classes()
    if name not in classes or name in _CANNOT_SHARD:
        near = difflib.get_close_matches(name, [*_BY_NAME, *classes], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted({*_BY_NAME, *classes} - _CANNOT_SHARD))
        raise ConfigError(
            f"$.optimizer.type: this engine has no optimizer {settings.type!r}.{hint} "
            f"It takes {known}, or remove the optimizer section to use the one of TrainingArguments (--optim)."
        )
    cls = classes[name]
    accepted = {
        key: parameter.default
        for key, parameter in inspect.signature(cls).parameters.items()
        if key != "params" and parameter.default is not inspect.Parameter.empty
    }
    return TorchRule(cls, _known_defaults(accepted, settings.params, cls.__name__))


def rule_for(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """The update rule that does what a ready-made optimizer object would do, or None if there is no such rule.

    Subclasses count only when they declare ``zero_rule`` themselves: they may have changed ``step``.
    """
    declared = getattr(optimizer, "zero_rule", None)
    if declared is not None:
        return declared()
    cls = type(optimizer)
    defaults = dict(optimizer.defaults)
    plain = not any(group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups)
    if plain and cls in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = cls is torch.optim.AdamW or bool(defaults.get("decoupled_weight_decay", False))
        return AdamRule(defaults, decoupled=decoupled)
    if plain and cls is torch.optim.SGD:
        momenta = {bool(group["momentum"]) for group in optimizer.param_groups}
        return SGDRule({**defaults, "momentum": float(any(momenta))}) if len(momenta) == 1 else None
    if plain and cls is torch.optim.Adagrad:
        return AdagradRule(defaults)
    if cls.__module__.startswith("torch.optim") and cls.__name__.lower() in _torch_classes():
        return None if cls.__name__.lower() in _CANNOT_SHARD else TorchRule(cls, defaults)
    return None
