"""The processes that serve one engine: one a GPU, told by the environment which rank they are, as torchrun would."""

from __future__ import annotations

import json
import math
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from engines import PEERS, library_of
from host_memory import MachineWatch

CELL = Path(__file__).with_name("cell.py")
GO: dict[str, Any] = {"go": True}
"""The job that stands for the next turn of the one that was begun."""
STOP: dict[str, Any] = {"stop": True}
"""The same, but there is no further turn: the answer is the result of those that there were."""

_SUMMED = ("tokens", "tokens_padded", "rss_bytes", "rss_peak_bytes", "rss_baseline_bytes", "rss_before_bytes")
_LARGEST = ("peak_allocated", "peak_reserved", "peak_allocated_whole_run")


@contextmanager
def appending(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what adds a JSON line to ``path``, handed to the system when the call returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:

        def keep(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        yield keep


class Surroundings(NamedTuple):
    """What every engine of a run shares."""

    log: Path
    peer_path: str = ""
    passed_on: tuple[str, ...] = ()
    """Further options for cell.py."""
    cache: Path | None = None
    """Where extensions are compiled to and found again; of a run's own if None, and then empty at first."""
    host_gib: float | None = None
    """End the processes when they hold more host memory than this."""
    is_alone: bool = True
    """Nothing else runs on the machine, so that all the host memory it loses is the processes'."""
    script: Path = CELL
    """What serves: it takes --engine and --serve, says READY, and answers a line of JSON with RESULT."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def num_gpus_of_machine() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def peer_path(given: str, library: str) -> str:
    """``/tmp/peers``, or each library's own: ``deepspeed=/tmp/ds,torchao=/tmp/ao``."""
    if "=" not in given:
        return given
    return dict(part.split("=", 1) for part in given.split(",")).get(library, "")


def environment_of(engine: str, rank: int, world_size: int, port: int, around: Surroundings) -> dict[str, str]:
    """A lone process sees one GPU, and its share of the cores; real DeepSpeed wants ranks even then."""
    environment = dict(os.environ)
    if world_size > 1 or library_of(engine) == "deepspeed":
        environment |= rank_environment(rank, world_size, port)
    gpus = num_gpus_of_machine()
    if gpus > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
        if world_size == 1:
            environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if library_of(engine) in PEERS:
        environment.pop("TORCH_CUDA_ARCH_LIST", None)  # with "9.0a" DeepSpeed's extensions do not build
        if path := peer_path(around.peer_path, library_of(engine)):
            environment["PYTHONPATH"] = os.pathsep.join([path, environment.get("PYTHONPATH", "")])
        if around.cache is not None:
            environment["TORCH_EXTENSIONS_DIR"] = str(around.cache)
    return environment


class Serving:
    """One engine, loaded and waiting for cells."""

    def __init__(self, engine: str, world_size: int, around: Surroundings) -> None:
        self.engine = engine
        self.world_size = world_size
        self.finds_clean_cache = around.cache is not None and not any(around.cache.glob("*"))
        self._around = around
        _forget_unfinished_builds(around.cache)
        self._log = around.log.open("a")
        self._log_start = around.log.stat().st_size
        self._log.write(f"\n--- {engine} on {world_size}\n")
        self._log.flush()
        port = free_port()
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(around.script), "--engine", engine, "--serve", *around.passed_on],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment_of(engine, rank, world_size, port, around),
            )
            for rank in range(world_size)
        ]
        self._buffers = [b"" for _ in self._processes]
        self.why = ""
        """Why the last ``read`` gave nothing."""

    def read(self, word: str, timeout: float) -> list[str] | None:
        """From every rank the next line that starts with ``word``; None if one ended, or all took too long."""
        deadline = time.time() + timeout
        found: dict[int, str] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while True:
                for rank in range(self.world_size):
                    if rank not in found and (line := self._take(rank, word)) is not None:
                        found[rank] = line
                if len(found) == self.world_size:
                    return [found[rank] for rank in range(self.world_size)]
                if time.time() > deadline:
                    self.why = f"took more than {timeout:.0f} s"
                    return None
                for key, _ in selector.select(timeout=0.5):
                    chunk = os.read(key.fd, 65536)
                    if not chunk:
                        self.why = self._epitaph(key.data)
                        return None
                    self._buffers[key.data] += chunk

    def _take(self, rank: int, word: str) -> str | None:
        while b"\n" in self._buffers[rank]:
            line, self._buffers[rank] = self._buffers[rank].split(b"\n", 1)
            if line.startswith(word.encode()):
                return line.decode()[len(word) :]
            self._log.write(line.decode(errors="replace") + "\n")
        return None

    def _epitaph(self, rank: int) -> str:
        code = self._processes[rank].wait()
        self._log.flush()
        with self._around.log.open("rb") as log:
            log.seek(max(self._log_start, self._around.log.stat().st_size - 2000))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"rank {rank} ended with code {code}: {lines[-1][:240] if lines else ''}"

    def wait_until_ready(self, timeout: float) -> bool:
        return self.read("READY", timeout) is not None

    def run(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The cell's result, of all ranks together; a dict with ``failed`` if there is none.

        A job in turns gives ``{"waits": True}``: run ``GO`` for the next turn. The last turn's answer is the result.
        """
        limit = self._around.host_gib * 2**30 if self._around.host_gib else None
        pids = [process.pid for process in self._processes]
        with MachineWatch(pids, limit, is_alone=self._around.is_alone) as watch:
            try:
                for process in self._processes:
                    assert process.stdin is not None
                    process.stdin.write(json.dumps(job).encode() + b"\n")
                    process.stdin.flush()
            except BrokenPipeError:
                return {"failed": "ended before the cell began"}
            lines = self.read("RESULT ", timeout)
        # In a further turn the processes have their memory already, and so have those of other engines.
        is_whole = self._around.is_alone and job not in (GO, STOP)
        used = {"machine_used_bytes": watch.most_used} if is_whole else {}
        if watch.ended_them:
            own = f"its processes held {watch.most_resident / 2**30:.1f}"
            return {"failed": f"needs more than {self._around.host_gib:g} GiB of host memory ({own})", **used}
        if lines is None:
            return {"failed": self.why, **used}
        results = [json.loads(line) for line in lines]
        waits = all(result.get("waits") for result in results)
        return results[0] if waits else {**merge(results), **used}

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._log.close()


def _forget_unfinished_builds(cache: Path | None) -> None:
    """A process that was ended while it compiled leaves a lock, and the next would wait for it for ever."""
    for lock in cache.glob("**/lock") if cache is not None else ():
        lock.unlink()


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several ranks': rank 0's, with sums of tokens and host memory, and the largest device peak.

    ``peak_allocated_sum`` is the device memory of all GPUs together. Tokens/s are of all ranks, by the slowest's time.
    """
    for result in results:
        if "error" in result:
            return result
    merged = dict(results[0])
    for name in _SUMMED:
        if merged.get(name) is not None:
            merged[name] = sum(result[name] for result in results)
    for name in _LARGEST:
        if name in merged:
            merged[name] = max(result[name] for result in results)
    if "peak_allocated" in merged:
        merged["peak_allocated_sum"] = sum(result["peak_allocated"] for result in results)
    slowest = max(result["step_ms_mean"] for result in results)
    merged["tokens_per_s"] = 1000 * merged["tokens"] / slowest
    return merged


def _key(engine: str, job: dict[str, Any]) -> tuple[str, str | None, int]:
    return engine, job.get("config"), job.get("gpus", 1)


class Pool:
    """Engines that are loaded, by name, config and number of ranks. ``with`` ends them all."""

    def __init__(self, around: Surroundings, first_timeout: float) -> None:
        self._around = around
        self._first_timeout = first_timeout
        self._serving: dict[tuple[str, str | None, int], Serving] = {}
        self._absent: dict[str, str] = {}
        """Engines that did not even load, and why: they are not tried again."""
        self._caches = [around.cache] if around.cache is not None else []
        self._own_caches: list[Path] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        for serving in self._serving.values():
            serving.stop()
        for cache in self._own_caches:
            shutil.rmtree(cache, ignore_errors=True)

    def _new_cache(self) -> Path:
        self._own_caches.append(Path(tempfile.mkdtemp(prefix="bench-extensions-")))
        self._caches.append(self._own_caches[-1])
        return self._caches[-1]

    def run(self, engine: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Run a cell in the engine's process, which is started if there is none.

        ``job["fresh"]`` ends it afterwards; ``job["clean"]`` also gives it an empty cache of extensions.
        """
        if engine in self._absent:
            return {"failed": self._absent[engine], "again": True}
        begun = time.time()
        key = _key(engine, job)
        is_first = key not in self._serving
        if is_first:
            if job.get("clean") or not self._caches:
                self._new_cache()
            serving = Serving(engine, key[2], self._around._replace(cache=self._caches[-1]))
            self._serving[key] = serving
            if not serving.wait_until_ready(self._first_timeout):
                self._absent[engine] = serving.why
                self._end(key)
                return {"failed": f"did not load: {self._absent[engine]}"}
        serving = self._serving[key]
        result = serving.run(job, self._first_timeout if is_first else timeout)
        result["wall_s"] = time.time() - begun
        result["clean_cache"] = is_first and serving.finds_clean_cache
        if result.get("waits"):
            return result
        if job.get("fresh") or "failed" in result or "error" in result:
            self._end(key)
        return result

    def run_in_turns(
        self, engines: Sequence[str], job: dict[str, Any], timeout: float, deadline: float = math.inf
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every engine loads and warms up, then they train a turn each, ``job["turns"]`` times over; their results.

        After ``deadline`` (``time.time()``) no further round begins.
        """
        waiting: dict[str, dict[str, Any]] = {}
        for engine in engines:
            result = self.run(engine, job, timeout)
            if result.get("waits"):
                waiting[engine] = result
            else:
                yield engine, result
        while waiting:
            word = GO if time.time() < deadline else STOP
            for engine in list(waiting):
                result = self._serving[_key(engine, job)].run(word, timeout)
                if result.get("waits"):
                    continue
                begun = waiting.pop(engine)
                if job.get("fresh") or "failed" in result or "error" in result:
                    self._end(_key(engine, job))
                yield engine, {**result, "clean_cache": begun["clean_cache"]}

    def _end(self, key: tuple[str, str | None, int]) -> None:
        self._serving.pop(key).stop()
