"""Sections beside number formats, ZeRO and the optimizer: checkpoints, logging, and what this engine does not have."""

from __future__ import annotations

from typing import Annotated, Literal

from hf_zero_plugin.config.fields import (
    AboveZero,
    Count,
    DepthLimit,
    LowerCase,
    NonNegative,
    Opaque,
    Positive,
    Section,
    applied,
    inert,
    refused,
    section,
)

__all__ = [
    "AIO",
    "ActivationCheckpointing",
    "Checkpoint",
    "Comet",
    "CommsLogger",
    "Compile",
    "CsvMonitor",
    "Elasticity",
    "FlopsProfiler",
    "HybridEngine",
    "MsAmp",
    "Nebula",
    "ProgressiveLayerDrop",
    "TensorBoard",
    "TensorParallel",
    "Timers",
    "Wandb",
]

_SWITCH_OFF = "Remove the section, or set enabled to false."
_SECTION_OFF = "Only read when its section is enabled, and enabling it is refused."
_REPORTERS = "The Trainer has reporters of its own, so the engine writes none."


class ActivationCheckpointing(Section):
    cpu_checkpointing: bool = applied(False, "Keep the inputs of checkpointed layers in host memory.")
    partition_activations: bool = inert(
        False,
        "Split the inputs of checkpointed layers over model-parallel ranks.",
        why="There are no model-parallel ranks here.",
    )
    contiguous_memory_optimization: bool = inert(
        False, "Copy checkpointed inputs into one buffer.", why="Only works with partitioned activations."
    )
    number_checkpoints: Count | None = inert(
        None, "Number of checkpointed layers, for the size of that buffer.", why="There is no such buffer."
    )
    synchronize_checkpoint_boundary: bool = inert(
        False, "Wait for the device at every checkpointed layer.", why="Streams are ordered by events."
    )
    profile: bool = inert(False, "Time every checkpointed layer.", why="Use torch.profiler.")


class AIO(Section):
    block_size: Positive = applied(1_048_576, "Bytes of one read or write; rounded up to 4096.")
    queue_depth: Positive = applied(8, "Reads and writes under way at once.")
    intra_op_parallelism: Positive = applied(1, "Multiplies queue_depth.")
    single_submit: bool = applied(False, "One read or write at a time.")
    overlap_events: bool = inert(
        True, "Overlap submitting and waiting.", why="Always done: every read or write has a thread that waits for it."
    )
    use_gds: bool = refused(
        False,
        "GPUDirect Storage.",
        why="It needs a compiled extension and NVIDIA's cuFile.",
        fix="Remove the key, or set it to false.",
    )


class CheckpointWriter(Section):
    type: str | None = inert(None, "DeepSpeed's writer.", why="Checkpoints are written by torch and safetensors.")
    decoupled: bool = inert(False, "Write in another process.", why="Checkpoints are written in this process.")
    io_buffer_size: Count = inert(67_108_864, "Bytes of the writer's buffer.", why="There is no such buffer.")
    io_buffer_double: bool = inert(True, "Two buffers.", why="There is no such buffer.")
    show_statistics: bool = inert(False, "Print the writer's speed.", why="The Trainer logs its own timings.")
    data_parallel: str | None = inert(None, "Which ranks write.", why="Every rank writes what it owns.")
    io_multiplier: Count = inert(1, "Repeat writes, for benchmarks.", why="Every file is written once.")


class ParallelWrite(Section):
    pipeline_stage: bool = inert(
        False, "Write pipeline stages in parallel.", why="There is no pipeline parallelism here."
    )


class Checkpoint(Section):
    tag_validation: Annotated[Literal["ignore", "warn", "fail"], LowerCase] = applied(
        "warn", "What to do when ranks save under different tags: Ignore, Warn or Fail."
    )
    use_node_local_storage: bool = applied(False, "Every node saves to a disk of its own.")
    load_universal: bool = inert(
        False, "Load a universal checkpoint.", why="Every checkpoint of this engine loads at any number of ranks."
    )
    checkpoint_serialization: bool = inert(True, "DeepSpeed's serialization.", why="torch.save is used.")
    parallel_write: ParallelWrite = section(ParallelWrite, "Who writes checkpoints in parallel.")
    writer: CheckpointWriter = section(CheckpointWriter, "DeepSpeed's checkpoint writers.")


class Throughput(Section):
    enabled: bool = applied(True, "Print samples per second beside what steps_per_print prints.")
    synchronized: bool = applied(True, "Wait for the device when measuring, once a print.")


class Timers(Section):
    throughput: Throughput = section(Throughput, "Samples per second.")


class FlopsProfiler(Section):
    enabled: bool = applied(False, "Count the operations of a step, by torch.utils.flop_counter.")
    recompute_fwd_factor: NonNegative = inert(
        0.0, "Weight of recomputed forward passes.", why="They are counted in the backward pass, where they run."
    )
    profile_step: Positive = applied(1, "Step to count; its first micro-step is.")
    module_depth: DepthLimit = applied(-1, "Depth of modules to print; -1 prints all.")
    top_modules: Positive = applied(1, "Number of modules to name at each depth.")
    detailed: bool = applied(True, "Print the whole model, module by module.")
    output_file: str | None = applied(None, "File to print to, instead of the log.")


class CommsLogger(Section):
    enabled: bool = refused(
        False,
        "Log every collective.",
        why="Not built yet.",
        fix=f"{_SWITCH_OFF} torch.profiler and TORCH_DISTRIBUTED_DEBUG=DETAIL show collectives.",
    )
    prof_all: bool = inert(True, "Log all operations.", why=_SECTION_OFF)
    prof_ops: list[str] = inert([], "Operations to log.", why=_SECTION_OFF)
    verbose: bool = inert(False, "Log as they happen.", why=_SECTION_OFF)
    debug: bool = inert(False, "Log the caller as well.", why=_SECTION_OFF)


def _reporter(tool: str, name: str) -> bool:
    flag: bool = refused(
        False, f"Report to {tool}.", why=_REPORTERS, fix=f"{_SWITCH_OFF} Pass --report_to {name} instead."
    )
    return flag


class TensorBoard(Section):
    enabled: bool = _reporter("TensorBoard", "tensorboard")
    output_path: str = inert("", "Directory of the logs.", why=_SECTION_OFF)
    job_name: str = inert("DeepSpeedJobName", "Name of the run.", why=_SECTION_OFF)


class Wandb(Section):
    enabled: bool = _reporter("Weights & Biases", "wandb")
    group: str | None = inert(None, "Group of the run.", why=_SECTION_OFF)
    team: str | None = inert(None, "Team of the run.", why=_SECTION_OFF)
    project: str = inert("deepspeed", "Project of the run.", why=_SECTION_OFF)


class CsvMonitor(Section):
    enabled: bool = refused(
        False,
        "Report to CSV files.",
        why=_REPORTERS,
        fix=f"{_SWITCH_OFF} The Trainer writes its log to trainer_state.json.",
    )
    output_path: str = inert("", "Directory of the logs.", why=_SECTION_OFF)
    job_name: str = inert("DeepSpeedJobName", "Name of the run.", why=_SECTION_OFF)


class Comet(Section):
    enabled: bool = _reporter("Comet", "comet_ml")
    samples_log_interval: Positive = inert(100, "Samples between reports.", why=_SECTION_OFF)
    project: str | None = inert(None, "Project of the run.", why=_SECTION_OFF)
    workspace: str | None = inert(None, "Workspace of the run.", why=_SECTION_OFF)
    api_key: str | None = inert(None, "Key of the service.", why=_SECTION_OFF)
    experiment_name: str | None = inert(None, "Name of the run.", why=_SECTION_OFF)
    experiment_key: str | None = inert(None, "Key of the run.", why=_SECTION_OFF)
    online: bool | None = inert(None, "Report over the network.", why=_SECTION_OFF)
    mode: str | None = inert(None, "New run or old.", why=_SECTION_OFF)


class Compile(Section):
    deepcompile: bool = refused(
        False,
        "DeepSpeed's compiler passes.",
        why="Not built yet.",
        fix="Remove the key, or set it to false; --torch_compile uses torch's own compiler.",
    )
    free_activation: bool = inert(False, "Free activations early.", why=_SECTION_OFF)
    free_activation_threshold: Count = inert(10_485_760, "Bytes from which to free.", why=_SECTION_OFF)
    offload_activation: bool = inert(False, "Offload activations.", why=_SECTION_OFF)
    offload_activation_pin_memory: bool = inert(True, "Page-locked memory for them.", why=_SECTION_OFF)
    offload_opt_states: bool = inert(False, "Offload optimizer states.", why=_SECTION_OFF)
    double_buffer: bool = inert(True, "Two buffers.", why=_SECTION_OFF)
    symmetric_memory: bool = inert(False, "Symmetric memory.", why=_SECTION_OFF)
    debug_log: bool = inert(False, "Log the passes.", why=_SECTION_OFF)
    offload_parameters: bool = inert(False, "Offload weights.", why=_SECTION_OFF)
    sync_before_reduce: bool = inert(False, "Wait before reducing.", why=_SECTION_OFF)
    sync_after_reduce: bool = inert(False, "Wait after reducing.", why=_SECTION_OFF)
    sync_before_allgather: bool = inert(False, "Wait before gathering.", why=_SECTION_OFF)
    sync_after_allgather: bool = inert(False, "Wait after gathering.", why=_SECTION_OFF)
    keep_int_input_tensors: bool = inert(True, "Keep integer inputs.", why=_SECTION_OFF)
    keep_all_input_tensors: bool = inert(False, "Keep all inputs.", why=_SECTION_OFF)
    passes: list[str] | None = inert(None, "Passes to run.", why=_SECTION_OFF)


_TP = "Only read with tensor parallelism, which this engine does not have."


class TensorParallel(Section):
    autotp_size: Count = refused(
        0,
        "Ranks that share one layer.",
        why="Tensor parallelism is not built yet.",
        fix="Remove the key, or set it to 0; use stage 3 for models that do not fit.",
        accepted=(1,),
    )
    tp_overlap_comm: bool = inert(False, "Overlap its collectives.", why=_TP)
    tp: Opaque | None = inert(None, "Sizes of the groups.", why=_TP)
    tensor_parallel: Opaque | None = inert(None, "Sizes of the groups.", why=_TP)
    dtype: str | None = inert(None, "Type of the weights.", why=_TP)
    injection_policy_tuple: list[str] | None = inert(None, "Layers to replace.", why=_TP)
    partition_config: Opaque | None = inert(None, "How layers are split.", why=_TP)
    preset_model: str | None = inert(None, "Known way to split a model.", why=_TP)
    keep_module_on_host: bool = inert(False, "Leave the model in host memory.", why=_TP)
    replace_with_kernel_inject: bool = inert(False, "Replace layers by kernels.", why=_TP)
    kernel_inject: bool = inert(False, "Replace layers by kernels.", why=_TP)


class Elasticity(Section):
    enabled: bool = refused(
        False,
        "Choose batch sizes that divide over many numbers of ranks.",
        why="The Trainer owns the batch sizes.",
        fix=f"{_SWITCH_OFF} Checkpoints resume at any number of ranks without it.",
    )
    max_train_batch_size: Positive = inert(2000, "Largest batch.", why=_SECTION_OFF)
    micro_batch_sizes: list[Positive] = inert([2, 4, 6], "Micro-batches to try.", why=_SECTION_OFF)
    min_gpus: Positive = inert(1, "Fewest ranks.", why=_SECTION_OFF)
    max_gpus: Positive = inert(10000, "Most ranks.", why=_SECTION_OFF)
    num_gpus_per_node: Positive = inert(1, "Ranks of a node.", why=_SECTION_OFF)
    model_parallel_size: Positive = inert(1, "Ranks of a model.", why=_SECTION_OFF)
    min_time: Count = inert(0, "Fewest minutes between changes.", why=_SECTION_OFF)
    prefer_larger_batch: bool = inert(True, "Prefer a large batch.", why=_SECTION_OFF)
    ignore_non_elastic_batch_info: bool = inert(False, "Ignore other batch keys.", why=_SECTION_OFF)
    version: AboveZero = inert(0.2, "Version of the section.", why=_SECTION_OFF)


class Nebula(Section):
    enabled: bool = refused(
        False, "Azure's Nebula checkpoints.", why="Checkpoints are written by torch and safetensors.", fix=_SWITCH_OFF
    )
    enable_nebula_load: bool = inert(True, "Load from Nebula.", why=_SECTION_OFF)
    nebula_load_path: str | None = inert(None, "Where to load from.", why=_SECTION_OFF)
    load_path: str | None = inert(None, "Where to load from.", why=_SECTION_OFF)
    persistent_storage_path: str | None = inert(None, "Where to save.", why=_SECTION_OFF)
    persistent_time_interval: Positive = inert(100, "Seconds between saves.", why=_SECTION_OFF)
    num_of_version_in_retention: Positive = inert(2, "Checkpoints kept.", why=_SECTION_OFF)


class HybridEngine(Section):
    enabled: bool = refused(
        False,
        "Switch between training and inference kernels.",
        why="It needs compiled inference kernels.",
        fix=f"{_SWITCH_OFF} model.generate works during training without it.",
    )
    max_out_tokens: Positive = inert(512, "Longest output.", why=_SECTION_OFF)
    inference_tp_size: Positive = inert(1, "Ranks of a layer.", why=_SECTION_OFF)
    release_inference_cache: bool = inert(False, "Free the cache.", why=_SECTION_OFF)
    pin_parameters: bool = inert(True, "Pin the weights.", why=_SECTION_OFF)
    tp_gather_partition_size: Positive = inert(8, "Layers gathered at once.", why=_SECTION_OFF)
    enable_cuda_graph: bool = inert(False, "Capture CUDA graphs.", why=_SECTION_OFF)


class ProgressiveLayerDrop(Section):
    enabled: bool = refused(
        False, "Drop layers at random.", why="It changes the model, and only works with a model made for it.",
        fix=_SWITCH_OFF,
    )  # fmt: skip
    theta: NonNegative = inert(1.0, "Share of layers kept at the end.", why=_SECTION_OFF)
    gamma: NonNegative = inert(0.001, "Speed of the change.", why=_SECTION_OFF)


class MsAmp(Section):
    """Written by accelerate when it is asked for fp8 with the MS-AMP backend."""

    enabled: bool = refused(
        False, "8-bit training by MS-AMP.", why="8-bit formats are not built.", fix="Use bf16."
    )  # fmt: skip
    opt_level: Literal["O1", "O2", "O3"] = inert("O1", "MS-AMP optimization level.", why=_SECTION_OFF)
