"""The largest decoder that an engine trains here: width fixed, layers searched, each try in its own process.

    python benchmarks/largest.py --out largest.jsonl --peer-path /tmp/ds --host-gib 118
    python benchmarks/largest.py --out largest.jsonl --peer-path /tmp/ds --host-gib 118 --gpu-gib 16 \\
        --engines ours-z3,deepspeed-z3,ours,deepspeed,plain

The first try of every engine is --start layers, so that there is a size at which all were measured in turn. From there
the number of layers moves along a ladder in which each rung is --ratio times the one below: up while tries succeed,
down while they fail, and then, rung by rung, into the gap between the two. Engines take turns try by try, and each try
is a line in --out at once: a call that is cut short has lost one try. Called again with the same --out, it goes on.

Weights are made in half precision, except the plain Trainer's, which are its masters. A try is three steps: it succeeds
if they end with a loss. It fails when the device or the host is full, and also when it takes longer than --timeout.
--host-gib ends a try that holds more host memory, before the system does; --gpu-gib lets a process use no more GPU
memory than that. --shared says that other work runs on the machine: host memory is then that of the processes alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from run import describe, measure_limits
from serving import Pool, Surroundings, appending


def ladder(start: int, ratio: float, most: int) -> list[int]:
    """Numbers of layers around ``start``, each about ``ratio`` times the one before, up to ``most``."""
    rungs = {start}
    for direction in (ratio, 1 / ratio):
        exact = float(start)
        while 1 <= exact * direction <= most:
            exact *= direction
            rungs.add(round(exact))
    return sorted(rungs)


def next_rung(rungs: list[int], start: int, outcomes: dict[int, bool]) -> int | None:
    """The rung to try next, or None if the largest that works is known.

    Args:
        outcomes: rung -> whether it worked, of the tries so far.
    """
    works = [rung for rung, worked in outcomes.items() if worked]
    fails = [rung for rung, worked in outcomes.items() if not worked]
    if not outcomes:
        return start
    low = rungs.index(max(works)) if works else -1
    high = rungs.index(min(fails)) if fails else len(rungs)
    if high - low <= 1:
        return None
    if not works:
        return rungs[max(0, math.ceil(high / 2) - 1)]
    if not fails:
        return rungs[low + 1]
    return rungs[(low + high) // 2]


def read_outcomes(path: Path, search: dict[str, Any]) -> dict[str, dict[int, bool]]:
    """By engine: what earlier calls with the same limits have found."""
    found: dict[str, dict[int, bool]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        if record.get("largest") == search:
            found.setdefault(record["engine"], {})[record["layers"]] = record["worked"]
    return found


def search_of(args: argparse.Namespace) -> dict[str, Any]:
    """What makes two searches the same one."""
    names = ("width", "precision", "batch", "length", "gpu_gib", "host_gib", "gpus")
    return {name: getattr(args, name) for name in names}


def job_of(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    return {
        "model": f"decoder-{args.width}x{layers}",
        "precision": args.precision,
        "batch": args.batch,
        "length": args.length,
        "checkpointing": 1,
        "half": 1,
        "steps": args.steps,
        "warmup": 1,
        "gpu_gib": args.gpu_gib,
        "gpus": args.gpus,
        "fresh": 1,
    }


def worked(result: dict[str, Any]) -> bool:
    return "failed" not in result and "error" not in result and result.get("loss") is not None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", default="ours-z3,deepspeed-z3")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--start", type=int, default=16, help="layers of the first try")
    parser.add_argument("--most", type=int, default=80, help="layers beyond which nothing is tried")
    parser.add_argument("--ratio", type=float, default=1.25)
    parser.add_argument("--precision", default="bf16", choices=["fp16", "bf16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu-gib", type=float)
    parser.add_argument("--host-gib", type=float)
    parser.add_argument("--shared", action="store_true", help="others use the machine too: count the processes' memory")
    parser.add_argument("--peer-path", default="")
    parser.add_argument("--extensions", type=Path, help="keep what DeepSpeed compiles here, for further runs")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one try, loading included")
    parser.add_argument("--budget", type=float, default=10**6, help="start no try after this many seconds")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    begun, search = time.time(), search_of(args)
    rungs = ladder(args.start, args.ratio, args.most)
    outcomes = read_outcomes(args.out, search)
    open_engines = args.engines.split(",")
    around = Surroundings(
        args.out.with_suffix(".log"),
        args.peer_path,
        cache=args.extensions,
        host_gib=args.host_gib,
        is_alone=not args.shared,
    )
    with appending(args.out) as keep, Pool(around, args.timeout) as pool:
        limits = measure_limits()
        if limits is not None:
            keep({"limits": limits})
        while open_engines:
            for engine in list(open_engines):
                layers = next_rung(rungs, args.start, outcomes.setdefault(engine, {}))
                if layers is None:
                    open_engines.remove(engine)
                    continue
                if time.time() - begun > args.budget:
                    print("time is up", flush=True)
                    return
                result = pool.run(engine, job_of(args, layers), args.timeout)
                if result.pop("again", False) or result.get("failed", "").startswith("did not load"):
                    open_engines.remove(engine)
                    print(f"{engine:13} {describe(result)}", flush=True)
                    continue
                outcomes[engine][layers] = worked(result)
                keep({**result, "largest": search, "engine": engine, "layers": layers, "worked": worked(result)})
                print(f"{engine:13} {layers:3} layers  {describe(result)}", flush=True)
    for engine, found in outcomes.items():
        print(f"{engine}: {max((rung for rung, well in found.items() if well), default=0)} layers", flush=True)


if __name__ == "__main__":
    main()
