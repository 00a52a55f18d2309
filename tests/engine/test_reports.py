"""What a configuration asks to be printed is printed: to stderr, or where the program's own logging goes."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_zero_plugin.config.settings import FlopsProfilerSettings
from hf_zero_plugin.engine.reports import reports, set_log_level

from .harness import Tiny, batch, make_engine, train

SCRIPT = """
import logging, sys
{setup}
logging.getLogger("hf_zero_plugin").setLevel(logging.WARNING)  # as transformers does
import torch
from tests.engine.harness import Tiny, make_engine, train
engine = make_engine(Tiny(), steps_per_print=2, train_micro_batch_size_per_gpu=4, log_level={level!r})
train(engine, 4)
"""


def _stderr(repo_dir: Path, setup: str = "", level: str | None = None) -> list[str]:
    code = SCRIPT.format(setup=setup, level=level)
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_dir, capture_output=True, text=True, check=True)
    return [line for line in done.stderr.splitlines() if "step" in line]


def test_steps_are_printed_whatever_the_trainers_log_level(repo_dir: Path) -> None:
    lines = _stderr(repo_dir)
    assert len(lines) == 2
    assert re.fullmatch(r"\[hf-zero\] step 2, skipped 0, lr \[0.01, 0.01\], [\d.]+ samples/s", lines[0])
    assert lines[1].startswith("[hf-zero] step 4, ")


def test_they_are_printed_once_where_logging_is_set_up_and_log_level_silences_them(repo_dir: Path) -> None:
    lines = _stderr(repo_dir, setup='logging.basicConfig(level=logging.WARNING, format="APP %(message)s")')
    assert [line[:10] for line in lines] == ["APP step 2", "APP step 4"]
    assert _stderr(repo_dir, level="error") == []


def test_log_level_is_this_packages_own() -> None:
    package = logging.getLogger("hf_zero_plugin")
    before = package.level
    try:
        set_log_level(None)
        assert package.level == before
        set_log_level("debug")
        assert (package.level, reports.level) == (logging.DEBUG, logging.DEBUG)
    finally:
        package.setLevel(before)
        reports.setLevel(logging.INFO)


def test_throughput_can_be_left_out_and_breakdowns_come_every_step(caplog: pytest.LogCaptureFixture) -> None:
    train(make_engine(Tiny(), steps_per_print=2, train_batch_size=4, throughput=False), 4)
    assert "samples/s" not in caplog.text
    caplog.clear()
    train(make_engine(Tiny(), memory_breakdown=True), 3)
    assert [r.getMessage()[:14] for r in caplog.records] == ["step 1: memory", "step 2: memory", "step 3: memory"]


# ---------------------------------------------------------------- operations


class Two(nn.Module):
    """A linear layer of 16 x 16 used twice, and one of 16 x 48: operations that can be counted on paper."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU())
        self.head = nn.Linear(16, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.body(x)))


ROWS = 4
BODY, HEAD = 2 * (2 * ROWS * 16 * 16), 2 * ROWS * 16 * 48


def _profile(caplog: pytest.LogCaptureFixture, **options: object) -> str:
    settings = FlopsProfilerSettings(profile_step=2, **options)  # type: ignore[arg-type]
    engine = make_engine(Two(), flops_profiler=settings, gradient_accumulation_steps=2)
    train(engine, 3, micros=2)
    return caplog.text


def test_operations_of_one_micro_step_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    said = _profile(caplog)
    forward = BODY + HEAD
    backward = 2 * HEAD + 2 * BODY - BODY // 2  # the input needs no gradient
    assert said.count("flops of step 2, first micro-step, this rank: 1.02 k parameters") == 1
    assert f"forward: {forward / 1000:.3g} kFLOP" in said
    assert f"backward: {backward / 1000:.3g} kFLOP" in said
    assert f"depth 1: head {HEAD / 1000:.3g} kFLOP\n" in said
    assert re.search(rf"head \(Linear\): 768 parameters, {HEAD / 1000:.3g} kFLOP, {HEAD / forward:.1%}", said)


def test_depth_number_and_detail_can_be_told(caplog: pytest.LogCaptureFixture) -> None:
    said = _profile(caplog, module_depth=1, top_modules=2, detailed=False)
    assert f"depth 1: head {HEAD / 1000:.3g} kFLOP, body {BODY / 1000:.3g} kFLOP" in said
    assert "depth 2" not in said
    assert "(Linear)" not in said


def test_the_profile_goes_to_a_file_and_training_is_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "sub" / "flops.txt"
    _profile(caplog, output_file=str(path))
    assert path.read_text().startswith("flops of step 2")
    assert f"written to {path}" in caplog.text
    plain, profiled = make_engine(Tiny()), make_engine(Tiny(), flops_profiler=FlopsProfilerSettings())
    assert train(plain, 3) == train(profiled, 3)
    assert torch.equal(plain(batch(9)), profiled(batch(9)))
