"""ds_config scheduler type -> a scheduler that drives an optimizer's parameter groups.

DeepSpeed's own names (``VALID_LR_SCHEDULES``) become a ``ZeroScheduler`` over the functions of
``schedule_formulas.py``; every other name is looked up in ``torch.optim.lr_scheduler``.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from hf_zero_plugin.config.settings import SchedulerSettings
from hf_zero_plugin.engine.schedule_formulas import (
    lr_range_test_lr,
    one_cycle_lr,
    one_cycle_momentum,
    warmup_cosine_ratio,
    warmup_decay_lr,
    warmup_lr,
)
from hf_zero_plugin.errors import ConfigError

__all__ = ["VALID_LR_SCHEDULES", "ZeroScheduler", "build_scheduler"]

logger = logging.getLogger(__name__)

_PATH = "$.scheduler.params"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Formula:
    lr: Callable[..., float]
    is_ratio: bool = False
    """``lr`` returns a factor on each group's initial learning rate, not a rate."""
    momentum: Callable[..., float] | None = None
    extra: tuple[str, ...] = ()
    """Keys that no formula takes."""

    def known_keys(self) -> dict[str, bool]:
        """Keys of ``$.scheduler.params`` -> is it required?"""
        functions = [self.lr] if self.momentum is None else [self.lr, self.momentum]
        keys = dict.fromkeys((*self.extra, "last_batch_iteration"), False)
        for function in functions:
            for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
                keys[name] = parameter.default is parameter.empty
        return keys


_STAIR_COUNTS = ("cycle_first_stair_count", "cycle_second_stair_count")
_FORMULAS = {
    "LRRangeTest": _Formula(lr=lr_range_test_lr),
    "OneCycle": _Formula(lr=one_cycle_lr, momentum=one_cycle_momentum, extra=("cycle_momentum", *_STAIR_COUNTS)),
    "WarmupLR": _Formula(lr=warmup_lr),
    "WarmupDecayLR": _Formula(lr=warmup_decay_lr),
    "WarmupCosineLR": _Formula(lr=warmup_cosine_ratio, is_ratio=True),
}

VALID_LR_SCHEDULES = list(_FORMULAS)
"""DeepSpeed's own schedule names. Names of torch.optim.lr_scheduler work as well."""


class ZeroScheduler:
    """One of DeepSpeed's schedules, driving the learning rate (and momentum) of an optimizer's groups.

    ``group["lr"]`` is set at construction and by every ``step()``; ``get_last_lr()`` is valid from the start.
    OneCycle also sets ``betas[0]`` or ``momentum``; the second beta stays the user's (DeepSpeed sets it to 0.99).

    Args:
        optimizer: anything with ``param_groups``; they are looked up anew at every step.
        type: one of ``VALID_LR_SCHEDULES``.
        params: ``$.scheduler.params``. Rates may be lists with one number per group.

    Raises:
        ConfigError: an unknown or missing key, or a value that cannot be used.
    """

    def __init__(self, optimizer: Any, type: str, params: dict[str, Any] | None = None) -> None:
        self.optimizer = optimizer
        self.type = type
        self._formula = _FORMULAS[type]
        self._params = _check_params(type, params or {}, len(optimizer.param_groups))
        self.last_batch_iteration: int = self._params.pop("last_batch_iteration", -1)
        self._cycles_momentum: bool = self._params.pop("cycle_momentum", self._formula.momentum is not None)
        for group in optimizer.param_groups:
            # Kept by optimizer.state_dict(), so a resumed run does not mistake the decayed rate for the first one.
            group.setdefault("initial_lr", float(group["lr"]))
        if self._cycles_momentum and not any(_has_momentum(group) for group in optimizer.param_groups):
            logger.warning("OneCycle: this optimizer has no betas or momentum, only the learning rate is cycled.")
        self._apply()

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Count one optimizer step (or go to the given index) and set the groups' rates."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._apply()

    def get_lr(self) -> list[float]:
        """Learning rate of each group at the present step, by the formula."""
        return [self._lr_of(index, group) for index, group in enumerate(self.optimizer.param_groups)]

    def get_mom(self) -> list[float] | None:
        """Momentum of each group at the present step; None when the schedule leaves momentum alone."""
        if not self._cycles_momentum or self._formula.momentum is None:
            return None
        momentum = self._formula.momentum(self.last_batch_iteration, **self._params_for(self._formula.momentum, 0))
        return [momentum] * len(self.optimizer.param_groups)

    def get_last_lr(self) -> list[float]:
        """Learning rate last given to each group."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved step, and set the groups' rates as they were then."""
        self.step(int(state_dict["last_batch_iteration"]))

    def __repr__(self) -> str:
        return f"ZeroScheduler({self.type}, step {self.last_batch_iteration}, lr {self._last_lr})"

    def _params_for(self, function: Callable[..., float], group_index: int) -> dict[str, Any]:
        wanted = inspect.signature(function).parameters
        return {
            key: value[group_index] if isinstance(value, list) else value
            for key, value in self._params.items()
            if key in wanted
        }

    def _lr_of(self, index: int, group: dict[str, Any]) -> float:
        value = self._formula.lr(self.last_batch_iteration, **self._params_for(self._formula.lr, index))
        return value * group.get("initial_lr", float(group["lr"])) if self._formula.is_ratio else value

    def _apply(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            if isinstance(group["lr"], Tensor):  # capturable optimizers keep it on the device; its identity matters
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        for group, momentum in zip(self.optimizer.param_groups, self.get_mom() or []):
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif "momentum" in group:
                group["momentum"] = momentum


def _has_momentum(group: dict[str, Any]) -> bool:
    return "betas" in group or "momentum" in group


# ---------------------------------------------------------------- settings -> scheduler


def build_scheduler(settings: SchedulerSettings, optimizer: Optimizer) -> ZeroScheduler | LRScheduler:
    """The scheduler that ``$.scheduler`` asks for, its first learning rate already set.

    Names are matched without regard to case.

    Raises:
        ConfigError: an unknown type, or parameters that its type does not take.
    """
    torch_types = {
        name: value
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, LRScheduler) and name not in ("LRScheduler", "_LRScheduler")
    }
    known = {name.lower(): name for name in (*torch_types, *VALID_LR_SCHEDULES)}
    name = known.get(settings.type.lower())
    if name is None:
        raise ConfigError(
            f"$.scheduler.type: there is no schedule called {settings.type!r}.{_did_you_mean(settings.type, known)} "
            f"Use {', '.join(VALID_LR_SCHEDULES)}, or a class name of torch.optim.lr_scheduler."
        )
    if name in _FORMULAS:
        return ZeroScheduler(optimizer, name, settings.params)
    return _build_torch_scheduler(torch_types[name], settings.params, optimizer)


_NOT_FROM_JSON = {
    "LambdaLR": "it needs a Python function",
    "MultiplicativeLR": "it needs a Python function",
    "SequentialLR": "it is made of other scheduler objects",
    "ChainedScheduler": "it is made of other scheduler objects",
    "ReduceLROnPlateau": "it needs a metric at every step, which only the Trainer has",
}


def _build_torch_scheduler(cls: type[LRScheduler], params: dict[str, Any], optimizer: Optimizer) -> LRScheduler:
    if cls.__name__ in _NOT_FROM_JSON:
        raise ConfigError(
            f"$.scheduler.type: {cls.__name__} cannot be made from JSON: {_NOT_FROM_JSON[cls.__name__]}. "
            "Remove the scheduler section, and use --lr_scheduler_type or pass the scheduler to the Trainer."
        )
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(cls).parameters.items()
        if name != "optimizer" and parameter.kind is not parameter.VAR_KEYWORD
    }
    required = {name: parameter.default is parameter.empty for name, parameter in parameters.items()}
    _check_keys(cls.__name__, required, params)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{cls.__name__} drives a torch.optim.Optimizer, got {type(optimizer).__name__}")
    try:
        _rehearse(cls, params, optimizer)
        return cls(optimizer, **params)
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{_PATH}: torch.optim.lr_scheduler.{cls.__name__} refuses {params}: {error}. "
            "Correct the parameters; PyTorch's documentation of the class lists them."
        ) from error


def _rehearse(cls: type[LRScheduler], params: dict[str, Any], optimizer: Optimizer) -> None:
    """Two steps on a stand-in: torch checks few parameters before the first step, hours into a run at the worst."""
    kept = ("lr", "initial_lr")
    groups = [{key: float(group[key]) for key in kept if key in group} for group in optimizer.param_groups]
    stand_in = AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in groups])
    scheduler = cls(stand_in, **params)
    for _ in range(2):
        stand_in.step()
        scheduler.step()


# ---------------------------------------------------------------- checks


_LEAST_COUNT = {
    "warmup_num_steps": 0,
    "total_num_steps": 1,
    "cycle_first_step_size": 1,
    "cycle_second_step_size": 0,
    "cycle_first_stair_count": 0,
    "cycle_second_stair_count": 0,
    "decay_step_size": 0,
    "lr_range_test_step_size": 1,
    "last_batch_iteration": -1,
}
_FLAGS = ("cycle_momentum", "lr_range_test_staircase")
_WARMUP_TYPES = ("log", "linear")
_MAY_BE_NULL = ("cycle_second_step_size", "cycle_second_stair_count")
_ONE_PER_GROUP = ("warmup_min_lr", "warmup_max_lr", "lr_range_test_min_lr", "cycle_min_lr", "cycle_max_lr")
_ANY_SIGN = ("decay_mom_rate",)


def _check_params(type_name: str, params: dict[str, Any], num_groups: int) -> dict[str, Any]:
    """A copy of ``params`` in which every key is known and every value usable."""
    keys = _FORMULAS[type_name].known_keys()
    if "total_num_steps" in keys and params.get("total_num_steps") is None:
        raise ConfigError(
            f"{_PATH}.total_num_steps: {type_name} must know the number of training steps, and it is not known. "
            "Set total_num_steps to the number of optimizer steps, or give the run a length (--max_steps, or a "
            "training set that has one), or use WarmupLR, which needs none."
        )
    params = {key: value for key, value in params.items() if key != "total_num_steps" or value is not None}
    _check_keys(type_name, keys, params)
    for stairs in _STAIR_COUNTS:
        if params.pop(stairs, None):
            logger.warning("%s.%s has no effect: OneCycle is always continuous (also in DeepSpeed).", _PATH, stairs)
    return {key: _check_value(key, value, num_groups) for key, value in params.items()}


def _check_keys(type_name: str, required: dict[str, bool], params: dict[str, Any]) -> None:
    for key in params:
        if key not in required:
            others = [name for name, formula in _FORMULAS.items() if key in formula.known_keys()]
            elsewhere = f" ({', '.join(others)} would take it.)" if others else ""
            raise ConfigError(
                f"{_PATH}.{key}: {type_name} has no such parameter.{_did_you_mean(key, required)}{elsewhere} "
                f"It takes {', '.join(sorted(required))}."
            )
    missing = [key for key, is_required in required.items() if is_required and key not in params]
    if missing:
        raise ConfigError(f"{_PATH}.{missing[0]}: {type_name} needs it, and it has no default. Add it.")


def _check_value(key: str, value: Any, num_groups: int) -> Any:
    path = f"{_PATH}.{key}"
    if isinstance(value, (list, tuple)) and key in _ONE_PER_GROUP:
        if len(value) != num_groups:
            raise ConfigError(
                f"{path}: {len(value)} values for {num_groups} parameter groups. "
                "Give one number for all groups, or as many as the optimizer has."
            )
        return [_check_number(path, item, signed=False) for item in value]
    if key in _FLAGS:
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: expected true or false, got {value!r}.")
        return value
    if key == "warmup_type":
        if value not in _WARMUP_TYPES:
            raise ConfigError(f"{path}: expected {' or '.join(map(repr, _WARMUP_TYPES))}, got {value!r}.")
        return value
    if value is None and key in _MAY_BE_NULL:
        return None
    number = _check_number(path, value, signed=key in _ANY_SIGN or key in _LEAST_COUNT)
    if key not in _LEAST_COUNT:
        return number
    if number != int(number) or number < _LEAST_COUNT[key]:
        raise ConfigError(f"{path}: expected a whole number, at least {_LEAST_COUNT[key]}, got {value!r}.")
    return int(number)


def _check_number(path: str, value: Any, *, signed: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{path}: expected a number, got {value!r}. Write it without quotes, for example 5e-5.")
    if value < 0 and not signed:
        raise ConfigError(f"{path}: expected a number that is not negative, got {value!r}.")
    return float(value)


def _did_you_mean(name: str, known: dict[str, Any]) -> str:
    close = get_close_matches(name.lower(), known, n=1)
    if not close:
        return ""
    found = known[close[0]]
    return f" Did you mean {found if isinstance(found, str) else close[0]!r}?"
