"""Offloaded weights, with offloaded states and without, are the weights that stay: to the bit, on one rank and two.

And both are those of the stage whose gradients are rounded alike: 0, or 2 where half-precision gradients are reduced
at every micro-step, as those of sharded parameters are. (Whole ones are reduced once, as at stage 1.)
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

from tests.helpers import run_ranks

from .stage3 import Net, batch, engine_for, hold_equal, loss_of, train

pytestmark = pytest.mark.slow

OFFLOADS: dict[str, dict[str, Any]] = {
    "weights": {"params_on": "cpu"},
    "states": {"states_on": "cpu"},
    "both": {"params_on": "cpu", "states_on": "cpu"},
    "both, host thread": {"params_on": "cpu", "states_on": "cpu", "offload": {"step_on": "host"}},
}
RUNS = list(itertools.product(["fp32", "bf16", "fp16"], ["all sharded", "small ones whole"], [1, 2]))
ALIKE = [run for run in RUNS if not (run[0] != "fp32" and run[1] == "small ones whole" and run[2] > 1)]
ROUNDING = {"fp32": 1e-6, "bf16": 2**-7, "fp16": 2**-10}
"""Norms are summed in another order at other stages, so a weight may be rounded to its neighbour."""


def _model() -> Net:
    """Without a trained scalar, which would be whole in any run."""
    model = Net()
    model.scale.requires_grad_(False)
    return model


def _runs() -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for precision, small, micros in RUNS:
        options: dict[str, Any] = {"precision": precision, "micros": micros}
        stage = 2 if precision != "fp32" and micros > 1 else 0
        results[precision, small, micros, "other stage"] = train(engine_for(_model(), stage=stage, **options))
        options["whole"] = 25 if small == "small ones whole" else 0
        results[precision, small, micros, "stays"] = train(engine_for(_model(), **options))
        for name, offload in OFFLOADS.items():
            results[precision, small, micros, name] = train(engine_for(_model(), **options, **offload))
    return results


@pytest.fixture(scope="module", params=[1, 2])
def runs(request: pytest.FixtureRequest) -> dict[Any, Any]:
    return run_ranks(_runs, request.param, timeout_s=400.0)[0]


@pytest.mark.parametrize("offloaded", OFFLOADS)
@pytest.mark.parametrize(("precision", "small", "micros"), RUNS)
def test_offloaded_equals_not_offloaded(
    precision: str, small: str, micros: int, offloaded: str, runs: dict[Any, Any]
) -> None:
    hold_equal(runs[precision, small, micros, offloaded], runs[precision, small, micros, "stays"])


@pytest.mark.parametrize(("precision", "small", "micros"), ALIKE)
def test_equals_the_other_stage(precision: str, small: str, micros: int, runs: dict[Any, Any]) -> None:
    found, wanted = runs[precision, small, micros, "stays"], runs[precision, small, micros, "other stage"]
    for name, tensor in wanted["weights"].items():
        torch.testing.assert_close(
            found["weights"][name],
            tensor,
            rtol=ROUNDING[precision],
            atol=2e-6,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert found["norms"] == pytest.approx(wanted["norms"], rel=max(ROUNDING[precision] / 10, 1e-5))


def _steps_twice() -> dict[str, list[float]]:
    norms: dict[str, list[float]] = {}
    for name, options in {"stage 2": {"stage": 2}, "stage 3": {}, **OFFLOADS}.items():
        engine, norms[name] = engine_for(_model(), **options), []
        for step in range(2):
            engine.backward(loss_of(engine, batch(step)))
            for _ in range(2):
                engine.step()
                norms[name].append(engine.get_global_grad_norm())
        engine.destroy()
    return norms


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_step_without_a_backward_pass_has_no_gradients(world_size: int) -> None:
    norms = run_ranks(_steps_twice, world_size, timeout_s=200.0)[0]
    for name, found in norms.items():
        assert [found[1], found[3]] == [0.0, 0.0], name
        assert found == pytest.approx(norms["stage 2"], rel=1e-4), name


def _fails_at_once(loss: Any) -> Any:
    loss.register_hook(lambda _: 1 / 0)
    return loss


def _steps_after_a_failed_backward() -> dict[str, float]:
    norms: dict[str, float] = {}
    for name, options in {"stage 2": {"stage": 2}, "stage 3": {}, **OFFLOADS}.items():
        engine = engine_for(_model(), **options)
        engine.backward(loss_of(engine, batch(0)))
        engine.step()
        with contextlib.suppress(ZeroDivisionError):
            engine.backward(_fails_at_once(loss_of(engine, batch(1))))
        engine.step()
        norms[name] = engine.get_global_grad_norm()
        engine.destroy()
    return norms


def test_a_step_after_a_backward_pass_that_failed_has_no_gradients() -> None:
    norms = run_ranks(_steps_after_a_failed_backward, 1, timeout_s=200.0)[0]
    assert norms == dict.fromkeys(norms, 0.0)
