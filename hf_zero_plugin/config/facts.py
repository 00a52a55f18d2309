"""What the run knows beside the configuration, as plain values: transformers is not imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["ModelFacts", "TrainingFacts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFacts:
    """The TrainingArguments that a configuration depends on; defaults are those of transformers 5."""

    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    world_size: int = 1
    auto_find_batch_size: bool = False
    max_grad_norm: float = 1.0
    learning_rate: float = 5e-5
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    fp16: bool = False
    bf16: bool = False
    fp16_full_eval: bool = False
    bf16_full_eval: bool = False
    max_steps: int = -1
    num_training_steps: int | None = None
    """Optimizer steps of the whole run, known once the data is counted."""
    warmup_steps: float = 0.0
    """Steps if at least 1, else a share of all steps."""
    optim: str = "adamw_torch_fused"
    lr_scheduler_type: str = "linear"
    gradient_checkpointing: bool = False
    save_on_each_node: bool = False
    given: frozenset[str] | None = None
    """Names that the user gave; None means that every value here is meant (a mismatch is then an error)."""

    @classmethod
    def of(cls, args: Any, *, num_training_steps: int | None = None) -> TrainingFacts:
        """From a TrainingArguments, or anything with its attributes; absent ones take their default."""
        values = {
            item.name: getattr(args, item.name)
            for item in fields(cls)
            if item.name not in ("num_training_steps", "given") and getattr(args, item.name, None) is not None
        }
        if hasattr(args, "max_grad_norm") and args.max_grad_norm is None:
            values["max_grad_norm"] = 0.0
        if getattr(args, "warmup_ratio", None) and not values.get("warmup_steps"):
            values["warmup_steps"] = float(args.warmup_ratio)  # an argument of its own in older releases
        for name in ("optim", "lr_scheduler_type"):
            if name in values:
                values[name] = str(getattr(values[name], "value", values[name]))
        return cls(num_training_steps=num_training_steps, **values)

    def is_given(self, name: str) -> bool:
        return self.given is None or name in self.given

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run; None while unknown."""
        if self.num_training_steps is not None:
            return self.num_training_steps
        return self.max_steps if self.max_steps > 0 else None

    @property
    def num_warmup_steps(self) -> int | None:
        """Warm-up in steps; None while it is a share of an unknown total."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        if self.warmup_steps <= 0:
            return 0
        return None if self.total_steps is None else math.ceil(self.total_steps * self.warmup_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    hidden_size: int | None = None
    """Width of the residual stream; the largest if there are several."""
    num_parameters: int | None = None
    model_type: str | None = None

    @classmethod
    def of(cls, config: Any, *, num_parameters: int | None = None) -> ModelFacts:
        """From a model's ``config`` object, whose text part counts for models of several parts."""
        hidden = None
        for part in (config, getattr(config, "text_config", None)):
            if hidden is None and part is not None:
                sizes = getattr(part, "hidden_sizes", None)
                hidden = getattr(part, "hidden_size", None) or (max(sizes) if sizes else None)
        return cls(hidden_size=hidden, num_parameters=num_parameters, model_type=getattr(config, "model_type", None))
