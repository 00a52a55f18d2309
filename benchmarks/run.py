"""Run cells in turn (A B A B ...), each in its own process with a time-out; append raw JSON lines to a file.

    python benchmarks/run.py --out raw.jsonl --rounds 3 --engines plain,ours,deepspeed \
        --models t5-small,t5-base --precisions fp16,bf16 --batches 1,8,64,256

Every line carries the round, so that ``table.py`` can compare engines within a round: a shared machine drifts between
rounds, and only ratios taken in turn mean anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

CELL = Path(__file__).with_name("cell.py")
LIMITS = Path(__file__).with_name("limits.py")


def run_cell(options: list[str], timeout: float) -> tuple[list[dict], str]:
    """One process; returns its results and, if it failed, why."""
    try:
        done = subprocess.run(
            [sys.executable, str(CELL), *options], capture_output=True, text=True, timeout=timeout, check=False
        )
        output, reason = done.stdout, "" if done.returncode == 0 else (done.stderr or done.stdout)[-600:]
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        output = raw.decode() if isinstance(raw, bytes) else raw
        reason = f"stopped after {timeout:.0f} s"
    results = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT ")]
    return results, reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="plain,ours")
    parser.add_argument("--models", default="t5-base")
    parser.add_argument("--precisions", default="fp16")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--timeout", type=float, default=90)
    parser.add_argument("--budget", type=float, default=10**6, help="start no cell after this many seconds")
    args, passed_on = parser.parse_known_args()
    start = time.time()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        limits = subprocess.run([sys.executable, str(LIMITS)], capture_output=True, text=True, check=False).stdout
        for line in limits.splitlines():
            if line.startswith("LIMITS "):
                file.write(json.dumps({"limits": json.loads(line[7:])}) + "\n")
                print(line, flush=True)
        for number in range(args.rounds):
            for model in args.models.split(","):
                for precision in args.precisions.split(","):
                    for engine in args.engines.split(","):
                        if time.time() - start > args.budget:
                            print("time is up", flush=True)
                            return
                        options = ["--engine", engine, "--model", model, "--precision", precision]
                        options += ["--batches", args.batches, *passed_on]
                        results, reason = run_cell(options, args.timeout)
                        for result in results:
                            file.write(json.dumps({"round": number, **result}) + "\n")
                            shown = result.get("error") or (
                                f"{result['step_ms_median']:7.1f} ms (mean {result['step_ms_mean']:.1f})  "
                                f"{result.get('peak_allocated', 0) / 2**30:6.2f} GiB  "
                                f"{result['cpu_seconds_per_second']:4.1f} cores"
                                + (f"  first {result['first_step_s']:.1f} s" if result["first_step_s"] else "")
                            )
                            print(
                                f"{number} {model:10} {precision} {engine:11} batch {result['batch']:4}  {shown}",
                                flush=True,
                            )
                        if reason:
                            file.write(
                                json.dumps(
                                    {
                                        "round": number,
                                        "engine": engine,
                                        "model": model,
                                        "precision": precision,
                                        "failed": reason,
                                    }
                                )
                                + "\n"
                            )
                            print(f"{number} {model} {precision} {engine} FAILED: {reason[-300:]}", flush=True)
                        file.flush()


if __name__ == "__main__":
    main()
