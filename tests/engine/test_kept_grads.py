"""Stage 3 on two ranks, weights offloaded, states streamed: gradients never go where the weights are.

The CPU stands in for the GPU, and every stream's order is checked (``races.py``). FSDP2's own streams are not among
them: it uses none on a CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_zero_plugin.engine import assembly, offload_stream, sharded_wiring, state_homes
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
    patch.setattr(offload_stream, "_allocated_bytes", Room(True))
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
            detector.harmless += [home._tick for home in homes]
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
