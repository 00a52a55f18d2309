"""The GPU's share of a step: forward and backward of the same model on the same batches, in half precision, no update.

Two figures. ``step_ms``: between CUDA events around forward and backward, so with the gaps in which the GPU waits for
launches. ``gpu_busy_ms``: the union of the kernels' intervals as the profiler saw them, without gaps and without copies
between host and device: what no launching, however fast, can undercut. The table's limit uses the second.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any


def measure(model: Any, batches: list[Any], *, accumulation: int, steps: int, warmup: int) -> dict[str, Any]:
    """Times of ``steps`` steps of ``accumulation`` batches each, in milliseconds.

    Args:
        batches: dicts of tensors on the model's device, taken in turn.
    """
    import torch

    cuda = next(model.parameters()).is_cuda
    model.train()
    place = 0

    def step() -> float:
        nonlocal place
        model.zero_grad(set_to_none=True)
        loss = None
        for _ in range(accumulation):
            loss = model(**batches[place % len(batches)]).loss
            (loss / accumulation).backward()
            place += 1
        return loss

    stamps = []
    for _ in range(warmup + steps):
        start = _mark(cuda)
        loss = step()
        stamps.append((start, _mark(cuda)))
    if cuda:
        torch.cuda.synchronize()
    found: dict[str, Any] = {
        "step_ms": [round(_between(*pair), 2) for pair in stamps[warmup:]],
        "loss": float(loss.detach()),
    }
    if cuda:
        from torch.profiler import ProfilerActivity, profile

        profiled = min(3, steps)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(profiled):
                step()
            torch.cuda.synchronize()
        found["gpu_busy_ms"] = busy_us(seen.events()) / 1000 / profiled
    return found


def _mark(cuda: bool) -> Any:
    import torch

    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def busy_us(events: Iterable[Any]) -> float:
    """Microseconds in which at least one kernel ran."""
    import torch

    on_device = torch.autograd.DeviceType.CUDA
    crossing = ("Memcpy HtoD", "Memcpy DtoH")
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == on_device and not event.name.startswith(crossing)
    )
    return union_length(spans)


def union_length(spans: Iterable[tuple[float, float]]) -> float:
    """Length covered by intervals that come in the order of their starts."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
