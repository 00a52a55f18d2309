"""The streamed safetensors file is, to the byte, the one that safetensors itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_zero_plugin.checkpoint.stream import stream_safetensors
from hf_zero_plugin.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
]


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {}
    for number, dtype in enumerate(DTYPES):
        found[f'z{number}.é"w'] = torch.randint(0, 2, (3, number)).to(dtype)  # the first one is empty
        found[f"a{number}"] = torch.randint(0, 2, ()).to(dtype)
    found["transposed"] = torch.randn(4, 5).T
    return found


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_equals_safetensors_to_the_byte(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = _tensors()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "wanted", metadata=metadata)
    stream_safetensors(tensors, tmp_path / "found", metadata)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["found", "wanted"]


def test_values_are_asked_for_one_at_a_time_in_the_order_of_the_file(tmp_path: Path) -> None:
    announced = {name: torch.empty(3, device="meta", dtype=torch.float16) for name in ("b", "a")}
    announced["wide"] = torch.empty(2, device="meta")
    asked: list[str] = []

    def values(tensor: Tensor) -> Tensor:
        asked.append(next(name for name, mine in announced.items() if mine is tensor))
        return torch.full(tensor.shape, len(asked), dtype=tensor.dtype)

    stream_safetensors(announced, tmp_path / "file", values=values)
    assert asked == ["wide", "a", "b"]
    assert {name: tensor[0].item() for name, tensor in load_file(tmp_path / "file").items()} == {
        "wide": 1.0,
        "a": 2.0,
        "b": 3.0,
    }


def test_a_tensor_that_is_not_what_was_announced_leaves_no_file(tmp_path: Path) -> None:
    announced = {"weight": torch.empty(3, device="meta")}
    with pytest.raises(CheckpointError, match=r"weight.*\(3,\).*\(2,\)"):
        stream_safetensors(announced, tmp_path / "file", values=lambda tensor: torch.zeros(2))
    with pytest.raises(CheckpointError, match="complex128"):
        stream_safetensors({"z": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
