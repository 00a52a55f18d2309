"""A resolved configuration in words: the dozen lines that are logged when a run starts."""

from __future__ import annotations

from collections.abc import Iterator

from hf_zero_plugin.config.resolved import ResolvedConfig
from hf_zero_plugin.config.settings import EngineSettings

__all__ = ["short_table"]

_SHARDED = {
    0: "nothing is sharded",
    1: "optimizer states sharded",
    2: "optimizer states and gradients sharded",
    3: "optimizer states, gradients and weights sharded",
}


def short_table(resolved: ResolvedConfig) -> str:
    """About a dozen lines, plain text: what runs, and where each decision came from."""
    origins = {entry.path: entry.source for entry in resolved.entries}
    rows = list(_rows(resolved.settings, origins))
    inert = [entry.path.rpartition(".")[2] for entry in resolved.entries if entry.in_file and entry.verdict == "inert"]
    if inert:
        shown = ", ".join(inert[:4]) + (", ..." if len(inert) > 4 else "")
        rows.append(("no effect", f"{len(inert)} keys of the file: {shown}", "hf-zero explain tells why"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"Configuration: {resolved.origin}"]
    lines += [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {origin}".rstrip() for name, value, origin in rows]
    lines += [f"  warning: {warning}" for warning in resolved.warnings]
    return "\n".join(lines)


def _rows(settings: EngineSettings, origins: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    zero = "$.zero_optimization"
    yield "stage", f"{settings.stage}, {_SHARDED[settings.stage]}", origins.get(f"{zero}.stage", "default")
    section = f"$.{settings.precision}.enabled"
    is_section = origins.get("$.data_types.param_dtype", "default") == "default"
    yield "weights", _weights(settings), origins.get(section, "default") if is_section else "file"
    yield "batch", _batch(settings), origins.get("$.train_micro_batch_size_per_gpu", "default")
    clipping = f"{settings.gradient_clipping:g}" if settings.gradient_clipping else "off"
    yield "clipping", clipping, origins.get("$.gradient_clipping", "default")
    if settings.optimizer is not None:
        params = ", ".join(f"{key} {_shown(value)}" for key, value in settings.optimizer.params.items())
        yield "optimizer", f"{settings.optimizer.type} ({params})", origins.get("$.optimizer.params.lr", "file")
    else:
        yield "optimizer", "the Trainer's", origins.get("$.optimizer", "")
    if settings.scheduler is not None:
        params = ", ".join(f"{key} {_shown(value)}" for key, value in settings.scheduler.params.items())
        yield "schedule", f"{settings.scheduler.type} ({params})", "file"
    else:
        yield "schedule", "the Trainer's", origins.get("$.scheduler", "")
    yield "offload", _offload(settings), origins.get(f"{zero}.offload_optimizer.device", "default")
    buckets = f"at most {settings.reduce_bucket_size:,} elements"
    yield "buckets", buckets, origins.get(f"{zero}.reduce_bucket_size", "default")


def _weights(settings: EngineSettings) -> str:
    words = (
        settings.precision if settings.autocast is None else f"{settings.precision}, computing in {settings.autocast}"
    )
    narrow = {"masters": settings.master_dtype, "optimizer states": settings.optimizer_state_dtype}
    words += "".join(f", {name} in {dtype}" for name, dtype in narrow.items() if dtype != "fp32")
    scale = settings.loss_scale
    if scale is None:
        return words
    if scale.static_scale:
        return f"{words}, loss scale {scale.static_scale:g}"
    return f"{words}, dynamic loss scale from 2^{scale.initial_scale_power}"


def _batch(settings: EngineSettings) -> str:
    micro = settings.train_micro_batch_size_per_gpu or "?"
    total = settings.train_batch_size or "?"
    return f"{micro} per device x {settings.gradient_accumulation_steps} accumulated, {total} per step"


def _offload(settings: EngineSettings) -> str:
    optimizer, weights = settings.offload_optimizer, settings.offload_param
    if optimizer.device == "none" and weights.device == "none":
        return "none"
    parts = []
    if optimizer.device != "none":
        share = "" if optimizer.ratio == 1.0 else f" (ratio {optimizer.ratio})"
        pinned = "" if optimizer.pin_memory else ", not page-locked"
        parts.append(f"optimizer states on {optimizer.device}{share}{pinned}")
    if weights.device != "none":
        parts.append(f"weights on {weights.device}")
    return "; ".join(parts)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "/".join(_shown(item) for item in value)
    return str(value)
