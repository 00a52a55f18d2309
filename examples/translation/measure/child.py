"""Starting a measuring process, reading its results line by line, surviving its death."""

from __future__ import annotations

import json
import queue
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from errors import UserError

from measure.launch import Ranks
from measure.limit import SweepOver, TimeLimit
from measure.rows import FAILED, OUT_OF_MEMORY, TIMED_OUT, Row
from measure.spec import Spec

START_LIMIT_S = 240.0
NUM_KEPT_LINES = 40
SETUP = "before the first cell, "


class Events(NamedTuple):
    """What to call as news arrive."""

    started: Callable[[Spec, int], None]
    finished: Callable[[Row], None]
    machine: Callable[[dict[str, object]], None]


def run_process(spec: Spec, events: Events, limit: TimeLimit) -> list[int]:
    """Measure the batch sizes of ``spec`` in one fresh process, or one a rank.

    Returns:
        Batch sizes that it did not come to. The one at which it died or was silent for too long is reported as a row;
        all of them are if it died while it was set up. The end of ``limit`` is no result: nothing is reported.

    Raises:
        UserError: the process has refused what it was given: text, tokenizer, GPUs. No cell is at fault.
    """
    waiting = list(spec.batches)
    current: int | None = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        ranks = Ranks(spec, errors)
        tail: deque[str] = deque(maxlen=NUM_KEPT_LINES)
        try:
            for line in _lines(ranks, spec, limit):
                word, _, rest = line.partition(" ")
                if word == "MACHINE":
                    events.machine(json.loads(rest))
                elif word == "REFUSED":
                    raise UserError(str(json.loads(rest)["message"]))
                elif word == "STARTED":
                    current = int(json.loads(rest)["batch_size"])
                    events.started(spec, current)
                elif word == "RESULT":
                    row = Row(**json.loads(rest))
                    if row.batch_size in waiting:
                        waiting.remove(row.batch_size)
                        events.finished(row)
                    current = None
                    if row.status == OUT_OF_MEMORY and spec.num_ranks > 1:
                        return waiting  # one rank has given up, so the others wait for nothing
                else:
                    tail.append(line)
            code = ranks.wait(timeout_s=30)
            killed = " (killed; by the kernel, if host memory ran out)" if code == -signal.SIGKILL else ""
            reason, status = f"exit code {code}{killed}", FAILED
        except TimeoutError as error:
            reason, status, code = str(error), TIMED_OUT, -1
        except SweepOver:
            return waiting
        finally:
            ranks.end()
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


def _cell_limit(spec: Spec) -> float:
    """Seconds without any news after which a cell is given up. A whole epoch at batch 1 may take most of an hour."""
    if spec.full:
        return 4 * 3600.0
    return 120.0 + 5 * spec.cell_seconds + 10.0 * (spec.steps or 0)


def _lines(ranks: Ranks, spec: Spec, limit: TimeLimit) -> Iterator[str]:
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        with stream:
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, args=(ranks.output,), daemon=True).start()
    longest_silence = START_LIMIT_S
    silent_since = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            ranks.check()
            if time.monotonic() - silent_since > longest_silence:
                raise TimeoutError(f"stopped after {longest_silence:.0f} s") from None
            if limit.is_over():
                raise SweepOver from None
            continue
        if line is None:
            return
        if line.startswith(("STARTED", "RESULT")):
            silent_since, longest_silence = time.monotonic(), _cell_limit(spec)
        yield line.rstrip("\n")
