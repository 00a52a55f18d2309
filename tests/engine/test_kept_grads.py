"""Stage 3 on two ranks, weights offloaded, states streamed: gradients never go where the weights are.

The CPU stands in for the GPU, and every stream's order is checked (``races.py``). FSDP2's own streams are not among
them: it uses none on a CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_zero_plugin.engine import assembly, sharded_wiring, staging_room, state_homes
from hf_zero_plugin.engine.fsdp import sharded_params
from hf_zero_plugin.engine.kept_grads import give_back, keep_on_device
from hf_zero_plugin.engine.offload_stream import StreamedHome
from tests.helpers import run_ranks

from .races import RaceDetector
from .stage3 import Net, batch, engine_for, loss_of, train
from .test_races import Room

OPTIONS: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "bf16", "micros": 2},
    {"precision": "fp16", "whole": 25},
    {"precision": "bf16", "offload": {"ratio": 0.5}},
]
BOTH: dict[str, Any] = {"params_on": "cpu", "states_on": "cpu"}


def _stream_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(state_homes, "HostHome", lambda context, pieces, **_: StreamedHome(context, pieces, pin_memory=False))
    patch.setattr(staging_room, "allocated_bytes", Room(True))
    patch.setattr(staging_room, "capacity_bytes", lambda _: 2 * 10**15)
    patch.setattr(sharded_wiring, "_streams", lambda *_: True)
    patch.setattr(assembly, "BUCKET_NUMEL", 300)


def _stand_ins(model: torch.nn.Module) -> int:
    items = sharded_params(model)
    groups = {id(item.group): item.group for item in items}.values()
    found = ["to_sharded_dtensor" in vars(item.handle) for item in items]
    return sum(found) + sum("post_backward" in vars(group) for group in groups)


def _compare() -> list[dict[str, Any]]:
    results = []
    for options in OPTIONS:
        poison = 1 if options["precision"] == "fp16" else None
        plain = {name: value for name, value in options.items() if name != "offload"}
        engine = engine_for(**plain, **BOTH)
        wanted = train(engine, poison=poison)
        engine.destroy()
        with pytest.MonkeyPatch.context() as patch, RaceDetector() as detector:
            _stream_on_the_cpu(patch)
            model = Net()
            engine = engine_for(model, **options, **BOTH)
            homes = [home for home in engine.parts.masters.homes if isinstance(home, StreamedHome)]  # type: ignore[union-attr]
            during = _stand_ins(model)
            found = train(engine, poison=poison)
            engine.destroy()
        results.append(
            {
                "wanted": wanted,
                "found": found,
                "races": detector.races,
                "homes": len(homes),
                "side": detector.num_side_operations,
                "during": during,
                "after": _stand_ins(model),
            }
        )
    return results


@pytest.mark.slow
def test_streamed_over_two_ranks_equals_updated_where_the_weights_are() -> None:
    for options, *ranks in zip(OPTIONS, *run_ranks(_compare, 2)):
        for rank in ranks:
            wanted, found = rank["wanted"], rank["found"]
            assert rank["homes"] and rank["side"] > 50, options
            assert rank["races"] == [], options
            assert found["losses"] == pytest.approx(wanted["losses"], nan_ok=True, abs=0), options
            assert found["norms"] == pytest.approx(wanted["norms"], nan_ok=True, abs=0), options
            assert found["skipped"] == wanted["skipped"]
            assert rank["during"] > 0 and rank["after"] == 0
            for name, value in wanted["weights"].items():
                assert torch.equal(value, found["weights"][name]), (options, name)


class _Owner:
    def __init__(self) -> None:
        self.taken: dict[str, float] = {}

    def take(self, name: str, grad: torch.Tensor) -> None:
        self.taken[name] = float(grad.norm())


def _without_an_owner() -> tuple[dict[str, float], list[dict[str, float]]]:
    """What is handed over while there is an owner, and the gradients that there are without one, and after all."""
    model = Net()
    engine = engine_for(model, **BOTH)
    engine.destroy()
    items = sharded_params(model)
    owner = _Owner()
    keep_on_device(items, owner, _Owner.take)

    def grads() -> dict[str, float]:
        model.zero_grad()
        loss_of(model, batch(0)).backward()
        found = {item.name: item.param.grad for item in items if item.param.grad is not None}
        return {name: float(grad.to_local().norm()) for name, grad in found.items()}  # type: ignore[attr-defined]

    assert grads() == {}
    taken = owner.taken
    del owner
    left = grads()
    give_back(items)
    assert _stand_ins(model) == 0
    return taken, [left, grads()]


def test_what_stays_on_the_model_does_nothing_without_its_owner() -> None:
    for taken, found in run_ranks(_without_an_owner, 2):
        assert found == [taken, taken]
        assert any(value > 0 for value in taken.values())


def _failed_and_left() -> dict[str, Any]:
    """An engine that fails while it is built; one that is left without a word, and one after it, that trains."""
    options: dict[str, Any] = {"precision": "fp32", **BOTH}
    engine = engine_for(**options)
    wanted = train(engine)
    engine.destroy()
    model = Net()
    with pytest.MonkeyPatch.context() as patch, RaceDetector():
        _stream_on_the_cpu(patch)
        with patch.context() as broken:
            broken.setattr(sharded_wiring, "_make_homes", _raise)
            with pytest.raises(MemoryError):
                engine_for(model, **options)
        engine = engine_for(model, **options)
        offloads = _flags_during_reduction(model)
        found = train(engine)
        engine_for(model, **options)
    return {"wanted": wanted, "found": found, "offloads": offloads}


def _raise(*_: Any) -> None:
    raise MemoryError


def _flags_during_reduction(model: torch.nn.Module) -> list[bool]:
    """What FSDP2 believes of a parameter when its gradient is handed over."""
    found: list[bool] = []
    for item in sharded_params(model):
        hand_over = item.handle.to_sharded_dtensor

        def noted(tensor: torch.Tensor, item: Any = item, hand_over: Any = hand_over) -> Any:
            found.append(item.handle.offload_to_cpu)
            return hand_over(tensor)

        item.handle.to_sharded_dtensor = noted
    return found


@pytest.mark.slow
def test_engines_that_failed_or_were_left_spoil_nothing() -> None:
    for rank in run_ranks(_failed_and_left, 2):
        assert rank["found"]["losses"] == rank["wanted"]["losses"]
        assert rank["offloads"] and not any(rank["offloads"])


def _untrained_beside() -> tuple[bool, bool, set[str]]:
    """A weight that wants gradients and that no optimizer knows, in a unit with others that one does."""
    model = Net()
    model.layers[1].up.weight.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch, RaceDetector():
        _stream_on_the_cpu(patch)
        engine = engine_for(model, **BOTH)
        items = {item.name: item for item in sharded_params(model)}
        items["layers.1.up.weight"].param.requires_grad_(True)
        kept = {name for name, item in items.items() if "to_sharded_dtensor" in vars(item.handle)}
        flags: list[bool] = []
        handle = items["layers.1.up.weight"].handle
        handle.to_sharded_dtensor = lambda grad: (
            flags.append(handle.offload_to_cpu),
            type(handle).to_sharded_dtensor(handle, grad),
        )[1]
        engine.backward(loss_of(engine, batch(0)))
        engine.step()
        has_grad = items["layers.1.up.weight"].param.grad is not None
        engine.destroy()
    return flags == [True], has_grad, kept


@pytest.mark.slow
def test_a_weight_without_an_optimizer_gets_its_gradient_where_it_is() -> None:
    for goes_to_host, has_grad, kept in run_ranks(_untrained_beside, 2):
        assert goes_to_host and has_grad
        assert "layers.1.up.weight" not in kept and "layers.1.down.weight" in kept
