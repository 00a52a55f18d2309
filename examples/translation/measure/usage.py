"""Memory and processor time of this process, sampled by a thread while a cell runs."""

from __future__ import annotations

import itertools
import os
import threading
import time
from typing import NamedTuple

import psutil
import torch

from measure.spec import DATA_PARALLEL, Spec

INTERVAL_S = 0.25
GIB = 2**30


class Usage(NamedTuple):
    """Between ``start`` and ``stop`` of a sampler."""

    wall_s: float
    cpu_s: float
    """Processor time of this process and its children."""
    cores_per_second: list[float]
    """Cores kept busy by this process, second by second."""
    machine_percent: float | None
    """Share of all cores of the machine, all processes; None where the system does not say."""
    rss_bytes: int


def num_cores() -> float:
    """Cores that this process may use: its affinity, and the quota of its control group if that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            allowed = min(allowed, int(quota) / int(period))
    except (OSError, ValueError):
        pass
    return allowed


def gpus_of(spec: Spec) -> list[int]:
    """GPUs that this process drives: its own one, or all of them under DataParallel; none without CUDA."""
    if not torch.cuda.is_available():
        return []
    return list(range(spec.num_gpus)) if spec.engine == DATA_PARALLEL else [torch.cuda.current_device()]


class Sampler:
    """A few system calls every INTERVAL_S, on a thread of its own; it takes no lock that training waits for."""

    def __init__(self, gpus: list[int]) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._points: list[tuple[float, float]] = []
        self._rss = 0
        self._device_used = dict.fromkeys(gpus, 0)
        self._handles = {gpu: handle for gpu in gpus if (handle := _nvml_handle(gpu)) is not None}

    def start(self) -> None:
        self._stop.clear()
        self._points = [self._point()]
        self._machine = psutil.cpu_times()
        self._rss = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._run, name="usage-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> Usage:
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        self._points.append(self._point())
        (first_wall, first_cpu), (last_wall, last_cpu) = self._points[0], self._points[-1]
        self._rss = max(self._rss, self._process.memory_info().rss)
        return Usage(
            wall_s=last_wall - first_wall,
            cpu_s=last_cpu - first_cpu,
            cores_per_second=_per_second(self._points),
            machine_percent=_busy_percent(self._machine, psutil.cpu_times()),
            rss_bytes=self._rss,
        )

    @property
    def device_used_bytes(self) -> dict[int, int]:
        """GPU -> the most memory that it reported as used so far, by anybody."""
        for gpu, most in self._device_used.items():
            free, total = torch.cuda.mem_get_info(gpu)
            self._device_used[gpu] = max(most, total - free)
        return dict(self._device_used)

    def _point(self) -> tuple[float, float]:
        times = self._process.cpu_times()
        return time.perf_counter(), times.user + times.system + times.children_user + times.children_system

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._points.append(self._point())
            self._rss = max(self._rss, self._process.memory_info().rss)
            for gpu, handle in self._handles.items():
                self._device_used[gpu] = max(self._device_used[gpu], _nvml_used(handle))


def _per_second(points: list[tuple[float, float]]) -> list[float]:
    """Cores busy in each whole second, interpolated between the samples; one value if there is no whole second."""
    start, end = points[0][0], points[-1][0]
    walls, cpus = [wall - start for wall, _ in points], [cpu for _, cpu in points]
    if end - start < 1:
        return [(cpus[-1] - cpus[0]) / max(end - start, 1e-9)]
    at_second = [_interpolate(walls, cpus, float(second)) for second in range(int(end - start) + 1)]
    return [after - before for before, after in itertools.pairwise(at_second)]


def _interpolate(walls: list[float], values: list[float], at: float) -> float:
    for index in range(1, len(walls)):
        if walls[index] >= at:
            width = walls[index] - walls[index - 1]
            share = (at - walls[index - 1]) / width if width > 0 else 1.0
            return values[index - 1] + share * (values[index] - values[index - 1])
    return values[-1]


def _busy_percent(before: object, after: object) -> float | None:
    total = sum(after) - sum(before)  # type: ignore[call-overload]
    idle = sum(getattr(after, name, 0.0) - getattr(before, name, 0.0) for name in ("idle", "iowait"))
    # Sandboxes may report nothing but zeros.
    return None if total <= 0 else 100.0 * (1.0 - idle / total)


def _nvml_handle(gpu: int) -> object | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(gpu).uuid}".encode())
    except Exception:  # no such package, or a sandbox in which NVML is closed: mem_get_info remains
        return None


def _nvml_used(handle: object) -> int:
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError:
        return 0
