"""The Trainer through the engine against the stock Trainer, to the bit, and everything around training.

The runs themselves are in scenes.py; two processes play them, one without and one with the engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
LINEAR = [
    f"linear {stage} {offload}" for stage in (0, 1, 2) for offload in ("none", "auto", "host", "config optimizer")
]
PAIRS = {
    **dict.fromkeys(LINEAR, "linear"),
    **{f"warmup {stage}": "warmup" for stage in (0, 1, 2)},
    "warmup file": "warmup",
    "accumulated 2 host": "accumulated",
    "checkpointed 2 host": "checkpointed",
    "adafactor 2 auto": "adafactor",
    "linear without deepspeed": "linear",
}


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **extra}


def same_weights(first: Path, second: Path) -> None:
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


class Played:
    """Results of both processes, and where their weights are."""

    def __init__(self, root: Path, repo: Path) -> None:
        self.root = root
        started = {}
        for kind in ("stock", "plugin"):
            command = [sys.executable, "-m", "tests.integration.scenes", kind, str(root / kind)]
            started[kind] = subprocess.Popen(
                command, cwd=repo, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        self.output = {kind: process.communicate()[0] for kind, process in started.items()}
        for kind, process in started.items():
            assert process.returncode == 0, self.output[kind][-4000:]
        self.results = {kind: json.loads((root / kind / "results.json").read_text()) for kind in started}

    def __call__(self, kind: str, name: str) -> Mapping[str, Any]:
        result = self.results[kind][name]
        assert "error" not in result, result["error"]
        return result


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, repo_dir: Path) -> Played:
    return Played(tmp_path_factory.mktemp("scenes"), repo_dir)


@pytest.mark.parametrize("ours", PAIRS)
def test_training_equals_the_stock_trainer_to_the_bit(played: Played, ours: str) -> None:
    """Losses, gradient norms (max_grad_norm 0.5 and no gradient_clipping key), weights, weight decay groups.

    Every tensor of this T5 has a multiple of 16 elements; see tests/engine/test_optimizers.py for others.
    """
    result, expected = played("plugin", ours), played("stock", PAIRS[ours])
    assert len(result["loss"]) == 6
    assert result["loss"] == expected["loss"]
    assert result["grad_norm"] == expected["grad_norm"]
    assert min(expected["grad_norm"]) > 0.5, "the clip must have had an effect"
    if not ours.startswith("adafactor"):
        assert result["groups"] == expected["groups"]
    same_weights(played.root / "plugin" / ours, played.root / "stock" / PAIRS[ours])


def test_the_engine_was_used_where_it_was_asked_for_and_only_there(played: Played) -> None:
    for ours in PAIRS:
        assert (played("plugin", ours)["engine"] == "ZeroEngine") == (ours != "linear without deepspeed")
    assert played("stock", "linear")["engine"] != "ZeroEngine"


def test_training_arguments_without_deepspeed_are_without_deepspeed(played: Played) -> None:
    """Although runs with it went before in the same process."""
    assert played("plugin", "linear without deepspeed")["enabled"] is False


@pytest.mark.parametrize("name", ["resume", "resume bf16"])
def test_resumed_run_equals_uninterrupted_run_to_the_bit(played: Played, name: str) -> None:
    result = played("plugin", name)
    assert result["resumed"]["loss"][-3:] == result["whole"]["loss"][-3:]
    assert result["resumed"]["grad_norm"][-3:] == result["whole"]["grad_norm"][-3:]
    root = played.root / "plugin" / name
    same_weights(root / "resumed", root / "whole")
    assert {"global_step3", "latest"} <= set(result["files"])


def test_evaluate_and_generate_work_before_between_and_after_two_trainings(played: Played) -> None:
    result = played("plugin", "around training")
    assert result["predicted before"] == result["predicted after"] == 4
    assert len({result["before"], result["after"], result["after second"]}) == 3
    assert result["after"] < result["before"]
    assert result["steps"] == 6


def test_best_model_is_loaded_at_the_end(played: Played) -> None:
    result = played("plugin", "best model")
    assert result["losses"][0] == min(result["losses"])
    assert result["losses"][0] != result["losses"][-1]
    assert result["at end"] == result["losses"][0]
    assert result["best"].endswith("checkpoint-2")


def test_saved_model_is_what_from_pretrained_reads(played: Played) -> None:
    result = played("plugin", "saved model")
    assert result["equal"]
    assert result["dtype"] == result["engine dtype"] == "torch.bfloat16"


def test_auto_find_batch_size_starts_again_with_a_smaller_batch(played: Played) -> None:
    result = played("plugin", "out of memory")
    assert result["sizes"][0] == 8
    assert result["sizes"][-6:] == [5] * 6
    assert result["steps"] == 6


def test_warmup_of_no_steps_trains(played: Played) -> None:
    result = played("plugin", "warmup of no steps")
    assert len(result["loss"]) == 6
    assert result["lr"][-1] == 0.01
    assert result["loss"][-1] < result["loss"][0]


def test_plain_accelerate_loop_equals_plain_torch_to_the_bit(played: Played) -> None:
    result = played("plugin", "plain accelerate")
    assert result["equal"]
    assert result["norms"] == result["expected"]
    assert min(result["norms"]) > 0.5


def test_facade_answers_for_every_module_that_is_imported(played: Played) -> None:
    result = played("plugin", "facade")
    assert all("hf_zero_plugin" in home for home in result["homes"].values())
    assert result["missing"] == "ModuleNotFoundError"
    assert result["version"].endswith("+hfzero")


def test_unsupported_names_say_so(played: Played) -> None:
    assert played("plugin", "facade")["refused"] == ["tp_model_init", "init_inference"]


def test_the_choice_of_engine_is_printed_once_and_nothing_warns_about_schedules(played: Played) -> None:
    assert played.output["plugin"].count("is the engine behind --deepspeed") == 1
    assert "before `optimizer.step()`" not in played.output["plugin"]
