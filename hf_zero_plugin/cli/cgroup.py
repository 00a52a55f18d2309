"""Limits that a container or a scheduler has set on this process: cgroup v2 and v1, the tightest of all levels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["core_quota", "memory_limit_bytes"]

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


def core_quota() -> float | None:
    """Cores' worth of time that this process may use together with its group; None without a limit."""
    quotas: list[float] = []
    for directory in _directories(""):
        words = _text(directory / "cpu.max").split()
        if len(words) == 2 and words[0].isdecimal():
            quotas.append(int(words[0]) / int(words[1]))
    for directory in _directories("cpu"):
        quota_us, period_us = _integer(directory / "cpu.cfs_quota_us"), _integer(directory / "cpu.cfs_period_us")
        if quota_us is not None and quota_us > 0 and period_us:
            quotas.append(quota_us / period_us)
    return min(quotas, default=None)


def _directories(controller: str) -> Iterator[Path]:
    """Directories of this process's group and its ancestors, for a v1 controller, or for v2 with ``""``."""
    mount = ROOT / controller if controller else ROOT
    group = "/"
    for line in _text(MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
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
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
