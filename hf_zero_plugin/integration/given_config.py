"""Configurations that other libraries hand to ``deepspeed.initialize``: copies of the user's, part-filled by them.

Two habits of theirs are undone before the configuration is checked like any other:

    "zero_optimization.reduce_bucket_size": 256     a top-level key that is a path, meant for an "auto" there (TRL)
    "reduce_bucket_size": "auto"                    a size that follows from the model, which ``initialize`` is given
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from hf_zero_plugin.config.auto import resolve_dict
from hf_zero_plugin.config.facts import ModelFacts
from hf_zero_plugin.config.fields import AUTO
from hf_zero_plugin.config.fill import SIZES_BY_MODEL, all_sizes
from hf_zero_plugin.config.paths import is_present, lookup, put
from hf_zero_plugin.config.settings import EngineSettings

__all__ = ["settings_given"]


def settings_given(config: dict[str, Any], model: nn.Module, *, world_size: int) -> EngineSettings:
    """Settings for ``model`` from a configuration that no Trainer has resolved; ``config`` is not changed.

    Raises:
        ConfigError: a mistake, or an "auto" that is left; every one of them is named.
    """
    config = copy.deepcopy(config)
    _put_paths_in_place(config)
    model_config = getattr(model, "config", None)
    if model_config is not None:
        for path, fill in all_sizes(ModelFacts.of(model_config)).items():
            if lookup(config, path) == AUTO:
                put(config, path, fill.value)
    return resolve_dict(config, world_size=world_size)


def _put_paths_in_place(config: dict[str, Any]) -> None:
    """What stands in its section as a value goes before the same key as a path."""
    for key in [key for key in config if f"$.{key}" in SIZES_BY_MODEL]:
        value, path = config.pop(key), f"$.{key}"
        if not is_present(config, path) or lookup(config, path) == AUTO:
            put(config, path, int(value))
