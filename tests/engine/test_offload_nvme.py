"""States on NVMe change nothing: the same bits as states in memory, whatever is read ahead or written behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_zero_plugin.config.settings import AioSettings, OptimizerSettings
from hf_zero_plugin.engine import assembly, state_homes
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.errors import ConfigError, HfZeroError
from hf_zero_plugin.integration.tensor_access import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from tests.helpers import run_ranks

from . import stage3
from .harness import Tiny, batch, loss_of, make_engine, train, weights

STEPS = 5
PIPELINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one buffer": {"buffer_count": 1, "pipeline_read": True, "pipeline_write": True},
    "both ways": {"buffer_count": 2, "pipeline_read": True, "pipeline_write": True},
    "host thread": {"step_on": "host", "pipeline_read": True, "pipeline_write": True},
}


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "BUCKET_NUMEL", 256)
    monkeypatch.setattr(state_homes, "STREAM_PIECE_NUMEL", 128)


def _engine(
    path: Path, *, precision: str = "fp32", offload: dict[str, Any] | None = None, **options: Any
) -> ZeroEngine:
    where = {"device": "nvme", "nvme_path": str(path), **(offload or {})}
    aio = AioSettings(block_size=4096, queue_depth=2)
    return make_engine(Tiny(), precision=precision, offload=where, aio=aio, **options)


def _same(ours: ZeroEngine, theirs: ZeroEngine) -> None:
    for engine in (ours, theirs):
        engine.synchronize()
    expected = weights(theirs.module)
    for name, weight in weights(ours.module).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_states_on_nvme_equal_states_in_memory_to_the_bit(precision: str, pipeline: str, tmp_path: Path) -> None:
    ours = _engine(tmp_path, precision=precision, offload=PIPELINES[pipeline])
    theirs = make_engine(Tiny(), precision=precision)
    assert train(ours, STEPS, micros=2) == train(theirs, STEPS, micros=2)
    _same(ours, theirs)
    assert list(tmp_path.iterdir()) == []
    ours.destroy()


@pytest.mark.parametrize("name", ["Lion", "Adagrad", "SGD"])
def test_other_rules_live_there_too(name: str, tmp_path: Path) -> None:
    optimizer = OptimizerSettings(type=name, params={"lr": 0.01})
    ours, theirs = _engine(tmp_path, optimizer=optimizer), make_engine(Tiny(), optimizer=optimizer)
    assert train(ours, STEPS) == train(theirs, STEPS)


def test_a_share_may_stay_on_the_device_and_states_may_be_narrow(tmp_path: Path) -> None:
    types = {"master_dtype": "bf16", "optimizer_state_dtype": "bf16", "precision": "bf16"}
    ours, theirs = _engine(tmp_path, offload={"ratio": 0.5}, **types), make_engine(Tiny(), **types)
    assert train(ours, STEPS) == train(theirs, STEPS)
    _same(ours, theirs)
    report = ours.memory_report()
    assert report["nvme"]["moments"] > 0
    assert report["device"]["moments"] > 0


def test_what_is_where(tmp_path: Path) -> None:
    engine = _engine(tmp_path, precision="bf16")
    numel = sum(layout.padded_numel for layout in engine.parts.layouts)
    report = engine.memory_report()
    assert report["nvme"] == {"master weights": 4 * numel, "moments": 8 * numel}
    assert set(report["host"]) == {"buffers"}


@pytest.mark.parametrize("pipeline", ["plain", "host thread"])
def test_resumed_run_equals_uninterrupted_run_to_the_bit(pipeline: str, tmp_path: Path) -> None:
    whole = _engine(tmp_path / "disk", precision="bf16", offload=PIPELINES[pipeline])
    train(whole, STEPS)
    first = make_engine(Tiny(), precision="bf16")
    train(first, 2)
    first.save_checkpoint(str(tmp_path / "from memory"))
    second = _engine(tmp_path / "disk", precision="bf16", offload=PIPELINES[pipeline])
    second.load_checkpoint(str(tmp_path / "from memory"))
    train(second, 1, first=2)
    second.save_checkpoint(str(tmp_path / "from disk"))
    third = _engine(tmp_path / "disk", precision="bf16", offload=PIPELINES[pipeline])
    third.load_checkpoint(str(tmp_path / "from disk"))
    train(third, STEPS - 3, first=3)
    _same(third, whole)


def test_states_can_be_read_and_set(tmp_path: Path) -> None:
    engine = _engine(tmp_path, precision="bf16", offload={"pipeline_read": True, "pipeline_write": True})
    train(engine, 2)
    param = engine.module.first.weight
    twice = safe_get_full_optimizer_state(param, "exp_avg") * 2
    safe_set_full_optimizer_state(param, twice, "exp_avg")
    assert torch.equal(safe_get_full_optimizer_state(param, "exp_avg"), twice)
    safe_set_full_fp32_param(param, torch.full_like(twice, 0.3))
    assert torch.equal(safe_get_full_fp32_param(param), torch.full_like(twice, 0.3))
    assert torch.equal(param, torch.full_like(param, 0.3))


def test_a_write_that_fails_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "states").mkdir()
    engine = _engine(tmp_path / "states")
    train(engine, 1)
    home = engine.parts.masters.homes[-1]  # type: ignore[union-attr]

    def fails() -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(home._file, "drain", fails)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="no space"):
        engine.synchronize()
    with pytest.raises(HfZeroError, match="interrupted by an error"):
        engine.save_checkpoint(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    monkeypatch.undo()
    engine.destroy()


def test_optimizers_that_keep_their_states_themselves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="RAdam keeps its states itself"):
        _engine(tmp_path, optimizer=OptimizerSettings(type="RAdam", params={"lr": 0.1}))


def _ranks(path: Path) -> dict[Any, Any]:
    assembly.BUCKET_NUMEL, state_homes.STREAM_PIECE_NUMEL = 256, 128
    found = {}
    for where in ("memory", "nvme"):
        on_disk = {"device": "nvme", "nvme_path": str(path), "pipeline_read": True, "pipeline_write": True}
        offload = on_disk if where == "nvme" else "none"
        for stage in (1, 2):
            engine = make_engine(Tiny(), stage=stage, precision="bf16", offload=offload)
            for step in range(3):
                engine.backward(loss_of(engine, batch(step, torch.distributed.get_rank()).bfloat16()))
                engine.step()
            engine.synchronize()
            found[where, stage] = weights(engine.module)
        for params_on in ("none", "cpu"):
            options = {"states_on": "nvme", "offload": {"nvme_path": str(path)}} if where == "nvme" else {}
            sharded = stage3.engine_for(params_on=params_on, whole=25, **options)
            found[where, "stage 3", params_on] = stage3.train(sharded, 3)["weights"]  # whole on rank 0, empty elsewhere
    return found


@pytest.mark.slow
def test_two_ranks_at_every_stage_equal_states_in_memory(tmp_path: Path) -> None:
    for rank in run_ranks(_ranks, 2, tmp_path):
        for key in [key for key in rank if key[0] == "nvme"]:
            expected = rank[("memory", *key[1:])]
            for name, weight in rank[key].items():
                assert torch.equal(weight, expected[name]), (key, name)
