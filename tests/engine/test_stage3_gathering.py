"""GatheredParameters against whatever callers do with it: nested, in the middle of a step, by one rank alone.

``_play`` runs everything in one go, on one gloo rank and on two; results are of every rank.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.fsdp import fsdp_modules, groups_of
from hf_zero_plugin.errors import HfZeroError
from hf_zero_plugin.integration.tensor_access import safe_get_full_fp32_param, safe_get_full_optimizer_state
from hf_zero_plugin.integration.zero_api import GatheredParameters
from tests.helpers import run_ranks

from .stage3 import Net, batch, engine_for, loss_of, rank_and_size, train

pytestmark = pytest.mark.slow

PLACES: dict[str, dict[str, Any]] = {
    "sharded": {},
    "small ones whole": {"whole": 25},
    "offloaded": {"params_on": "cpu", "states_on": "cpu"},
    "bf16": {"precision": "bf16", "params_on": "cpu"},
}
Scene = Callable[[ZeroEngine, Net], Any]


def _values(param: nn.Parameter) -> Tensor:
    with GatheredParameters(param):
        return param.data.clone()


def _nested(engine: ZeroEngine, model: Net) -> bool:
    """Inner contexts over parts of outer ones: what the inner one changes is there in the outer one and after it."""
    rank, world_size = rank_and_size()
    first, second, third = (model.layers[i].up.weight for i in range(3))
    with GatheredParameters([first, second], modifier_rank=0):
        if rank == 0:
            first.data.fill_(1.0)
        with GatheredParameters(iter([None, third, second, second]), modifier_rank=world_size - 1):
            with GatheredParameters(second):
                second.data.mul_(1.0)
            if rank == world_size - 1:
                second.data = torch.full((10, 30), 2.0).T  # replaced, and not contiguous
                third.data.fill_(3.0)
        inside = bool((second == 2.0).all())
        if rank == 0:
            with torch.no_grad():
                second[0] += 1
    found = [_values(param) for param in (first, second, third)]
    after = found[0].eq(1).all() and found[1][0].eq(3).all() and found[1][1:].eq(2).all() and found[2].eq(3).all()
    return inside and bool(after)


def _crossed(engine: ZeroEngine, model: Net) -> bool:
    """Contexts of many parameters, each rank naming them in an order of its own, none of them closed before the end."""
    rank, world_size = rank_and_size()
    params = list(model.layers[1].parameters())
    with ExitStack() as stack:
        stack.enter_context(GatheredParameters(params[:: 1 if rank == 0 else -1], modifier_rank=0))
        stack.enter_context(GatheredParameters(dict.fromkeys(reversed(params)), modifier_rank=world_size - 1))
        for number, param in enumerate(params):
            if rank == world_size - 1:
                nn.init.constant_(param, number)
    return all(bool((_values(param) == number).all()) for number, param in enumerate(params))


def _masters_follow(engine: ZeroEngine, model: Net) -> bool:
    """Moments stay, masters become what the weights are."""
    param = model.layers[0].down.weight
    moment = safe_get_full_optimizer_state(param, "exp_avg")
    with GatheredParameters(param, modifier_rank=0):
        torch.manual_seed(rank_and_size()[0])
        nn.init.normal_(param)
    torch.manual_seed(0)
    wanted = nn.init.normal_(torch.empty(10, 30, dtype=param.dtype)).float()
    master, moment_after = safe_get_full_fp32_param(param), safe_get_full_optimizer_state(param, "exp_avg")
    assert master is not None and moment is not None and moment_after is not None
    return torch.equal(master, wanted) and torch.equal(moment, moment_after) and bool(moment.any())


def _copies(engine: ZeroEngine, model: Net) -> bool:
    with GatheredParameters(model.parameters()):
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer)
        copied = copy.deepcopy(model.layers[0].up.weight)
        shapes = {name: tensor.shape for name, tensor in saved.items()}
    whole = engine._zero3_consolidated_16bit_state_dict()
    is_copy = type(copied) is nn.Parameter and copied.shape == (30, 10) and copied.is_leaf
    same = rank_and_size()[0] > 0 or all(torch.equal(saved[name], tensor) for name, tensor in whole.items())
    return is_copy and same and shapes == {name: tensor.shape for name, tensor in Net().state_dict().items()}


def _one_rank_runs(engine: ZeroEngine, model: Net) -> bool:
    """Nobody waits for the others; contexts that leave something out do not come into it."""
    rank, world_size = rank_and_size()
    plain = Net().to(model.embed.weight.dtype)
    right = True
    with GatheredParameters(model.layers[0].parameters()), GatheredParameters(model.parameters()):
        plain.load_state_dict(model.state_dict())
        if rank == world_size - 1:
            with torch.no_grad():
                right = all(torch.equal(model(batch(i)), plain(batch(i))) for i in range(3))
                model.layers[2](plain.embed(batch(0)))
            loss_of(model, batch(0))  # with gradients, and never used
    groups = [group for module in fsdp_modules(model) for group in groups_of(module)]
    ordinary = not any(group.is_unsharded or "_zero_runs_on" in vars(group) for group in groups)
    with torch.no_grad():
        return right and ordinary and torch.equal(model(batch(1)), plain(batch(1)))


def _runs_on_what_is_changed(engine: ZeroEngine, model: Net) -> bool:
    with GatheredParameters(model.parameters(), modifier_rank=0):
        for param in model.parameters():
            param.data.mul_(0.5)
        with torch.no_grad():
            inside = model(batch(0))
    with torch.no_grad():
        return torch.equal(model(batch(0)), inside)


def _changed_after_a_run_with_gradients(engine: ZeroEngine, model: Net) -> bool:
    """What the model shows is what is gathered, not FSDP2's copies, which would be forgotten with their changes."""
    with GatheredParameters(model.parameters(), modifier_rank=0):
        inside = None
        if rank_and_size()[0] == 0:
            loss_of(model, batch(0))
            for param in model.parameters():
                param.data.mul_(0.5)
            inside = [param.detach().clone() for param in model.parameters()]
    with GatheredParameters(model.parameters()):
        return inside is None or all(torch.equal(p.detach(), q) for p, q in zip(model.parameters(), inside))


def _trains_inside(engine: ZeroEngine, model: Net) -> bool:
    """Forward and backward pass in the context, on all ranks: the gradients are those of any other place."""
    other = engine_for(Net(), **next(options for options in PLACES.values() if _is_of(options, engine)))
    for module in (model, other.module):
        with GatheredParameters(module.parameters(), modifier_rank=0), torch.no_grad():
            for number, param in enumerate(module.parameters()):
                param.copy_(torch.linspace(-0.3, 0.3 + 0.01 * number, param.numel()).view(param.shape))
    norms = []
    for one, place in ((engine, GatheredParameters(model.parameters())), (other, ExitStack())):
        with place:
            one.backward(loss_of(one, batch(0)))
        one.step()
        norms.append(one.get_global_grad_norm())
    return bool(norms[0] == norms[1] > 0)


def _is_of(options: dict[str, Any], engine: ZeroEngine) -> bool:
    precision, device = options.get("precision", "fp32"), options.get("params_on", "none")
    whole = options.get("whole", 0)
    settings = engine.settings
    mine = (settings.precision, settings.offload_param.device, settings.stage3.param_persistence_threshold)
    return mine == (precision, device, whole)


def _fails_alone(engine: ZeroEngine, model: Net) -> bool:
    """An error in the forward pass of one rank leaves a model that runs."""
    rank, world_size = rank_and_size()
    try:
        with GatheredParameters(model.parameters(), modifier_rank=0):
            model.embed.weight.data.zero_()
            if rank == world_size - 1:
                model(torch.tensor([[99]]))
            else:
                raise IndexError
    except IndexError:
        pass
    with torch.no_grad():
        return bool(model(batch(0)).any())


def _another_shape(engine: ZeroEngine, model: Net) -> bool:
    param = model.layers[0].up.weight
    before = _values(param)
    try:
        with GatheredParameters(param, modifier_rank=0):
            param.data = torch.zeros(2)
    except HfZeroError as error:
        return "layers.0.up.weight" in str(error) and torch.equal(_values(param), before)
    return False


def _within_a_step(engine: ZeroEngine, model: Net, gathers: bool) -> dict[str, Any]:
    """Gathered before forward, inside it, between it and backward, and before step: nothing of the step changes."""

    def maybe(*_: Any) -> None:
        if gathers:
            with GatheredParameters(model.layers[1].parameters()), GatheredParameters(model.parameters()):
                pass

    handles = [model.layers[1].norm.register_forward_hook(maybe), model.layers[2].register_forward_pre_hook(maybe)]
    losses = []
    for step in range(3):
        maybe()
        loss = loss_of(engine, batch(step))
        maybe()
        engine.backward(loss)
        maybe()
        engine.step()
        losses.append(loss.item())
    for handle in handles:
        handle.remove()
    return {"losses": losses, **train(engine, 1, first=3)}


SCENES: list[Scene] = [
    _nested,
    _crossed,
    _masters_follow,
    _copies,
    _one_rank_runs,
    _runs_on_what_is_changed,
    _changed_after_a_run_with_gradients,
    _trains_inside,
    _fails_alone,
    _another_shape,
]


def _play() -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for place, options in PLACES.items():
        model = Net()
        engine = engine_for(model, **options)
        train(engine, 2)
        for scene in SCENES:
            results[place, scene.__name__] = scene(engine, model)
        results[place, "trains on"] = train(engine, 1, first=2)["losses"][0] > 0
        steps = []
        for gathers in (True, False):
            model = Net()
            steps.append(_within_a_step(engine_for(model, **options), model, gathers))
        results[place, "steps"] = steps
    return results


@pytest.fixture(scope="module", params=[1, 2])
def played(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return run_ranks(_play, request.param, timeout_s=200.0)


@pytest.mark.parametrize("scene", [scene.__name__ for scene in SCENES] + ["trains on"])
@pytest.mark.parametrize("place", PLACES)
def test_gathered_parameters(place: str, scene: str, played: list[dict[Any, Any]]) -> None:
    assert [results[place, scene] for results in played] == [True] * len(played)


@pytest.mark.parametrize("place", PLACES)
def test_gathering_in_the_middle_of_a_step_changes_nothing(place: str, played: list[dict[Any, Any]]) -> None:
    found, wanted = played[0][place, "steps"]
    assert found["losses"] == wanted["losses"]
    for name, tensor in wanted["weights"].items():
        assert torch.equal(found["weights"][name], tensor), name
