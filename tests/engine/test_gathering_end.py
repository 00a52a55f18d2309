"""An engine that ends inside a ``GatheredParameters`` context: the context goes on, and what it changed is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.fsdp import fsdp_modules, groups_of
from hf_zero_plugin.integration.zero_api import GatheredParameters
from tests.helpers import run_ranks

from .stage3 import Net, batch, engine_for, rank_and_size, train

PLACES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 2": {"stage": 2, "states_on": "cpu"},
    "stage 3": {},
    "small ones whole": {"whole": 25},
    "offloaded bf16": {"precision": "bf16", "params_on": "cpu", "states_on": "cpu"},
}


def _give(params: Any, factor: float) -> None:
    with torch.no_grad():
        for number, param in enumerate(params, 1):
            param.copy_(torch.linspace(-factor, factor * number / 10, param.numel()).view(param.shape))


def _right(factor: float, dtype: torch.dtype) -> Net:
    plain = Net().to(dtype)
    _give(plain.parameters(), factor)
    return plain


def _holds(model: nn.Module, plain: nn.Module) -> bool:
    with GatheredParameters(model.parameters()):
        return all(torch.equal(p.detach(), q.detach()) for p, q in zip(model.parameters(), plain.parameters()))


def _output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(batch(0))
    return result


def _leftovers(model: nn.Module) -> list[set[str]]:
    ours = {"unshard", "wait_for_unshard", "post_backward", "_zero_runs_on"}
    groups = [group for module in fsdp_modules(model) for group in groups_of(module)]
    return [found for group in groups if (found := ours & vars(group).keys())]


def _fail_after_the_end(engine: ZeroEngine, model: Net) -> None:
    with GatheredParameters(model.layers[1].parameters(), modifier_rank=0):
        engine.destroy()
        raise IndexError


def _play(options: dict[str, Any]) -> dict[str, Any]:
    rank, world_size = rank_and_size()
    model = Net()
    engine = engine_for(model, **options)
    train(engine, 1)
    dtype = model.embed.weight.dtype
    seen: dict[str, Any] = {}
    with GatheredParameters(model.parameters(), modifier_rank=0):
        if rank == 0:
            _give(model.parameters(), 0.3)
        with GatheredParameters(model.layers[0].parameters()):
            engine.destroy()
        # By one rank alone, which nobody waits for.
        seen["runs inside"] = rank > 0 or torch.equal(_output(model), _output(_right(0.3, dtype)))
    seen["is kept"] = _holds(model, _right(0.3, dtype))
    seen["runs after it"] = torch.equal(_output(model), _output(_right(0.3, dtype)))
    seen["leftovers"] = _leftovers(model)

    # What is left can be gathered, changed and trained again. One rank gives up alone, and its engine too.
    engine = engine_for(model, **options)
    with GatheredParameters(model.parameters(), modifier_rank=world_size - 1):
        if rank == world_size - 1:
            engine.destroy()
            _give(model.parameters(), 0.2)
    engine.destroy()
    seen["is kept again"] = _holds(model, _right(0.2, dtype))

    # An error on the way: what was gathered is dropped, the context still ends.
    engine = engine_for(model, **options)
    with pytest.raises(IndexError):
        _fail_after_the_end(engine, model)
    seen["leftovers in the end"] = _leftovers(model)
    seen["trains on"] = train(engine_for(model, **options), 2)["losses"]
    seen["trained from"] = train(engine_for(_right(0.2, dtype), **options), 2)["losses"]
    return seen


def _play_all() -> dict[str, Any]:
    return {place: _play(options) for place, options in PLACES.items()}


@pytest.fixture(scope="module", params=[1, 2])
def played(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(_play_all, request.param)


@pytest.mark.parametrize("place", PLACES)
def test_a_context_outlives_the_engine(place: str, played: list[dict[str, Any]]) -> None:
    for results in played:
        seen = results[place]
        assert [seen[key] for key in ("runs inside", "is kept", "runs after it", "is kept again")] == [True] * 4
        assert seen["leftovers"] == seen["leftovers in the end"] == []
        assert seen["trains on"] == seen["trained from"]
