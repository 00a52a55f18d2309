"""The scaler against a second one, written from the rules alone, and against properties that must always hold."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_zero_plugin.config.settings import LossScaleSettings
from hf_zero_plugin.engine.loss_scaler import LossScaler
from hf_zero_plugin.errors import LossScaleError


@dataclass
class Reference:
    """The rules as sentences, one branch each; stops (``dead``) where the scaler raises."""

    scale: float
    window: int
    hysteresis: int
    consecutive: bool
    minimum: float
    counter: int = 0
    iteration: int = 0
    last_overflow: int = -1
    dead: bool = False

    def __post_init__(self) -> None:
        self.counter = self.hysteresis

    def feed(self, overflow: bool) -> None:
        if overflow and self.counter > 1:
            self.counter -= 1
            self.last_overflow = self.iteration
        elif overflow and self.scale == self.minimum:
            self.dead = True
            return
        elif overflow:
            self.scale = self.scale / 2 if self.scale / 2 > self.minimum else self.minimum
            self.last_overflow = self.iteration
        else:
            if self.consecutive:
                self.counter = self.hysteresis
            since = self.iteration - self.last_overflow - 1
            if since > 0 and since % self.window == 0:
                self.scale *= 2
                self.counter = self.hysteresis
        self.iteration += 1


def _scales(scaler: LossScaler, events: str) -> list[float]:
    """Scale after each event; "." is a clean step, "x" an overflow, "!" stands for LossScaleError as scale 0."""
    scales = []
    for event in events:
        try:
            scaler.update(event == "x")
        except LossScaleError:
            scales.append(0.0)
            break
        scales.append(scaler.scale)
    return scales


@pytest.mark.parametrize(
    ("options", "events", "expected"),
    [
        pytest.param({"window": 2, "hysteresis": 1}, "....", [16, 16, 32, 32], id="window counts from one after -1"),
        pytest.param({"window": 1, "hysteresis": 1}, "...", [16, 32, 64], id="never at the first iteration"),
        pytest.param({"window": 2, "hysteresis": 1}, "x....", [8, 8, 8, 16, 16], id="window restarts at an overflow"),
        pytest.param({"window": 9, "hysteresis": 1}, "xxx", [8, 4, 2], id="no hysteresis"),
        pytest.param({"window": 9, "hysteresis": 2}, "xxx", [16, 8, 4], id="hysteresis is spent once"),
        pytest.param({"window": 9, "hysteresis": 3}, "x.x.x", [16, 16, 16, 16, 8], id="clean steps do not refill it"),
        pytest.param(
            {"window": 9, "hysteresis": 2, "consecutive_hysteresis": True},
            "x.x.xx",
            [16, 16, 16, 16, 16, 8],
            id="clean steps refill it when consecutive",
        ),
        pytest.param({"window": 2, "hysteresis": 2}, "xx..." + "xx", [16, 8, 8, 8, 16, 16, 8], id="growth refills it"),
        pytest.param({"window": 2, "hysteresis": 2}, "x..x", [16, 16, 16, 8], id="no growth, no refill"),
        pytest.param({"window": 9, "hysteresis": 1, "min_scale": 4}, "xxx", [8, 4, 0], id="error at the minimum"),
        pytest.param({"window": 9, "hysteresis": 1, "min_scale": 6}, "xxx", [8, 6, 0], id="halving stops at it"),
        pytest.param({"window": 9, "hysteresis": 2, "min_scale": 16}, "xx", [16, 0], id="hysteresis holds there too"),
        pytest.param({"window": 9, "hysteresis": 0}, "x", [8], id="hysteresis 0 means 1"),
        pytest.param({"window": 9, "min_scale": 64}, ".", [64], id="starts no lower than the minimum"),
    ],
)
def test_trace_follows_the_rules(options: dict[str, float], events: str, expected: list[float]) -> None:
    scaler = LossScaler(LossScaleSettings(initial_scale_power=4, **options))  # type: ignore[arg-type]
    assert _scales(scaler, events) == expected


_SETTINGS = st.builds(
    LossScaleSettings,
    initial_scale_power=st.integers(3, 20),
    window=st.integers(1, 6),
    hysteresis=st.integers(1, 4),
    consecutive_hysteresis=st.booleans(),
    min_scale=st.sampled_from([1.0, 2.0, 3.0, 8.0]),
)
_EVENTS = st.text(alphabet=".x", max_size=60)


@given(_SETTINGS, _EVENTS)
def test_scaler_equals_the_reference(options: LossScaleSettings, events: str) -> None:
    scaler = LossScaler(options)
    reference = Reference(
        scale=2.0**options.initial_scale_power,
        window=options.window,
        hysteresis=options.hysteresis,
        consecutive=options.consecutive_hysteresis,
        minimum=options.min_scale,
    )
    expected = []
    for event in events:
        reference.feed(event == "x")
        expected.append(0.0 if reference.dead else reference.scale)
        if reference.dead:
            break
    assert _scales(scaler, events) == expected


@given(_SETTINGS, _EVENTS)
def test_scale_is_never_below_the_minimum_and_moves_by_powers_of_two(options: LossScaleSettings, events: str) -> None:
    scaler = LossScaler(options)
    previous = scaler.scale
    for scale in _scales(scaler, events):
        if scale == 0.0:
            assert previous == options.min_scale
            break
        assert scale >= options.min_scale
        assert scale / previous in (0.5, 1.0, 2.0) or scale == options.min_scale
        previous = scale


@given(_SETTINGS, _EVENTS, _EVENTS)
def test_resumed_scaler_continues_as_if_never_stopped(options: LossScaleSettings, before: str, after: str) -> None:
    scaler, resumed = LossScaler(options), LossScaler(options)
    _scales(scaler, before)
    resumed.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert resumed.state_dict() == scaler.state_dict()
    assert _scales(resumed, after) == _scales(scaler, after)


@settings(max_examples=20)
@given(_EVENTS)
def test_static_scale_never_changes(events: str) -> None:
    scaler = LossScaler(LossScaleSettings(static_scale=128.0))
    assert _scales(scaler, events) == [128.0] * len(events)


def test_error_at_the_minimum_names_parameter_and_remedy_and_changes_nothing() -> None:
    scaler = LossScaler(LossScaleSettings(initial_scale_power=0, hysteresis=1))
    before = scaler.state_dict()
    with pytest.raises(LossScaleError, match=r"encoder\.weight.*bf16") as caught:
        scaler.update(True, culprit="encoder.weight")
    assert "$.fp16.min_loss_scale" in str(caught.value)
    assert scaler.state_dict() == before
    with pytest.raises(LossScaleError, match="bf16"):
        scaler.update(True)


def test_a_run_without_gradients_does_not_scale_to_infinity() -> None:
    scaler = LossScaler(LossScaleSettings(window=1))
    assert max(_scales(scaler, "." * 2000)) == 2.0**127
    scaler.update(True)
    scaler.update(True)
    assert math.isfinite(scaler.scale)
    assert scaler.scale == 2.0**126


def test_settings_win_over_a_saved_state() -> None:
    dynamic = LossScaler(LossScaleSettings(initial_scale_power=10))
    static = LossScaler(LossScaleSettings(static_scale=8.0))
    raised = LossScaler(LossScaleSettings(min_scale=2.0**12))
    static_state = static.state_dict()
    static.load_state_dict(dynamic.state_dict())
    assert static.scale == 8.0
    raised.load_state_dict(dynamic.state_dict())
    assert raised.scale == 2.0**12
    dynamic.load_state_dict(static_state)
    assert dynamic.scale == 2.0**10


def test_defaults_are_deepspeeds() -> None:
    """65536; one overflow is forgiven, the second halves; growth after 1000 clean steps."""
    scaler = LossScaler(LossScaleSettings())
    assert scaler.scale == 65536.0
    assert _scales(scaler, "xx") == [65536.0, 32768.0]
    assert _scales(scaler, "." * 1000)[-1] == 32768.0
    assert _scales(scaler, ".") == [65536.0]
