"""A step of which a part is launched later is finished whatever its caller does next; on the CPU, streams checked."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from hf_zero_plugin.engine.zero_optimizer import ZeroOptimizer
from tests.helpers import run_ranks

from .races import RaceDetector
from .stage3 import Net, engine_for, train
from .test_races import WIDTH, _engine, _homes, _stream_on_the_cpu, _train, tiny_buckets

__all__ = ["tiny_buckets"]


def _weights(model: torch.nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("room", [False, True], ids=["no room", "room"])
def test_an_engine_that_is_dropped_after_a_step_leaves_the_weights_of_that_step(
    room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = _train(_engine("bf16", "none"), 1)
    _stream_on_the_cpu(monkeypatch, room=room)
    with RaceDetector() as detector:
        engine = _engine("bf16", "cpu")
        model = engine.module
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
        engine.backward(engine(x).float().square().mean())
        engine.step()
        assert _homes(engine)[0]._rest is not None
        gone = weakref.ref(engine)
        del engine
        gc.collect()
        assert gone() is None
        found = _weights(model)
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_an_engine_and_a_model_that_are_dropped_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their states are page-locked memory."""
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector():
        engine = _engine("bf16", "cpu")
        _train(engine, 2)
        gone = weakref.ref(_homes(engine)[0])
        del engine
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_without_a_backward_pass_has_no_gradients(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    again = lambda engine: engine.step()  # noqa: E731
    resident = _engine(precision, "none")
    wanted = _train(resident, 3, after_step=again)
    assert resident.get_global_grad_norm() == 0.0
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector() as detector:
        engine = _engine(precision, "cpu")
        found = _train(engine, 3, after_step=again)
        engine.destroy()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_an_evaluation_in_inference_mode_may_come_between(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _train(_engine("bf16", "none"), 3)
    _stream_on_the_cpu(monkeypatch, room=True)

    @torch.inference_mode()
    def evaluate(engine: torch.nn.Module) -> None:
        engine(torch.ones(1, WIDTH).bfloat16())

    found = None
    with RaceDetector() as detector:
        engine = _engine("bf16", "cpu")
        found = _train(engine, 3, after_step=evaluate)
        engine.destroy()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_learning_rate_that_is_a_tensor_is_the_one_of_its_step() -> None:
    """Schedules write into such a tensor; pieces that are updated later must not see it."""
    rate = torch.tensor(0.5)
    optimizer = ZeroOptimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate}], {})
    (group,) = optimizer.hyperparameters()
    rate.fill_(0.1)
    assert group["lr"] == 0.5


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_model_that_is_moved_or_cast_takes_the_updated_weights_along(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``model.to`` and its kin go through ``_apply``, which looks at every parameter without naming it."""
    wanted = [weight.double() for weight in _train(_engine(precision, "none"), 1)]
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector() as detector:
        engine = _engine(precision, "cpu")
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
        engine.backward(engine(x.to(next(engine.module.parameters()).dtype)).float().square().mean())
        engine.step()
        found = _weights(engine.module.double())
        engine.destroy()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def _store_is_gone() -> bool:
    engine = engine_for(Net(), stage=2)
    train(engine, 1)
    gone = weakref.ref(engine.parts.grads)
    del engine
    gc.collect()
    return gone() is None


def test_gradients_of_several_ranks_are_dropped_with_their_engine() -> None:
    assert run_ranks(_store_is_gone, 2) == [True, True]
