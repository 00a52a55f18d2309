"""``torch_compile=True`` in TrainingArguments: the engine's model is compiled, and trains to the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .play import Played, same_weights

pytestmark = pytest.mark.slow

Play = Callable[[str, int], Played]


@pytest.mark.parametrize("scene", ["stage 2", "accumulated, stage 3"])
def test_compiled_equals_not_compiled(play: Play, scene: str) -> None:
    played = play("compile_scenes", 1)
    found, wanted = played("plugin", scene), played("stock", "plain")
    assert wanted["graphs"] == 0
    assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-6)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2e-5)
    same_weights(played.folder("plugin", scene), played.folder("stock", "plain"))
    if "after" in found:
        assert found["after"] == pytest.approx(wanted["after"], rel=2e-6)


def test_hooks_of_the_engine_cut_no_graph(play: Play) -> None:
    """The training is one graph, compiled once, as without an engine. At stage 3 FSDP2's own hooks part the blocks."""
    played = play("compile_scenes", 1)
    assert played("plugin", "stage 2")["graphs"] == played("stock", "plain, compiled")["graphs"] == 1
    assert 1 < played("plugin", "accumulated, stage 3")["graphs"] < 10
