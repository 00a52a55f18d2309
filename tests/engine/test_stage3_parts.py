"""Stage 3: parameters in containers, used by others than their owners, leaf modules, states one by one, parts called
without the model. One and two gloo ranks; ``_play`` runs everything in one go and the tests look at results.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.fsdp import fsdp_modules, groups_of
from hf_zero_plugin.integration.tensor_access import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from hf_zero_plugin.integration.zero_api import GatheredParameters, register_external_parameter, set_z3_leaf_modules
from tests.helpers import run_ranks

from .stage3 import Block, Net, batch, engine_for, loss_of, train

pytestmark = pytest.mark.slow


class _Mixed(nn.Module):
    """Parameters in a list, in a dict, on a module that never runs, and three dimensions deep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.ParameterList([nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(6, 6))])
        self.by_name = nn.ParameterDict(
            {"scale": nn.Parameter(torch.rand(6)), "deep": nn.Parameter(torch.rand(3, 2, 6))}
        )
        self.silent = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 7)
        register_external_parameter(self, self.silent.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.embedding(tokens, self.table[0]) @ self.table[1] * self.by_name["scale"]
        x = nn.functional.linear(x, self.silent.weight, self.silent.bias) + self.by_name["deep"].sum((0, 1))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def _mixed() -> dict[str, Any]:
    results = {}
    for name, options in {
        "stage 0": {"stage": 0},
        "sharded": {},
        "offloaded": {"params_on": "cpu", "states_on": "cpu", "whole": 10},
    }.items():
        results[name] = train(engine_for(_Mixed(), **options))
    return results


class _Stack(nn.Module):
    """As a layer of experts: which of its parts run may depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Block(10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def _stacked() -> Net:
    model = Net(depth=2)
    model.layers.append(_Stack())
    return model


def _group_sizes(engine: ZeroEngine) -> list[int]:
    return [len(group.fsdp_params) for module in fsdp_modules(engine.module) for group in groups_of(module)]


def _leaves() -> dict[str, Any]:
    model = _stacked()
    marked_modules = set_z3_leaf_modules(model, [_Stack])
    assert marked_modules == [model.layers[2]]
    marked = engine_for(model)
    by_setting = engine_for(_stacked(), stage3={"leaf_module_classes": ("_Stack",)})
    nobody_calls = engine_for(stage3={"leaf_module_classes": ("ModuleList",)})
    return {
        "sizes": [_group_sizes(engine) for engine in (marked, by_setting, nobody_calls)],
        "trained": [train(marked), train(by_setting)],
        "reference": train(engine_for(_stacked(), stage=0)),
        "list": (train(nobody_calls), train(engine_for(stage=0))),
    }


def _states() -> dict[str, Any]:
    results = {}
    for name, options in {"stage 0": {"stage": 0}, "sharded": {}, "offloaded": {"params_on": "cpu"}}.items():
        model = Net()
        engine = engine_for(model, **options)
        train(engine, 2)
        param = dict(model.named_parameters())["layers.1.down.weight"]
        values = torch.arange(300.0).view(10, 30)
        safe_set_full_optimizer_state(param, values, "exp_avg")
        moment = safe_get_full_optimizer_state(param, "exp_avg")
        part = safe_get_local_optimizer_state(param, "exp_avg")
        safe_set_full_fp32_param(param, values)
        master, mine = safe_get_full_fp32_param(param), safe_get_local_fp32_param(param)
        assert part is not None and mine is not None and moment is not None and master is not None
        equal = torch.equal(part, mine) and torch.equal(moment, values) and torch.equal(master, values)
        safe_set_local_fp32_param(param, mine + 1)
        safe_set_local_optimizer_state(param, part + 2, "exp_avg_sq")
        with GatheredParameters(param):
            weight = param.data.clone()
        second = safe_get_full_optimizer_state(param, "exp_avg_sq")
        master = safe_get_full_fp32_param(param)
        assert second is not None and master is not None
        results[name] = {
            "equal": equal,
            "weight": torch.equal(weight, values + 1) and torch.equal(master, values + 1),
            "moment": torch.equal(second, values + 2),
            "trained": train(engine, 1, first=2),
        }
    return results


def _parts_alone() -> dict[str, Any]:
    """Modules that read parameters of the root run without the root's forward: backbones, encoders, heads."""
    results = {}
    for name, options in {"stage 0": {"stage": 0}, "sharded": {}, "offloaded": {"params_on": "cpu"}}.items():
        model = Net()
        engine = engine_for(model, **options)
        with torch.no_grad():
            first = model.embed(batch(0)).sum().item()
        losses = []
        for step in range(3):
            # The forward pass of Net, called from outside.
            x = model.embed(batch(step)) + model.offset
            for layer in model.layers:
                x = layer(x)
            out = model.head(model.norm(x))
            loss = nn.functional.cross_entropy(out.flatten(0, 1), batch(step).roll(1, 1).flatten())
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        results[name] = {"first": first, "losses": losses, "after": loss_of(engine, batch(9)).item()}
    return results


def _play() -> dict[str, Any]:
    return {"mixed": _mixed(), "leaves": _leaves(), "states": _states(), "parts alone": _parts_alone()}


@pytest.fixture(scope="module", params=[1, 2])
def played(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_ranks(_play, request.param, timeout_s=300.0)[0]


def _assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, tensor in wanted["weights"].items():
        assert found["weights"][name].shape == tensor.shape, name
        torch.testing.assert_close(
            found["weights"][name], tensor, atol=2e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5)


@pytest.mark.parametrize("name", ["sharded", "offloaded"])
def test_parameters_in_containers_and_of_silent_modules(name: str, played: dict[str, Any]) -> None:
    _assert_same(played["mixed"][name], played["mixed"]["stage 0"])


def test_leaf_modules_are_gathered_as_a_whole(played: dict[str, Any]) -> None:
    leaves = played["leaves"]
    marked, by_setting, nobody_calls = leaves["sizes"]
    assert marked == by_setting
    assert 3 * 6 in marked
    assert len(nobody_calls) == 1  # a list is not called: its parts are gathered with the root
    for trained in leaves["trained"]:
        _assert_same(trained, leaves["reference"])
    _assert_same(*leaves["list"])


@pytest.mark.parametrize("name", ["sharded", "offloaded"])
def test_states_can_be_read_and_set_one_by_one(name: str, played: dict[str, Any]) -> None:
    found, wanted = played["states"][name], played["states"]["stage 0"]
    assert found["equal"]
    assert found["weight"]
    assert found["moment"]
    _assert_same(found["trained"], wanted["trained"])


@pytest.mark.parametrize("name", ["sharded", "offloaded"])
def test_parts_of_the_model_run_without_it(name: str, played: dict[str, Any]) -> None:
    found, wanted = played["parts alone"][name], played["parts alone"]["stage 0"]
    assert found["first"] == pytest.approx(wanted["first"], abs=1e-5)
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    assert found["after"] == pytest.approx(wanted["after"], abs=1e-5)


def test_the_root_is_updated_first() -> None:
    """It is gathered whole before the first layer runs, its head included, which is registered last."""
    model = Net()
    model.head = nn.Linear(10, 7, bias=False)  # not tied
    engine = engine_for(model, params_on="cpu", reduce_bucket_size=64)
    order = [slot.spec.name for layout in engine.parts.layouts for slot in layout.slots if slot.spec.numel > 64]
    root = {name for name in order if not name.startswith("layers")}
    assert root == {"embed.weight", "idle.weight", "head.weight"}
    assert set(order[: len(root)]) == root
    engine.destroy()


def test_what_was_fetched_ahead_is_not_used_after_a_change() -> None:
    model, plain = Net(), Net()
    engine = engine_for(model, params_on="cpu")
    with torch.no_grad():
        model.layers[0](torch.zeros(1, 5, 10))
        (ahead,) = groups_of(model.layers[1])  # type: ignore[arg-type]
        assert ahead._all_gather_result is not None
        param = model.layers[1].up.weight
        with GatheredParameters(param, modifier_rank=0):
            param.data.zero_()
        plain.layers[1].up.weight.zero_()
        assert ahead._all_gather_result is None
        torch.testing.assert_close(model(batch(0)), plain(batch(0)))
    engine.destroy()
    assert engine.parts.shards is not None
    assert engine.parts.shards.transfers is None
    assert "unshard" not in vars(ahead)


def test_a_parameter_without_a_gradient_counts_as_zero_after_one_that_had_one() -> None:
    """Nothing is cleared between steps, so what an idle parameter was given earlier must not count again."""
    model, plain = Net(), Net()
    engines = [engine_for(model, params_on="cpu"), engine_for(plain, stage=0)]
    for step in range(4):
        for engine in engines:
            loss = loss_of(engine, batch(step))
            if step % 2:
                idle = engine.module.idle
                loss = loss + idle(torch.ones(2, 10)).square().mean()
            engine.backward(loss)
            engine.step()
    ours, theirs = (engine._zero3_consolidated_16bit_state_dict() for engine in engines)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert engines[0].get_global_grad_norm() == pytest.approx(engines[1].get_global_grad_norm(), rel=1e-5)
    for engine in engines:
        engine.destroy()


def _without_a_layer() -> dict[int, dict[str, Any]]:
    return {stage: train(engine_for(stage=stage, left_out="layers.1", gradient_clipping=0.0)) for stage in (0, 3)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_that_the_optimizer_does_not_know_stay_as_they_are(world_size: int) -> None:
    found = run_ranks(_without_a_layer, world_size)[0]
    assert found[3]["losses"] == pytest.approx(found[0]["losses"], rel=1e-6)
    for name, tensor in Net().state_dict().items():
        unchanged = torch.equal(found[3]["weights"][name], tensor)
        assert unchanged == ("layers.1." in name or name in ("offset", "idle.bias")), name
