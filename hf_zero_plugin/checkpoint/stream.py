"""Writing one safetensors file tensor by tensor, so that no more than one of them is in memory.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, the header with the
type, shape and place of every tensor, then the tensors' bytes. Sizes are known beforehand, so the header goes first
and the values follow as they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hf_zero_plugin.errors import CheckpointError

__all__ = ["order_in_file", "stream_safetensors"]

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}
"""safetensors lays the last of these first: wide types, so that everything is aligned."""


def order_in_file(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order in which their values are asked for and written.

    Raises:
        CheckpointError: a tensor's type has no name in the format.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name!r} is of type {tensor.dtype}, which safetensors does not store.")
    return sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))


def stream_safetensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    values: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Write ``path`` as ``safetensors.torch.save_file`` would, to the byte.

    Args:
        tensors: by name; only shapes and types are looked at before a tensor's turn comes.
        values: gives the tensor to write, on any device; called once per name, in the order of the file.

    Raises:
        CheckpointError: a tensor's type has no name in the format, or its values are not what was announced.
    """
    order = order_in_file(tensors)
    aside = Path(f"{os.fspath(path)}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(_header(tensors, order, metadata))
            for name in order:
                _write(file, name, tensors[name], values(tensors[name]))
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _header(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, name: str, announced: Tensor, values: Tensor) -> None:
    if values.shape != announced.shape or values.dtype != announced.dtype:
        raise CheckpointError(
            f"{name!r} was to be {announced.dtype} {tuple(announced.shape)} and is {values.dtype} "
            f"{tuple(values.shape)}: the model has changed while it was saved."
        )
    if values.numel():
        file.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
