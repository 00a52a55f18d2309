"""How fast large downloads are, and how long one small one waits behind them, by how they are cut. Needs a GPU.

    python benchmarks/copy_queue.py

2 GB of page-locked memory are queued on a side stream, in copies of so many MB: with nothing between them, with a tiny
kernel after each, or each in the other one of two streams, after the one before. Uploads run meanwhile; the compute
stream is idle or multiplies matrices of a 3 B decoder. The waits are those of three ``tensor.item()`` in a row.
"""

from __future__ import annotations

import time
from typing import Any

import torch

DOWN_MB, UP_MB = 2048, 1024
CASES = (
    ("back to back", 64),
    ("kernels between", 64),
    ("kernels between", 128),
    ("kernels between", 256),
    ("two streams", 64),
    ("two streams", 32),
    ("two streams", 16),
)


def pinned(num_mb: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(num_mb * 2**20, dtype=torch.uint8, pin_memory=True),
        torch.empty(num_mb * 2**20, dtype=torch.uint8, device="cuda"),
    )


class Link:
    def __init__(self) -> None:
        self.down, self.up = pinned(DOWN_MB), pinned(UP_MB)
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        self.uploads = torch.cuda.Stream()
        self.tick = torch.zeros(1, device="cuda")
        self.number = torch.ones(1, device="cuda")
        self.left = torch.randn(16384, 3072, device="cuda", dtype=torch.bfloat16)
        self.right = torch.randn(3072, 8192, device="cuda", dtype=torch.bfloat16)

    def multiply(self, count: int) -> None:
        for _ in range(count):
            self.left @ self.right

    def upload(self) -> None:
        with torch.cuda.stream(self.uploads):
            host, device = self.up
            for to, part in zip(device.split(128 * 2**20), host.split(128 * 2**20)):
                to.copy_(part, non_blocking=True)

    def download(self, way: str, cut_mb: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Events before and after."""
        begun: Any = torch.cuda.Event(enable_timing=True)
        begun.record(self.streams[0])
        before = begun
        host, device = self.down
        for to, part in zip(host.split(cut_mb * 2**20), device.split(cut_mb * 2**20)):
            if way == "two streams":
                self.streams.reverse()
                self.streams[0].wait_event(before)
            with torch.cuda.stream(self.streams[0]):
                to.copy_(part, non_blocking=True)
                if way == "kernels between":
                    self.tick.zero_()
            if way == "two streams":
                before = self.streams[0].record_event()
        ended: Any = torch.cuda.Event(enable_timing=True)
        ended.record(self.streams[0])
        return begun, ended

    def rate(self, way: str, cut_mb: int, is_busy: bool) -> float:
        """GB/s."""
        torch.cuda.synchronize()
        self.multiply(90 if is_busy else 0)
        self.upload()
        begun, ended = self.download(way, cut_mb)
        torch.cuda.synchronize()
        return DOWN_MB * 2**20 / 1e6 / begun.elapsed_time(ended)

    def waits(self, way: str, cut_mb: int, is_busy: bool) -> list[float]:
        """Milliseconds."""
        torch.cuda.synchronize()
        self.multiply(4 if is_busy else 0)
        self.upload()
        self.download(way, cut_mb)
        time.sleep(0.006)
        found = []
        for _ in range(3):
            start = time.perf_counter()
            self.number.item()
            found.append(1000 * (time.perf_counter() - start))
        return found


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    link = Link()
    for is_busy in (False, True):
        for way, cut_mb in CASES:
            for _ in range(2):  # the second one is shown
                rate, waits = link.rate(way, cut_mb, is_busy), link.waits(way, cut_mb, is_busy)
            shown = ", ".join(f"{wait:.2f}" for wait in waits)
            beside = "matrix products" if is_busy else "nothing else"
            print(f"{beside:15} {way:15} {cut_mb:3} MB  {rate:4.1f} GB/s, item waits {shown} ms", flush=True)


if __name__ == "__main__":
    main()
