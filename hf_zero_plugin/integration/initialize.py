"""``deepspeed.initialize``: from what the caller holds to a ZeroEngine."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from hf_zero_plugin.config.auto import ResolvedConfig
from hf_zero_plugin.config.load import load_config
from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.zero_optimizer import trainable_groups
from hf_zero_plugin.errors import ConfigError, UnsupportedFeature
from hf_zero_plugin.integration.accelerator import current_device
from hf_zero_plugin.integration.comm import init_distributed
from hf_zero_plugin.integration.given_config import settings_given
from hf_zero_plugin.integration.parameter_offload import ParameterOffload

__all__ = ["add_config_arguments", "init_distributed", "initialize"]

logger = logging.getLogger("hf_zero_plugin")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    config_params: Any = None,
    **ignored: Any,
) -> tuple[ZeroEngine, Any, DataLoader | None, Any]:
    """Wrap ``model`` in an engine.

    Args:
        model: the model to train, on any device.
        optimizer: a ready-made optimizer; else the configuration's ``optimizer`` section is used.
        model_parameters: what to train, parameters or param groups; without it and without an optimizer the
            caller only wants to evaluate (Accelerate), or all of the model (``config=``).
        lr_scheduler: a scheduler, or a function from the optimizer to one.
        training_data: a dataset, for which a DataLoader is made.
        config, config_params: the configuration, as a dict or a path.

    Returns:
        (engine, optimizer or None, DataLoader or None, scheduler or None).

    Raises:
        ConfigError: the configuration cannot be honoured.
        UnsupportedFeature: model or sequence parallelism was asked for.
    """
    if model is None:
        raise ConfigError("deepspeed.initialize: no model was given; pass model=")
    if mpu is not None:
        raise UnsupportedFeature("deepspeed.initialize(mpu=...): model parallelism is not part of this engine")
    given = config if config is not None else config_params
    if given is None:
        given = getattr(args, "deepspeed_config", None)
    if given is None:
        raise ConfigError("deepspeed.initialize: no configuration was given; pass config= (a dict or a path)")
    init_distributed()
    resolved = _resolved_by_trainer(given)
    if resolved is not None:
        settings = resolved.settings
    else:
        settings = settings_given(_as_dict(given), model, world_size=dist.get_world_size())
    evaluates = optimizer is None and model_parameters is None and config is None
    groups = None if evaluates else _groups(model, optimizer, model_parameters, settings, resolved)
    engine = ZeroEngine(
        model,
        settings,
        device=current_device(),
        param_groups=groups,
        client_optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        config=given if isinstance(given, dict) else _as_dict(given),
    )
    if engine.optimizer is not None and engine.parts.shards is not None:
        engine.optimizer.parameter_offload = ParameterOffload()  # type: ignore[attr-defined]
    if resolved is not None and engine.global_rank == 0 and groups is not None:
        _log_once(resolved)
    loader = _loader(training_data, settings, collate_fn) if training_data is not None else None
    return engine, engine.optimizer, loader, engine.lr_scheduler


def _as_dict(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else load_config(given).config


def _resolved_by_trainer(given: Any) -> ResolvedConfig | None:
    """What the Trainer's config object resolved to, if ``given`` is the very dict it filled."""
    from hf_zero_plugin.integration.repairs import resolved_of

    return resolved_of(given) if isinstance(given, dict) else None


def _groups(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    model_parameters: Iterable[Any] | None,
    settings: EngineSettings,
    resolved: ResolvedConfig | None,
) -> list[dict[str, Any]] | None:
    if optimizer is not None:
        return trainable_groups(optimizer.param_groups)
    if settings.optimizer is None:
        return None
    params = list(model_parameters) if model_parameters is not None else list(model.parameters())
    groups = trainable_groups(params)
    if resolved is not None and len(groups) == 1 and set(groups[0]) == {"params"}:
        return _decayed_and_not(model, groups[0]["params"])
    return groups


def _decayed_and_not(model: nn.Module, params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The Trainer's two groups: biases and norms are not decayed. One group from the config would decay them all."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    wanted = {id(param) for param in params}
    named = [(name, param) for name, param in model.named_parameters() if id(param) in wanted]
    groups: list[dict[str, Any]] = [
        {"params": [param for name, param in named if name in decayed]},
        {"params": [param for name, param in named if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _loader(dataset: Any, settings: EngineSettings, collate_fn: Any) -> DataLoader:
    sampler: DistributedSampler | None = DistributedSampler(dataset) if hasattr(dataset, "__len__") else None
    return DataLoader(
        dataset, batch_size=settings.train_micro_batch_size_per_gpu or 1, sampler=sampler, collate_fn=collate_fn
    )


_logged: set[str] = set()


def _log_once(resolved: ResolvedConfig) -> None:
    from hf_zero_plugin.config.report import short_table

    text = short_table(resolved)
    if text not in _logged:
        _logged.add(text)
        print(text, flush=True)


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of scripts that call ``deepspeed.add_config_arguments``."""
    group = parser.add_argument_group("hf_zero_plugin")
    group.add_argument("--deepspeed", action="store_true", help="train through the ZeRO engine")
    group.add_argument("--deepspeed_config", help="ds_config.json")
    return parser
