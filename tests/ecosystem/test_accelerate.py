"""Accelerate without the Trainer: a loop of the user's own, against the same loop without an engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .accelerate_scenes import BOTH, CODE, CONFIGURATION
from .play import Played

pytestmark = pytest.mark.slow

Play = Callable[[str, int], Played]
CASES = [(1, where) for where in (CODE, CONFIGURATION, BOTH)] + [(2, CODE)]
every_case = pytest.mark.parametrize(("ranks", "where"), CASES)
every_stage = pytest.mark.parametrize("stage", ["stage 2", "stage 3", "stage 3 offloaded"])


@every_case
@every_stage
@pytest.mark.parametrize("how", ["", "accumulated "])
def test_a_loop_equals_the_loop_without_an_engine(play: Play, ranks: int, where: str, stage: str, how: str) -> None:
    """Losses, the norms that clip_grad_norm_ returns, learning rates, and what get_state_dict gives at the end."""
    played = play("accelerate_scenes", ranks)
    found, wanted = played("plugin", f"{how}{stage}, {where}"), played("stock", f"{how}plain")
    assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-6)
    assert found["norm"] == pytest.approx(wanted["norm"], rel=2e-5)
    assert found["rate"] == pytest.approx(wanted["rate"])
    assert min(wanted["norm"]) > 0.5, "the clip must have had an effect"
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, values in wanted["weights"].items():
        torch.testing.assert_close(
            torch.tensor(found["weights"][name]), torch.tensor(values), atol=1e-5, rtol=0, msg=name
        )


@every_case
@every_stage
@pytest.mark.parametrize("how", ["", "accumulated "])
def test_load_state_goes_back_to_save_state(play: Play, ranks: int, where: str, stage: str, how: str) -> None:
    """The second half of the pass, played again, gives the same losses and weights to the bit."""
    for rank in range(ranks):
        assert play("accelerate_scenes", ranks)("plugin", f"{how}{stage}, {where}", rank)["resumed"]


@pytest.mark.parametrize("where", [CODE, CONFIGURATION, BOTH])
@every_stage
def test_accumulation_equals_the_double_batch(play: Play, where: str, stage: str) -> None:
    played = play("accelerate_scenes", 1)
    found, whole = played("plugin", f"accumulated {stage}, {where}"), played("plugin", f"{stage}, {where}")
    assert found["norm"] == pytest.approx(whole["norm"], rel=2e-5)
    halves = found["loss"]
    assert [(a + b) / 2 for a, b in zip(halves[::2], halves[1::2])] == pytest.approx(whole["loss"], rel=2e-6)


@every_stage
def test_unwrap_model_gives_the_users_model(play: Play, stage: str) -> None:
    """FSDP2 changes its class by inheritance at stage 3."""
    engine, model = play("accelerate_scenes", 1)("plugin", f"{stage}, {CODE}")["kinds"]
    assert engine == "ZeroEngine"
    assert model == ("LlamaForCausalLM" if stage == "stage 2" else "FSDPLlamaForCausalLM")
