"""What ZeroCallback costs a step, on the stock Trainer and on the engine.

    python benchmarks/callback_cost.py --out callback.jsonl [--cell t5-small:bf16:8] [--pairs 100]

In one training it is switched off and on every few steps (off on, on off, ...), the engine's time-line with it: runs
beside each other differ by more than it costs. Two figures, because they err in different ways. The median over
neighbours of on / off holds everything; its interval says how well it is known (95 %, by order statistics). The time
inside the callback's own methods holds no noise, and nothing outside of them. Target: below 1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run import parse_cells
from serving import appending

METHODS = ("on_step_begin", "on_step_end", "on_log")
WARMUP = 10
BLOCK_STEPS = 5
"""Of which the first, in which the switch is thrown, is not counted."""


class Watched:
    """A ZeroCallback that can be switched off, with all that it has started."""

    def __init__(self) -> None:
        from hf_zero_plugin.integration.callback import ZeroCallback

        self.callback = ZeroCallback(show_summary=False)
        self.seconds_inside = 0.0
        self.num_steps = 0
        self.is_on = True
        self._methods = {name: self._timed(getattr(self.callback, name)) for name in METHODS}
        monitor: Any = self.callback._monitor
        monitor._on_forward = self._timed(monitor._on_forward)
        self._hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = []

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds_inside += time.perf_counter() - begun

        return call

    def switch(self, on: bool) -> None:
        self.is_on = on
        for name, method in self._methods.items():
            setattr(self.callback, name, method if on else lambda *_, **__: None)
        engine: Any = self.callback._engine
        if engine is None:
            return
        if not self._hooks:
            self._timeline = engine.timeline
            self._hooks = [(hooks, dict(hooks)) for hooks in (engine._forward_pre_hooks, engine._forward_hooks)]
        timeline = self._timeline if on else None
        engine.timeline = engine.parts.masters._timeline = timeline
        for home in engine.parts.masters.homes:
            home.timeline = timeline
        for hooks, kept in self._hooks:
            hooks.clear()
            hooks.update(kept if on else {})


def measure(engine: str, job: dict[str, Any], num_pairs: int) -> dict[str, Any]:
    from cell import build_parser, prepare

    prepare(engine)
    import torch
    from transformers import TrainerCallback
    from trial import make_trainer

    watched = Watched()
    stamps: list[float] = []

    class Switch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())
            block, place = divmod(len(stamps) - WARMUP, BLOCK_STEPS)
            watched.num_steps += watched.is_on
            if block >= 0 and place == 0:
                watched.switch(block % 4 in (1, 2))

    full = {**job, "turns": 0, "losses": 0, "steps": WARMUP + 2 * num_pairs * BLOCK_STEPS}
    options = argparse.Namespace(**{**vars(build_parser().parse_args(["--engine", engine])), **full})
    trainer = make_trainer(options, torch.cuda.is_available())[0]
    trainer.add_callback(watched.callback)
    trainer.add_callback(Switch())
    trainer.train()
    blocks = [stamps[start : start + BLOCK_STEPS + 1] for start in range(WARMUP - 1, len(stamps) - 1, BLOCK_STEPS)]
    block_ms = [1000 * (block[-1] - block[1]) / (len(block) - 2) for block in blocks]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {**job, "engine": engine, "device": device, "torch": torch.__version__} | compare(block_ms, watched)


def compare(block_ms: list[float], watched: Watched) -> dict[str, Any]:
    """``block_ms``: off, on, on, off, off, on, on ...: milliseconds a step."""
    pairs = [(one, two) if place % 2 == 0 else (two, one) for place, (one, two) in enumerate(_neighbours(block_ms))]
    percents = sorted(100 * (on / off - 1) for off, on in pairs)
    reach = 0.98 * math.sqrt(len(percents))
    low, high = (percents[round(len(percents) / 2 + side * reach)] for side in (-1, 1))
    without = statistics.median(off for off, _ in pairs)
    inside_us = 1e6 * watched.seconds_inside / watched.num_steps
    return {
        "step_ms": round(without, 2),
        "difference_percent": round(statistics.median(percents), 2),
        "interval_percent": [round(low, 2), round(high, 2)],
        "inside_us_per_step": round(inside_us, 1),
        "inside_percent": round(inside_us / 10 / without, 3),
        "block_ms": [round(ms, 3) for ms in block_ms],
    }


def _neighbours(values: list[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", default="t5-small:bf16:8", help="as run.py's, without engines")
    parser.add_argument("--pairs", type=int, default=100, help="10 at least")
    parser.add_argument("--engine", choices=["plain", "ours"], help="this one alone, in this process")
    args = parser.parse_args()
    try:
        ((job, _), *_) = parse_cells([args.cell], "plain")
    except ValueError as error:
        parser.error(str(error))
    if args.pairs < 10:
        parser.error("--pairs must be 10 or more")
    if args.engine is None:
        for engine in ("plain", "ours"):
            subprocess.run([sys.executable, *sys.argv, "--engine", engine], check=True)
        return
    found = measure(args.engine, job, args.pairs)
    with appending(args.out) as keep:
        keep({"callback_cost": found})
    print(json.dumps({name: value for name, value in found.items() if name != "block_ms"}), flush=True)


if __name__ == "__main__":
    main()
