"""Run cells in turn (A B A B ...): every engine lives in its own process, and they take turns cell by cell.

    python benchmarks/run.py --out raw.jsonl --rounds 3 --engines plain,ours,deepspeed \
        --cells t5-base:fp16:1,8,64,256 t5-base:bf16:1,8,64,256:plain,ours,torchao

A cell may name its own engines (fourth field). ``--peer-path`` is put on PYTHONPATH for deepspeed and torchao alone, so
that their presence changes nothing for the others.

A shared machine drifts, so only ratios taken in turn mean anything: within a round, all engines run one cell before any
runs the next. Processes start one after the other, and each one's time to its first step is its own. While one runs,
the others wait for their turn with their device caches emptied. Raw JSON lines go to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CELL = Path(__file__).with_name("cell.py")
LIMITS = Path(__file__).with_name("limits.py")
PEERS = ("deepspeed", "torchao")


class Engine:
    """One serving process."""

    def __init__(self, name: str, options: list[str], log: Path, peer_path: str) -> None:
        self.name = name
        environment = dict(os.environ)
        if name in PEERS and peer_path:
            environment["PYTHONPATH"] = os.pathsep.join([peer_path, environment.get("PYTHONPATH", "")])
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [sys.executable, str(CELL), "--engine", name, "--serve", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._buffer = b""

    def read(self, word: str, timeout: float) -> str | None:
        """The next line that starts with ``word``, or None if the process ended or took too long."""
        assert self._process.stdout is not None
        deadline = time.time() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while time.time() < deadline:
                while b"\n" in self._buffer:
                    line, self._buffer = self._buffer.split(b"\n", 1)
                    if line.startswith(word.encode()):
                        return line.decode()[len(word) :]
                    self._log.write(line.decode(errors="replace") + "\n")
                if selector.select(timeout=1.0):
                    chunk = os.read(self._process.stdout.fileno(), 65536)
                    if not chunk:
                        return None
                    self._buffer += chunk
        return None

    def run(self, job: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self.read("RESULT ", timeout)
        return json.loads(line) if line is not None else None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def describe(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    first = f"  first step after {result['first_step_s']:.1f} s" if result["first_step_s"] else ""
    return (
        f"{result['step_ms_median']:7.1f} ms (mean {result['step_ms_mean']:.1f})  "
        f"{result.get('peak_allocated', 0) / 2**30:6.2f} GiB  {result['cpu_seconds_per_second']:4.1f} cores{first}"
    )


def parse_cells(specs: list[str], engines: str) -> list[tuple[dict[str, Any], list[str]]]:
    """MODEL:PRECISION:BATCH,BATCH[:ENGINE,ENGINE] -> (job, engines) for every batch."""
    jobs = []
    for spec in specs:
        model, precision, batches, *own = spec.split(":")
        names = (own[0] if own else engines).split(",")
        jobs += [({"model": model, "precision": precision, "batch": int(b)}, names) for b in batches.split(",")]
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="plain,ours")
    parser.add_argument("--cells", nargs="+", default=["t5-base:fp16:1,8,64,256"], help="MODEL:PRECISION:BATCH,BATCH")
    parser.add_argument("--peer-path", default="", help="where deepspeed and torchao are installed")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one cell")
    parser.add_argument("--first-timeout", type=float, default=180, help="seconds for an engine's first cell")
    parser.add_argument("--budget", type=float, default=10**6, help="start no cell after this many seconds")
    args, passed_on = parser.parse_known_args()
    start = time.time()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:

        def keep(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        limits = subprocess.run([sys.executable, str(LIMITS)], capture_output=True, text=True, check=False).stdout
        for line in limits.splitlines():
            if line.startswith("LIMITS "):
                keep({"limits": json.loads(line[7:])})
                print(line, flush=True)
        engines: dict[str, Engine] = {}
        jobs = parse_cells(args.cells, args.engines)
        for number in range(args.rounds):
            for job, names in jobs:
                for name in names:
                    if time.time() - start > args.budget:
                        print("time is up", flush=True)
                        for engine in engines.values():
                            engine.stop()
                        return
                    patience = args.timeout
                    if name not in engines:
                        engines[name] = Engine(name, passed_on, args.out.with_suffix(".log"), args.peer_path)
                        patience = args.first_timeout
                    result = engines[name].run(job, patience)
                    label = f"{number} {job['model']:10} {job['precision']} {name:11} batch {job['batch']:4}"
                    if result is None:
                        keep({"round": number, "engine": name, **job, "failed": "ended or took too long"})
                        print(f"{label}  FAILED (see the log)", flush=True)
                        engines.pop(name).stop()
                        continue
                    keep({"round": number, **result})
                    print(f"{label}  {describe(result)}", flush=True)
        for engine in engines.values():
            engine.stop()


if __name__ == "__main__":
    main()
