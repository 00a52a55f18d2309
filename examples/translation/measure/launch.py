"""The ranks of one measurement: started, listened to, ended together. Standard library only.

They are started here, with a launcher's variables, instead of by torchrun: one start of Python less, and the end of a
rank is seen at once. torchrun's ranks have process sessions of their own: ended by force, it leaves them on the GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO

from measure.spec import DEEPSPEED, ROOT, Spec

EXAMPLE = Path(__file__).resolve().parents[1]
GRACE_S = 5.0
"""How long the other ranks may go on when one has failed: its last words must arrive first."""


def child_environment() -> dict[str, str]:
    """Ours, with the example and the package on the path, and no network asked."""
    path = os.pathsep.join([str(EXAMPLE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def visible_gpus() -> list[str]:
    """The names in CUDA_VISIBLE_DEVICES; none if it is not set."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def first_gpu() -> str:
    """The only GPU that a process on its own is to see; none ("") where all are hidden on purpose."""
    return next(iter(visible_gpus()), "" if "CUDA_VISIBLE_DEVICES" in os.environ else "0")


class Ranks:
    """The processes that measure one :class:`Spec`. All write to one pipe, whole lines at a time."""

    def __init__(self, spec: Spec, errors: IO[str]) -> None:
        reading, writing = os.pipe()
        self.output: IO[str] = os.fdopen(reading, encoding="utf-8", errors="replace")
        self._failed_at: float | None = None
        command = [sys.executable, "-m", "measure.cell", json.dumps(asdict(spec))]
        try:
            self._processes = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=writing,
                    stderr=errors,
                    env={**child_environment(), **place},
                    start_new_session=True,  # so that what a rank starts ends with it
                )
                for place in placements(spec)
            ]
        finally:
            os.close(writing)  # the pipe ends when the last rank does

    def check(self) -> None:
        """End all if one has failed: the others may wait for it until their collective's time-out."""
        if not any(process.poll() for process in self._processes):
            return
        self._failed_at = self._failed_at or time.monotonic()
        if time.monotonic() - self._failed_at > GRACE_S:
            self.end()

    def wait(self, timeout_s: float) -> int:
        """Exit code of the rank that failed first, as far as can be told; 0 if none did.

        Raises:
            TimeoutError: a rank goes on.
        """
        end = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self._processes):
            self.check()
            if time.monotonic() > end:
                raise TimeoutError(f"did not end within {timeout_s:.0f} s of its last word")
            time.sleep(0.05)
        codes = [process.returncode for process in self._processes]
        # Those that end() has killed are not the cause.
        return next((code for code in codes if code not in (0, -signal.SIGKILL)), max(codes, key=abs))

    def end(self) -> None:
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in self._processes:
            process.wait()


def placements(spec: Spec) -> list[dict[str, str]]:
    """The variables of each rank: which GPUs it sees, where the others are, its share of the cores.

    A process on its own sees one GPU, or the plain Trainer would take them all.
    """
    num_ranks = spec.num_ranks
    gpus = spec.gpus.split(",") if spec.gpus else visible_gpus()
    place: dict[str, str] = {}
    if gpus:
        place["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[: spec.num_gpus])
    elif spec.num_gpus == 1:
        place["CUDA_VISIBLE_DEVICES"] = first_gpu()
    if num_ranks == 1 and spec.engine != DEEPSPEED:  # which looks for MPI if it finds no launcher's variables
        return [place]
    if num_ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        place["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    place["LOCAL_WORLD_SIZE"] = str(num_ranks)
    return [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
