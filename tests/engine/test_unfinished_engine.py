"""An error while an engine is made: the model loses nothing, and the next engine begins where the first would have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_zero_plugin.engine import sharded_assembly, sharded_wiring
from hf_zero_plugin.engine.sharded_values import Fill
from hf_zero_plugin.errors import HfZeroError
from tests.helpers import run_ranks

from .stage3 import Net, batch, engine_for, train

STATES_NOWHERE = {"states_on": "nvme", "offload": {"nvme_path": "/proc/nowhere"}}


class Broken(Exception):
    pass


def _no_storage(*_: Any, **__: Any) -> Any:
    raise Broken


def _no_values(*_: Any, **__: Any) -> Any:
    raise Broken


def _fail(place: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of an engine that cannot be made, or whose making is interrupted there."""
    if place == "states":
        return STATES_NOWHERE
    if place == "storage":
        patch.setattr(sharded_assembly, "make_storage", _no_storage)
    if place == "whole parameters":
        patch.setattr(sharded_wiring.initial_values, "adopt_weights", _no_values)
    if place.startswith("value"):
        fill, calls = Fill.__call__, iter(range(1000))

        def interrupted(self: Fill, *args: Any) -> None:
            if next(calls) == int(place.split()[1]):
                raise Broken
            fill(self, *args)

        patch.setattr(Fill, "__call__", interrupted)
    return {}


def _attempts(precision: str, whole: int, place: str) -> list[dict[str, Any]]:
    """Two trainings: as it should be, and after an attempt that failed."""
    options: dict[str, Any] = {"precision": precision, "whole": whole}
    wanted = train(engine_for(Net(), **options))
    model = Net()
    with pytest.MonkeyPatch.context() as patch:
        failing = _fail(place, patch)
        with pytest.raises((Broken, HfZeroError)):
            engine_for(model, **options, **failing)
    for use in (lambda: model(batch(0)), model.state_dict):
        with pytest.raises(HfZeroError, match=r"have no values yet.*Nothing is lost"):
            use()
    engine = engine_for(model, **options)
    model.state_dict()
    return [wanted, train(engine)]


def _hold_equal(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    assert found["losses"] == wanted["losses"]
    assert found["norms"] == wanted["norms"]
    assert found["weights"].keys() == wanted["weights"].keys()
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in wanted["weights"].items())


@pytest.mark.parametrize("whole", [0, 25])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("place", ["storage", "value 0", "value 3"])
def test_sharding_that_was_interrupted_begins_anew(
    place: str, precision: str, whole: int, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, found = _attempts(precision, whole, place)
    if place == "value 3" and precision != "fp32":
        assert "3 parameters now begin with their values in half precision" in caplog.text
        assert found["losses"] == pytest.approx(wanted["losses"], rel=0.01)
    else:
        assert "half precision" not in caplog.text
        _hold_equal(wanted, found)


@pytest.mark.parametrize("whole", [0, 25])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("place", ["states", "whole parameters"])
def test_states_that_have_no_place_leave_all_digits(place: str, precision: str, whole: int) -> None:
    """Masters begin with the values that the model was loaded with, which the weights have no room for."""
    _hold_equal(*_attempts(precision, whole, place))


@pytest.mark.parametrize("place", ["storage", "value 3", "states"])
def test_a_model_that_was_sharded_before_loses_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for fails in (False, True):
        model = Net()
        first = engine_for(model, precision="bf16")
        train(first)
        first.destroy()
        if fails:
            with monkeypatch.context() as patch:
                failing = _fail(place, patch)
                with pytest.raises((Broken, HfZeroError)):
                    engine_for(model, precision="bf16", **failing)
        results.append(train(engine_for(model, precision="bf16"), first=4))
    _hold_equal(*results)


def _ranks_fail_and_try_again() -> list[dict[str, Any]]:
    return [one for place in ("states", "storage", "value 0") for one in _attempts("bf16", 25, place)]


@pytest.mark.slow
def test_two_ranks_try_again() -> None:
    results = run_ranks(_ranks_fail_and_try_again, 2, timeout_s=200.0)[0]
    for wanted, found in zip(results[::2], results[1::2], strict=True):
        _hold_equal(wanted, found)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_stages_leave_the_model_as_it_was(precision: str, stage: int) -> None:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(HfZeroError, match="nvme_path"):
        engine_for(model, stage=stage, precision=precision, **STATES_NOWHERE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    _hold_equal(
        train(engine_for(Net(), stage=stage, precision=precision)),
        train(engine_for(model, stage=stage, precision=precision)),
    )
