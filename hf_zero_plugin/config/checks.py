"""What cannot be right together: between two keys, and between the file and TrainingArguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_zero_plugin.config.build import weight_type
from hf_zero_plugin.config.facts import TrainingFacts
from hf_zero_plugin.config.fields import AUTO
from hf_zero_plugin.config.fill import ADAM_FAMILY, Fill
from hf_zero_plugin.config.paths import is_present, lookup, show
from hf_zero_plugin.config.problems import Problem
from hf_zero_plugin.config.schema import DsConfig

__all__ = ["cross_problems", "cross_warnings", "mismatches", "unknown_totals"]

_Z = "$.zero_optimization"


def mismatches(config: dict[str, Any], fills: dict[str, Fill], args: TrainingFacts) -> tuple[list[Problem], list[str]]:
    """Values in the file that differ from TrainingArguments: problems, and warnings where the user gave no argument."""
    problems, warnings = [], []
    for path, fill in fills.items():
        if not fill.must_match or fill.value is None or not is_present(config, path):
            continue
        value = lookup(config, path)
        if value == AUTO or value is None or _agree(path, value, fill.value):
            continue
        flags = " and ".join(f"--{name}" for name in fill.arguments)
        if any(args.is_given(name) for name in fill.arguments):
            problems.append(_mismatch(path, value, fill, flags))
        else:
            warnings.append(
                f"{path}: the file says {show(value)}; the Trainer's default is {show(fill.value)}, "
                f"and a run refuses the difference. Pass {flags} to agree."
            )
    return problems, warnings


def _mismatch(path: str, value: Any, fill: Fill, flags: str) -> Problem:
    note = f" ({fill.note})" if fill.source == "derived" and fill.note else ""
    return Problem(
        path=path,
        what=f"{show(value)} in the file, but {show(fill.value)} from {flags}{note}",
        why="The Trainer would follow its arguments and the engine the file.",
        fix=f'Set {path} to "auto", or make {flags} agree.',
    )


def _agree(path: str, ours: Any, theirs: Any) -> bool:
    if path.endswith(".warmup_num_steps"):
        # The Trainer itself turns 0 into 1, and the formulas treat both alike.
        return bool(max(1, ours) == max(1, theirs))
    if isinstance(ours, (list, tuple)):
        return list(ours) == list(theirs)
    return bool(ours == theirs)


def cross_problems(model: DsConfig, sources: dict[str, str]) -> Iterator[Problem]:
    """Keys that exclude each other. ``model`` holds no "auto" any more."""
    zero = model.zero_optimization
    if model.fp16.enabled and model.bf16.enabled:
        origin = {name: sources.get(f"$.{name}.enabled", "file") for name in ("fp16", "bf16")}
        yield Problem(
            path="$.bf16.enabled",
            what=f"fp16 (from {origin['fp16']}) and bf16 (from {origin['bf16']}) are both on",
            why="Weights have one type.",
            fix='Switch one of them off; with both sections at "auto", pass only one of --fp16 and --bf16.',
        )
    if model.fp16.loss_scale == 0 and 2**model.fp16.initial_scale_power < model.fp16.min_loss_scale:
        yield Problem(
            path="$.fp16.initial_scale_power",
            what=f"the loss scale would start at 2^{model.fp16.initial_scale_power}, "
            f"below min_loss_scale {model.fp16.min_loss_scale:g}",
            why="The scale never falls below min_loss_scale, so it cannot start there.",
            fix="Raise initial_scale_power, or lower min_loss_scale.",
        )
    if model.torch_autocast.enabled and (model.fp16.enabled or model.bf16.enabled):
        name = "fp16" if model.fp16.enabled else "bf16"
        yield Problem(
            path="$.torch_autocast.enabled",
            what=f"torch_autocast and {name} are both on",
            why=f"torch_autocast keeps the weights in fp32, {name} does not.",
            fix=f"Remove the {name} section, or torch_autocast.",
        )
    wanted = model.data_types.param_dtype
    if wanted is not None and wanted != weight_type(model):
        name = "fp16" if model.fp16.enabled else "bf16"
        yield Problem(
            path="$.data_types.param_dtype",
            what=f'"{wanted}", but {name} (from {sources.get(f"$.{name}.enabled", "file")}) is on',
            why="Weights have one type.",
            fix=f"Remove param_dtype, or switch {name} off.",
        )
    states = model.optimizer.params.get("fp32_optimizer_states") if model.optimizer is not None else None
    if states is False and weight_type(model) == "fp16":
        yield Problem(
            path="$.optimizer.params.fp32_optimizer_states",
            what="false would keep the moments in fp16",
            why="Squares of small gradients are zero in fp16, and Adam divides by their root.",
            fix="Use bf16 instead of fp16, or remove the key to keep the moments in fp32.",
        )
    if zero.offload_optimizer.device == "nvme" and not zero.offload_optimizer.nvme_path:
        yield Problem(
            path=f"{_Z}.offload_optimizer.nvme_path",
            what="the key is missing",
            why='The device is "nvme", and nothing says which disk that is.',
            fix='Name a directory on it, for example "/local_nvme".',
        )
    if zero.stage < 3 and zero.offload_param.device == "cpu":
        yield Problem(
            path=f"{_Z}.offload_param.device",
            what=f'"{zero.offload_param.device}" needs stage 3, but the stage is {zero.stage}',
            why="Below stage 3 every rank keeps the whole weights on its device; DeepSpeed ignores this silently.",
            fix=f"Set {_Z}.stage to 3, or remove offload_param.",
        )
    if zero.stage == 3 and model.gradient_allreduce_op == "sum":
        yield Problem(
            path="$.gradient_allreduce_op",
            what='"sum" does not work at stage 3',
            why="Stage 3 averages gradients.",
            fix='Use "mean", or stage 0, 1 or 2.',
        )


def unknown_totals(config: dict[str, Any]) -> Iterator[Problem]:
    """Schedules that end need to know when; asked only where no Trainer will tell."""
    if lookup(config, "$.scheduler.type") is None:
        return
    name = str(config["scheduler"]["type"])
    if name.lower() in ("warmupdecaylr", "warmupcosinelr") and not is_present(
        config, "$.scheduler.params.total_num_steps"
    ):
        yield Problem(
            path="$.scheduler.params.total_num_steps",
            what='the key "total_num_steps" is missing',
            why=f"{name} has to know where it ends.",
            fix="Add it, as the number of optimizer steps of the whole run.",
        )


def cross_warnings(config: dict[str, Any], args: TrainingFacts | None) -> Iterator[str]:
    """Allowed, but probably not what is meant."""
    if "zero_optimization" not in config:
        yield "$.zero_optimization: not in the file; stage 0, nothing is sharded or offloaded."
    elif not is_present(config, f"{_Z}.stage"):
        yield f"{_Z}.stage: not in the file; stage 0, nothing is sharded."
    steps = lookup(config, "$.scheduler.params.warmup_num_steps")
    total = lookup(config, "$.scheduler.params.total_num_steps")
    if isinstance(steps, int) and isinstance(total, int) and steps > total:
        yield f"$.scheduler.params.warmup_num_steps: {steps} is more than total_num_steps {total}."
    if args is None:
        return
    optimizer = lookup(config, "$.optimizer.type")
    if isinstance(optimizer, str) and not _same_optimizer(optimizer, args.optim):
        yield f'$.optimizer.type: "{optimizer}" of the file is used; --optim {args.optim} has no effect.'
    scheduler = lookup(config, "$.scheduler.type")
    wanted = args.lr_scheduler_type
    if isinstance(scheduler, str) and wanted != "linear" and wanted != _LIKE.get(scheduler.lower()):
        yield f'$.scheduler.type: "{scheduler}" of the file is used; --lr_scheduler_type {wanted} has no effect.'


_LIKE = {"warmuplr": "constant_with_warmup", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}


def _same_optimizer(type_name: str, optim: str) -> bool:
    family = optim.split("_")[0].lower()
    return family == type_name.lower() or (family == "adamw" and type_name.lower() in ADAM_FAMILY)
