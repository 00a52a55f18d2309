"""What stage 3 says when a key has no effect."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest

from hf_zero_plugin.config.settings import EngineSettings, OffloadOptimizerSettings
from hf_zero_plugin.engine.sharded_wiring import _tell_what_does_not_apply


@pytest.mark.parametrize(
    ("offload", "rank", "named"),
    [
        ({"ratio": 0.5}, 0, "offload_optimizer.ratio: no effect here. All .* a quarter of its GPU"),
        ({"ratio": 0.5, "step_on": "host"}, 0, 'offload_optimizer.ratio: no effect here. All .* "step_on": "host"'),
        ({"step_on": "device", "ratio": "auto"}, 0, "offload_optimizer.ratio and step_on: .* a quarter of its GPU"),
        ({"step_on": "host"}, 0, None),
        ({"ratio": 0.5}, 1, None),
    ],
)
def test_keys_without_effect_on_several_ranks_are_named(
    offload: dict[str, Any], rank: int, named: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    parts: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), sharding=SimpleNamespace(rank=rank))
    settings = EngineSettings(stage=3, offload_optimizer=OffloadOptimizerSettings(device="cpu", **offload))
    with caplog.at_level(logging.WARNING, logger="hf_zero_plugin"):
        _tell_what_does_not_apply(parts, settings)
    assert re.search(named, caplog.text) if named is not None else not caplog.text
