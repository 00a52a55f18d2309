"""``get_accelerator()``: the few questions that transformers asks about the device."""

from __future__ import annotations

import os

import torch

__all__ = ["Accelerator", "current_device", "get_accelerator"]


def current_device() -> torch.device:
    """The device of this rank: what accelerate has chosen, else the GPU of LOCAL_RANK, else the CPU."""
    from accelerate import PartialState

    if PartialState._shared_state:
        return torch.device(PartialState().device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


class Accelerator:
    def current_device_name(self) -> str:
        return str(current_device())

    def current_device(self) -> int | str:
        device = current_device()
        return device.index if device.index is not None else device.type

    def device_name(self, index: int | None = None) -> str:
        kind = current_device().type
        return kind if index is None or kind == "cpu" else f"{kind}:{index}"

    def communication_backend_name(self) -> str:
        return "nccl" if current_device().type == "cuda" else "gloo"

    def device_count(self) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 1

    def is_available(self) -> bool:
        return True

    def empty_cache(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


_accelerator = Accelerator()


def get_accelerator() -> Accelerator:
    return _accelerator
