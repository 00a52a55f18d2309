"""Run cells in turn (A B A B ...): every engine lives in its own processes, and they take turns cell by cell.

    python benchmarks/run.py --out raw.jsonl --rounds 3 --peer-path deepspeed=/tmp/ds,torchao=/tmp/ao \\
        --cells t5-base:fp16:1,8,64,256:plain,ours,deepspeed \\
                t5-base:bf16:8:ours,deepspeed:accumulation=1/4/16 \\
                decoder-3b:bf16:4:compute,ours,deepspeed:length=1024,checkpointing=1,steps=8 \\
                t5-base:bf16:8:plain,ours:gpus=2,config=zero1/zero2/zero3

A cell is MODEL:PRECISION:BATCH,BATCH[:ENGINE,ENGINE[:OPTION=VALUE,OPTION=VALUE]]. ``engines.py`` and ``workloads.py``
list the names. BATCH is per GPU. A value a/b/c stands for as many cells. Options:

    accumulation, length, checkpointing (0 or 1), steps, warmup, dropout
    turns        in place of rounds: the cell's engines are loaded at once and take so many turns (turns.py)
    config       file of configs/ without .json, for ours and deepspeed (zero1_offload: zero1, states offloaded)
    ratio        offload_optimizer.ratio; budget: GiB for ours-auto; share: host_share for ours-both
    gpus         processes over as many GPUs (NCCL; gloo without GPUs)
    losses       1: record every step's loss
    gpu_gib      let each process use no more GPU memory than this
    fresh        1: a new process for this cell, ended afterwards; models above a billion parameters always have that
    clean        1: fresh, and nothing of an extension compiled before
    timeout      seconds for this cell

A shared machine drifts, so only ratios taken in turn mean anything: within a round, all engines run one cell before any
runs the next. Processes start one after the other, and each one's time to its first step is its own. While one runs,
the others wait for their turn with their device caches emptied. A cell that fails or runs out of memory costs its own
process and leaves a line that says why. Raw JSON lines go to --out. ``--peer-path DIR``, or a folder for each as in
``--peer-path deepspeed=DIR,torchao=DIR``, is put on PYTHONPATH for deepspeed and torchao alone, so that their presence
changes nothing for the others: transformers imports a torchao that it finds, which takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engines import ENGINES, config_name
from serving import Pool, Surroundings, appending
from turns import split_turns
from workloads import is_large

LIMITS = Path(__file__).with_name("limits.py")

OPTIONS: dict[str, Any] = {
    "accumulation": int,
    "length": int,
    "checkpointing": int,
    "steps": int,
    "warmup": int,
    "turns": int,
    "dropout": float,
    "config": str,
    "ratio": float,
    "budget": float,
    "share": float,
    "gpus": int,
    "losses": int,
    "gpu_gib": float,
    "fresh": int,
    "clean": int,
    "timeout": float,
}


def parse_options(text: str) -> list[dict[str, Any]]:
    """``a=1/2,b=3`` -> every combination, as dicts.

    Raises:
        ValueError: an option is not known or has no value.
    """
    names, values = [], []
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in OPTIONS or not equals:
            raise ValueError(f"{part!r}: expected OPTION=VALUE with one of {', '.join(OPTIONS)}")
        names.append(name)
        values.append([OPTIONS[name](one) for one in value.split("/")])
    return [dict(zip(names, chosen)) for chosen in itertools.product(*values)]


def parse_cells(specs: list[str], engines: str) -> list[tuple[dict[str, Any], list[str]]]:
    """(job, engines) for every cell, in the order in which they are written.

    Raises:
        ValueError: a cell cannot be read.
    """
    jobs = []
    for spec in specs:
        fields = spec.split(":")
        if not 3 <= len(fields) <= 5:
            raise ValueError(f"{spec!r}: expected MODEL:PRECISION:BATCHES[:ENGINES[:OPTIONS]]")
        model, precision, batches = fields[:3]
        names = (fields[3] if len(fields) > 3 and fields[3] else engines).split(",")
        if unknown := sorted(set(names) - set(ENGINES)):
            raise ValueError(f"{spec!r}: no engine {', '.join(unknown)}; there are {', '.join(ENGINES)}")
        for options in parse_options(fields[4] if len(fields) > 4 else ""):
            for batch in batches.split(","):
                job = {"model": model, "precision": precision, "batch": int(batch), **options}
                job["fresh"] = int(bool(job.get("fresh") or job.get("clean") or is_large(model)))
                check_turns(spec, job, names)
                jobs.append((job, names))
    return jobs


def check_turns(spec: str, job: dict[str, Any], engines: list[str]) -> None:
    """Raises ValueError: the cell cannot be run in the turns that it asks for."""
    if not job.get("turns", 0):
        return
    if job["turns"] < 0 or job.get("warmup", 1) < 1:
        raise ValueError(f"{spec!r}: turns begin after a warm-up, so turns and warmup must be 1 or more")
    if len(set(engines)) < len(engines):
        raise ValueError(f"{spec!r}: an engine is one process and cannot wait for two turns at once; name each once")


def describe(result: dict[str, Any]) -> str:
    for name in ("failed", "error"):
        if name in result:
            return f"FAILED: {result[name]}"
    first = f"  first step after {result['first_step_s']:.1f} s" if result.get("first_step_s") else ""
    return (
        f"{result['step_ms_median']:7.1f} ms (mean {result['step_ms_mean']:.1f})  "
        f"{result.get('peak_allocated', 0) / 2**30:6.2f} GiB  {result.get('cpu_seconds_per_second', 0):4.1f} cores  "
        f"{result['tokens_per_s']:.0f} tokens/s{first}"
    )


def label_of(job: dict[str, Any]) -> str:
    shown = {name: value for name, value in job.items() if name not in ("model", "precision", "batch", "fresh")}
    options = " ".join(f"{name}={value}" for name, value in shown.items())
    return f"{job['model']} {job['precision']} batch {job['batch']} {options}".strip()


def measure_limits() -> dict[str, Any] | None:
    found = subprocess.run([sys.executable, str(LIMITS)], capture_output=True, text=True, check=False).stdout
    lines = [line for line in found.splitlines() if line.startswith("LIMITS ")]
    return json.loads(lines[0][7:]) if lines else None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="plain,ours", help="for cells that name none")
    parser.add_argument("--cells", nargs="+", default=["t5-base:fp16:1,8,64,256"])
    parser.add_argument("--num-gpus", type=int, default=1, help="for cells without gpus=")
    parser.add_argument("--peer-path", default="", help="where deepspeed and torchao are installed")
    parser.add_argument("--extensions", type=Path, help="keep what DeepSpeed compiles here, for further runs")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one cell")
    parser.add_argument("--first-timeout", type=float, default=180, help="seconds to load, and for the first cell")
    parser.add_argument(
        "--budget", type=float, default=10**6, help="start no cell, and no round of turns, after this many seconds"
    )
    parser.add_argument("--host-gib", type=float, help="end a cell that holds more host memory")
    return parser


def main() -> None:
    parser = build_parser()
    args, passed_on = parser.parse_known_args()
    try:
        jobs = parse_cells(args.cells, args.engines)
    except ValueError as error:
        parser.error(str(error))
    start = time.time()
    around = Surroundings(
        args.out.with_suffix(".log"), args.peer_path, tuple(passed_on), args.extensions, host_gib=args.host_gib
    )
    with appending(args.out) as keep, Pool(around, args.first_timeout) as pool:

        def record(number: int, name: str, job: dict[str, Any], result: dict[str, Any]) -> None:
            if not result.pop("again", False):
                place = {"round": number, "engine": name, "world_size": job["gpus"]}
                asked = {**job, "config": config_name(name, job.get("config"))}
                keep({**(asked if "failed" in result else {}), **place, **result})
            print(f"{number} {name:13} {label_of(job)}  {describe(result)}", flush=True)

        limits = measure_limits()
        if limits is not None:
            keep({"limits": limits})
            print(f"LIMITS {json.dumps(limits)}", flush=True)
        for number in range(args.rounds):
            for job, names in jobs:
                full = {"gpus": args.num_gpus, **job}
                timeout = full.get("timeout", args.timeout)
                if time.time() - start > args.budget:
                    print("time is up", flush=True)
                    return
                if full.get("turns") and number == 0:
                    for name, result in pool.run_in_turns(names, full, timeout, start + args.budget):
                        for turn, part in enumerate(split_turns(result) if "turns" in result else [result]):
                            record(turn, name, full, part)
                elif not full.get("turns"):
                    for name in names:
                        record(number, name, full, pool.run(name, full, timeout))


if __name__ == "__main__":
    main()
