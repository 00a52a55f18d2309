"""Starting a measuring process, reading its results line by line, surviving its death."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, NamedTuple

from measure.rows import FAILED, TIMED_OUT, Row
from measure.spec import DEEPSPEED, ROOT, Spec

EXAMPLE = Path(__file__).resolve().parents[1]
START_LIMIT_S = 240.0
NUM_KEPT_LINES = 40
SETUP = "before the first cell, "


class Events(NamedTuple):
    """What to call as news arrive."""

    started: Callable[[Spec, int], None]
    finished: Callable[[Row], None]
    machine: Callable[[dict[str, object]], None]


def run_process(spec: Spec, events: Events, *, deadline: float | None = None) -> list[int]:
    """Measure the batch sizes of ``spec`` in one fresh process.

    Returns:
        Batch sizes that it did not come to. The one at which it died or ran out of time is reported as a row; all
        of them are if it died while it was set up.
    """
    waiting = list(spec.batches)
    current: int | None = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = _start(spec, errors)
        tail: deque[str] = deque(maxlen=NUM_KEPT_LINES)
        try:
            for line in _lines(process, spec, deadline):
                word, _, rest = line.partition(" ")
                if word == "MACHINE":
                    events.machine(json.loads(rest))
                elif word == "STARTED":
                    current = int(json.loads(rest)["batch_size"])
                    events.started(spec, current)
                elif word == "RESULT":
                    row = Row(**json.loads(rest))
                    if row.batch_size in waiting:
                        waiting.remove(row.batch_size)
                        events.finished(row)
                    current = None
                else:
                    tail.append(line)
            code = process.wait(timeout=30)
            reason, status = f"exit code {code}", FAILED
        except TimeoutError as error:
            reason, status, code = str(error), TIMED_OUT, -1
        finally:
            _end(process)
        if code == 0 or (current is None and len(waiting) < len(spec.batches)):
            return waiting
        errors.seek(0)
        tail.extend(line.rstrip() for line in errors.readlines()[-NUM_KEPT_LINES:])
        print("\n".join(tail), file=sys.stderr, flush=True)
        last = next((line for line in reversed(tail) if line.strip()), "")
        # Before its first cell the process was still being set up: another one would die of the same.
        dead, when = ([current], "") if current is not None else (list(waiting), SETUP)
        for batch_size in dead:
            waiting.remove(batch_size)
            events.finished(spec.row(batch_size, status=status, error=f"{when}{reason}: {last.strip()[:160]}"))
        return waiting


def child_environment() -> dict[str, str]:
    """Ours, with the example and the package on the path, and no network asked."""
    path = os.pathsep.join([str(EXAMPLE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _placement(spec: Spec) -> dict[str, str]:
    """One rank sees one GPU, or the plain Trainer would take them all."""
    if spec.num_gpus > 1:
        return {}
    place = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    if spec.engine == DEEPSPEED:  # it looks for a launcher's variables, and for MPI without them
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return place


def _start(spec: Spec, errors: IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable]
    if spec.num_gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={spec.num_gpus}"]
    return subprocess.Popen(
        [*command, "-m", "measure.cell", json.dumps(asdict(spec))],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        errors="replace",
        env={**child_environment(), **_placement(spec)},
        start_new_session=True,  # a launcher's ranks end with it
    )


def _cell_limit(spec: Spec) -> float:
    """Seconds without any news after which a cell is given up. A whole epoch at batch 1 may take most of an hour."""
    if spec.full:
        return 4 * 3600.0
    return 120.0 + 5 * spec.cell_seconds + 10.0 * (spec.steps or 0)


def _lines(process: subprocess.Popen[str], spec: Spec, deadline: float | None) -> Iterator[str]:
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None

    def read(stream: IO[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    limit = START_LIMIT_S
    silent_since = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            now = time.monotonic()
            if now - silent_since > limit:
                raise TimeoutError(f"stopped after {limit:.0f} s") from None
            if deadline is not None and now > deadline:
                raise TimeoutError("stopped at the end of --max-minutes") from None
            continue
        if line is None:
            return
        if line.startswith(("STARTED", "RESULT")):
            silent_since, limit = time.monotonic(), _cell_limit(spec)
        yield line.rstrip("\n")


def _end(process: subprocess.Popen[str]) -> None:
    """The process and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
