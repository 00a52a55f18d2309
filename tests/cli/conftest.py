"""Runs the real command in child processes, on CPU whatever the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

HF_ZERO = [sys.executable, "-c", "import sys; from hf_zero_plugin.cli.main import main; sys.exit(main())"]
TIMEOUT_S = 120
_LAUNCH_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "ACCELERATE_USE_CPU",
    "HF_ZERO_TRACEBACK",
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]


def clean_environment(**extra: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCH_VARIABLES}
    return {**environment, "CUDA_VISIBLE_DEVICES": "", **extra}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run("run", "script.py", VARIABLE="value")``: hf-zero in ``tmp_path``, to its end."""

    def run_to_end(*arguments: str, command: list[str] = HF_ZERO, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=clean_environment(**extra),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    return run_to_end


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """As ``run``, but running: in a session of its own, so that signals reach what a terminal's would reach."""
    processes: list[subprocess.Popen[str]] = []

    def start_in_background(*arguments: str, **extra: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*HF_ZERO, *arguments],
            cwd=tmp_path,
            env=clean_environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start_in_background
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Write a script into ``tmp_path`` and return its name."""

    def write(source: str, name: str = "script.py") -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
        return name

    return write


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
