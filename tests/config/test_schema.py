"""The schema knows every key, says what becomes of it, and agrees with the torch that is installed."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

from hf_zero_plugin.config.fields import ruling_of
from hf_zero_plugin.config.json_schema import json_schema
from hf_zero_plugin.config.load import load_config
from hf_zero_plugin.config.schema import DsConfig, KnownKey, known_keys, section_of
from hf_zero_plugin.config.schema_optim import OPTIMIZERS, REFUSED_OPTIMIZERS, REFUSED_SCHEDULERS, SCHEDULERS

Z = "zero_optimization"
SPEC: dict[str, dict[str, Any]] = {
    "": {
        "train_batch_size": None,
        "train_micro_batch_size_per_gpu": None,
        "gradient_accumulation_steps": None,
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "communication_data_type": None,
        "sparse_gradients": False,
        "disable_allgather": False,
        "seq_parallel_communication_data_type": None,
        "dataloader_drop_last": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "log_level": None,
        "dump_state": False,
        "vocabulary_size": None,
        "sequence_parallel_size": 1,
        "pipeline": None,
        "expert_parallel": None,
        "use_data_before_expert_parallelism": False,
        "compression_training": None,
        "quantize_training": None,
        "weight_quantization": None,
        "sparse_attention": None,
        "eigenvalue": None,
        "curriculum_learning": None,
        "data_efficiency": None,
        "autotuning": None,
        "datastates_ckpt": None,
        "graph_harvesting": False,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": True,
    },
    "fp16": {
        "enabled": False,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
        "auto_cast": False,
    },
    "bf16": {
        "enabled": False,
        "check_grad_overflow": True,
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
        "immediate_grad_update": False,
    },
    "data_types": {"grad_accum_dtype": None, "param_dtype": None},
    "torch_autocast": {"enabled": False, "dtype": None, "lower_precision_safe_modules": None},
    "amp": {"enabled": False},
    Z: {
        "stage": 0,
        "reduce_bucket_size": 500_000_000,
        "allgather_bucket_size": 500_000_000,
        "overlap_comm": None,
        "sub_group_size": 1_000_000_000,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "round_robin_gradients": False,
        "use_multi_rank_bucket_allreduce": True,
        "ignore_unused_parameters": True,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_gather_16bit_weights_on_model_save": False,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_model_persistence_threshold": 2**63 - 1,
        "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False,
        "stage3_allgather_sequential": False,
        "memory_efficient_linear": True,
        "override_module_apply": True,
        "pipeline_loading_checkpoint": False,
        "log_trace_cache_warnings": False,
        "enable_sanity_checks": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "zeropp_loco_param": None,
        "mics_shard_size": -1,
        "mics_hierarchical_params_gather": False,
        "legacy_stage1": False,
        "save_muon_momentum_buffer_in_memory": False,
        "zenflow": None,
    },
    f"{Z}.leaf_module": {"classes": [], "names": [], "name_suffixes": []},
    f"{Z}.offload_optimizer": {
        "device": "none",
        "pin_memory": True,
        "nvme_path": None,
        "buffer_count": 4,
        "pipeline_read": False,
        "pipeline_write": False,
        "fast_init": False,
        "ratio": 1.0,
        "super_offload": False,
        "cpuadam_cores_perc": 0.8,
        "step_on": "auto",
        "gpu_memory_budget": None,
    },
    f"{Z}.offload_param": {
        "device": "none",
        "pin_memory": True,
        "nvme_path": None,
        "buffer_count": 5,
        "buffer_size": 100_000_000,
        "max_in_cpu": 1_000_000_000,
    },
    "aio": {
        "block_size": 1048576,
        "queue_depth": 8,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
        "use_gds": False,
    },
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "contiguous_memory_optimization": False,
        "number_checkpoints": None,
        "synchronize_checkpoint_boundary": False,
        "profile": False,
    },
    "checkpoint": {"tag_validation": "warn", "use_node_local_storage": False, "load_universal": False},
    "timers.throughput": {"enabled": True, "synchronized": True},
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "comms_logger": {"enabled": False},
    "tensorboard": {"enabled": False},
    "wandb": {"enabled": False},
    "csv_monitor": {"enabled": False},
    "comet": {"enabled": False},
    "tensor_parallel": {"autotp_size": 0},
    "compile": {"deepcompile": False},
    "hybrid_engine": {"enabled": False},
    "elasticity": {"enabled": False},
    "nebula": {"enabled": False},
    "progressive_layer_drop": {"enabled": False},
}
"""Section -> key -> default, as DeepSpeed 0.19 has them (and our own two keys)."""

SPEC_KEYS = [
    (f"$.{section}.{name}".replace("$..", "$."), default)
    for section, keys in SPEC.items()
    for name, default in keys.items()
]
KNOWN = {key.path: key for key in known_keys()}


@pytest.mark.parametrize(("path", "default"), SPEC_KEYS)
def test_every_key_is_known_with_the_default_of_deepspeed(path: str, default: Any) -> None:
    assert KNOWN[path].default == default


@pytest.mark.parametrize(("path", "default"), SPEC_KEYS)
def test_every_default_can_be_written_out(path: str, default: Any) -> None:
    if default is None:
        return
    config: dict[str, Any] = {}
    *sections, name = path.split(".")[1:]
    node = config
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = default
    load_config(config)


def all_keys() -> list[KnownKey]:
    keys = list(known_keys())
    for kind, types in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        for name, model in types.items():
            keys += known_keys(model, f"$.{kind}.params[{name}]")
    return keys


@pytest.mark.parametrize("key", all_keys(), ids=lambda key: key.path)
def test_every_key_is_explained(key: KnownKey) -> None:
    description, ruling = key.field.description or "", key.ruling
    assert description.endswith(".")
    if ruling.verdict != "applied":
        assert ruling.why.endswith(".")
    if ruling.verdict == "refused":
        assert ruling.fix.endswith(".")
        assert not ruling.refuses(key.default)


def test_every_section_is_described() -> None:
    for name, field in DsConfig.model_fields.items():
        if section_of(field) is not None and ruling_of(field) is None:
            assert (field.description or "").endswith("."), name


# ---------------------------------------------------------------- torch


TORCH_OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
TORCH_SCHEDULERS = {
    name: cls
    for name, cls in vars(torch.optim.lr_scheduler).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.lr_scheduler.LRScheduler)
    and not name.endswith("LRScheduler")
}


def parameters_of(cls: type, besides: set[str]) -> dict[str, bool]:
    """Name -> is it required?"""
    found = inspect.signature(cls).parameters
    return {name: item.default is item.empty for name, item in found.items() if name not in besides}


@pytest.mark.parametrize("name", sorted(TORCH_OPTIMIZERS))
def test_every_torch_optimizer_is_known_with_its_parameters(name: str) -> None:
    if name in REFUSED_OPTIMIZERS:
        return
    ours = set(OPTIMIZERS[name].model_fields)
    theirs = set(parameters_of(TORCH_OPTIMIZERS[name], {"params"}))
    # Adam becomes AdamW by adam_w_mode, not by torch's own switch.
    assert theirs - {"decoupled_weight_decay"} <= ours | {"decoupled_weight_decay"}
    extra = {"max_grad_norm", "foreach", "fused", "capturable", "maximize", "differentiable"}
    if name not in ("Adam", "AdamW"):
        assert ours - extra <= theirs


@pytest.mark.parametrize("name", sorted(TORCH_SCHEDULERS))
def test_every_torch_scheduler_is_known_with_its_parameters(name: str) -> None:
    if name in REFUSED_SCHEDULERS:
        return
    theirs = parameters_of(TORCH_SCHEDULERS[name], {"optimizer", "scale_fn"})
    fields = SCHEDULERS[name].model_fields
    # None of the schedulers of older torch releases takes more than these.
    assert set(theirs) <= set(fields)
    assert {key for key, field in fields.items() if field.is_required()} == {
        key for key, must in theirs.items() if must
    }


# ---------------------------------------------------------------- JSON Schema


def test_json_schema_is_of_the_2020_draft_and_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    json.dumps(schema)
    for name, definition in schema["$defs"].items():
        for key, item in definition.get("properties", {}).items():
            assert item.get("description"), f"{name}.{key}"
    assert schema["properties"]["bfloat16"]["deprecated"]
    assert schema["$defs"]["ZeroOptimization"]["properties"]["cpu_offload"]["deprecated"]
    assert "Refused: " in schema["properties"]["sparse_gradients"]["description"]


def test_json_schema_resolves_every_reference() -> None:
    schema = json_schema()
    text = json.dumps(schema)
    for chunk in text.split('"$ref": "#/$defs/')[1:]:
        assert chunk.partition('"')[0] in schema["$defs"]


def test_json_schema_chooses_parameters_by_type_without_regard_to_case() -> None:
    import re

    branches = json_schema()["$defs"]["Optimizer"]["allOf"]
    patterns = [branch["if"]["properties"]["type"]["pattern"] for branch in branches]
    assert sum(bool(re.match(pattern, "adamw")) for pattern in patterns) == 1
    assert sum(bool(re.match(pattern, "ADAMW")) for pattern in patterns) == 1
