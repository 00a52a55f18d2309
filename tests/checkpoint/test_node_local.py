"""``checkpoint.use_node_local_storage``: every node keeps its own part, and resumes from it."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from hf_zero_plugin.errors import CheckpointError
from tests.engine.harness import Tiny, batch, loss_of, make_engine
from tests.helpers import run_ranks


def _steps(engine, first: int, last: int) -> None:
    for step in range(first, last):
        engine.backward(loss_of(engine, batch(step, dist.get_rank())))
        engine.step()


def _two_nodes(root: str, stage: int) -> tuple[bool, list[str], str]:
    """Two ranks that see different folders: each is the first of its node."""
    os.environ["LOCAL_RANK"] = "0"
    here = f"{root}/node{dist.get_rank()}"
    options = {"stage": stage, "use_node_local_storage": True}
    straight, first, second = (make_engine(Tiny(), **options) for _ in range(3))
    _steps(straight, 0, 5)
    _steps(first, 0, 3)
    first.save_checkpoint(here)
    path, _ = second.load_checkpoint(here)
    _steps(second, 3, 5)
    assert path is not None
    equal = all(torch.equal(a, b) for a, b in zip(second.module.parameters(), straight.module.parameters()))
    files = sorted(os.listdir(path))
    message = ""
    if stage:
        other = make_engine(Tiny(), stage=stage)  # expects one folder for all ranks
        try:
            other.load_checkpoint(here)
        except CheckpointError as error:
            message = str(error)
    return equal, files, message


@pytest.mark.parametrize("stage", [0, 2])
def test_each_node_resumes_from_its_own_folder_to_the_bit(tmp_path, stage: int) -> None:
    results = run_ranks(_two_nodes, 2, str(tmp_path), stage)
    for rank, (equal, files, message) in enumerate(results):
        assert equal
        shard = f"zero_shard_{rank if stage else 0:05d}_of_0000{2 if stage else 1}_0000.safetensors"
        assert {"zero_state.json", "zero_client.pt", "zero_module.safetensors", shard} == set(files)
        assert not stage or f"the files of rank [{1 - rank}] are not here" in message
