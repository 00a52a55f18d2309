"""What groups of processes leave this one: both versions of cgroup, all levels."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hf_zero_plugin import host_limits
from hf_zero_plugin.engine.pinned import PinnedArena
from hf_zero_plugin.errors import ConfigError


@pytest.fixture
def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_limits, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(host_limits, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="latin-1")


def test_cgroup_v2_takes_the_tightest_level(control_groups: Path) -> None:
    write(control_groups / "membership", "0::/job/step\n")
    write(control_groups / "cgroup/job/step/memory.max", "max\n")
    write(control_groups / "cgroup/job/memory.max", f"{2**33}\n")
    write(control_groups / "cgroup/job/step/cpu.max", "150000 100000\n")
    write(control_groups / "cgroup/job/cpu.max", "max 100000\n")
    assert host_limits.memory_limit_bytes() == 2**33
    assert host_limits.core_quota() == 1.5


def test_cgroup_v1(control_groups: Path) -> None:
    write(control_groups / "membership", "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n")
    write(control_groups / "cgroup/memory/memory.limit_in_bytes", f"{2**34}\n")
    write(control_groups / "cgroup/cpu/docker/abc/cpu.cfs_quota_us", "200000\n")
    write(control_groups / "cgroup/cpu/docker/abc/cpu.cfs_period_us", "100000\n")
    assert host_limits.memory_limit_bytes() == 2**34
    assert host_limits.core_quota() == 2.0


def test_no_limits(control_groups: Path) -> None:
    write(control_groups / "membership", "1:memory:/\n")
    write(control_groups / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(control_groups / "cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert host_limits.memory_limit_bytes() is None
    assert host_limits.core_quota() is None


def test_usable_cores_are_whole_and_at_least_one(control_groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert host_limits.usable_cores() == 8
    for quota, cores in (("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)):
        write(control_groups / "cgroup/cpu.max", quota)
        assert host_limits.usable_cores() == cores


@pytest.mark.parametrize(
    ("limit", "used", "statistic"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_available_memory_counts_pages_of_files_that_nobody_uses(
    limit: str, used: str, statistic: str, control_groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**34))
    root = control_groups / "cgroup"
    write(root / limit, f"{2**33}\n")
    write(root / used, f"{2**32}\n")
    assert host_limits.available_memory_bytes() == 2**32
    write((root / limit).with_name("memory.stat"), f"active_file 5\n{statistic} {2**31}\n")
    assert host_limits.available_memory_bytes() == 2**32 + 2**31
    write(root / used, f"{2**35}\n")
    assert host_limits.available_memory_bytes() == 0
    write(root / limit, "max\n" if limit == "memory.max" else "9223372036854771712\n")
    assert host_limits.available_memory_bytes() == 2**34


@pytest.mark.parametrize(
    "text", ["", "\n", "max", "--5", "-1", "100", "100 0", "100 x", "x y z", "inactive_file", "\xff\xfe"]
)
def test_odd_files_are_no_limits(text: str, control_groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**34))
    root = control_groups / "cgroup"
    write(control_groups / "membership", text)
    for name in ("cpu.max", "memory.stat", "memory.max", "cpu/cpu.cfs_period_us", "memory/memory.usage_in_bytes"):
        write(root / name, text)
    assert host_limits.core_quota() is None
    assert host_limits.available_memory_bytes() == 2**34


def test_states_that_a_group_has_no_room_for_are_refused(control_groups: Path) -> None:
    write(control_groups / "membership", "0::/job\n")
    write(control_groups / "cgroup/job/memory.max", f"{2**20}\n")
    write(control_groups / "cgroup/job/memory.current", "0\n")
    with pytest.raises(ConfigError, match=r"needs another 0\.5 GiB of host memory, 0\.0 GiB is available"):
        PinnedArena(2**27, pin=False)
