"""The ``zero_optimization`` section: what is sharded, what is offloaded, how large the buckets are."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from hf_zero_plugin.config.fields import (
    AboveZero,
    AutoCount,
    AutoDevice,
    AutoFlag,
    AutoPositive,
    AutoShare,
    AutoStage,
    AutoText,
    Count,
    Integer,
    LowerCase,
    Names,
    Opaque,
    Positive,
    Section,
    Share,
    applied,
    inert,
    refused,
    section,
)

__all__ = ["LeafModule", "OffloadOptimizer", "OffloadParam", "ZeroOptimization"]

_NVME_ONLY = "Only read when the device is nvme, which this engine does not have yet."
_NVME_WHY = "Offload of weights to NVMe is not built yet; optimizer states can be."
_NVME_FIX = 'Use "cpu", or "none".'
_ALWAYS = "Always done: gradients live in flat buckets from the start."
_FSDP2 = "Stage 3 is PyTorch's fully_shard, which decides this itself."
_QUANTIZED_WHY = "ZeRO++ sends quantized weights or gradients, which changes the mathematics."
_MICS_WHY = "Sharding over part of the ranks (MiCS, hpZ) is not built."
_REMOVE = "Remove the key."


class OffloadOptimizer(Section):
    device: AutoDevice = applied(
        "none",
        "Home of the master weights and optimizer states: none (the accelerator), cpu, nvme.",
        note="States on NVMe are updated by the host's cores.",
    )
    pin_memory: bool = applied(True, "Page-locked host memory: faster copies that overlap with computing.")
    ratio: AutoShare = applied(
        1.0,
        'Share of the optimizer states kept on the host; "auto" fills gpu_memory_budget first.',
        note='Works at every stage; "auto" is ours.',
    )
    gpu_memory_budget: AboveZero | None = applied(
        None, 'GiB of accelerator memory that ratio "auto" may fill with optimizer states.', note="Ours."
    )
    step_on: Annotated[Literal["auto", "host", "device", "both"], LowerCase] = applied(
        "auto",
        "Who computes the update of offloaded states: the host's cores, the accelerator with the states "
        "streamed through it, or both, each a share.",
        note='Ours. "auto": the accelerator if there is one; with offload_param on several ranks, if a rank\'s '
        'gradients fit into a quarter of its memory and the states are offloaded. "both" is faster for models of '
        "billions of parameters, if host cores are idle; it needs stage 3 where there are several ranks, and is the "
        "host's alone without an accelerator.",
    )
    host_share: Share | None = applied(
        None,
        'Share of the offloaded states that host cores update with step_on "both".',
        note="Ours. Unless it is given, it follows from the number of threads (OMP_NUM_THREADS): a third with 16, so "
        "results are equal to the bit only where that number is.",
    )
    nvme_path: AutoText | None = applied(None, "Directory for states on NVMe; every rank keeps a file there.")
    buffer_count: Positive = applied(4, "Staging buffers in host memory, each of a bucket's states.")
    pipeline_read: bool = applied(False, "Read the next states from NVMe during the update.")
    pipeline_write: bool = applied(False, "Write the last states to NVMe during the update.")
    fast_init: bool = inert(
        False, "Faster first placement of the states on NVMe.", why="The states are placed there in one pass, always."
    )
    super_offload: bool = inert(
        False,
        "DeepSpeed's overlap of the host update with the backward and forward passes.",
        why="Updates of offloaded states overlap with the next forward pass here, wherever there is a GPU.",
    )
    cpuadam_cores_perc: Share = applied(
        0.8,
        "Share of PyTorch's threads (OMP_NUM_THREADS) for the update on the host; at least one.",
        note="All of them unless the key is given.",
    )


class OffloadParam(Section):
    device: AutoDevice = refused(
        "none",
        "Home of the half-precision shards between uses: none (the accelerator), cpu, nvme. Stage 3 only.",
        why=_NVME_WHY,
        fix=_NVME_FIX,
        accepted=("cpu",),
        otherwise="applied",
    )
    pin_memory: bool = applied(True, "Page-locked host memory: faster copies that overlap with computing.")
    nvme_path: AutoText | None = inert(None, "Directory for offloaded shards.", why=_NVME_ONLY)
    buffer_count: Count = inert(5, "Staging buffers between NVMe and the host.", why=_NVME_ONLY)
    buffer_size: Count = inert(100_000_000, "Elements of one staging buffer.", why=_NVME_ONLY)
    max_in_cpu: Count = inert(1_000_000_000, "Elements kept on the host instead of NVMe.", why=_NVME_ONLY)


class LeafModule(Section):
    classes: Names = applied([], "Class names of modules that are gathered as a whole, with all that is inside them.")
    names: Names = applied([], "Names of modules that are gathered as a whole: encoder.block.0.")
    name_suffixes: Names = applied([], "Ends of names of modules that are gathered as a whole: .experts.")


class ZeroOptimization(Section):
    stage: AutoStage = applied(
        0,
        "What is sharded over the ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too.",
        note='"auto" is 2, as accelerate has it.',
    )
    offload_optimizer: OffloadOptimizer = section(OffloadOptimizer, "Where optimizer states live between steps.")
    offload_param: OffloadParam = section(OffloadParam, "Where the weights of stage 3 live between uses.")

    reduce_bucket_size: AutoPositive = applied(
        500_000_000,
        "Elements of a bucket, the unit that is reduced, stepped and gathered at once: the least of this, "
        "allgather_bucket_size, sub_group_size and 16,777,216, but at least 2,097,152.",
    )
    allgather_bucket_size: Count = applied(500_000_000, "Elements of new weights that are gathered at once.")
    sub_group_size: Positive = applied(1_000_000_000, "Elements of optimizer states that are stepped at once.")
    overlap_comm: bool | None = applied(
        None,
        "Reduce buckets while the backward pass goes on.",
        note="On unless it is set to false; DeepSpeed's default is on at stage 3 only.",
    )
    contiguous_gradients: bool = inert(True, "Copy gradients into one buffer.", why=_ALWAYS)
    reduce_scatter: bool = inert(
        True,
        "Reduce-scatter gradients instead of all-reduce.",
        why="The stage decides: all-reduce at stage 0, reduce-scatter from stage 1 on. The sums are the same.",
    )
    allgather_partitions: bool = inert(
        True, "All-gather new weights instead of broadcasting them.", why="Always done; the weights are the same."
    )
    round_robin_gradients: bool = inert(
        False, "Deal gradients out to the ranks in turn.", why="Every rank owns an equal slice of every bucket."
    )
    use_multi_rank_bucket_allreduce: bool = inert(
        True, "Reduce buckets of several ranks at once.", why="Every bucket belongs to all ranks."
    )
    ignore_unused_parameters: bool = inert(
        True, "Allow parameters without a gradient.", why="A parameter without a gradient counts as zero, always."
    )
    load_from_fp32_weights: bool = inert(
        True,
        "Restore master weights from the fp32 copy of a checkpoint.",
        why="Checkpoints always hold fp32 master weights, and they are always restored.",
    )
    elastic_checkpoint: bool = inert(
        False,
        "Load checkpoints at another number of ranks.",
        why="Checkpoints load at any number of ranks, always.",
    )
    legacy_stage1: bool = refused(
        False, "DeepSpeed's first implementation of stage 1.", why="There is only one here.", fix=_REMOVE
    )

    stage3_param_persistence_threshold: AutoCount = applied(
        100_000, "Parameters with fewer elements stay whole on every rank (stage 3)."
    )
    stage3_gather_16bit_weights_on_model_save: AutoFlag = applied(
        False,
        "save_model writes whole weights, parameter by parameter (stage 3); false: a checkpoint, and how to export it.",
        note='"auto" is true at stage 3; accelerate would take false, and save_model would write no weights.',
    )
    stage3_prefetch_bucket_size: AutoCount = applied(
        50_000_000, "Elements gathered ahead of their use, in whole modules, one at least; 0: nothing (stage 3)."
    )
    stage3_max_live_parameters: Count = applied(
        1_000_000_000, "Elements that may stay gathered between forward and backward (stage 3)."
    )
    stage3_max_reuse_distance: Count = applied(
        1_000_000_000,
        "Keep modules gathered between forward and backward if fewer elements than this are computed with in between.",
    )
    stage3_model_persistence_threshold: Count = applied(
        sys.maxsize, "Most elements, of all small parameters together, that may stay whole on every rank (stage 3)."
    )
    stage3_module_granularity_threshold: Integer = inert(0, "Gather small modules as a whole.", why=_FSDP2)
    stage3_use_all_reduce_for_fetch_params: bool = inert(False, "Gather weights by all-reduce.", why=_FSDP2)
    stage3_allgather_sequential: bool = inert(False, "Gather weights one by one.", why=_FSDP2)
    leaf_module: LeafModule = section(LeafModule, "Modules that are gathered as a whole (stage 3).")

    memory_efficient_linear: bool = inert(
        True, "Replace torch's linear function by a leaner one.", why="PyTorch's own linear is used."
    )
    override_module_apply: bool = inert(True, "Replace nn.Module.apply at stage 3.", why="nn.Module is left alone.")
    pipeline_loading_checkpoint: bool = inert(
        False, "Overlap loading a checkpoint with building the model.", why="Checkpoints are read in one pass."
    )
    log_trace_cache_warnings: bool = inert(
        False, "Warn when the order of modules changes.", why="There is no trace of the module order to go stale."
    )
    enable_sanity_checks: bool = inert(False, "DeepSpeed's internal checks.", why="They check DeepSpeed's own state.")

    zero_hpz_partition_size: Count = refused(
        1, "Ranks that share a second copy of the shards (ZeRO++).", why=_MICS_WHY, fix=_REMOVE, accepted=(0,)
    )
    zero_quantized_weights: bool = refused(False, "Gather quantized weights.", why=_QUANTIZED_WHY, fix=_REMOVE)
    zero_quantized_nontrainable_weights: bool = refused(
        False, "Hold frozen weights quantized.", why=_QUANTIZED_WHY, fix=_REMOVE
    )
    zero_quantized_gradients: bool = refused(False, "Reduce quantized gradients.", why=_QUANTIZED_WHY, fix=_REMOVE)
    zeropp_loco_param: Opaque | None = refused(
        None, "Error feedback for quantized gradients.", why=_QUANTIZED_WHY, fix=_REMOVE
    )
    mics_shard_size: Integer = refused(-1, "Ranks that share one copy of the model.", why=_MICS_WHY, fix=_REMOVE)
    mics_hierarchical_params_gather: bool = refused(
        False, "Gather weights inside a node first.", why=_MICS_WHY, fix=_REMOVE
    )
    save_muon_momentum_buffer_in_memory: bool = refused(
        False, "Keep Muon's momentum off NVMe.", why="Muon is not built.", fix=_REMOVE
    )
    zenflow: Opaque | None = refused(
        None,
        "Delayed, importance-selected updates (ZenFlow).",
        why="It steps with stale gradients, which changes the mathematics.",
        fix="Remove the section; the host update already overlaps with the next forward pass.",
    )
