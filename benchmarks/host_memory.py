"""Host memory of one process, and of the whole machine, as the system counts it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

import psutil

_RESET_PEAK = "5"
"""Written to clear_refs it makes VmHWM start anew (man 5 proc)."""


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """VmHWM: the most that was resident since the process began or ``reset_peak`` worked; 0 if the system has none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> bool:
    """Start VmHWM anew. Returns whether the system allowed it."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


class MachineWatch:
    """From outside of the measured processes: by how much the machine's used memory rises above where it was.

    A library may keep host memory that no process's resident size shows (memory that a driver allocates); this sees it.
    Give ``limit_bytes`` and ``pids`` to end the processes when together they are larger. What the machine as a whole
    gained counts too, for memory that nobody owns up to, unless ``is_alone`` is false: others use the machine as well.
    """

    def __init__(
        self,
        pids: list[int] | None = None,
        limit_bytes: float | None = None,
        every_s: float = 0.1,
        *,
        is_alone: bool = True,
    ) -> None:
        self.most_used = self.most_resident = 0
        self.ended_them = False
        self._pids = pids or []
        self._limit = limit_bytes
        self._is_alone = is_alone
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._before = psutil.virtual_memory().used

    def __enter__(self) -> MachineWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.is_set():
            self.most_used = max(self.most_used, psutil.virtual_memory().used - self._before)
            if self._limit is not None and self._resident() > self._limit:
                self.ended_them = True
                for pid in self._pids:
                    try:
                        psutil.Process(pid).kill()
                    except psutil.Error:
                        continue
            time.sleep(self._every_s)

    def _resident(self) -> int:
        total = 0
        for pid in self._pids:
            try:
                total += psutil.Process(pid).memory_info().rss
            except psutil.Error:
                continue
        self.most_resident = max(self.most_resident, total)
        return max(total, self.most_used) if self._is_alone else total
