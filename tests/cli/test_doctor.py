"""hf-zero doctor: complete, honest about what is broken, and readable by programs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path

import psutil
import pytest

from hf_zero_plugin.cli import cgroup, doctor, facts
from hf_zero_plugin.cli.facts import Fact

from .conftest import Run


def test_reports_this_machine(run: Run) -> None:
    done = run("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report["problems"]
    assert list(report) == [*facts.SECTIONS, "problems"]
    for name in ("torch", "transformers", "accelerate"):
        assert report["versions"][name]["value"] == importlib.metadata.version(name)
    assert report["devices"]["gpus"]["value"] == 0
    assert report["process backends"]["gloo"]["value"] is True
    assert report["memory"]["host memory"]["value"] == psutil.virtual_memory().total
    assert report["engine"]["--deepspeed, hf-zero run"]["value"].startswith("hf_zero_plugin")


def test_piped_output_is_plain_lines(run: Run) -> None:
    done = run("doctor", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")
    assert "\x1b" not in done.stdout
    assert "environment: HF_HUB_OFFLINE: 1" in done.stdout.splitlines()
    assert any(line.startswith("environment: ACCELERATE_USE_CPU: true (warning: ") for line in done.stdout.splitlines())


def print_with(monkeypatch: pytest.MonkeyPatch, *collected: Fact) -> int:
    monkeypatch.setattr(facts, "SECTIONS", {"versions": lambda: list(collected)})
    return doctor.run(argparse.Namespace(json=False))


def test_exit_code_tells_broken_from_unusual(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_with(monkeypatch, Fact("torch", "9.0", "outside the tested range", "warning")) == 0
    assert "warning: outside" in capsys.readouterr().out
    assert print_with(monkeypatch, Fact("torch", None, "missing", "broken")) == 1
    assert "BROKEN: missing" in capsys.readouterr().out


def test_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert print_with(monkeypatch, Fact("memory", 2**34, text="16.0 GiB")) == 0
    assert "16.0 GiB" in capsys.readouterr().out


def test_versions_are_judged_by_our_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"hf-zero-plugin": "0.1.0", "torch": "1.0", "transformers": "5.20.0"}
    monkeypatch.setattr(facts, "_version_of", versions.get)
    judged = {fact.name: fact for fact in facts.version_facts()}
    assert judged["torch"].verdict == "warning"
    assert "outside the tested range >=2.11,<2.14" in judged["torch"].remark
    assert judged["transformers"].verdict == "ok"
    assert judged["accelerate"].verdict == "broken"
    assert "pip install 'accelerate" in judged["accelerate"].remark
    assert judged["sacrebleu"].verdict == "ok"
    assert "extra: examples" in judged["sacrebleu"].remark
    assert "ruff" not in judged


@pytest.fixture
def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cgroup_v2_takes_the_tightest_level(control_groups: Path) -> None:
    write(control_groups / "membership", "0::/job/step\n")
    write(control_groups / "cgroup/job/step/memory.max", "max\n")
    write(control_groups / "cgroup/job/memory.max", f"{2**33}\n")
    write(control_groups / "cgroup/job/step/cpu.max", "150000 100000\n")
    write(control_groups / "cgroup/job/cpu.max", "max 100000\n")
    assert cgroup.memory_limit_bytes() == 2**33
    assert cgroup.core_quota() == 1.5


def test_cgroup_v1(control_groups: Path) -> None:
    write(control_groups / "membership", "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n")
    write(control_groups / "cgroup/memory/memory.limit_in_bytes", f"{2**34}\n")
    write(control_groups / "cgroup/cpu/docker/abc/cpu.cfs_quota_us", "200000\n")
    write(control_groups / "cgroup/cpu/docker/abc/cpu.cfs_period_us", "100000\n")
    assert cgroup.memory_limit_bytes() == 2**34
    assert cgroup.core_quota() == 2.0


def test_no_limits(control_groups: Path) -> None:
    write(control_groups / "membership", "1:memory:/\n")
    write(control_groups / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(control_groups / "cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert cgroup.memory_limit_bytes() is None
    assert cgroup.core_quota() is None
