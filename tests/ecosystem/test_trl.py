"""TRL's trainers through the engine, against themselves without it: an RLHF pipeline, one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .play import Played, same_weights

for library in ("trl", "peft", "datasets"):
    pytest.importorskip(library, reason=f"{library} is not installed (extras: ecosystem, examples)")

pytestmark = pytest.mark.slow

Play = Callable[[str, int], Played]
both_numbers_of_ranks = pytest.mark.parametrize("ranks", [1, 2])
every_stage = pytest.mark.parametrize("stage", ["stage 2", "stage 3", "stage 3 offloaded"])


def _assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert (found["engine"], wanted["engine"] == "ZeroEngine") == ("ZeroEngine", False)
    assert len(wanted["loss"]) == 4
    assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-6)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2e-5)


@both_numbers_of_ranks
@every_stage
@pytest.mark.parametrize("how", ["pipeline", "accumulated"])
@pytest.mark.parametrize("step", ["sft", "reward", "dpo"])
def test_a_step_of_the_pipeline_equals_the_stock_trainers(
    play: Play, ranks: int, stage: str, how: str, step: str
) -> None:
    """Reward and DPO begin from what SFT has saved. Two micro-batches count as one of twice the size.

    To the bit where sums are taken in the same order. In another order Adam makes much of the last bits of small
    gradients: of a step of 0.01 the stock trainer's accumulation differs from its double batch by 3e-5.
    """
    played = play("trl_scenes", ranks)
    found, wanted = played("plugin", f"{how} {stage}")[step], played("stock", "pipeline plain")[step]
    _assert_same(found, wanted)
    atol = 0.0 if (ranks, how, stage) == (1, "pipeline", "stage 2") else 1e-4
    ours, theirs = played.folder("plugin", f"{how} {stage}") / step, played.folder("stock", "pipeline plain") / step
    same_weights(ours, theirs, atol=atol)


@both_numbers_of_ranks
@every_stage
def test_the_reference_is_an_engine_that_does_not_train(play: Play, ranks: int, stage: str) -> None:
    played = play("trl_scenes", ranks)
    found, wanted = played("plugin", f"pipeline {stage}")["dpo"], played("stock", "pipeline plain")["dpo"]
    assert found["reference"] == "ZeroEngine"
    assert found["of reference"] == pytest.approx(wanted["of reference"], rel=1e-6)


@both_numbers_of_ranks
@every_stage
def test_a_reference_that_follows_the_model(play: Play, ranks: int, stage: str) -> None:
    played = play("trl_scenes", ranks)
    found, wanted = played("plugin", f"following {stage}"), played("stock", "following plain")
    _assert_same(found, wanted)
    assert found["of reference"] == pytest.approx(wanted["of reference"], rel=1e-6)
    assert wanted["of reference"] != pytest.approx(
        played("stock", "pipeline plain")["dpo"]["of reference"], rel=1e-3
    ), "it must have moved"


@every_stage
def test_a_reference_whose_numbers_are_computed_before(play: Play, stage: str) -> None:
    played = play("trl_scenes", 1)
    _assert_same(played("plugin", f"computed before {stage}"), played("stock", "computed before plain"))


@both_numbers_of_ranks
@every_stage
@pytest.mark.parametrize("step", ["sft", "dpo"])
def test_adapters(play: Play, ranks: int, stage: str, step: str) -> None:
    """In DPO the reference is the model with its adapter off."""
    played = play("trl_scenes", ranks)
    found, wanted = played("plugin", f"adapters {stage}"), played("stock", "adapters plain")
    _assert_same(found[step], wanted[step])
    assert found["sft"]["files"] == ["adapter_model.safetensors"]
    assert found["dpo"]["reference"] == "NoneType"
    name = "adapter_model.safetensors"
    same_weights(
        played.folder("plugin", f"adapters {stage}") / step, played.folder("stock", "adapters plain") / step, name
    )


@both_numbers_of_ranks
@every_stage
def test_generation_between_steps(play: Play, ranks: int, stage: str) -> None:
    """Inside TRL's own context, which gathers the weights at stage 3; training goes on as if nothing had been."""
    played = play("trl_scenes", ranks)
    for rank in range(ranks):
        found, wanted = (
            played(kind, name, rank)
            for kind, name in (("plugin", f"generating {stage}"), ("stock", "generating plain"))
        )
        assert found["tokens"] == wanted["tokens"]
        assert wanted["tokens"][0] != wanted["tokens"][-1]
    _assert_same(found, played("stock", "pipeline plain")["sft"])
