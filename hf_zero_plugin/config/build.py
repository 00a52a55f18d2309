"""Validated configuration -> ``EngineSettings``. Nothing is decided here."""

from __future__ import annotations

from typing import Any, cast

from hf_zero_plugin.config.fields import Section, ruling_of
from hf_zero_plugin.config.schema import DsConfig, params_model
from hf_zero_plugin.config.schema_zero import ZeroOptimization
from hf_zero_plugin.config.settings import (
    ActivationCheckpointingSettings,
    AioSettings,
    EngineSettings,
    FlopsProfilerSettings,
    LossScaleSettings,
    OffloadOptimizerSettings,
    OffloadParamSettings,
    OptimizerSettings,
    Precision,
    SchedulerSettings,
    Stage3Settings,
)

__all__ = ["build_settings", "weight_type"]

_GIB = 2**30


def build_settings(config: DsConfig) -> EngineSettings:
    """``config`` holds no "auto" but those that are the engine's own."""
    zero = config.zero_optimization
    precision = weight_type(config)
    autocast = (config.torch_autocast.dtype or "bf16") if config.torch_autocast.enabled else None
    is_fp16 = "fp16" in (precision, autocast)
    return EngineSettings(
        stage=zero.stage,
        precision=precision,
        autocast=autocast,
        master_dtype="bf16" if precision == "bf16" and config.bf16.bf16_master_weights_and_grads else "fp32",
        optimizer_state_dtype=_state_dtype(config, precision),
        cast_inputs=config.fp16.auto_cast and precision == "fp16",
        loss_scale=_loss_scale(config) if is_fp16 else None,
        # A key of the bf16 section: loss scaling cannot do without the check.
        check_grad_overflow=config.bf16.check_grad_overflow or is_fp16,
        train_batch_size=config.train_batch_size,
        train_micro_batch_size_per_gpu=config.train_micro_batch_size_per_gpu,
        gradient_accumulation_steps=config.gradient_accumulation_steps or 1,
        grad_accum_dtype=config.data_types.grad_accum_dtype,
        gradient_clipping=config.gradient_clipping,
        prescale_gradients=config.prescale_gradients,
        gradient_predivide_factor=config.gradient_predivide_factor,
        gradient_allreduce_op=config.gradient_allreduce_op,
        communication_dtype=config.communication_data_type,
        lower_precision_safe_modules=tuple(config.torch_autocast.lower_precision_safe_modules or ())
        if autocast
        else (),
        reduce_bucket_size=zero.reduce_bucket_size,
        allgather_bucket_size=zero.allgather_bucket_size,
        sub_group_size=zero.sub_group_size,
        overlap_comm=zero.overlap_comm is not False,
        offload_optimizer=_offload_optimizer(zero),
        offload_param=OffloadParamSettings(device=zero.offload_param.device, pin_memory=zero.offload_param.pin_memory),
        stage3=_stage3(zero),
        aio=AioSettings(
            block_size=config.aio.block_size,
            queue_depth=config.aio.queue_depth,
            intra_op_parallelism=config.aio.intra_op_parallelism,
            single_submit=config.aio.single_submit,
        ),
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
        throughput=config.timers.throughput.enabled,
        throughput_synchronized=config.timers.throughput.synchronized,
        log_level=config.log_level,
        flops_profiler=_flops_profiler(config),
    )


def weight_type(config: DsConfig) -> Precision:
    """Of the fp16 and bf16 sections, or else ``data_types.param_dtype``."""
    if config.fp16.enabled:
        return "fp16"
    return "bf16" if config.bf16.enabled else config.data_types.param_dtype or "fp32"


def _state_dtype(config: DsConfig, precision: Precision) -> Precision:
    in_weights_type = config.optimizer is not None and config.optimizer.params.get("fp32_optimizer_states") is False
    return precision if precision == "bf16" and (in_weights_type or config.bf16.bf16_optimizer_states) else "fp32"


def _flops_profiler(config: DsConfig) -> FlopsProfilerSettings | None:
    profiler = config.flops_profiler
    if not profiler.enabled:
        return None
    return FlopsProfilerSettings(
        profile_step=profiler.profile_step,
        module_depth=profiler.module_depth,
        top_modules=profiler.top_modules,
        detailed=profiler.detailed,
        output_file=profiler.output_file,
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
        host_share=offload.host_share,
        host_threads_share=offload.cpuadam_cores_perc if "cpuadam_cores_perc" in offload.model_fields_set else 1.0,
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
        max_reuse_distance=zero.stage3_max_reuse_distance,
        model_persistence_threshold=zero.stage3_model_persistence_threshold,
        leaf_module_classes=tuple(dict.fromkeys(zero.leaf_module.classes)),
        leaf_module_names=tuple(dict.fromkeys(zero.leaf_module.names)),
        leaf_module_name_suffixes=tuple(dict.fromkeys(zero.leaf_module.name_suffixes)),
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
