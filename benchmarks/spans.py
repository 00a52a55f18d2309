"""What a span of timed steps comes to: the fields that every clock reports."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import psutil


def describe_span(stamps: Sequence[float], end: float, processor_before: Any) -> dict[str, Any]:
    """Times of the steps between ``stamps``, the mean up to ``end`` (seconds), and the cores busy meanwhile.

    Args:
        processor_before: ``psutil.Process().cpu_times()`` at the first stamp.
    """
    after, elapsed = psutil.Process().cpu_times(), end - stamps[0]
    steps_ms = [1000 * (b - a) for a, b in itertools.pairwise(stamps)]
    busy = after.user + after.system - processor_before.user - processor_before.system
    return {
        "steps": len(steps_ms),
        "step_ms_median": statistics.median(steps_ms),
        "step_ms_mean": 1000 * elapsed / len(steps_ms),
        "step_ms": [round(ms, 2) for ms in steps_ms],
        "cpu_seconds_per_second": busy / elapsed,
    }


def describe_peaks(peak_before: int) -> dict[str, int]:
    """Device memory since the statistics were reset; ``peak_before`` is what was allocated at most until then."""
    import torch

    peak = torch.cuda.max_memory_allocated()
    return {
        "peak_allocated": peak,
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "peak_allocated_whole_run": max(peak_before, peak),
    }
