"""What stage 3 says when a key has no effect."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_zero_plugin.config.settings import EngineSettings, OffloadOptimizerSettings, OptimizerSettings
from hf_zero_plugin.engine import sharded_wiring
from hf_zero_plugin.engine.optimizers import rule_from_config
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


@pytest.mark.parametrize(
    ("offload", "fits", "others_fit", "streams"),
    [
        ({"device": "cpu"}, True, True, True),
        ({"device": "cpu"}, True, False, False),
        ({"device": "cpu"}, False, True, False),
        ({"device": "cpu", "step_on": "host"}, True, True, False),
        ({"device": "nvme", "nvme_path": "/tmp"}, True, True, False),
        ({"device": "none"}, True, True, False),
        ({"device": "none", "step_on": "device"}, True, True, True),
    ],
)
def test_ranks_agree_whether_offloaded_weights_are_updated_on_the_device(
    offload: dict[str, Any], fits: bool, others_fit: bool, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device and another rank are stood in for; what they would do is tested where there are two GPUs."""

    def all_reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        tensor.clamp_(max=int(others_fit))

    monkeypatch.setattr(sharded_wiring, "_fits_device", lambda *_: fits)
    monkeypatch.setattr(sharded_wiring.dist, "all_reduce", all_reduce)
    original = torch.tensor
    monkeypatch.setattr(sharded_wiring.torch, "tensor", lambda value, device: original(value))
    parts: Any = SimpleNamespace(device=torch.device("cuda", 0), sharding=SimpleNamespace(rank=0, world_size=2))
    settings = EngineSettings(stage=3, offload_optimizer=OffloadOptimizerSettings(**offload))
    rule = rule_from_config(OptimizerSettings(type="AdamW", params={"lr": 1e-3}))
    found = sharded_wiring._streams(parts, settings, rule, None, torch.device("cpu"), [], None)
    assert found == streams
