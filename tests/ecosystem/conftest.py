"""Scenes are played once a module and number of ranks, whichever tests look at them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .play import Played


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory, repo_dir: Path) -> Callable[[str, int], Played]:
    """``play(module, ranks)``: the scenes of ``tests.ecosystem.<module>``, without the engine and with it."""
    done: dict[tuple[str, int], Played] = {}

    def play(module: str, ranks: int) -> Played:
        if (module, ranks) not in done:
            done[module, ranks] = Played(module, tmp_path_factory.mktemp(f"{module}{ranks}"), repo_dir, ranks)
        return done[module, ranks]

    return play
