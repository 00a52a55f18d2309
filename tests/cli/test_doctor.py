"""hf-zero doctor: complete, honest about what is broken, and readable by programs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json

import psutil
import pytest

from hf_zero_plugin.cli import doctor, facts
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
