"""The schedules of ds_config as pure functions of the step.

``step`` is i, the index of the last optimizer step taken, counted from 0; -1 stands for "none taken yet". So the
first update of a run uses the rate at i = -1 (the minimum), the second the rate at i = 0.

The keyword arguments of the functions are the keys of ``$.scheduler.params``, with DeepSpeed's defaults:

    ==============  ============================================  =========================================
    type            function                                      shape
    ==============  ============================================  =========================================
    WarmupLR        ``warmup_lr``                                 rise, then constant
    WarmupDecayLR   ``warmup_decay_lr``                           rise, then a line down to the minimum
    WarmupCosineLR  ``warmup_cosine_ratio`` x the optimizer's lr  rise, then half a cosine
    OneCycle        ``one_cycle_lr``, ``one_cycle_momentum``      triangle, then decay; momentum the inverse
    LRRangeTest     ``lr_range_test_lr``                          a ramp or a staircase upwards
    ==============  ============================================  =========================================
"""

from __future__ import annotations

import math


def _warmup_end(warmup_num_steps: int) -> int:
    """W. At least 2, because the logarithmic rise divides by ln W; so 0 and 1 are allowed and mean 2."""
    return max(2, warmup_num_steps)


def _warmup_gain(step: int, warmup_num_steps: int, warmup_type: str) -> float:
    """Share of the way from minimum to maximum, in [0, 1]."""
    end = _warmup_end(warmup_num_steps)
    if step < 0:
        return 0.0
    if step >= end:
        return 1.0
    return step / end if warmup_type == "linear" else math.log(step + 1) / math.log(end)


def warmup_lr(
    step: int,
    *,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float = 0.001,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> float:
    """min + (max - min) * gain; gain is ln(i+1)/ln W ("log") or i/W ("linear"), and 1 from step W on."""
    return warmup_min_lr + (warmup_max_lr - warmup_min_lr) * _warmup_gain(step, warmup_num_steps, warmup_type)


def warmup_decay_lr(
    step: int,
    *,
    total_num_steps: int,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float = 0.001,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> float:
    """The rise of ``warmup_lr``, then gain = (T - i) / (T - W), never below 0; T is ``total_num_steps``."""
    end = _warmup_end(warmup_num_steps)
    if step < end:
        gain = _warmup_gain(step, warmup_num_steps, warmup_type)
    else:
        gain = max(0.0, (total_num_steps - step) / max(1, total_num_steps - end))
    return warmup_min_lr + (warmup_max_lr - warmup_min_lr) * gain


def warmup_cosine_ratio(
    step: int,
    *,
    total_num_steps: int,
    warmup_min_ratio: float = 0.0,
    warmup_num_steps: int = 1000,
    cos_min_ratio: float = 0.0001,
    warmup_type: str = "log",
) -> float:
    """Factor on the optimizer's own learning rate: the rise, then half a cosine from 1 down to ``cos_min_ratio``.

    The cosine has come (i - W + 1) / (T - W) of its way, so it reaches its floor at i = T - 1 and stays there.
    """
    end = _warmup_end(warmup_num_steps)
    if step < end:
        return warmup_min_ratio + (1.0 - warmup_min_ratio) * _warmup_gain(step, warmup_num_steps, warmup_type)
    progress = min(1.0, (step - end + 1) / max(1, total_num_steps - end))
    return cos_min_ratio + (1.0 - cos_min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _triangle(step: int, first_size: int, second_size: int | None) -> float:
    """Height in [0, 1] at i + 1: up over ``first_size`` steps, down over ``second_size`` (default: the same)."""
    place = step + 1
    second = first_size if second_size is None else second_size
    return place / first_size if place <= first_size else (first_size + second - place) / second


def _steps_into_decay(step: int, first_size: int, second_size: int | None) -> int:
    """0 while i is inside the cycle, then 1, 2, ..."""
    return max(0, step - (first_size + (first_size if second_size is None else second_size)) + 1)


def one_cycle_lr(
    step: int,
    *,
    cycle_min_lr: float,
    cycle_max_lr: float,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    decay_step_size: int = 0,
    decay_lr_rate: float = 0.0,
) -> float:
    """One triangle min -> max -> min, then min / (1 + rate * n / decay_step_size), n steps after the cycle."""
    num_decay = _steps_into_decay(step, cycle_first_step_size, cycle_second_step_size)
    if num_decay == 0:
        return cycle_min_lr + (cycle_max_lr - cycle_min_lr) * _triangle(
            step, cycle_first_step_size, cycle_second_step_size
        )
    if decay_step_size == 0:
        return cycle_min_lr
    return cycle_min_lr / (1.0 + decay_lr_rate * num_decay / decay_step_size)


def one_cycle_momentum(
    step: int,
    *,
    cycle_min_mom: float = 0.8,
    cycle_max_mom: float = 0.9,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    decay_step_size: int = 0,
    decay_mom_rate: float = 0.0,
) -> float:
    """The learning rate's triangle upside down, max -> min -> max, then max * (1 + rate * n / decay_step_size)."""
    num_decay = _steps_into_decay(step, cycle_first_step_size, cycle_second_step_size)
    if num_decay == 0:
        return cycle_max_mom - (cycle_max_mom - cycle_min_mom) * _triangle(
            step, cycle_first_step_size, cycle_second_step_size
        )
    if decay_step_size == 0:
        return cycle_max_mom
    return cycle_max_mom * (1.0 + decay_mom_rate * num_decay / decay_step_size)


def lr_range_test_lr(
    step: int,
    *,
    lr_range_test_min_lr: float = 0.001,
    lr_range_test_step_size: int = 2000,
    lr_range_test_step_rate: float = 1.0,
    lr_range_test_staircase: bool = False,
) -> float:
    """min * (1 + rate * (i+1) / size); a staircase rounds the fraction down."""
    interval = (step + 1) / lr_range_test_step_size
    if lr_range_test_staircase:
        interval = math.floor(interval)
    return lr_range_test_min_lr * (1.0 + lr_range_test_step_rate * interval)
