"""The accelerators and processor cores that this machine gives us, asked for without importing torch here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from hf_zero_plugin.errors import LaunchError

__all__ = [
    "VISIBLE_VARIABLE",
    "count_visible_gpus",
    "visible_value",
]

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"

# One of these exists wherever a CUDA or ROCm driver is loaded (WSL has only the last).
_DRIVER_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
_PROBE = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
_PROBE_TIMEOUT_S = 120


def count_visible_gpus() -> int:
    """How many GPUs torch can use here, CUDA_VISIBLE_DEVICES respected.

    torch is the authority (driver too old, CPU build, MIG slices), but it is asked in a child process: asking here
    could fix CUDA_VISIBLE_DEVICES for good. Without a driver the answer is 0 and costs nothing.

    Raises:
        LaunchError: there is a driver, but torch could not be asked.
    """
    if not any(Path(node).exists() for node in _DRIVER_NODES):
        return 0
    if os.environ.get(VISIBLE_VARIABLE, "0").strip() in ("", "-1"):
        return 0
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True
        )
        return int(probe.stdout.split()[-1])
    except subprocess.CalledProcessError as error:
        last_line = (error.stderr.strip().splitlines() or ["no output"])[-1]
        raise LaunchError(f"torch cannot be imported to count the GPUs: {last_line}. See hf-zero doctor.") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"torch did not count the GPUs within {_PROBE_TIMEOUT_S} s: the driver hangs. Check nvidia-smi, or "
            f"set {VISIBLE_VARIABLE}= to run on CPU."
        ) from error


def visible_value(environ: Mapping[str, str], num_visible: int, indices: tuple[int, ...]) -> str | None:
    """The CUDA_VISIBLE_DEVICES that shows only ``indices``, which count the visible GPUs; None: leave it alone.

    Entries that are there already are kept as they are written, for they may be UUIDs: with ``GPU-a,GPU-b`` visible,
    index 1 is ``GPU-b``.
    """
    if indices == tuple(range(num_visible)):
        return None
    value = environ.get(VISIBLE_VARIABLE)
    entries = [str(i) for i in range(num_visible)] if value is None else [e.strip() for e in value.split(",")]
    return ",".join(entries[index] for index in indices)
