"""How fast large copies are, and how long small ones wait behind them, by how they are cut. Needs a GPU.

    python benchmarks/copy_queue.py

2 GB of page-locked memory are queued each way on side streams, in copies of so many MiB: with nothing between them,
with a tiny kernel after each, or each in the other one of two streams, after the one before. The compute stream is idle
or multiplies matrices of a 3 B decoder. Waits are those of three ``tensor.item()`` in a row, or of three batches of 100
kB in page-locked memory that go to the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

TOTAL_MB = 2048
CASES = (
    ("back to back", 64),
    ("kernels between", 64),
    ("kernels between", 128),
    ("kernels between", 256),
    ("two streams", 128),
    ("two streams", 64),
    ("two streams", 32),
    ("two streams", 16),
)


class Direction:
    """Copies of one direction of the link."""

    def __init__(self, *, is_up: bool) -> None:
        host = torch.empty(TOTAL_MB * 2**20, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(TOTAL_MB * 2**20, dtype=torch.uint8, device="cuda")
        self.target, self.source = (device, host) if is_up else (host, device)
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        self.tick = torch.zeros(1, device="cuda")

    def queue(self, way: str, cut_mb: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Events before and after."""
        begun: Any = torch.cuda.Event(enable_timing=True)
        begun.record(self.streams[0])
        before = begun
        for to, part in zip(self.target.split(cut_mb * 2**20), self.source.split(cut_mb * 2**20)):
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


class Link:
    def __init__(self) -> None:
        self.up, self.down = Direction(is_up=True), Direction(is_up=False)
        self.number = torch.ones(1, device="cuda")
        self.batch = torch.ones(12_500, dtype=torch.int64, pin_memory=True)
        self.left = torch.randn(16384, 3072, device="cuda", dtype=torch.bfloat16)
        self.right = torch.randn(3072, 8192, device="cuda", dtype=torch.bfloat16)

    def multiply(self, count: int) -> None:
        for _ in range(count):
            self.left @ self.right

    def rates(self, way: str, cut_mb: int, is_busy: bool) -> list[float]:
        """GB/s up and down, at once."""
        torch.cuda.synchronize()
        self.multiply(90 if is_busy else 0)
        spans = [direction.queue(way, cut_mb) for direction in (self.up, self.down)]
        torch.cuda.synchronize()
        return [TOTAL_MB * 2**20 / 1e6 / begun.elapsed_time(ended) for begun, ended in spans]

    def waits(self, way: str, cut_mb: int, is_busy: bool, small: Callable[[], object]) -> list[float]:
        """Milliseconds that three small copies take."""
        torch.cuda.synchronize()
        self.multiply(4 if is_busy else 0)
        for direction in (self.up, self.down):
            direction.queue(way, cut_mb)
        time.sleep(0.006)
        found = []
        for _ in range(3):
            start = time.perf_counter()
            small()
            found.append(1000 * (time.perf_counter() - start))
        return found

    def read(self) -> object:
        return self.number.item()

    def send(self) -> object:
        return self.batch.to("cuda")


def shown(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    link = Link()
    for is_busy in (False, True):
        for way, cut_mb in CASES:
            for _ in range(2):  # the second one is shown
                rates = link.rates(way, cut_mb, is_busy)
                reads, batches = (link.waits(way, cut_mb, is_busy, small) for small in (link.read, link.send))
            beside = "matrix products" if is_busy else "nothing else"
            print(
                f"{beside:15} {way:15} {cut_mb:3} MB  up, down {shown(rates, 1)} GB/s, "
                f"item waits {shown(reads, 2)} ms, batch {shown(batches, 2)} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
