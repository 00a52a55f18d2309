"""An error while an engine is made: what is wrong with a configuration costs the model nothing, and a model whose
weights were being taken apart never computes again."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from hf_zero_plugin.config.settings import OptimizerSettings, SchedulerSettings
from hf_zero_plugin.engine import sharded_assembly
from hf_zero_plugin.engine.sharded_values import Fill
from hf_zero_plugin.errors import ConfigError, HfZeroError
from tests.helpers import run_ranks

from .stage3 import Net, batch, engine_for, hold_equal, train

MISTAKES: dict[str, dict[str, Any]] = {
    "a directory": {"states_on": "nvme", "offload": {"nvme_path": "/proc/nowhere"}},
    "a scheduler": {"scheduler": SchedulerSettings(type="WarmupLR", params={"warmup_num_steps": "many"})},
    "an optimizer": {"optimizer": OptimizerSettings(type="AdamV", params={})},
    "a log level": {"log_level": "loud"},
}


class Broken(Exception):
    pass


def _broken(*_: Any, **__: Any) -> Any:
    raise Broken("the disk is\nfull")


def _mistaken_then_right(mistake: str, stage: int, precision: str, whole: int) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"stage": stage, "precision": precision, "whole": whole}
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ConfigError, ValueError)):
        engine_for(model, **options, **MISTAKES[mistake])
    after = model.state_dict()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    return [train(engine_for(model, **options)), train(engine_for(Net(), **options))]


@pytest.mark.parametrize(("stage", "whole"), [(0, 0), (2, 0), (3, 0), (3, 25)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_the_model_no_digit(mistake: str, precision: str, stage: int, whole: int) -> None:
    hold_equal(*_mistaken_then_right(mistake, stage, precision, whole))


def _tensor_bytes() -> int:
    """Of all that lives in this process."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not one.is_meta]
    storages = [getattr(one, "_local_tensor", one).untyped_storage() for one in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_an_engine_after_another_holds_no_second_copy_of_the_weights() -> None:
    model, sizes = Net(200), []
    for step in range(3):
        engine = engine_for(model, precision="bf16")
        train(engine, 1, first=step)
        engine.destroy()
        del engine
        sizes.append(_tensor_bytes())
    assert max(sizes) - min(sizes) < 10_000 < 2 * sum(param.numel() for param in Net(200).parameters())


def _ranks_make_mistakes() -> list[dict[str, Any]]:
    return [one for mistake in MISTAKES for one in _mistaken_then_right(mistake, 3, "bf16", 25)]


@pytest.mark.slow
def test_mistakes_of_two_ranks_cost_nothing_either() -> None:
    results = run_ranks(_ranks_make_mistakes, 2, timeout_s=200.0)[0]
    for found, wanted in zip(results[::2], results[1::2], strict=True):
        hold_equal(found, wanted)


@pytest.mark.parametrize("whole", [0, 25])
@pytest.mark.parametrize("was_sharded", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_have_the_type_of_their_shards_are_there_before_states_are_made(
    precision: str, was_sharded: bool, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for fails in (True, False):
        model = Net().bfloat16() if precision == "bf16" else Net()
        options: dict[str, Any] = {"precision": precision, "whole": whole}
        if was_sharded:
            engine_for(model, **options).destroy()
        if fails:
            with monkeypatch.context() as patch:
                _interrupt("states", patch)
                with pytest.raises(Broken):
                    engine_for(model, **options)
        results.append(train(engine_for(model, **options)))
    hold_equal(*results)


def _interrupt(place: str, patch: pytest.MonkeyPatch) -> None:
    if place == "sharding":
        patch.setattr(sharded_assembly, "shard_units", _broken)
    if place == "states":
        patch.setattr(sharded_assembly, "connect_training", _broken)
    if place == "values":
        fill, calls = Fill.__call__, iter(range(1000))
        patch.setattr(Fill, "__call__", lambda *args: _broken() if next(calls) == 3 else fill(*args))


@pytest.mark.parametrize(
    ("place", "precision", "was_sharded"),
    [
        ("sharding", "fp32", False),
        ("sharding", "bf16", False),
        ("states", "bf16", False),
        ("values", "fp32", False),
        ("values", "bf16", False),
        ("values", "fp32", True),
        ("values", "bf16", True),
    ],
)
def test_a_model_that_was_being_taken_apart_never_computes_again(
    place: str, precision: str, was_sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    if was_sharded:
        engine_for(model, precision=precision).destroy()
    with monkeypatch.context() as patch:
        _interrupt(place, patch)
        with pytest.raises(Broken):
            engine_for(model, precision=precision)
    hidden = torch.zeros(2, 10, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for use in (
        lambda: model(batch(0)),
        lambda: model.layers[0](hidden),
        lambda: model.embed(batch(0)),
        model.state_dict,
        model.layers[1].state_dict,
        lambda: engine_for(model),
        lambda: engine_for(model, stage=2),
        lambda: engine_for(nn.ModuleList([model])),
        lambda: engine_for(model, trains=False),
    ):
        with pytest.raises(HfZeroError, match=r"no weights any more.*\(Broken: the disk is\).*Load or build the model"):
            use()
