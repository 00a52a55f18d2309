"""The Trainer at stage 3, one process and two: training, evaluation, generation, checkpoints, saving, LoRA.

One run of ``stage3_scenes`` per number of ranks; the tests compare its scenes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .playing import play_scenes

pytestmark = pytest.mark.slow

SAME = [
    "sharded",
    "offloaded",
    "checkpointed layers",
    "trained twice",
    "resumed",
    "resumed from stage 0",
    "resumed at stage 0",
    "loaded",
]
Results = tuple[Path, dict[str, Any]]


def _play(out: Path, other: str, repo: Path, num_ranks: int) -> Results:
    play_scenes("stage3_scenes", num_ranks, out, repo, other, timeout_s=600)
    return out, json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, repo_dir: Path) -> Results:
    return _play(tmp_path_factory.mktemp("one"), "-", repo_dir, 1)


@pytest.fixture(scope="module")
def two(one: Results, tmp_path_factory: pytest.TempPathFactory, repo_dir: Path) -> Results:
    return _play(tmp_path_factory.mktemp("two"), str(one[0]), repo_dir, 2)


def _weights(results: Results, scene: str) -> dict[str, torch.Tensor]:
    return load_file(results[0] / scene / "model.safetensors")


def _assert_same_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("scene", SAME)
@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_stage_0(scene: str, ranks: int, one: Results, two: Results) -> None:
    """save_model's file, and what evaluation and generation of the trained model give."""
    results = one if ranks == 1 else two
    _assert_same_weights(_weights(results, scene), _weights(one, "stage 0"))
    found, wanted = results[1][scene], results[1]["stage 0"]
    assert found["after"] == pytest.approx(wanted["after"], abs=1e-5)
    assert found["generated"] == wanted["generated"]
    if scene != "loaded":
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5) or "resumed" in scene


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_streamed_into_one_set(ranks: int, one: Results, two: Results) -> None:
    """From stage 3 alone; experts, which are cut into many tensors on the way to the file, as well."""
    out, results = one if ranks == 1 else two
    assert [results[scene]["streams"] for scene in ("sharded", "offloaded", "stage 0", "lora")] == [1, 1, 0, 0]
    assert results["experts"]["streams"] == 1
    assert results["experts at stage 0"]["streams"] == 0
    saved, wanted = _weights((out, results), "experts"), _weights((out, results), "experts at stage 0")
    assert len(saved) > 2 * 3 * 3
    _assert_same_weights(saved, wanted, 0)


def test_two_ranks_generate_rows_of_uneven_lengths_as_one_does(one: Results, two: Results) -> None:
    rows = one[1]["sharded"]["generated"]
    lengths = {len([token for token in row if token]) for row in rows}
    assert len(lengths) > 2
    assert two[1]["sharded"]["generated"][: len(rows)] == rows


def test_resumes_what_another_number_of_ranks_saved(one: Results, two: Results) -> None:
    _assert_same_weights(_weights(two, "resumed from other ranks"), _weights(one, "stage 0"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluates_and_predicts_before_training_and_after_loading(ranks: int, one: Results, two: Results) -> None:
    results = (one if ranks == 1 else two)[1]
    assert results["sharded"]["before"] == pytest.approx(results["stage 0"]["before"], abs=1e-5)
    assert results["loaded"]["before"] == pytest.approx(results["sharded"]["after"], abs=1e-5)
    assert results["sharded"]["predicted before"] == results["stage 0"]["predicted before"]
    assert results["loaded"]["predicted before"] == results["sharded"]["generated"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scene", ["resized", "resized and offloaded"])
def test_embeddings_resized_after_loading_and_beams(scene: str, ranks: int, one: Results, two: Results) -> None:
    """Loaded in shards, with new rows before the engine is made; generation with beams on uneven rows."""
    results = one if ranks == 1 else two
    wanted = _weights(results, "resized at stage 0")
    assert wanted["shared.weight"].shape[0] == 70
    _assert_same_weights(_weights(results, scene), wanted, 1e-5)
    assert results[1][scene]["generated"] == results[1]["resized at stage 0"]["generated"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_encoder_runs_by_itself(ranks: int, one: Results, two: Results) -> None:
    results = (one if ranks == 1 else two)[1]
    assert results["encoded"] == pytest.approx(results["encoded at stage 0"], rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulation_equals_stage_0(ranks: int, one: Results, two: Results) -> None:
    results = one if ranks == 1 else two
    _assert_same_weights(_weights(results, "accumulated"), _weights(results, "accumulated at stage 0"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_trains_a_second_time(ranks: int, one: Results, two: Results) -> None:
    results = (one if ranks == 1 else two)[1]
    assert results["trained twice"]["again"] < sum(results["stage 0"]["loss"]) / 4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scene", ["lora", "lora offloaded"])
def test_lora_equals_stage_2_and_saves_adapters_only(scene: str, ranks: int, one: Results, two: Results) -> None:
    out, results = one if ranks == 1 else two
    found, wanted = results[scene], results["lora at stage 2"]
    assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    assert "adapter_model.safetensors" in found["files"]
    assert "model.safetensors" not in found["files"]
    adapters = load_file(out / scene / "adapter_model.safetensors")
    # Adam makes much of the last bits of gradients that are almost zero.
    _assert_same_weights(adapters, load_file(one[0] / "lora at stage 2" / "adapter_model.safetensors"), 2e-5)
    num_bytes = sum(tensor.numel() for tensor in adapters.values()) * 8
    assert found["states"] <= 2 * num_bytes  # padding of tiny tensors
