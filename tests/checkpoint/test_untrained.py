"""Frozen weights go into a checkpoint one at a time, and out of it at any number of ranks; the file is as it was."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.shards import Shards
from tests.engine.stage3 import Net, engine_for, rank_and_size, train
from tests.engine.test_serving import LAYER_BYTES, _Deep, _peak_bytes
from tests.helpers import run_ranks

MODULE = "global_step1/zero_module.safetensors"


def _net(seed: int = 0) -> nn.Module:
    """All but the norms is frozen, and there is a buffer that no type of real numbers holds."""
    net = Net(seed=seed)
    for name, param in net.named_parameters():
        param.requires_grad_("norm" in name)
    net.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
    return net


def _engine(seed: int = 0, **options: Any) -> ZeroEngine:
    return engine_for(_net(seed), whole=12, **options)  # biases of 10 elements stay whole


def _frozen(engine: ZeroEngine) -> dict[str, Tensor]:
    """Whole, on every rank."""
    assert engine.parts.shards is not None
    engine.parts.reshard()
    by_name = engine.parts.shards.by_name
    params = {name: param for name, param in engine.module.named_parameters() if not param.requires_grad}
    tensors = {name: tensor.detach() for name, tensor in [*params.items(), *engine.module.named_buffers()]}
    return {n: engine.parts.shards.gather(by_name[n]) if n in by_name else t for n, t in tensors.items()}


@contextmanager
def _counting_whole_parameters() -> Iterator[dict[str, int]]:
    """``asked``: how often one was collected; ``at once``: most elements that were alive together; ``largest`` one."""
    seen = {"asked": 0, "at once": 0, "largest": 0}
    alive: list[weakref.ref[Tensor]] = []
    original = Shards.collect

    def collect(*args: Any) -> Tensor:
        whole = original(*args)
        alive.append(weakref.ref(whole))
        seen["asked"] += 1
        seen["at once"] = max(seen["at once"], sum(t.numel() for ref in alive if (t := ref()) is not None))
        seen["largest"] = max(seen["largest"], whole.numel())
        return whole

    Shards.collect = collect  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Shards.collect = original  # type: ignore[method-assign]


def _save(root: str) -> dict[str, Any]:
    rank, world_size = rank_and_size()
    engine = _engine()
    train(engine, 1)
    with _counting_whole_parameters() as seen:
        engine.save_checkpoint(root)
    frozen = _frozen(engine)
    if rank == 0:
        # All of it in memory, then one file: as checkpoints were written before.
        save_file({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in frozen.items()}, f"{root}/old")
    if world_size > 1:
        os.environ["LOCAL_RANK"] = "0"
        local = _engine(use_node_local_storage=True)
        train(local, 1)
        local.save_checkpoint(f"{root}/node{rank}")
    return {
        "seen": seen,
        "frozen": frozen,
        "cut": list(engine.parts.shards.by_name),
        "losses": train(engine, 2)["losses"],
    }


def _resume(root: str, goes_on: bool) -> dict[str, Any]:
    engine = _engine(seed=5)
    path, _ = engine.load_checkpoint(root)
    assert path is not None
    return {"frozen": _frozen(engine), "losses": train(engine, 2)["losses"] if goes_on else None}


@pytest.fixture(scope="module", params=[1, 2])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("untrained")
    return root, run_ranks(_save, request.param, str(root))


Saved = tuple[Path, list[dict[str, Any]]]


def test_one_whole_parameter_at_a_time_is_in_memory(saved: Saved) -> None:
    _, results = saved
    for rank, result in enumerate(results):
        frozen = [name for name in result["cut"] if name in result["frozen"]]
        assert len(frozen) > 5
        assert result["seen"]["asked"] == len(frozen)
        largest = max(result["frozen"][name].numel() for name in frozen) if rank == 0 else 0
        assert result["seen"]["largest"] == result["seen"]["at once"] == largest


def test_the_file_is_to_the_byte_the_one_that_was_written_from_memory(saved: Saved) -> None:
    """What reads the one reads the other; on storage of their own all nodes write it."""
    root, results = saved
    wanted = (root / "old").read_bytes()
    assert (root / MODULE).read_bytes() == wanted
    for node in range(len(results)) if len(results) > 1 else ():
        assert (root / f"node{node}" / MODULE).read_bytes() == wanted
    assert load_file(root / MODULE).keys() == results[0]["frozen"].keys()


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_frozen_weights_come_back_at_any_number_of_ranks(world_size: int, saved: Saved) -> None:
    root, results = saved
    goes_on = world_size == len(results)
    found = run_ranks(_resume, world_size, str(root), goes_on)
    for result in found:
        assert result["frozen"].keys() == results[0]["frozen"].keys()
        assert all(torch.equal(tensor, results[0]["frozen"][name]) for name, tensor in result["frozen"].items())
    assert not goes_on or [result["losses"] for result in found] == [result["losses"] for result in results]


def _save_deep(root: str) -> float:
    """In layers, of which the model has a dozen."""
    engine = engine_for(_Deep(), trains=False)
    engine.save_checkpoint(f"{root}/first")  # libraries that load at the first save are not its doing
    return _peak_bytes(lambda: engine.save_checkpoint(f"{root}/second")) / LAYER_BYTES


@pytest.mark.slow
def test_the_host_needs_room_for_one_layer_beside_the_shards(tmp_path: Path) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    first, second = run_ranks(_save_deep, 2, str(tmp_path), env={"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert json.loads((tmp_path / "second" / "global_step0" / "zero_state.json").read_text())["world_size"] == 2
    assert 0.8 < first < 1.5
    assert second < 0.3
