"""How large copies are cut. That cuts wait for each other, and for what they should, is in test_races.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hf_zero_plugin.engine.cut_copies import LEAST_BYTES, MOST_BYTES, CutCopies, cut_bytes

from .races import RaceDetector


@pytest.mark.parametrize(
    ("numel", "cut", "sizes"),
    [
        (100, 100, [100]),
        (101, 100, [51, 50]),
        (1000, 300, [250, 250, 250, 250]),
        (7, 3, [3, 3, 1]),
        (1, 100, [1]),
        (0, 100, [0]),
    ],
)
def test_cuts_are_even_alternate_and_bring_every_byte(numel: int, cut: int, sizes: list[int]) -> None:
    source = torch.arange(numel).to(torch.uint8)
    target = torch.zeros(numel, dtype=torch.uint8)
    used: list[Any] = []
    copied: list[int] = []
    with RaceDetector():
        copies = CutCopies(torch.device("cpu"), cut)
        for stream in copies._streams:
            record = stream.record_event
            stream.record_event = lambda record=record, stream=stream: (used.append(stream), record())[1]  # type: ignore[misc, method-assign]
        original = torch.Tensor.copy_

        def copy_(to: torch.Tensor, part: torch.Tensor, **options: Any) -> torch.Tensor:
            assert options == {"non_blocking": True}
            copied.append(part.numel())
            return original(to, part)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", copy_)
            ended = copies.copy(target, source)
        assert ended.clock == used[-1].clock  # type: ignore[attr-defined]
    assert copied == sizes
    assert torch.equal(target, source)
    assert all(one is not other for one, other in itertools.pairwise(used))


def test_more_to_move_makes_longer_cuts_and_fewer_of_a_kind() -> None:
    totals = [10**6, 10**9, 3 * 10**9, 36 * 10**9, 10**12]
    found = [cut_bytes(total) for total in totals]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (LEAST_BYTES, MOST_BYTES)
    assert cut_bytes(4 * 3 * 10**9) == pytest.approx(2 * cut_bytes(3 * 10**9), abs=1)
