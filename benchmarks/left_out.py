"""What do parts of our step cost? The same cell with parts left out, in turns, and where the host's time goes.

    python benchmarks/left_out.py --out left-out.jsonl --cells t5-base:bf16:8 t5-base:fp16:1,8 \\
        --specs plain ours-device ours ours-copies ours-clamps

A spec is an engine, or "ours" less some of these, which makes its results wrong and its time telling:

    uploads, downloads, copies   states are not moved between host and device
    updates                      weights and states stay as they are; in fp16, copies are left out with updates only
    clamps                       T5 in fp16 does not guard its hidden states against overflow

Phases are milliseconds of host time a step, nested ones counted in the outer ones too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import ENGINES, library_of
from run import parse_cells
from serving import Pool, Surroundings, appending

PARTS = ("uploads", "downloads", "copies", "updates", "clamps")
_milliseconds: dict[str, float] = defaultdict(float)


def split_spec(spec: str) -> tuple[str, set[str]]:
    """Engine, and what is left out.

    Raises:
        ValueError: no such engine or part.
    """
    if spec in ENGINES:
        return spec, set()
    engine, *parts = spec.split("-")
    if engine != "ours" or not set(parts) <= set(PARTS):
        raise ValueError(f"{spec!r}: expected one of {', '.join(ENGINES)}, or ours less any of {', '.join(PARTS)}")
    return engine, set(parts) | ({"uploads", "downloads"} if "copies" in parts else set())


# ---------------------------------------------------------------- one process


def timed(owner: Any, name: str, phase: str) -> None:
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            _milliseconds[phase] += 1000 * (time.perf_counter() - begun)

    setattr(owner, name, call)


def time_phases(engine: str) -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer

    timed(Trainer, "training_step", "training_step")
    timed(Trainer, "compute_loss", "forward")
    timed(Trainer, "get_batch_samples", "batches")
    timed(Accelerator, "backward", "backward and step")
    timed(Accelerator, "clip_grad_norm_", "clip")
    timed(AcceleratedOptimizer, "step", "optimizer")
    if library_of(engine) == "ours":
        from hf_zero_plugin.engine import engine as of_engine
        from hf_zero_plugin.engine.master_weights import MasterWeights

        timed(of_engine.ZeroEngine, "step", "step")
        timed(of_engine, "grad_stats", "norm")
        timed(MasterWeights, "step", "update")
        timed(MasterWeights, "launch_rest", "rest")
        timed(MasterWeights, "wait", "wait")
        timed(MasterWeights, "prefetch_if_due", "prefetch")


def leave_out(parts: set[str]) -> None:
    from hf_zero_plugin.engine.offload_stream import StreamedHome

    def nothing(*_: Any) -> None:
        return None

    def over_when_ready(home: Any, index: int, buffer: Any, *after: Any) -> Any:
        return after[0]

    for part, method, replacement in (
        ("uploads", "_upload", over_when_ready),
        ("downloads", "_download", over_when_ready),
        ("updates", "_update", nothing),
    ):
        if part in parts:
            setattr(StreamedHome, method, replacement)
    if "clamps" in parts:
        from transformers.models.t5 import modeling_t5

        modeling_t5.torch = TorchWithoutClamps()


class TorchWithoutClamps:
    """``torch`` as T5's modelling code sees it, blind for infinite values and without the clamp that follows them."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def isinf(self, _: Any) -> TorchWithoutClamps:
        return self

    def any(self) -> TorchWithoutClamps:
        return self

    def where(self, condition: Any, left: Any, right: Any) -> Any:
        import torch

        return right if condition is self else torch.where(condition, left, right)

    def clamp(self, values: Any, min: Any = None, max: Any = None) -> Any:
        import torch

        return values if isinstance(max, float) and max > 6e4 else torch.clamp(values, min=min, max=max)


def watch_steps(per_step: dict[str, list[float]]) -> Callable[[Any], None]:
    """A step's end that files away what its phases took, if the step is timed."""
    from turns import TurnClock

    original = TurnClock.on_step_end

    def on_step_end(clock: TurnClock) -> None:
        if clock.times_step(clock.num_steps + 1):
            for phase, spent in _milliseconds.items():
                per_step[phase].append(spent)
        _milliseconds.clear()
        original(clock)

    return on_step_end


def serve(spec: str) -> None:
    from cell import build_parser, prepare, run_cell
    from turns import TurnClock

    engine, parts = split_spec(spec)
    prepare(engine)
    time_phases(engine)
    leave_out(parts)
    per_step: dict[str, list[float]] = defaultdict(list)
    TurnClock.on_step_end = watch_steps(per_step)  # type: ignore[assignment, method-assign]
    print("READY", flush=True)
    for line in sys.stdin:
        job = argparse.Namespace(**{**vars(build_parser().parse_args(["--engine", engine])), **json.loads(line)})
        per_step.clear()
        result = run_cell(job, False, 0)
        result["phases_ms"] = {phase: round(statistics.median(spent), 2) for phase, spent in per_step.items()}
        print("RESULT " + json.dumps(result), flush=True)


# ---------------------------------------------------------------- all of them


def describe(result: dict[str, Any], base: dict[str, Any]) -> str:
    if "turns" not in result:
        return f"FAILED: {result.get('failed') or result.get('error')}"
    pairs = zip(result["turns"], base.get("turns", []))
    ratios = [one["step_ms_median"] / other["step_ms_median"] for one, other in pairs]
    shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
    phases = " ".join(f"{phase} {ms:.1f}" for phase, ms in result["phases_ms"].items())
    return f"{result['step_ms_median']:7.1f} ms  {shown}  {phases}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cells", nargs="+", default=["t5-base:bf16:8"], help="as run.py's, without engines")
    parser.add_argument("--specs", nargs="+", default=["plain", "ours-device", "ours", "ours-copies"])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=180, help="seconds to load, and for one turn")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.engine)
        return
    if args.out is None:
        parser.error("--out is missing")
    args.specs = list(dict.fromkeys(args.specs))
    try:
        jobs = [job for job, _ in parse_cells(args.cells, "plain")]
        for spec in args.specs:
            split_spec(spec)
    except ValueError as error:
        parser.error(str(error))
    around = Surroundings(args.out.with_suffix(".log"), script=Path(__file__).resolve())
    with appending(args.out) as keep, Pool(around, args.timeout) as pool:
        for job in jobs:
            results = dict(pool.run_in_turns(args.specs, {**job, "turns": args.turns}, args.timeout))
            for spec in args.specs:
                keep({"spec": spec, **results[spec]})
                print(f"{job['model']} {job['precision']} {job['batch']} {spec:16} ", end="")
                print(describe(results[spec], results[args.specs[0]]), flush=True)


if __name__ == "__main__":
    main()
