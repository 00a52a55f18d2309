"""What the engine is told: a resolved configuration with no ``"auto"`` left in it.

``auto.resolve`` makes it from the user's JSON, the TrainingArguments and the model; the engine reads nothing else.
Sizes called ``*_size`` are counted in elements, as in DeepSpeed's configuration; ``*_bytes`` are bytes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "fp16", "bf16"]
OffloadDevice = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScaleSettings:
    """fp16 loss scaling. ``static_scale`` 0 means dynamic."""

    static_scale: float = 0.0
    initial_scale_power: int = 16
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadOptimizerSettings:
    """Where fp32 master weights and optimizer states live between steps."""

    device: OffloadDevice = "none"
    pin_memory: bool = True
    ratio: float | Literal["auto"] = 1.0
    """Share of the states kept on the host; "auto" fills ``gpu_memory_budget_bytes`` first."""
    gpu_memory_budget_bytes: int | None = None
    step_on: Literal["auto", "host", "device", "both"] = "auto"
    """Who computes the update: host cores, or the accelerator with the states streamed through it (ours alone)."""
    host_share: float | None = None
    """Of the offloaded states, what host cores update where both work; None: by the number of threads."""
    host_threads_share: float = 1.0
    """Of the threads that torch uses, for the update on the host."""
    nvme_path: str | None = None
    buffer_count: int = 4
    pipeline_read: bool = False
    pipeline_write: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AioSettings:
    """Transfers between NVMe and host memory."""

    block_size: int = 1_048_576
    """Bytes of one read or write."""
    queue_depth: int = 8
    intra_op_parallelism: int = 1
    single_submit: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadParamSettings:
    """Where the half-precision shards of stage 3 live between uses."""

    device: OffloadDevice = "none"
    pin_memory: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage3Settings:
    param_persistence_threshold: int = 100_000
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    model_persistence_threshold: int = sys.maxsize
    gather_16bit_weights_on_model_save: bool = False
    leaf_module_classes: tuple[str, ...] = ()
    leaf_module_names: tuple[str, ...] = ()
    leaf_module_name_suffixes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationCheckpointingSettings:
    cpu_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopsProfilerSettings:
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    type: str
    """Name as the user wrote it; engine/optimizers.py matches it without regard to case."""
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSettings:
    type: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    stage: int = 0
    precision: Precision = "fp32"
    """Type of the weights on the device and of the forward pass."""
    autocast: Literal["fp16", "bf16"] | None = None
    """torch.autocast around the forward pass (torch_autocast section); weights then stay fp32."""
    master_dtype: Precision = "fp32"
    optimizer_state_dtype: Precision = "fp32"
    """Types in which master weights and the optimizer's states rest; the update itself is always fp32."""
    cast_inputs: bool = False
    """Floating-point inputs of the model take the type of the weights (fp16.auto_cast)."""
    loss_scale: LossScaleSettings | None = None
    """Set exactly when gradients are fp16 (precision or autocast is fp16)."""
    check_grad_overflow: bool = True

    train_batch_size: int | None = None
    train_micro_batch_size_per_gpu: int | None = None
    gradient_accumulation_steps: int = 1
    grad_accum_dtype: Precision | None = None
    gradient_clipping: float = 0.0
    """Largest global gradient norm; 0 switches clipping off."""
    prescale_gradients: bool = False
    gradient_predivide_factor: float = 1.0
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    communication_dtype: Precision | None = None
    lower_precision_safe_modules: tuple[str, ...] = ()
    """Import paths of module classes whose gradients are reduced in the type of ``autocast``."""

    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    sub_group_size: int = 1_000_000_000
    overlap_comm: bool = True

    offload_optimizer: OffloadOptimizerSettings = OffloadOptimizerSettings()
    offload_param: OffloadParamSettings = OffloadParamSettings()
    aio: AioSettings = AioSettings()
    stage3: Stage3Settings = Stage3Settings()
    activation_checkpointing: ActivationCheckpointingSettings = ActivationCheckpointingSettings()

    optimizer: OptimizerSettings | None = None
    scheduler: SchedulerSettings | None = None

    checkpoint_tag_validation: Literal["ignore", "warn", "fail"] = "warn"
    use_node_local_storage: bool = False

    steps_per_print: int | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    throughput: bool = True
    """Samples per second beside what steps_per_print prints."""
    throughput_synchronized: bool = True
    log_level: str | None = None
    flops_profiler: FlopsProfilerSettings | None = None
    """None: off."""
