"""What a container or a scheduler leaves this process of the host: cgroup v2 and v1, the tightest of all levels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory_bytes", "core_quota", "memory_limit_bytes", "usable_cores"]

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

_V1_UNLIMITED = 2**60
"""cgroup v1 writes "no limit" as the largest multiple of a page; no machine has so much memory."""


def memory_limit_bytes() -> int | None:
    """The memory that this process may use together with its group; None without a limit."""
    limits = [_integer(directory / "memory.max") for directory in _directories("")]
    limits += [_integer(directory / "memory.limit_in_bytes") for directory in _directories("memory")]
    known = [limit for limit in limits if limit is not None and limit < _V1_UNLIMITED]
    return min(known, default=None)


def available_memory_bytes() -> int:
    """Host memory that can still be taken: what the machine has free, or what a group has left, whichever is less.

    Pages of files that nobody has used lately count as free in both: the kernel drops them before it refuses memory.
    """
    import psutil

    left = [psutil.virtual_memory().available]
    for controller, limit_name, used_name, droppable_name in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for directory in _directories(controller):
            limit, used = _integer(directory / limit_name), _integer(directory / used_name)
            if limit is not None and used is not None:
                left.append(limit - used + _statistic(directory / "memory.stat", droppable_name))
    return max(0, min(left))


def usable_cores() -> int:
    """Cores that this process may use: affinity and the cgroup's CPU quota, at least 1."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = core_quota()
    return max(1, num_cores if quota is None else min(num_cores, int(quota)))


def core_quota() -> float | None:
    """Cores' worth of time that this process may use together with its group; None without a limit."""
    quotas: list[float] = []
    for directory in _directories(""):
        quota_us, period_us = [*map(_number, _text(directory / "cpu.max").split()), None, None][:2]
        if quota_us and period_us:
            quotas.append(quota_us / period_us)
    for directory in _directories("cpu"):
        quota_us, period_us = _integer(directory / "cpu.cfs_quota_us"), _integer(directory / "cpu.cfs_period_us")
        if quota_us and period_us:  # no limit is -1
            quotas.append(quota_us / period_us)
    return min(quotas, default=None)


def _directories(controller: str) -> Iterator[Path]:
    """Directories of this process's group and its ancestors, for a v1 controller, or for v2 with ``""``."""
    mount = ROOT / controller if controller else ROOT
    group = "/"
    for line in _text(MEMBERSHIP).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if path and controller in controllers.split(","):
            group = path
    directory = mount / group.lstrip("/")
    while True:
        # In a container the path may be the host's, which does not exist below our mount: then only the mount counts.
        if directory.is_dir():
            yield directory
        if directory == mount or mount not in directory.parents:
            return
        directory = directory.parent


def _integer(path: Path) -> int | None:
    return _number(_text(path).strip())


def _number(text: str) -> int | None:
    """None for a word, "max", or a negative number, which is how a missing limit is written."""
    return int(text) if text.isdecimal() else None


def _statistic(path: Path, name: str) -> int:
    """Of a file of lines ``name number``; 0 if it is not there."""
    words = (line.split() for line in _text(path).splitlines())
    return next((_number(pair[1]) or 0 for pair in words if len(pair) == 2 and pair[0] == name), 0)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
