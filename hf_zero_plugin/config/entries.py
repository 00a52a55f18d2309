"""Every key of the schema -> an ``Entry``: its value, its origin, and what becomes of it here and now."""

from __future__ import annotations

from typing import Any

from hf_zero_plugin.config.build import weight_type
from hf_zero_plugin.config.facts import TrainingFacts
from hf_zero_plugin.config.fields import AUTO, Verdict
from hf_zero_plugin.config.fill import Fill
from hf_zero_plugin.config.load import LoadedConfig
from hf_zero_plugin.config.paths import is_present, lookup
from hf_zero_plugin.config.resolved import Entry
from hf_zero_plugin.config.schema import DsConfig, KnownKey, known_keys

__all__ = ["list_entries"]


def list_entries(
    loaded: LoadedConfig,
    filled: dict[str, Any],
    fills: dict[str, Fill],
    sources: dict[str, str],
    validated: DsConfig | None,
    args: TrainingFacts | None,
) -> list[Entry]:
    """In the order of the schema. ``validated`` is None if the values do not fit it."""
    found = []
    for key in known_keys(config=filled):
        kind = key.path.split(".")[1]
        if kind in ("optimizer", "scheduler") and kind not in filled:
            if key.path.endswith(".type"):
                found.append(_built_by_the_trainer(kind, args))
            continue
        found.append(_entry(key, loaded, filled, fills, sources, validated))
    return found


def _entry(
    key: KnownKey,
    loaded: LoadedConfig,
    filled: dict[str, Any],
    fills: dict[str, Fill],
    sources: dict[str, str],
    validated: DsConfig | None,
) -> Entry:
    path = key.path
    in_file = is_present(loaded.config, path)
    was_auto = in_file and lookup(loaded.config, path) == AUTO
    fill = fills.get(path)
    value = lookup(filled, path) if is_present(filled, path) else _default(key)
    source = sources.get(path) or ("file" if in_file else "default")
    verdict, note = _verdict(key, value, validated)
    if fill is not None and path in sources and fill.note:
        note = f"{fill.note}. {note}".replace("..", ".").strip() if note else fill.note
        if fill.value is None:
            value = None
    return Entry(path=path, value=value, source=source, verdict=verdict, note=note, in_file=in_file, was_auto=was_auto)


def _default(key: KnownKey) -> Any:
    return True if key.path == "$.zero_optimization.overlap_comm" else key.default


def _verdict(key: KnownKey, value: Any, validated: DsConfig | None) -> tuple[Verdict, str]:
    ruling = key.ruling
    if ruling.verdict == "inert":
        return "inert", ruling.why
    if ruling.refuses(value):
        return "refused", f"{ruling.why} {ruling.fix}"
    idle = _idle(key.path, validated) if validated is not None else ""
    if idle:
        return "inert", idle
    if ruling.verdict == "refused":
        return ("applied", "") if ruling.otherwise == "applied" else ("inert", "Off; refused when asked for.")
    return "applied", _remark(key.path, value, validated)


def _remark(path: str, value: Any, config: DsConfig | None) -> str:
    """What is worth saying about this value."""
    if path == "$.optimizer.type" and str(value).lower() == "adam" and config is not None and config.optimizer:
        return "" if config.optimizer.params.get("adam_w_mode") is False else "AdamW, because adam_w_mode is not false."
    if path == "$.zero_optimization.stage":
        return _STAGES.get(value, "")
    if path == "$.zero_optimization.offload_optimizer.step_on" and value == "both" and config is not None:
        return "With several ranks the accelerator alone, below stage 3." if config.zero_optimization.stage < 3 else ""
    if path == "$.fp16.loss_scale":
        return "dynamic" if value == 0 else "static"
    return ""


_STAGES = {
    0: "nothing is sharded",
    1: "optimizer states are sharded",
    2: "optimizer states and gradients are sharded",
    3: "optimizer states, gradients and weights are sharded",
}


def _idle(path: str, config: DsConfig) -> str:
    """Why an applied key has nothing to do in this configuration; empty if it has."""
    zero = config.zero_optimization
    section, _, name = path.rpartition(".")
    autocast = config.torch_autocast
    weights = weight_type(config)
    scales_loss = weights == "fp16" or (autocast.enabled and autocast.dtype == "fp16")
    if section == "$.fp16" and name != "enabled" and not (weights == "fp16" if name == "auto_cast" else scales_loss):
        return "fp16 is off."
    if section == "$.bf16" and name == "check_grad_overflow" and scales_loss:
        return "Loss scaling cannot do without the check."
    if section == "$.bf16" and name.startswith("bf16_") and weights != "bf16":
        return "bf16 is off."
    if name == "fp32_optimizer_states" and weights == "fp32":
        return "The weights are fp32 too."
    if section == "$.torch_autocast" and name != "enabled":
        if not autocast.enabled:
            return "torch_autocast is off."
        if name == "lower_precision_safe_modules" and zero.stage == 3:
            return "Stage 3 reduces all gradients in one type."
    if section == "$.flops_profiler" and name != "enabled" and not config.flops_profiler.enabled:
        return "The profiler is off."
    if section == "$.timers.throughput" and config.steps_per_print is None:
        return "Printed with steps_per_print, which is absent."
    if section == "$.zero_optimization.offload_optimizer" and name != "device":
        if zero.offload_optimizer.device == "none":
            return "The optimizer is not offloaded."
        if name in _NVME_KEYS and zero.offload_optimizer.device != "nvme":
            return "Only used when the device is nvme."
        if name == "step_on" and zero.offload_optimizer.device == "nvme":
            return "States on NVMe are updated by the host's cores."
        on_host = zero.offload_optimizer.step_on in ("host", "both") or zero.offload_optimizer.device == "nvme"
        if name == "cpuadam_cores_perc" and not on_host:
            return 'Only used with step_on "host" or "both"; the accelerator computes the update otherwise.'
        if name == "host_share" and (
            zero.offload_optimizer.step_on != "both" or zero.offload_optimizer.device != "cpu"
        ):
            return 'Only used with the device "cpu" and step_on "both".'
        if name == "gpu_memory_budget" and zero.offload_optimizer.ratio != AUTO:
            return 'Only used with ratio "auto".'
    if section == "$.aio" and zero.offload_optimizer.device != "nvme":
        return "Nothing is offloaded to nvme."
    if path == "$.zero_optimization.offload_param.pin_memory" and zero.offload_param.device == "none":
        return "The weights are not offloaded."
    if zero.stage < 3 and (name.startswith("stage3_") or section.endswith(".leaf_module")):
        return f"Only at stage 3; the stage is {zero.stage}."
    if path == "$.gradient_predivide_factor" and not config.prescale_gradients:
        return "Only used with prescale_gradients."
    return ""


_NVME_KEYS = frozenset({"nvme_path", "buffer_count", "pipeline_read", "pipeline_write"})


def _built_by_the_trainer(kind: str, args: TrainingFacts | None) -> Entry:
    name = "optim" if kind == "optimizer" else "lr_scheduler_type"
    value = getattr(args, name) if args is not None else None
    return Entry(
        path=f"$.{kind}",
        value=value,
        source=f"TrainingArguments.{name}" if args is not None else "default",
        verdict="applied",
        note=f"Not in the file: the Trainer builds the {kind}." if args is not None else "Yours to build.",
    )
