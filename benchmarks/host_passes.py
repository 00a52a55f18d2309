"""What a host update would gain from one compiled kernel: the fused update alone against all passes over a piece.

    python benchmarks/host_passes.py | tee benchmarks/raw/host-passes.txt

A piece as ``offload_host.py`` updates it: widen the half-precision gradient, multiply, fused AdamW, narrow the weights.
A kernel that did it in one pass would move 32 bytes a parameter; the fused update alone moves 28 and needs the gradient
in fp32. Both in turns, on pieces that are larger than any cache, with all of torch's threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from limits import fused_adamw

NUMEL, PIECES, TURNS = 12 * 2**20, 4, 7


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    rows = [[torch.rand(NUMEL) for _ in range(3)] for _ in range(PIECES)]
    half = [torch.rand(NUMEL, dtype=torch.bfloat16) for _ in range(PIECES)]
    wide = torch.rand(NUMEL)

    def fused() -> None:
        for master, *moments in rows:
            fused_adamw(master, wide, *moments)

    def passes() -> None:
        for (master, *moments), grad in zip(rows, half):
            wide.copy_(grad).mul_(0.5)
            fused_adamw(master, wide, *moments)
            grad.copy_(master)

    fused(), passes()
    pairs = [(seconds(passes), seconds(fused)) for _ in range(TURNS)]
    ratios = sorted(one / other for one, other in pairs)
    per = 1e9 / (NUMEL * PIECES)
    alone, whole = (statistics.median(pair[at] for pair in pairs) * per for at in (1, 0))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {TURNS} turns")
    print(
        f"fused AdamW alone {alone:.2f} ns a parameter ({28 / alone:.0f} GB/s); with widening and narrowing {whole:.2f}"
    )
    print(f"all passes / fused alone: {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
