"""The whole of ds_config.json: every key DeepSpeed 0.19 knows, and what this engine does with it.

``DsConfig`` validates, ``known_keys`` walks.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo

from hf_zero_plugin.config.fields import (
    AboveZero,
    AutoAllowed,
    AutoNonNegative,
    AutoPositive,
    Dtype,
    LogLevel,
    Opaque,
    Positive,
    PrintEvery,
    Ruling,
    Section,
    applied,
    inert,
    refused,
    ruling_of,
    section,
)
from hf_zero_plugin.config.schema_optim import OPTIMIZERS, SCHEDULERS, Optimizer, Scheduler
from hf_zero_plugin.config.schema_precision import AMP, BF16, FP16, DataTypes, TorchAutocast
from hf_zero_plugin.config.schema_rest import (
    AIO,
    ActivationCheckpointing,
    Checkpoint,
    Comet,
    CommsLogger,
    Compile,
    CsvMonitor,
    Elasticity,
    FlopsProfiler,
    HybridEngine,
    MsAmp,
    Nebula,
    ProgressiveLayerDrop,
    TensorBoard,
    TensorParallel,
    Timers,
    Wandb,
)
from hf_zero_plugin.config.schema_zero import ZeroOptimization

__all__ = ["DsConfig", "KnownKey", "known_keys", "params_model", "section_models", "section_of"]

_REMOVE = "Remove the section."
_NO_COMPRESSION = "It changes the model while it trains, and needs DeepSpeed's own modules."


class DsConfig(Section):
    # Batch
    train_batch_size: AutoPositive | None = applied(
        None, "Samples per optimizer step over all ranks: micro-batch x accumulation x ranks."
    )
    train_micro_batch_size_per_gpu: AutoPositive | None = applied(None, "Samples per forward pass on one rank.")
    gradient_accumulation_steps: AutoPositive | None = applied(None, "Forward passes per optimizer step.")

    # Number formats
    fp16: FP16 = section(FP16, "Mixed precision in float16, with loss scaling.")
    bf16: BF16 = section(BF16, "Mixed precision in bfloat16.")
    torch_autocast: TorchAutocast = section(TorchAutocast, "Mixed precision by torch.autocast.")
    data_types: DataTypes = section(DataTypes, "Types apart from the weights'.")
    amp: AMP = section(AMP, "Mixed precision by NVIDIA Apex.")
    msamp: MsAmp = section(MsAmp, "8-bit training by MS-AMP.")

    # Gradients
    gradient_clipping: AutoNonNegative = applied(1.0, "Largest global gradient norm; 0 switches clipping off.")
    prescale_gradients: bool = applied(False, "Divide gradients by the number of ranks before summing them.")
    gradient_predivide_factor: AboveZero = applied(
        1.0, "Divide gradients by this before summing them, and by the rest after it."
    )
    gradient_allreduce_op: Literal["mean", "sum"] = applied("mean", "Average gradients over the ranks, or sum them.")
    communication_data_type: Dtype | None = applied(
        None, "Type in which gradients are reduced; the type they have if absent."
    )
    sparse_gradients: bool = refused(
        False,
        "Exchange the gradients of embeddings as sparse tensors.",
        why="Gradients live in flat dense buckets.",
        fix="Remove the key, or set it to false.",
    )
    disable_allgather: bool = inert(
        False, "Broadcast instead of all-gather.", why="The weights that come out are the same."
    )
    seq_parallel_communication_data_type: Dtype | None = inert(
        None, "Type of sequence-parallel collectives.", why="There is no sequence parallelism here."
    )
    managed_gradient_accumulation: bool = inert(
        True, "The engine counts micro-steps itself.", why="The Trainer marks the last micro-step of every step."
    )
    dataloader_drop_last: bool = inert(
        False, "Drop the last incomplete batch.", why="The Trainer builds the data loader (--dataloader_drop_last)."
    )

    # Optimizer
    optimizer: Optimizer | None = applied(None, "Optimizer of the engine; the Trainer's (--optim) if absent.")
    scheduler: Scheduler | None = applied(
        None, "Learning-rate schedule of the engine; the Trainer's (--lr_scheduler_type) if absent."
    )
    zero_allow_untested_optimizer: bool = inert(
        False, "Allow an optimizer that DeepSpeed does not know.", why="Every torch optimizer is allowed."
    )
    zero_force_ds_cpu_optimizer: bool = inert(
        True,
        "Replace an offloaded optimizer by DeepSpeed's CPU Adam.",
        why="The optimizer you chose is the one that runs, offloaded or not.",
    )

    # ZeRO
    zero_optimization: ZeroOptimization = section(ZeroOptimization, "Sharding and offload.")
    aio: AIO = section(AIO, "Reading from and writing to NVMe.")
    activation_checkpointing: ActivationCheckpointing = section(ActivationCheckpointing, "Checkpointed activations.")

    # Checkpoints and logging
    checkpoint: Checkpoint = section(Checkpoint, "How checkpoints are written.")
    steps_per_print: PrintEvery = applied(None, "Print progress every so many steps; not at all if absent.")
    wall_clock_breakdown: bool = applied(False, "Time forward, backward and step.")
    memory_breakdown: bool = applied(False, "Print memory by kind.")
    dump_state: bool = inert(False, "Print the engine's state.", why="hf-zero explain prints the configuration.")
    vocabulary_size: Positive | None = inert(None, "Only checked for alignment by DeepSpeed.", why="Nothing uses it.")
    log_level: LogLevel | None = applied(
        None, "Level of this engine's messages: debug, info, warning, error, critical.",
        note="The Trainer's level (--log_level) if absent.",
    )  # fmt: skip
    timers: Timers = section(Timers, "Measurements.")
    flops_profiler: FlopsProfiler = section(FlopsProfiler, "Count of operations.")
    comms_logger: CommsLogger = section(CommsLogger, "Log of collectives.")
    tensorboard: TensorBoard = section(TensorBoard, "Reports to TensorBoard.")
    wandb: Wandb = section(Wandb, "Reports to Weights & Biases.")
    csv_monitor: CsvMonitor = section(CsvMonitor, "Reports to CSV files.")
    comet: Comet = section(Comet, "Reports to Comet.")

    # Parallelism
    tensor_parallel: TensorParallel = section(TensorParallel, "Tensor parallelism.")
    sequence_parallel_size: Positive = refused(
        1, "Ranks that share one sequence.", why="Sequence parallelism is not built yet.", fix="Remove the key."
    )
    pipeline: Opaque | None = refused(
        None, "Pipeline parallelism.", why="The Trainer has no pipeline parallelism.", fix=_REMOVE
    )
    expert_parallel: Opaque | None = refused(
        None, "Expert parallelism.", why="Experts are sharded like any other weights.", fix=f"{_REMOVE} Use stage 3."
    )
    use_data_before_expert_parallelism: bool = refused(
        False,
        "Order of data-parallel and expert-parallel ranks.",
        why="There is no expert parallelism here.",
        fix="Remove the key, or set it to false.",
    )

    # What this engine does not have
    compile: Compile = section(Compile, "DeepCompile.")
    elasticity: Elasticity = section(Elasticity, "Elastic batch sizes.")
    nebula: Nebula = section(Nebula, "Azure's Nebula checkpoints.")
    hybrid_engine: HybridEngine = section(HybridEngine, "Training and inference in one engine.")
    progressive_layer_drop: ProgressiveLayerDrop = section(ProgressiveLayerDrop, "Layers dropped at random.")
    compression_training: Opaque | None = refused(
        None, "Quantization and pruning.", why=_NO_COMPRESSION, fix=f"{_REMOVE} torchao quantizes and prunes."
    )
    quantize_training: Opaque | None = refused(
        None, "Quantization while training (MoQ).", why=_NO_COMPRESSION, fix=f"{_REMOVE} torchao quantizes."
    )
    weight_quantization: Opaque | None = refused(
        None, "Quantized weights.", why=_NO_COMPRESSION, fix=f"{_REMOVE} torchao quantizes."
    )
    sparse_attention: Opaque | None = refused(
        None, "Block-sparse attention.", why="It needs compiled kernels.", fix=f"{_REMOVE} torch has flex_attention."
    )
    eigenvalue: Opaque | None = refused(
        None, "Curvature of the loss, for MoQ.", why="It only serves quantize_training.", fix=_REMOVE
    )
    curriculum_learning: Opaque | None = refused(
        None, "Growing sequence lengths.", why="The Trainer owns the data.", fix=f"{_REMOVE} Sort or cut your data set."
    )
    data_efficiency: Opaque | None = refused(
        None,
        "Sampling and dropping of tokens.",
        why="The Trainer owns the data.",
        fix=f"{_REMOVE} Sample in your own code.",
    )
    autotuning: Opaque | None = refused(
        None, "Search for the best configuration.", why="It is a feature of DeepSpeed's launcher.", fix=_REMOVE
    )
    datastates_ckpt: Opaque | bool | None = refused(
        None,
        "DataStates checkpoints.",
        why="Checkpoints are written by torch and safetensors.",
        fix=_REMOVE,
        accepted=(False,),
    )
    inference: Opaque | None = refused(
        None, "DeepSpeed-Inference.", why="This engine trains.", fix=f"{_REMOVE} Serve the saved model by other means."
    )
    graph_harvesting: bool = refused(
        False,
        "Capture collectives in CUDA graphs.",
        why="Not built.",
        fix="Remove the key, or set it to false; --torch_compile uses torch's own compiler.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownKey:
    """One key of the schema."""

    path: str
    """``$.zero_optimization.stage``."""
    field: FieldInfo
    ruling: Ruling

    @property
    def default(self) -> Any:
        return None if self.field.is_required() else self.field.default

    @property
    def allows_auto(self) -> bool:
        return any(isinstance(item, AutoAllowed) for item in _annotations(self.field.annotation, self.field.metadata))


def _annotations(annotation: Any, metadata: list[Any]) -> Iterator[Any]:
    yield from metadata
    for part in typing.get_args(annotation):
        yield part
        yield from _annotations(part, [])


def section_of(field: FieldInfo) -> type[Section] | None:
    """The model behind a field that is a JSON object; None for a plain value."""
    for part in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def params_model(kind: str, type_name: Any) -> type[Section] | None:
    """Model of ``optimizer.params`` or ``scheduler.params`` for a type; None if there is no such type here."""
    table = OPTIMIZERS if kind == "optimizer" else SCHEDULERS
    if not isinstance(type_name, str):
        return None
    return next((model for name, model in table.items() if name.lower() == type_name.lower()), None)


def known_keys(
    model: type[Section] = DsConfig, prefix: str = "$", config: dict[str, Any] | None = None
) -> Iterator[KnownKey]:
    """Every key below ``model``, in the order of the schema.

    Args:
        config: the configuration itself; ``optimizer.params`` and ``scheduler.params`` are opened up by its types.
    """
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}"
        inner = section_of(field)
        if inner is not None:
            yield from known_keys(inner, path, config)
            continue
        if name == "params" and config is not None:
            kind = path.split(".")[1]
            params = params_model(kind, (config.get(kind) or {}).get("type"))
            if params is not None:
                yield from known_keys(params, path)
            continue
        ruling = ruling_of(field)
        assert ruling is not None, path
        yield KnownKey(path=path, field=field, ruling=ruling)


def section_models(config: dict[str, Any] | None = None) -> dict[str, type[Section]]:
    """Path of every JSON object -> its model."""
    found: dict[str, type[Section]] = {}

    def visit(model: type[Section], path: str) -> None:
        found[path] = model
        for name, field in model.model_fields.items():
            inner = section_of(field)
            if inner is not None:
                visit(inner, f"{path}.{name}")

    visit(DsConfig, "$")
    for kind in ("optimizer", "scheduler"):
        params = params_model(kind, ((config or {}).get(kind) or {}).get("type"))
        if params is not None:
            found[f"$.{kind}.params"] = params
    return found
