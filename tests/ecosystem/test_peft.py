"""LoRA by PEFT through the engine, against the stock Trainer with the same model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from safetensors.torch import load_file

from .play import Played, same_weights

pytest.importorskip("peft", reason="peft is not installed (extra: ecosystem)")

pytestmark = pytest.mark.slow

Play = Callable[[str, int], Played]
SCENES = ["stage 2", "stage 3", "stage 3, small ones whole", "stage 3, offloaded"]
both_numbers_of_ranks = pytest.mark.parametrize("ranks", [1, 2])
every_scene = pytest.mark.parametrize("scene", [*SCENES, *(f"accumulated, {scene}" for scene in SCENES)])
ADAPTER = "adapter_model.safetensors"


@both_numbers_of_ranks
@every_scene
def test_trains_as_the_stock_trainer_does(play: Play, ranks: int, scene: str) -> None:
    """Two micro-batches count as one of twice the size, too."""
    played = play("peft_scenes", ranks)
    found, wanted = played("plugin", scene), played("stock", "plain")
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    same_weights(played.folder("plugin", scene), played.folder("stock", "plain"), ADAPTER)


@both_numbers_of_ranks
@every_scene
def test_saves_the_adapter_and_nothing_else(play: Play, ranks: int, scene: str) -> None:
    played = play("peft_scenes", ranks)
    folder = played.folder("plugin", scene)
    assert [file.name for file in folder.glob("*.safetensors")] == [ADAPTER]
    saved = load_file(folder / ADAPTER)
    assert {tuple(tensor.shape) for tensor in saved.values()} == {(4, 16), (16, 4)}
    assert sum(tensor.numel() for tensor in saved.values()) == played("plugin", scene)["trainable"] == 512


@both_numbers_of_ranks
@every_scene
def test_states_are_of_the_adapter_only_and_on_the_host(play: Play, ranks: int, scene: str) -> None:
    """Adapters of this size stay whole if small parameters do, and the states of whole ones stay on the device."""
    seen = play("peft_scenes", ranks)("plugin", scene)
    home, other = ("device", "host") if "whole" in scene else ("host", "device")
    shards = ranks if scene.endswith(("stage 2", "whole")) else 1  # padded to 64 elements a tensor if cut alone
    assert seen["memory"][home]["moments"] == 2 * 4 * 512 // shards
    assert "moments" not in seen["memory"][other]
    assert seen["memory"]["device"]["gradients"] == 4 * 512 // (1 if "whole" in scene else shards)


@pytest.mark.parametrize("scene", ["stage 3", "stage 3, offloaded"])
def test_two_ranks_hold_half_of_the_frozen_weights_each(play: Play, scene: str) -> None:
    one, two = (play("peft_scenes", ranks)("plugin", scene)["memory"]["device"]["weights"] for ranks in (1, 2))
    assert one > 4 * play("peft_scenes", 1)("plugin", scene)["elements"]
    assert two / one == pytest.approx(0.5, abs=0.02)


@both_numbers_of_ranks
@every_scene
def test_reads_back_merges_and_unmerges(play: Play, ranks: int, scene: str) -> None:
    """Outputs are the trained model's, which is far from the one that training began with."""
    far = play("peft_scenes", ranks)("plugin", scene)["far"]
    assert far.pop("untrained") > 0.1
    assert set(far) == {"read back", "merged in place", "unmerged", "merged and unloaded"}
    assert max(far.values()) < 1e-6
