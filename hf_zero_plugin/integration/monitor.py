"""What a running training is asked about: time, tokens, arithmetic, memory. Nothing here waits for the device.

Tokens are counted from the shapes of the batches, padding included: that is what the device works on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

__all__ = ["PEAK_TFLOPS", "Monitor", "Usage", "peak_flops"]

GIB = 2**30

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Dense fp16 and bf16 matrix products with fp32 sums, TFLOP/s, from data sheets. More special names first."""
WITHOUT_BF16 = ("V100", "T4")


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a device by its name; None if it or its rate for ``dtype`` is not in the table."""
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    words = f" {device_name.replace('-', ' ')} "
    for name, tera in PEAK_TFLOPS.items():
        if f" {name} " in words:
            return None if name in WITHOUT_BF16 and dtype is torch.bfloat16 else tera * 1e12
    return None


@dataclass
class Usage:
    """Sums over some steps of this rank."""

    seconds: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    flops: float = 0.0
    num_updates: int = 0
    """Steps whose offloaded update was timed; the two that follow are sums over them."""
    hidden_share: float = 0.0
    wait_ms: float = 0.0

    def __iadd__(self, other: Usage) -> Usage:
        self.seconds += other.seconds
        self.num_steps += other.num_steps
        self.num_tokens += other.num_tokens
        self.flops += other.flops
        self.num_updates += other.num_updates
        self.hidden_share += other.hidden_share
        self.wait_ms += other.wait_ms
        return self


class Monitor:
    """Counts what ``model`` is trained on from ``attach`` to ``detach``; a step costs some microseconds."""

    def __init__(self) -> None:
        self.total = Usage()
        self._window = Usage()
        self._started: float | None = None
        self._handle: Any = None
        self._process = psutil.Process()
        self.peak: float | None = None
        self.is_cuda = False

    def attach(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, *, recomputes_forward: bool = False
    ) -> None:
        self.detach()
        self.total, self._window, self._started = Usage(), Usage(), None
        self._source, self._target = matmul_parameters(model)
        factor = 8.0 if recomputes_forward else 6.0
        self._flops_source, self._flops_target = factor * self._source, factor * self._target
        self.is_cuda = device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(device), dtype) if self.is_cuda else None
        self._handle = model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not model.training:
            return
        inputs = kwargs.get("input_ids", args[0] if args else None)
        labels = kwargs.get("labels")
        source = inputs.numel() if isinstance(inputs, Tensor) and inputs.ndim <= 2 else 0
        target = labels.numel() if self._target and isinstance(labels, Tensor) else 0
        self._window.num_tokens += source + target
        self._window.flops += self._flops_source * source + self._flops_target * target

    def step_begins(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def step_ends(self) -> None:
        """Count one step. Time between steps (data, logging) belongs to the next one."""
        now = time.perf_counter()
        self._window.seconds += now - (self._started if self._started is not None else now)
        self._window.num_steps += 1
        self._started = now

    def update_timed(self, hidden_share: float, wait_ms: float) -> None:
        """What the engine says of a step's offloaded update."""
        self._window.num_updates += 1
        self._window.hidden_share += hidden_share
        self._window.wait_ms += wait_ms

    def pause(self) -> None:
        """What follows until the next step is not training: evaluation, saving."""
        self._started = None

    def take_window(self) -> Usage:
        """What was counted since the last call."""
        window, self._window = self._window, Usage()
        self.total += window
        return window

    def utilisation(self, usage: Usage) -> float | None:
        """Share of the device's peak arithmetic in use: 6 FLOP a parameter and token, 8 with recomputed activations."""
        if self.peak is None or usage.seconds <= 0:
            return None
        return usage.flops / usage.seconds / self.peak

    def host_bytes(self) -> int:
        return int(self._process.memory_info().rss)


def matmul_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters that multiply each source token, and each target token (0 without a decoder of its own).

    Embedding tables are looked up, not multiplied, but for the output's; attention scores are left out.
    """
    tables = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and isinstance(module.weight, nn.Parameter)
    }

    def count(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters() if p.ndim > 1 and id(p) not in tables)

    find_head = getattr(model, "get_output_embeddings", None)
    head = getattr(find_head(), "weight", None) if callable(find_head) else None
    tied = head.numel() if isinstance(head, Tensor) and id(head) in tables else 0
    find_encoder = getattr(model, "get_encoder", None)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and callable(find_encoder):
        encoder = count(find_encoder())
        return encoder, count(model) + tied - encoder
    return count(model) + tied, 0
