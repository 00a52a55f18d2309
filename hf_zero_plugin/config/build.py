"""Validated configuration -> ``EngineSettings``. Nothing is decided here."""

from __future__ import annotations

from typing import Any, cast

from hf_zero_plugin.config.fields import Section, ruling_of
from hf_zero_plugin.config.schema import DsConfig, params_model
from hf_zero_plugin.config.schema_zero import ZeroOptimization
from hf_zero_plugin.config.settings import (
    ActivationCheckpointingSettings,
    EngineSettings,
    LossScaleSettings,
    OffloadOptimizerSettings,
    OffloadParamSettings,
    OptimizerSettings,
    Precision,
    SchedulerSettings,
    Stage3Settings,
)

__all__ = ["build_settings"]

_GIB = 2**30


def build_settings(config: DsConfig) -> EngineSettings:
    """``config`` holds no "auto" but those that are the engine's own."""
    zero = config.zero_optimization
    precision: Precision = "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"
    autocast = (config.torch_autocast.dtype or "bf16") if config.torch_autocast.enabled else None
    is_fp16 = "fp16" in (precision, autocast)
    return EngineSettings(
        stage=zero.stage,
        precision=precision,
        autocast=autocast,
        loss_scale=_loss_scale(config) if is_fp16 else None,
        check_grad_overflow=config.bf16.check_grad_overflow,
        train_batch_size=config.train_batch_size,
        train_micro_batch_size_per_gpu=config.train_micro_batch_size_per_gpu,
        gradient_accumulation_steps=config.gradient_accumulation_steps or 1,
        grad_accum_dtype=config.data_types.grad_accum_dtype,
        gradient_clipping=config.gradient_clipping,
        prescale_gradients=config.prescale_gradients,
        gradient_predivide_factor=config.gradient_predivide_factor,
        gradient_allreduce_op=config.gradient_allreduce_op,
        communication_dtype=config.communication_data_type,
        reduce_bucket_size=zero.reduce_bucket_size,
        allgather_bucket_size=zero.allgather_bucket_size,
        sub_group_size=zero.sub_group_size,
        overlap_comm=zero.overlap_comm is not False,
        offload_optimizer=_offload_optimizer(zero),
        offload_param=OffloadParamSettings(device=zero.offload_param.device, pin_memory=zero.offload_param.pin_memory),
        stage3=_stage3(zero),
        activation_checkpointing=ActivationCheckpointingSettings(
            cpu_checkpointing=config.activation_checkpointing.cpu_checkpointing
        ),
        optimizer=_typed(config, "optimizer", OptimizerSettings),
        scheduler=_typed(config, "scheduler", SchedulerSettings),
        checkpoint_tag_validation=config.checkpoint.tag_validation,
        use_node_local_storage=config.checkpoint.use_node_local_storage,
        steps_per_print=config.steps_per_print,
        wall_clock_breakdown=config.wall_clock_breakdown,
        memory_breakdown=config.memory_breakdown,
    )


def _loss_scale(config: DsConfig) -> LossScaleSettings:
    fp16 = config.fp16
    return LossScaleSettings(
        static_scale=fp16.loss_scale,
        initial_scale_power=fp16.initial_scale_power,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        min_scale=fp16.min_loss_scale,
    )


def _offload_optimizer(zero: ZeroOptimization) -> OffloadOptimizerSettings:
    offload = zero.offload_optimizer
    budget = offload.gpu_memory_budget
    return OffloadOptimizerSettings(
        device=offload.device,
        pin_memory=offload.pin_memory,
        ratio=offload.ratio,
        gpu_memory_budget_bytes=None if budget is None else int(budget * _GIB),
        step_on=offload.step_on,
        nvme_path=offload.nvme_path,
        buffer_count=offload.buffer_count,
        pipeline_read=offload.pipeline_read,
        pipeline_write=offload.pipeline_write,
    )


def _stage3(zero: ZeroOptimization) -> Stage3Settings:
    return Stage3Settings(
        param_persistence_threshold=zero.stage3_param_persistence_threshold,
        prefetch_bucket_size=zero.stage3_prefetch_bucket_size,
        max_live_parameters=zero.stage3_max_live_parameters,
        gather_16bit_weights_on_model_save=zero.stage3_gather_16bit_weights_on_model_save,
        leaf_module_classes=tuple(dict.fromkeys(zero.leaf_module.classes)),
    )


def _typed(config: DsConfig, kind: str, settings: type[Any]) -> Any:
    """The optimizer or the scheduler: what the user wrote, less the keys that are for nobody."""
    node = getattr(config, kind)
    if node is None:
        return None
    model = cast(type[Section], params_model(kind, node.type))
    typed = model.model_validate(node.params)
    passed = {}
    for name, field in model.model_fields.items():
        ruling, value = ruling_of(field), getattr(typed, name)
        was_given = name in typed.model_fields_set and value is not None
        if was_given and ruling is not None and ruling.verdict == "applied":
            passed[name] = value
    return settings(type=node.type, params=passed)
