"""Two CPU ranks under ``hf-zero run`` and under torchrun, against the stock Trainer's own two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .test_trainer import environment, same_weights

pytestmark = pytest.mark.slow

HF_ZERO = [sys.executable, "-c", "import sys; from hf_zero_plugin.cli.main import main; sys.exit(main())"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
TORCHRUN += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]


def _play(command: list[str], out: Path, repo: Path) -> list[dict[str, Any]]:
    env = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = [json.loads((out / f"results{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        for name, scene in result.items():
            assert "error" not in scene, f"{name}: {scene['error']}"
    return results


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, repo_dir: Path) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("stock")
    command = [*TORCHRUN, "-m", "tests.integration.scenes", "stock", str(out), "ranks"]
    return out, _play(command, out, repo_dir)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory, repo_dir: Path) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("plugin")
    command = [*HF_ZERO, "run", "--num_gpus", "2", "-m", "tests.integration.scenes", "plugin", str(out), "ranks"]
    return out, _play(command, out, repo_dir)


Results = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("name", ["linear 0 None", "linear 1 host", "linear 2 auto"])
def test_two_ranks_equal_the_stock_trainers_two_ranks(plugin: Results, stock: Results, name: str) -> None:
    """Stage 0 to the bit. Stages 1 and 2 clip, and add squares of shards in another order: the norm's last bit."""
    for ours, theirs in zip(plugin[1], stock[1]):
        assert ours[name]["loss"] == pytest.approx(theirs["linear"]["loss"], rel=1e-5)
        assert ours[name]["grad_norm"] == pytest.approx(theirs["linear"]["grad_norm"], rel=1e-4)
    first, second = plugin[0] / name, stock[0] / "linear"
    if name == "linear 0 None":
        assert plugin[1][0][name]["loss"] == stock[1][0]["linear"]["loss"]
        assert plugin[1][0][name]["grad_norm"] == stock[1][0]["linear"]["grad_norm"]
        same_weights(first, second)
    theirs = load_file(second / "model.safetensors")
    for key, tensor in load_file(first / "model.safetensors").items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5)


def test_two_ranks_resume_to_the_bit(plugin: Results) -> None:
    for rank in plugin[1]:
        result = rank["resume"]
        assert result["resumed"]["loss"][-3:] == result["whole"]["loss"][-3:]
    same_weights(plugin[0] / "resume" / "resumed", plugin[0] / "resume" / "whole")


def test_torchrun_reaches_the_engine_as_hf_zero_run_does(plugin: Results, tmp_path: Path, repo_dir: Path) -> None:
    command = [*TORCHRUN, "-m", "hf_zero_plugin", "-m", "tests.integration.scenes", "plugin", str(tmp_path), "ranks"]
    results = _play(command, tmp_path, repo_dir)
    for name in ("linear 0 None", "linear 2 auto"):
        assert results[0][name]["loss"] == plugin[1][0][name]["loss"]
        same_weights(tmp_path / name, plugin[0] / name)
