"""Running a module of scenes in processes of its own, on one rank or on several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .test_trainer import environment

__all__ = ["play_scenes"]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def play_scenes(scenes: str, num_ranks: int, out: Path, repo: Path, *arguments: str, timeout_s: float = 300) -> str:
    """``python -m tests.integration.SCENES OUT ARGUMENTS...``: everything that it said."""
    launcher = [*TORCHRUN, str(num_ranks)] if num_ranks > 1 else []
    command = [sys.executable, *launcher, "-m", f"tests.integration.{scenes}", str(out), *arguments]
    env = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
