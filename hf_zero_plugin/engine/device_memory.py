"""What a GPU has, and what this process has of it."""

from __future__ import annotations

import torch

__all__ = ["allocated_bytes", "capacity_bytes"]


def allocated_bytes(device: torch.device) -> int:
    """``torch.cuda.memory_allocated`` without sorting a hundred other numbers: it is asked a dozen times a step."""
    return int(torch._C._cuda_memoryStats(device.index)["allocated_bytes"]["all"]["current"])


def capacity_bytes(device: torch.device) -> int:
    """All of the GPU's memory, or the part that ``set_per_process_memory_fraction`` leaves this process."""
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return int(fraction * total)
