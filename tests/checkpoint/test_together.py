"""Two ranks save together, or nothing is saved: a rank that cannot write leaves nobody waiting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_zero_plugin.checkpoint import stream
from hf_zero_plugin.engine import checkpointing
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.errors import CheckpointError
from tests.engine.stage3 import Net, engine_for, train
from tests.helpers import run_ranks

PLACES = {
    "an update of rank 1": (1, ZeroEngine, "synchronize"),
    "a shard of rank 0": (0, checkpointing, "write_shard"),
    "a shard of rank 1": (1, checkpointing, "write_shard"),
    "frozen weights, after some": (0, stream, "_write"),
    "the state": (0, checkpointing, "_state"),
    "in its place": (0, checkpointing, "_put_in_place"),
}


def _fails(original: Callable[..., Any], after: int) -> Callable[..., Any]:
    calls: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise OSError("disk full")
        return original(*args, **kwargs)

    return call


def _saves(root: str) -> dict[str, Any]:
    engine = engine_for(Net(frozen=True), stage=3)
    train(engine, 1)
    engine.save_checkpoint(root)
    train(engine, 1, first=1)
    seen: dict[str, Any] = {}
    for name, (rank, module, function) in PLACES.items():
        original = getattr(module, function)
        if dist.get_rank() == rank:
            setattr(module, function, _fails(original, after=1 if function == "_write" else 0))
        try:
            engine.save_checkpoint(root)
        except (OSError, CheckpointError) as error:
            seen[name] = f"{type(error).__name__}: {error}"
        finally:
            setattr(module, function, original)
        dist.barrier()
        seen[f"{name}, then"] = sorted(path.name for path in Path(root).glob("global_step?"))
    weights = train(engine, 1, first=2)["weights"]
    engine.save_checkpoint(root)
    again = engine_for(Net(frozen=True, seed=5), stage=3)
    path, _ = again.load_checkpoint(root)
    same = again._zero3_consolidated_16bit_state_dict()
    seen["in the end"] = path, all(torch.equal(weights[name], tensor) for name, tensor in same.items())
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_saves, 2, str(tmp_path_factory.mktemp("saved")), timeout_s=120.0)


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_cannot_write_is_named_and_nothing_is_lost(place: str, ranks: list[dict[str, Any]]) -> None:
    failing = PLACES[place][0]
    assert ranks[failing][place] == "OSError: disk full"
    told = ranks[1 - failing][place]
    assert told.startswith("CheckpointError: save_checkpoint: ")
    assert f"rank {failing} (OSError: disk full) could not do its part" in told
    assert "nothing was saved" in told
    assert ranks[0][f"{place}, then"] == ["global_step1"]


def test_saving_works_again_afterwards(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        path, is_same = rank["in the end"]
        assert Path(path).name == "global_step3"
        assert is_same
