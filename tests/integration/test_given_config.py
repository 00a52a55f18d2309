"""Configurations as libraries hand them to ``deepspeed.initialize``."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hf_zero_plugin.errors import ConfigError
from hf_zero_plugin.integration.given_config import settings_given


class _Model(nn.Module):
    class config:
        hidden_size = 16


def _zero(**zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **zero}}


def test_sizes_follow_from_the_model() -> None:
    autos = dict.fromkeys(
        ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
    )
    settings = settings_given(_zero(**autos), _Model(), world_size=1)
    assert settings.reduce_bucket_size == 256
    assert settings.stage3.prefetch_bucket_size == 230
    assert settings.stage3.param_persistence_threshold == 160


def test_a_key_that_is_a_path_fills_an_auto_or_a_gap_and_nothing_else() -> None:
    given = {
        **_zero(stage3_param_persistence_threshold=5, reduce_bucket_size="auto"),
        "zero_optimization.reduce_bucket_size": 100,
        "zero_optimization.stage3_prefetch_bucket_size": 0.9 * 100,
        "zero_optimization.stage3_param_persistence_threshold": 1000,
    }
    before = {**given}
    settings = settings_given(given, nn.Linear(1, 1), world_size=1)
    assert (settings.reduce_bucket_size, settings.stage3.prefetch_bucket_size) == (100, 90)
    assert settings.stage3.param_persistence_threshold == 5
    assert given == before


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (_zero(reduce_bucket_size="auto"), "reduce_bucket_size"),
        ({**_zero(), "zero_optimization.stage": 2}, "zero_optimization.stage"),
        ({**_zero(), "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer.params.lr"),
    ],
)
def test_anything_else_is_an_error_that_names_it(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settings_given(config, nn.Linear(1, 1), world_size=1)
