"""Each schedule against its formula, written a second time here; then the class that applies it, and torch's own."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from hf_zero_plugin.config.settings import SchedulerSettings
from hf_zero_plugin.engine.schedules import VALID_LR_SCHEDULES, ZeroScheduler, build_scheduler
from hf_zero_plugin.errors import ConfigError


def _optimizer(*lrs: float, kind: type[Optimizer] = torch.optim.AdamW, **options: Any) -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (0.5,)]
    return kind(groups, **options)  # type: ignore[call-arg]


def _build(type_name: str, params: dict[str, Any], optimizer: Optimizer | None = None) -> Any:
    return build_scheduler(SchedulerSettings(type=type_name, params=params), optimizer or _optimizer())


def _trace(scheduler: Any, num_steps: int) -> list[float]:
    """Learning rate of the first group before each of ``num_steps`` updates: at i = -1, 0, 1, ..."""
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr()[0] == rates[-1]
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("kind", ["log", "linear"])
def test_warmup_rises_to_the_maximum_and_stays(warmup: int, kind: str) -> None:
    params = {"warmup_min_lr": 0.1, "warmup_max_lr": 0.9, "warmup_num_steps": warmup, "warmup_type": kind}
    end = warmup if warmup > 2 else 2
    expected = [0.1]
    for i in range(19):
        share = i / end if kind == "linear" else math.log(i + 1) / math.log(end)
        expected.append(0.9 if i >= end else 0.1 + 0.8 * share)
    assert _trace(_build("WarmupLR", params), 20) == pytest.approx(expected, rel=1e-12)


def test_warmup_defaults_are_deepspeeds() -> None:
    scheduler = _build("WarmupLR", {})
    assert scheduler.get_last_lr() == [0.0]
    scheduler.step(99)
    assert scheduler.get_last_lr() == pytest.approx([0.001 * math.log(100) / math.log(1000)])


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (4, 10), (4, 12), (10, 10), (12, 10), (2, 3), (0, 1)])
@pytest.mark.parametrize("kind", ["log", "linear"])
def test_warmup_decay_falls_on_a_line_to_the_minimum(warmup: int, total: int, kind: str) -> None:
    low, high = 0.2, 1.0
    params = {"warmup_min_lr": low, "warmup_max_lr": high, "warmup_num_steps": warmup, "warmup_type": kind}
    end = max(2, warmup)
    expected = [low]
    for i in range(15):
        if i < end:
            gain = {"log": math.log(i + 1) / math.log(end), "linear": i / end}[kind]
        else:
            gain = max(0.0, (total - i) / max(1, total - end))
        expected.append(low + (high - low) * gain)
    scheduler = _build("WarmupDecayLR", {**params, "total_num_steps": total})
    assert _trace(scheduler, 16) == pytest.approx(expected, rel=1e-12)
    scheduler.step(total + 5)
    assert scheduler.get_last_lr() == [low]


@pytest.mark.parametrize(("warmup", "total"), [(0, 12), (3, 12), (5, 6), (8, 8), (9, 4)])
@pytest.mark.parametrize("kind", ["log", "linear"])
def test_warmup_cosine_is_a_factor_on_the_optimizers_rate(warmup: int, total: int, kind: str) -> None:
    base, start, floor = 0.5, 0.1, 0.01
    params = {"warmup_min_ratio": start, "cos_min_ratio": floor, "warmup_num_steps": warmup, "warmup_type": kind}
    end = max(2, warmup)
    expected = [base * start]
    for i in range(15):
        if i < end:
            gain = {"log": math.log(i + 1) / math.log(end), "linear": i / end}[kind]
            ratio = start + (1 - start) * gain
        else:
            angle = math.pi * min(1.0, (i - end + 1) / max(1, total - end))
            ratio = floor + (1 - floor) * 0.5 * (1 + math.cos(angle))
        expected.append(base * ratio)
    scheduler = _build("WarmupCosineLR", {**params, "total_num_steps": total}, _optimizer(base))
    assert _trace(scheduler, 16) == pytest.approx(expected, rel=1e-12)


def _cycle_corners(low: float, high: float, first: int, second: int) -> list[float]:
    """The triangle at i + 1 = 0, 1, ..., first + second, by linear interpolation between its corners."""
    up = [low + (high - low) * k / first for k in range(first + 1)]
    down = [high + (low - high) * k / second for k in range(1, second + 1)]
    return up + down


@pytest.mark.parametrize(("first", "second"), [(4, None), (4, 4), (3, 5), (1, 1), (6, 2)])
@pytest.mark.parametrize("decay_every", [0, 3])
def test_one_cycle_goes_up_down_and_decays(first: int, second: int | None, decay_every: int) -> None:
    params = {
        "cycle_min_lr": 0.1,
        "cycle_max_lr": 0.5,
        "cycle_first_step_size": first,
        "cycle_second_step_size": second,
        "decay_step_size": decay_every,
        "decay_lr_rate": 0.5,
        "cycle_min_mom": 0.7,
        "cycle_max_mom": 0.95,
        "decay_mom_rate": 0.01,
    }
    length = second or first
    rates = _cycle_corners(0.1, 0.5, first, length)
    momenta = _cycle_corners(0.95, 0.7, first, length)
    for n in range(1, 8):
        rates.append(0.1 / (1 + 0.5 * n / decay_every) if decay_every else 0.1)
        momenta.append(0.95 * (1 + 0.01 * n / decay_every) if decay_every else 0.95)
    scheduler = _build("OneCycle", params, _optimizer(betas=(0.5, 0.999)))
    for rate, momentum in zip(rates, momenta):
        group = scheduler.optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(rate, rel=1e-12)
        assert group["betas"] == pytest.approx((momentum, 0.999), rel=1e-12)
        assert scheduler.get_mom() == pytest.approx([momentum])
        scheduler.step()


def test_one_cycle_drives_the_momentum_of_sgd() -> None:
    optimizer = _optimizer(kind=torch.optim.SGD, momentum=0.3)
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 1}
    scheduler = _build("OneCycle", params, optimizer)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.8)


def test_one_cycle_leaves_momentum_alone_when_told_so() -> None:
    optimizer = _optimizer(betas=(0.5, 0.6))
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_momentum": False}
    scheduler = _build("OneCycle", params, optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    assert scheduler.get_mom() is None


def test_one_cycle_without_momentum_to_cycle_says_so(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = _optimizer(kind=torch.optim.Adagrad)
    _build("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_stair_count": 3}, optimizer)
    assert "no betas or momentum" in caplog.text
    assert "cycle_first_stair_count has no effect" in caplog.text


@pytest.mark.parametrize("staircase", [False, True])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_lr_range_test_climbs(staircase: bool, size: int) -> None:
    params = {
        "lr_range_test_min_lr": 0.01,
        "lr_range_test_step_size": size,
        "lr_range_test_step_rate": 2.0,
        "lr_range_test_staircase": staircase,
    }
    expected = [0.01 * (1 + 2.0 * (num_taken // size if staircase else num_taken / size)) for num_taken in range(12)]
    assert _trace(_build("LRRangeTest", params), 12) == pytest.approx(expected, rel=1e-12)


_USABLE: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_max_lr": 0.3, "warmup_num_steps": 5},
    "WarmupDecayLR": {"warmup_max_lr": 0.3, "warmup_num_steps": 5, "total_num_steps": 11},
    "WarmupCosineLR": {"warmup_num_steps": 5, "total_num_steps": 11},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.3, "cycle_first_step_size": 4, "decay_step_size": 2},
    "LRRangeTest": {"lr_range_test_step_size": 4},
}


def test_every_valid_schedule_is_tried_here() -> None:
    assert sorted(VALID_LR_SCHEDULES) == sorted(_USABLE)


@pytest.mark.parametrize("type_name", VALID_LR_SCHEDULES)
@pytest.mark.parametrize("num_before", [0, 1, 7, 13])
def test_resumed_schedule_continues_as_if_never_stopped(type_name: str, num_before: int) -> None:
    """Also when the optimizer's own state, with the decayed rate in it, was loaded before the scheduler was built."""
    whole = _build(type_name, _USABLE[type_name])
    _trace(whole, num_before)
    optimizer = _optimizer()
    optimizer.load_state_dict(whole.optimizer.state_dict())
    resumed = _build(type_name, _USABLE[type_name], optimizer)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert resumed.get_last_lr() == whole.get_last_lr()
    assert optimizer.param_groups[0]["betas"] == whole.optimizer.param_groups[0]["betas"]
    assert _trace(resumed, 10) == _trace(whole, 10)


@pytest.mark.parametrize("type_name", VALID_LR_SCHEDULES)
def test_last_lr_is_valid_from_construction_and_one_per_group(type_name: str) -> None:
    scheduler = _build(type_name, _USABLE[type_name], _optimizer(0.5, 0.25))
    for _ in range(3):
        assert scheduler.get_last_lr() == [group["lr"] for group in scheduler.optimizer.param_groups]
        assert scheduler.get_last_lr() == scheduler.get_lr()
        assert len(scheduler.get_last_lr()) == 2
        scheduler.step()


def test_groups_keep_their_own_rates() -> None:
    cosine = _build("WarmupCosineLR", {"total_num_steps": 20, "warmup_num_steps": 2}, _optimizer(0.5, 0.25))
    cosine.step(1)
    assert cosine.get_last_lr() == [0.5, 0.25]
    listed = _build("WarmupLR", {"warmup_min_lr": [0.1, 0.2], "warmup_max_lr": [1.0, 2.0]}, _optimizer(1.0, 1.0))
    assert listed.get_last_lr() == [0.1, 0.2]
    listed.step(5000)
    assert listed.get_last_lr() == [1.0, 2.0]


def test_second_run_on_the_same_optimizer_starts_from_the_first_rate() -> None:
    optimizer = _optimizer(0.5)
    params = {"total_num_steps": 4, "warmup_num_steps": 2}
    first = _trace(_build("WarmupCosineLR", params, optimizer), 6)
    assert _trace(_build("WarmupCosineLR", params, optimizer), 6) == first


def test_tensor_rate_is_filled_in_place() -> None:
    lr = torch.tensor(0.5)
    scheduler = _build("WarmupLR", {"warmup_max_lr": 0.25, "warmup_num_steps": 0}, _optimizer(lr))  # type: ignore[arg-type]
    scheduler.step(2)
    assert scheduler.optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_last_batch_iteration_sets_the_start() -> None:
    params = {"warmup_max_lr": 0.25, "warmup_num_steps": 10, "warmup_type": "linear"}
    assert _build("WarmupLR", {**params, "last_batch_iteration": 4}).get_last_lr() == pytest.approx([0.1])


@pytest.mark.parametrize("value", [{}, {"total_num_steps": None}], ids=["absent", "null"])
@pytest.mark.parametrize("type_name", VALID_LR_SCHEDULES)
def test_only_types_that_end_need_total_num_steps(type_name: str, value: dict[str, Any]) -> None:
    params = {key: item for key, item in _USABLE[type_name].items() if key != "total_num_steps"} | value
    if type_name not in ("WarmupDecayLR", "WarmupCosineLR"):
        assert isinstance(_build(type_name, params), ZeroScheduler)
        return
    with pytest.raises(ConfigError, match=r"\$\.scheduler\.params\.total_num_steps: .*--max_steps"):
        _build(type_name, params)


@pytest.mark.parametrize(
    ("type_name", "params", "message"),
    [
        ("WarmupLR", {"warmup_maxlr": 1}, r"params\.warmup_maxlr: .*Did you mean 'warmup_max_lr'\?"),
        ("WarmupLR", {"total_num_steps": 5}, r"params\.total_num_steps: .*WarmupDecayLR, WarmupCosineLR would take it"),
        ("WarmupLR", {"warmup_max_lr": "5e-5"}, r"params\.warmup_max_lr: expected a number, got '5e-5'"),
        ("WarmupLR", {"warmup_max_lr": True}, r"params\.warmup_max_lr: expected a number, got True"),
        ("WarmupLR", {"warmup_max_lr": math.nan}, r"params\.warmup_max_lr: expected a number"),
        ("WarmupLR", {"warmup_max_lr": -1.0}, r"params\.warmup_max_lr: .*not negative"),
        ("WarmupLR", {"warmup_num_steps": -1}, r"params\.warmup_num_steps: expected a whole number, at least 0"),
        ("WarmupLR", {"warmup_num_steps": 2.5}, r"params\.warmup_num_steps: expected a whole number"),
        ("WarmupLR", {"warmup_type": "cosine"}, r"params\.warmup_type: expected 'log' or 'linear', got 'cosine'"),
        ("WarmupLR", {"warmup_min_lr": [0.1, 0.2]}, r"params\.warmup_min_lr: 2 values for 1 parameter groups"),
        ("OneCycle", {"cycle_max_lr": 1}, r"params\.cycle_min_lr: OneCycle needs it"),
        ("OneCycle", {**_USABLE["OneCycle"], "cycle_first_step_size": 0}, r"cycle_first_step_size: .*at least 1"),
        ("OneCycle", {**_USABLE["OneCycle"], "cycle_momentum": 1}, r"cycle_momentum: expected true or false"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, r"lr_range_test_step_size: .*at least 1"),
        ("StepLR", {"step_sise": 3}, r"params\.step_sise: StepLR has no such parameter.*Did you mean 'step_size'\?"),
        ("StepLR", {}, r"params\.step_size: StepLR needs it"),
        ("StepLR", {"step_size": "three"}, r"\$\.scheduler\.params: torch\.optim\.lr_scheduler\.StepLR refuses"),
        ("OneCycleLR", {"max_lr": 1.0}, r"\$\.scheduler\.params: .*total_steps"),
        ("LambdaLR", {}, r"\$\.scheduler\.type: LambdaLR cannot be made from JSON.*--lr_scheduler_type"),
        ("ReduceLROnPlateau", {}, r"\$\.scheduler\.type: ReduceLROnPlateau cannot .*metric"),
        ("WarmpLR", {}, r"\$\.scheduler\.type: .*'WarmpLR'.*Did you mean 'WarmupLR'\?"),
        ("nonsense", {}, r"\$\.scheduler\.type: there is no schedule called 'nonsense'\. Use LRRangeTest"),
    ],
)
def test_mistakes_name_their_path_and_remedy(type_name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _build(type_name, params)


@pytest.mark.parametrize(
    ("type_name", "params"),
    [
        ("StepLR", {"step_size": 2, "gamma": 0.5}),
        ("ExponentialLR", {"gamma": 0.9}),
        ("CosineAnnealingLR", {"T_max": 6}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 12}),
        ("LinearLR", {}),
        ("PolynomialLR", {"total_iters": 5, "power": 2.0}),
        ("CosineAnnealingWarmRestarts", {"T_0": 4}),
        ("cosineannealinglr", {"T_max": 6}),
    ],
)
def test_torch_schedulers_work_by_name(type_name: str, params: dict[str, Any]) -> None:
    names = {name.lower(): name for name in vars(torch.optim.lr_scheduler)}
    oracle = getattr(torch.optim.lr_scheduler, names[type_name.lower()])(_optimizer(), **params)
    scheduler = _build(type_name, params)
    assert type(scheduler) is type(oracle)
    for _ in range(8):
        assert scheduler.get_last_lr() == oracle.get_last_lr()
        for one in (scheduler, oracle):
            one.optimizer.step()
            one.step()


def test_type_is_matched_without_regard_to_case() -> None:
    assert _build("warmuplr", {}).type == "WarmupLR"


def test_accelerates_wrapper_accepts_it() -> None:
    """What HF calls on the scheduler goes through accelerate's wrapper."""
    from accelerate.scheduler import AcceleratedScheduler

    optimizer = _optimizer()
    scheduler = _build("WarmupLR", _USABLE["WarmupLR"], optimizer)
    wrapper = AcceleratedScheduler(scheduler, optimizer, step_with_optimizer=False)
    wrapper.step()
    wrapper.step()
    assert wrapper.get_last_lr() == wrapper.get_lr() == [0.3 * math.log(2) / math.log(5)]
    state = wrapper.state_dict()
    wrapper.step()
    wrapper.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.3 * math.log(2) / math.log(5)
