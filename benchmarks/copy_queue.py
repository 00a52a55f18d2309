"""How long one small copy waits while large ones are queued on another stream. Needs a GPU.

    python benchmarks/copy_queue.py

A backlog of 1.3 GB is queued on a side stream, in one direction, cut into copies of so many MB, with or without a tiny
kernel after each. Meanwhile the compute stream reads one number (``item``) or uploads 4 KB (``upload``), three times.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

TOTAL_MB = 1300


def queue(host: Tensor, device: Tensor, direction: str, chunk_mb: int, tick: Tensor | None) -> None:
    chunk = chunk_mb * 2**20 // 4
    for start in range(0, host.numel(), chunk):
        there, here = device[start : start + chunk], host[start : start + chunk]
        (here if direction == "download" else there).copy_(
            there if direction == "download" else here, non_blocking=True
        )
        if tick is not None:
            tick.zero_()


def probe(what: str, number: Tensor, small: Tensor, target: Tensor) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    if what == "item":
        number.item()
    else:
        target.copy_(small, non_blocking=True)
        torch.cuda.current_stream().synchronize()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    numel = TOTAL_MB * 2**20 // 4
    host, device = torch.empty(numel, pin_memory=True), torch.empty(numel, device="cuda")
    number, tick = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    small, target = torch.ones(1024, pin_memory=True), torch.empty(1024, device="cuda")
    side = torch.cuda.Stream()
    print(torch.cuda.get_device_name(), torch.__version__)
    for direction in ("download", "upload"):
        for what in ("item", "upload"):
            for chunk_mb in (100, 25, 5):
                for kernels in (False, True):
                    for _ in range(3):  # the last one is shown
                        torch.cuda.synchronize()
                        with torch.cuda.stream(side):
                            queue(host, device, direction, chunk_mb, tick if kernels else None)
                        time.sleep(0.004)
                        waits = [probe(what, number, small, target) for _ in range(3)]
                    shown = ", ".join(f"{wait:.2f}" for wait in waits)
                    between = "kernels between" if kernels else "back to back"
                    print(f"backlog {direction:8} {chunk_mb:3} MB {between:15} {what:6} waits {shown} ms", flush=True)


if __name__ == "__main__":
    main()
