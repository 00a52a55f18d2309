"""safe_get_* and safe_set_* at every stage, on one gloo rank and two: parts make the whole, mistakes are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_zero_plugin.engine.tensor_access import full_state, local_state, set_full_state, set_local_state
from hf_zero_plugin.errors import HfZeroError
from hf_zero_plugin.integration import tensor_access
from hf_zero_plugin.integration.zero_api import GatheredParameters
from tests.helpers import run_ranks

from .stage3 import Net, batch, engine_for, loss_of, rank_and_size, train

PLACES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 2": {"stage": 2, "states_on": "cpu"},
    "stage 3": {"whole": 25},
    "stage 3 offloaded": {"params_on": "cpu", "states_on": "cpu"},
}


def _parts_of_all(part: Tensor, stage: int) -> Tensor:
    """End to end, in rank order; at stage 0 every rank has all."""
    if rank_and_size()[1] == 1 or stage == 0:
        return part
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return torch.cat(parts)


def _refusals(param: torch.nn.Parameter) -> list[str]:
    local = tensor_access.safe_get_local_fp32_param(param)
    assert local is not None
    attempts = [
        lambda: tensor_access.safe_set_full_fp32_param(param, torch.zeros(3)),
        lambda: tensor_access.safe_set_full_optimizer_state(param, torch.zeros(301), "exp_avg"),
        lambda: tensor_access.safe_set_local_fp32_param(param, torch.zeros(local.numel() + 1)),
        lambda: tensor_access.safe_set_local_optimizer_state(param, torch.zeros(1), "exp_avg"),
        lambda: tensor_access.safe_get_full_optimizer_state(param, "exp_average"),
        lambda: tensor_access.safe_get_local_optimizer_state(param, "exp_average"),
    ]
    told = []
    for attempt in attempts:
        with pytest.raises(HfZeroError) as caught:
            attempt()
        told.append(str(caught.value))
    return told


def _play() -> dict[str, Any]:
    results = {}
    for place, options in PLACES.items():
        model = Net(frozen=True)
        held = dict(model.named_parameters())
        engine = engine_for(model, **options)
        train(engine, 2)
        engine.backward(loss_of(engine, batch(2)))
        named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        seen: dict[str, Any] = {"whole": {}, "right": []}
        for name, param in named.items():
            full = {
                "grad": (tensor_access.safe_get_full_grad(param), tensor_access.safe_get_local_grad(param)),
                "master": (
                    tensor_access.safe_get_full_fp32_param(param),
                    tensor_access.safe_get_local_fp32_param(param),
                ),
                "exp_avg": (
                    tensor_access.safe_get_full_optimizer_state(param, "exp_avg"),
                    tensor_access.safe_get_local_optimizer_state(param, "exp_avg"),
                ),
            }
            for kind, (whole, part) in full.items():
                assert whole is not None and part is not None
                seen["whole"][name, kind] = whole
                seen["right"].append(torch.equal(_parts_of_all(part, options.get("stage", 3)), whole.flatten()))
        engine.step()
        original = held["layers.1.up.weight"]
        master = tensor_access.safe_get_full_fp32_param(original)
        with GatheredParameters(original):
            seen["right"].append(master is not None and torch.equal(master, original.data))
        frozen = model.layers[0].up.weight
        seen["nobody's"] = [tensor_access.safe_get_full_fp32_param(p) for p in (frozen, torch.nn.Parameter(frozen[:1]))]
        seen["refusals"] = _refusals(named["layers.1.up.weight"])
        seen["after"] = train(engine, 1, first=3)["losses"]
        results[place] = seen
    return results


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def played(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(_play, request.param)


@pytest.mark.parametrize("place", PLACES)
def test_parts_make_the_whole_and_the_whole_is_that_of_stage_0(place: str, played: list[dict[str, Any]]) -> None:
    for results in played:
        assert all(results[place]["right"])
        assert results[place]["nobody's"] == [None, None]
        for key, tensor in results["stage 0"]["whole"].items():
            torch.testing.assert_close(results[place]["whole"][key], tensor, atol=2e-6, rtol=1e-5, msg=str(key))
        assert results[place]["after"] == pytest.approx(results["stage 0"]["after"], abs=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_values_of_another_size_and_unknown_states_are_refused(place: str, played: list[dict[str, Any]]) -> None:
    for results in played:
        told = results[place]["refusals"]
        assert all(message.startswith("layers.1.up.weight: ") for message in told)
        assert "has 3 elements, the parameter has 300" in told[0]
        assert "this rank's part of the parameter has" in told[2]
        assert "no state 'exp_average'; it has 'exp_avg', 'exp_avg_sq'" in told[4]


MASTER, STATE = "master", "exp_avg"
SETTERS: dict[str, tuple[str, bool]] = {
    "full master": (MASTER, False),
    "full state": (STATE, False),
    "local master": (MASTER, True),
    "local state": (STATE, True),
}
ONE_WRONG_PLACES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 2": {"stage": 2, "states_on": "cpu", "precision": "bf16"},
    "stage 3 whole": {"whole": 1000},
    "stage 3": {},
    "stage 3 offloaded": {"params_on": "cpu", "states_on": "cpu", "precision": "bf16"},
}


def _set(param: torch.nn.Parameter, kind: str, is_local: bool, excess: int) -> None:
    """What is there, and one more."""
    got = (local_state if is_local else full_state)(param, kind)
    assert got is not None
    value = torch.cat([got.flatten() + 1.0, torch.zeros(excess)])
    (set_local_state if is_local else set_full_state)(param, value, kind)


def _state_of(model: Net) -> dict[str, Tensor]:
    state = {}
    for name, param in model.named_parameters():
        for kind in (MASTER, STATE):
            part = full_state(param, kind)
            assert part is not None
            state[f"{name} {kind}"] = part
    with GatheredParameters(model.parameters()):
        return state | {name: param.detach().clone() for name, param in model.named_parameters()}


def _one_is_wrong() -> dict[Any, Any]:
    """Rank 1 gives an element too many."""
    seen: dict[Any, Any] = {}
    for place, options in ONE_WRONG_PLACES.items():
        model = Net()
        engine = engine_for(model, **options)
        train(engine, 1)
        param = dict(model.named_parameters())["layers.1.down.weight"]
        for setter, (kind, is_local) in SETTERS.items():
            before, part, told = _state_of(model), local_state(param, kind), ""
            try:
                _set(param, kind, is_local, excess=dist.get_rank())
            except HfZeroError as error:
                told = str(error)
            after = _state_of(model)  # collective
            changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
            part_after = local_state(param, kind)
            assert part is not None and part_after is not None
            is_kept = torch.equal(part, part_after)
            _set(param, kind, is_local, excess=0)
            seen[place, setter] = told, changed, is_kept, full_state(param, kind)
        train(engine, 1, first=1)
        seen[place, "trained"] = _state_of(model)
    return seen


@pytest.fixture(scope="module")
def one_wrong() -> list[dict[Any, Any]]:
    return run_ranks(_one_is_wrong, 2)


@pytest.mark.parametrize("setter", SETTERS)
@pytest.mark.parametrize("place", ONE_WRONG_PLACES)
def test_a_value_of_the_wrong_size_on_one_rank(place: str, setter: str, one_wrong: list[dict[Any, Any]]) -> None:
    """Nothing has changed and every rank is told. Where none needs another, the rest go on, and so does their part."""
    (first, changed, _, right), (second, changed_there, is_kept, right_there) = (
        results[place, setter] for results in one_wrong
    )
    assert second.startswith("layers.1.down.weight: the value to set has ")
    assert is_kept
    assert changed == changed_there
    assert torch.equal(right, right_there)
    name = "layers.1.down.weight"
    if setter == "local state" and place != "stage 0":
        assert (first, changed) == ("", {f"{name} exp_avg"})
    elif setter == "local master" and place in ("stage 3", "stage 3 offloaded"):
        assert (first, changed) == ("", {f"{name} master", name})
    else:
        assert first.startswith("layers.1.down.weight: the value to set has ")
        assert "elements on rank 1, " in first
        assert changed == set()


@pytest.mark.parametrize("place", ONE_WRONG_PLACES)
def test_after_a_refusal_ranks_train_on_alike(place: str, one_wrong: list[dict[Any, Any]]) -> None:
    weights = [results[place, "trained"] for results in one_wrong]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
