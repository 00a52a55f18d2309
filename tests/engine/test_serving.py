"""Saving at stage 3 gathers one parameter at a time, in the order in which the file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_zero_plugin.checkpoint.export import save_weights
from hf_zero_plugin.engine.pending import Pending, values_of
from hf_zero_plugin.errors import HfZeroError
from tests.helpers import run_ranks

from .stage3 import Net, engine_for, rank_and_size, train

WIDTH, DEPTH = 2048, 12
LAYER_BYTES = WIDTH * WIDTH * 4


def _pending(tensor: Tensor, asked: list[int] | None = None) -> Tensor:
    def fetch() -> Tensor:
        if asked is not None:
            asked.append(1)
        return tensor

    return Pending.of(tensor.shape, tensor.dtype, fetch)


def test_what_is_computed_from_pending_tensors_is_pending() -> None:
    asked: list[int] = []
    real = torch.arange(24.0).view(4, 6)
    tensor = _pending(real, asked)
    top, bottom = tensor.chunk(2)
    result = torch.cat([bottom, top]).T.contiguous().to(torch.bfloat16)
    assert (result.shape, result.dtype, result.device.type) == ((6, 4), torch.bfloat16, "meta")
    assert top.untyped_storage().nbytes() == 48  # of its own, not of what it was cut from
    assert tensor.contiguous() is tensor
    assert tensor[1:].numel() == 18
    assert not asked
    torch.testing.assert_close(values_of(result), torch.cat([real[2:], real[:2]]).T.bfloat16())
    with pytest.raises(HfZeroError, match="in place"):
        tensor.mul_(2)


def _save_whole_and_streamed(root: str) -> dict[str, Any]:
    rank, _ = rank_and_size()
    engine = engine_for(whole=25, frozen=True)
    train(engine, 1)
    whole = engine._zero3_consolidated_16bit_state_dict()
    if rank == 0:
        save_weights(whole, root, "whole.safetensors")
    engine.save_16bit_model(root, "streamed.safetensors")

    with engine.streamed_saving():
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        names = list(state)
        late = state.get("embed.weight")
        tied = rank != 0 or state["head.weight"] is late
        if rank == 0:
            # Twice, in an order of rank 0's own, and not all of them.
            order = [*reversed(list(state.values()))][::2] * 2
            assert all(values_of(tensor).shape == tensor.shape for tensor in order)
            engine.end_saving()
            engine.end_saving()
    if rank == 0:
        with pytest.raises(HfZeroError, match="asked for after"):
            values_of(late)
    try:
        with engine.streamed_saving():
            engine._zero3_consolidated_16bit_state_dict()
            if rank == 0:
                raise KeyError
    except KeyError:
        pass  # the others were let go
    return {"names": names, "tied": tied, "trains on": train(engine, 1)["losses"]}


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_file_equals_the_gathered_one(world_size: int, tmp_path: Path) -> None:
    results = run_ranks(_save_whole_and_streamed, world_size, str(tmp_path))
    assert (tmp_path / "streamed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    frozen = {name for name, param in Net(frozen=True).named_parameters() if not param.requires_grad}
    assert set(results[0]["names"]) == set(Net().state_dict()) - frozen
    assert results[0]["tied"]
    if world_size == 2:
        assert results[1]["names"] == []


class _Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _peak_bytes(save: Any) -> int:
    """Most host memory that ``save`` had on top of what was there before."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    save()
    return _status("VmHWM") - before


def _peaks(root: str) -> dict[str, float]:
    """In layers."""
    engine = engine_for(_Deep(), trains=False)
    state: dict[str, Tensor] = {}
    engine.save_16bit_model(root)  # libraries that load with the first saving are not its doing
    peaks = {
        "streamed": _peak_bytes(lambda: engine.save_16bit_model(root)),
        "gathered": _peak_bytes(lambda: state.update(engine._zero3_consolidated_16bit_state_dict())),
    }
    return {what: peak / LAYER_BYTES for what, peak in peaks.items()}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_saving_takes_no_more_host_memory_than_a_layer(world_size: int, tmp_path: Path) -> None:
    """Of 12, on the rank that writes; the others, whose device the host is here, hold what is on its way."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    # Large blocks go back to the system when they are freed, so that the heap's holes are not counted.
    peaks, *others = run_ranks(_peaks, world_size, str(tmp_path), env={"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert peaks["gathered"] > 0.8 * DEPTH
    assert 0.8 < peaks["streamed"] < 1.3
    for other in others:
        assert max(other.values()) < 0.3
    assert len(load_file(tmp_path / "model.safetensors")) == DEPTH
