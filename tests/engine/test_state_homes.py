"""Which share of the offloaded states host cores update."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_zero_plugin.config.settings import OffloadOptimizerSettings
from hf_zero_plugin.engine.state_homes import _host_share, _interleaved

ALONE: Any = SimpleNamespace(is_alone=True)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_the_host_gets_its_share_evenly_and_not_the_first_piece(share: float) -> None:
    pieces: Any = list(range(40))
    hosted = _interleaved(pieces, share)
    assert len(hosted) == round(40 * share)
    for end in range(1, 41):
        assert abs(sum(piece < end for piece in hosted) - share * end) < 1
    assert 0 not in hosted or share == 1


def test_the_share_follows_from_the_threads_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for threads in (1, 2, 4, 16, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        shares.append(_host_share(OffloadOptimizerSettings(step_on="both"), ALONE))
        assert _host_share(OffloadOptimizerSettings(step_on="both", host_share=0.25), ALONE) == 0.25
    assert shares[:2] == [0, 0], "no thread to spare"
    assert shares == sorted(shares)
    assert 0.25 < shares[3] < 0.4


def test_ranks_that_gather_leave_it_to_their_devices(caplog: pytest.LogCaptureFixture) -> None:
    offload = OffloadOptimizerSettings(step_on="both", host_share=0.5)
    with caplog.at_level(logging.WARNING, logger="hf_zero_plugin"):
        assert _host_share(offload, SimpleNamespace(is_alone=False)) == 0  # type: ignore[arg-type]
    assert "stages 1 and 2 on several ranks" in caplog.text
