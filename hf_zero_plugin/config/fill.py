"""``"auto"`` and absent keys -> a value and where it came from.

One rule for absent keys: what TrainingArguments also knows is inherited from there, because a value in the file would
have had to agree with it anyway. DeepSpeed under the Trainer inherits only where the file says ``"auto"``, so a file
without ``gradient_clipping`` or ``gradient_accumulation_steps`` used to mean something else than the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hf_zero_plugin.config.facts import ModelFacts, TrainingFacts
from hf_zero_plugin.config.fields import AUTO
from hf_zero_plugin.config.paths import lookup
from hf_zero_plugin.config.schema import known_keys, params_model

__all__ = ["ADAM_FAMILY", "OWN_AUTO", "SIZES_BY_MODEL", "Fill", "all_fills", "all_sizes", "remaining_autos"]

OWN_AUTO = frozenset({"$.zero_optimization.offload_optimizer.ratio", "$.zero_optimization.offload_optimizer.step_on"})
"""Keys whose "auto" is a value that the engine understands."""

SIZES_BY_MODEL: dict[str, tuple[Callable[[int], int], str, int]] = {
    "$.zero_optimization.reduce_bucket_size": (lambda h: h * h, "hidden size squared", 500_000_000),
    "$.zero_optimization.stage3_prefetch_bucket_size": (
        lambda h: int(0.9 * h * h),
        "0.9 x hidden size squared",
        50_000_000,
    ),
    "$.zero_optimization.stage3_param_persistence_threshold": (lambda h: 10 * h, "10 x hidden size", 100_000),
}
"""Keys that follow from the model: the formula in its hidden size, the same in words, the value without a model."""

ADAM_FAMILY = frozenset({"adam", "adamw", "adamax", "nadam", "radam"})
_LATER = "not known before the data is counted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """What a key becomes when the file says "auto", or nothing."""

    value: Any
    """None: not known yet; the key is left out."""
    source: str
    """"TrainingArguments.x", "model", "derived" or "default"."""
    note: str = ""
    inherited: bool = False
    """Also used when the key is absent."""
    must_match: bool = False
    """A value in the file has to be this one."""
    arguments: tuple[str, ...] = ()
    """TrainingArguments that the value is made of."""


def all_fills(config: dict[str, Any], args: TrainingFacts, model: ModelFacts | None) -> dict[str, Fill]:
    """Path -> its fill, for every key that can be filled in this configuration."""
    return {
        **_batch_fills(args),
        **_precision_fills(config, args),
        **_optimizer_fills(config, args),
        **_scheduler_fills(config, args),
        **_zero_fills(config, model),
    }


def _from(args: TrainingFacts, name: str, *, inherited: bool = True, note: str = "") -> Fill:
    return Fill(
        value=getattr(args, name),
        source=f"TrainingArguments.{name}",
        arguments=(name,),
        inherited=inherited,
        must_match=True,
        note=note,
    )


def _batch_fills(args: TrainingFacts) -> dict[str, Fill]:
    micro, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    fixed = not args.auto_find_batch_size
    found = "The Trainer looks for a batch size that fits." if not fixed else ""
    fills = {
        "$.train_batch_size": Fill(
            value=micro * steps * args.world_size,
            source="derived",
            note=found or f"{micro} per device x {steps} accumulated x {args.world_size} ranks",
            inherited=True,
            must_match=fixed,
            arguments=("per_device_train_batch_size", "gradient_accumulation_steps"),
        ),
        "$.train_micro_batch_size_per_gpu": Fill(
            value=micro,
            source="TrainingArguments.per_device_train_batch_size",
            note=found,
            inherited=True,
            must_match=fixed,
            arguments=("per_device_train_batch_size",),
        ),
        "$.gradient_accumulation_steps": _from(args, "gradient_accumulation_steps"),
        "$.gradient_clipping": _from(args, "max_grad_norm"),
    }
    if args.save_on_each_node:
        fills["$.checkpoint.use_node_local_storage"] = Fill(
            value=True, source="TrainingArguments.save_on_each_node", inherited=True, arguments=("save_on_each_node",)
        )
    return fills


def _precision_fills(config: dict[str, Any], args: TrainingFacts) -> dict[str, Fill]:
    if lookup(config, "$.torch_autocast.enabled") is True:
        off = Fill(value=False, source="derived", note="torch_autocast keeps the weights in fp32.", inherited=True)
        dtype = Fill(
            value="fp16" if args.fp16 else "bf16",
            source=f"TrainingArguments.{'fp16' if args.fp16 else 'bf16'}" if args.fp16 or args.bf16 else "default",
            inherited=True,
        )
        return {"$.fp16.enabled": off, "$.bf16.enabled": off, "$.torch_autocast.dtype": dtype}
    fills = {
        "$.amp.enabled": Fill(value=False, source="default"),
        "$.amp.opt_level": Fill(value="O1", source="default"),
    }
    for name in ("fp16", "bf16"):
        flags = [flag for flag in (name, f"{name}_full_eval") if getattr(args, flag)]
        fills[f"$.{name}.enabled"] = Fill(
            value=bool(flags),
            source=f"TrainingArguments.{flags[0] if flags else name}",
            inherited=True,
            must_match=True,
            arguments=(name, f"{name}_full_eval"),
        )
    return fills


def _optimizer_fills(config: dict[str, Any], args: TrainingFacts) -> dict[str, Fill]:
    type_name = lookup(config, "$.optimizer.type")
    model = params_model("optimizer", type_name)
    if model is None:
        return {}
    adam = str(type_name).lower() in ADAM_FAMILY
    fills = {
        "lr": _from(args, "learning_rate"),
        "weight_decay": _from(args, "weight_decay"),
        "eps": _from(args, "adam_epsilon", inherited=adam),
        "betas": Fill(
            value=[args.adam_beta1, args.adam_beta2],
            source="TrainingArguments.adam_beta1, adam_beta2",
            inherited=adam,
            must_match=True,
            arguments=("adam_beta1", "adam_beta2"),
        ),
    }
    return {f"$.optimizer.params.{name}": fill for name, fill in fills.items() if name in model.model_fields}


def _scheduler_fills(config: dict[str, Any], args: TrainingFacts) -> dict[str, Fill]:
    model = params_model("scheduler", lookup(config, "$.scheduler.type"))
    if model is None:
        return {}
    fills = {
        "warmup_min_lr": Fill(value=0.0, source="default"),
        "warmup_max_lr": _from(args, "learning_rate"),
        "warmup_num_steps": Fill(
            value=args.num_warmup_steps,
            source="TrainingArguments.warmup_steps",
            note=_LATER if args.num_warmup_steps is None else "",
            inherited=True,
            must_match=True,
            arguments=("warmup_steps",),
        ),
        "total_num_steps": Fill(
            value=args.total_steps,
            source="TrainingArguments.max_steps" if args.max_steps > 0 else "derived",
            note=_LATER if args.total_steps is None else "steps of the whole run",
            inherited=True,
            must_match=args.total_steps is not None,
            arguments=("max_steps", "num_train_epochs"),
        ),
    }
    return {f"$.scheduler.params.{name}": fill for name, fill in fills.items() if name in model.model_fields}


def _zero_fills(config: dict[str, Any], model: ModelFacts | None) -> dict[str, Fill]:
    zero = "$.zero_optimization"
    stage = lookup(config, f"{zero}.stage")
    is_stage_3 = stage == 3
    none = Fill(value="none", source="default", note='"auto" offloads nothing; write "cpu" to offload.')
    fills = {
        f"{zero}.stage": Fill(value=2, source="default", note='"auto" is stage 2, as accelerate has it.'),
        f"{zero}.offload_optimizer.device": none,
        f"{zero}.offload_param.device": none,
        f"{zero}.offload_optimizer.nvme_path": Fill(value=None, source="default"),
        f"{zero}.offload_param.nvme_path": Fill(value=None, source="default"),
        f"{zero}.stage3_gather_16bit_weights_on_model_save": Fill(
            value=is_stage_3,
            source="derived",
            note="So that save_model writes whole weights; accelerate alone would take false." if is_stage_3 else "",
        ),
    }
    return {**fills, **all_sizes(model)}


def all_sizes(model: ModelFacts | None) -> dict[str, Fill]:
    """The fills of ``SIZES_BY_MODEL``."""
    hidden = model.hidden_size if model is not None else None
    fills = {}
    for path, (formula, words, default) in SIZES_BY_MODEL.items():
        if hidden is None:
            reason = "no model is given" if model is None else "the model names no hidden_size"
            fills[path] = Fill(value=default, source="default", note=f"{words} once it is known; {reason}")
        else:
            fills[path] = Fill(value=formula(hidden), source="model", note=f"{words} ({hidden})")
    return fills


def remaining_autos(config: dict[str, Any]) -> Iterator[str]:
    """Paths that still hold "auto" and that the engine would not understand."""
    for key in known_keys(config=config):
        if lookup(config, key.path) == AUTO and key.path not in OWN_AUTO:
            yield key.path
