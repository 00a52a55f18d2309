"""Small repairs of transformers and accelerate, applied right after their modules load. Each says what it mends.

A repair wraps one function, keeps its signature, and does nothing where this engine is not used.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

from hf_zero_plugin.integration.cpu_ranks import repair_partial_state
from hf_zero_plugin.integration.removed_flags import restore_overwrite_output_dir

__all__ = [
    "repair_accelerate_plugin",
    "repair_accelerate_state",
    "repair_modeling_utils",
    "repair_trainer",
    "repair_training_args",
    "repair_transformers_deepspeed",
    "resolved_of",
]

_DEEPSPEED_VARIABLE = "ACCELERATE_USE_DEEPSPEED"
_set_by_launcher = os.environ.get(_DEEPSPEED_VARIABLE)

_resolved: list[tuple[dict[str, Any], Any]] = []
"""The newest dicts that a Trainer has filled, and what they resolved to. accelerate copies the object around the dict,
so the dict itself is what identifies a configuration."""


def resolved_of(config: dict[str, Any]) -> Any | None:
    """The ResolvedConfig that ``config`` was filled from, if a Trainer filled this very object."""
    return next((resolved for known, resolved in _resolved if known is config), None)


def repair_transformers_deepspeed(module: ModuleType) -> None:
    """The Trainer's config object: checked when it is made, resolved without holes, never half filled.

    Mends: unknown keys pass silently; an absent ``gradient_clipping`` drops max_grad_norm; an absent
    ``gradient_accumulation_steps`` becomes 1; ``--bf16`` without a bf16 section stays fp32; no ``stage`` is a KeyError
    at the first save; offload swaps any optimizer for a CPU Adam; ``warmup_num_steps: 0`` does not start.
    """
    from hf_zero_plugin.config.auto import ModelFacts, TrainingFacts, dict_for_trainer, resolve
    from hf_zero_plugin.config.load import load_config

    cls = module.HfTrainerDeepSpeedConfig
    make, process = cls.__init__, cls.trainer_config_process

    def __init__(self: Any, config_file_or_dict: Any) -> None:
        previous = module._hf_deepspeed_config_weak_ref
        holder = previous() if previous is not None else None
        known = holder is not None and getattr(holder, "config", None) is config_file_or_dict
        # The Trainer rebuilds its config from the filled dict when it searches for a batch size: start from what
        # the user wrote.
        loaded = getattr(holder, "zero_loaded", None) if known else None
        loaded = loaded if loaded is not None else load_config(config_file_or_dict)
        make(self, dict_for_trainer(loaded))
        self.zero_loaded = loaded
        self.zero_resolved = None

    @functools.wraps(process)
    def trainer_config_process(self: Any, args: Any, auto_find_batch_size: bool = False) -> None:
        resolve(self.zero_loaded, TrainingFacts.of(args))  # raises what is wrong before anything is built
        process(self, args, auto_find_batch_size)
        self.mismatches.clear()

    def trainer_config_finalize(self: Any, args: Any, model: Any, num_training_steps: int) -> None:
        facts = TrainingFacts.of(args, num_training_steps=num_training_steps or None)
        model_facts = ModelFacts.of(model.config) if hasattr(model, "config") else None
        self.zero_resolved = resolve(self.zero_loaded, facts, model_facts)
        # The dict object is shared with accelerate's plugin: change it in place.
        resolved = self.zero_resolved.as_ds_dict()
        self.config.clear()
        self.config.update(resolved)
        self.set_stage_and_offload()
        _resolved[:] = [(self.config, self.zero_resolved), *_resolved[:3]]

    cls.__init__ = __init__
    cls.trainer_config_process = trainer_config_process
    cls.trainer_config_finalize = trainer_config_finalize


def repair_modeling_utils(module: ModuleType) -> None:
    """PreTrainedModel's questions about sizes and types do not wait for pending weights.

    Mends: the Trainer counts all parameters after every step, and models ask for their own dtype within ``forward``;
    both walk over ``named_parameters``, which would make every step wait for all of the update before it.
    """
    from hf_zero_plugin.engine.readiness import is_training, unguarded

    cls = module.PreTrainedModel
    count = cls.num_parameters

    @functools.wraps(count)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        with unguarded():
            if only_trainable or not is_training(self):
                return count(self, only_trainable, exclude_embeddings)
            # The count cannot change while an engine holds the parameters; counting takes a millisecond or two.
            memo = self.__dict__.setdefault("_hf_zero_counts", {})
            if exclude_embeddings not in memo:
                memo[exclude_embeddings] = count(self, only_trainable, exclude_embeddings)
            return memo[exclude_embeddings]

    cls.num_parameters = num_parameters
    for name in ("dtype", "device"):
        ask = getattr(cls, name).fget

        def answer(self: Any, ask: Any = ask) -> Any:
            with unguarded():
                return ask(self)

        setattr(cls, name, property(answer, doc=getattr(cls, name).__doc__))


def repair_training_args(module: ModuleType) -> None:
    """TrainingArguments: a process group for a lone process, and no DeepSpeed where none was asked for.

    Mends: with two visible GPUs and no launcher the Trainer takes DataParallel and never reaches the engine; an
    earlier Accelerator leaves ACCELERATE_USE_DEEPSPEED in the environment, and arguments without ``deepspeed`` then
    train under an empty stage 2 config; ACCELERATE_USE_CPU makes ``deepspeed`` mean nothing, silently.
    """
    from hf_zero_plugin.integration.comm import describe_single_process
    from hf_zero_plugin.integration.use_cpu import hide_gpus_instead_of_use_cpu

    cls = module.TrainingArguments
    post_init = cls.__post_init__

    @functools.wraps(post_init)
    def __post_init__(self: Any) -> None:
        if self.deepspeed:
            # A CUDA context may exist already, and would still show its GPUs: say it to the Trainer as well.
            self.use_cpu = hide_gpus_instead_of_use_cpu() or self.use_cpu
            describe_single_process()
        elif _set_by_launcher is None:
            os.environ.pop(_DEEPSPEED_VARIABLE, None)
        post_init(self)

    cls.__post_init__ = __post_init__
    restore_overwrite_output_dir(module)


def repair_trainer(module: ModuleType) -> None:
    """Trainer: a second ``train()``, evaluation before training at any stage, saving that is streamed and done once.

    Mends: ``train`` wraps the engine of the train before it, which is destroyed by then; ``evaluate`` and ``predict``
    without training raise "ZeRO inference only makes sense with ZeRO Stage 3", and drop the optimizer section, so
    that a later ``train`` has none; a checkpoint whose weights are not gathered is written twice.
    """
    from hf_zero_plugin.engine.engine import ZeroEngine
    from hf_zero_plugin.integration.single_write import write_once
    from hf_zero_plugin.integration.streamed_saving import stream_saving

    cls = module.Trainer
    train, init = cls.train, module.deepspeed_init

    @functools.wraps(train)
    def train_again(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model_wrapped, ZeroEngine):
            self.model_wrapped = self.model
        try:
            return train(self, *args, **kwargs)
        except RuntimeError as error:
            # The Trainer has collectives of its own, outside the engine.
            engine = self.model_wrapped
            explained = engine.watchdog.explain(error) if isinstance(engine, ZeroEngine) else None
            if explained is None:
                raise
            raise explained from error

    @functools.wraps(init)
    def deepspeed_init(trainer: Any, num_training_steps: int, inference: bool = False) -> tuple[Any, Any]:
        if not inference:
            return init(trainer, num_training_steps, inference)
        plugin = trainer.accelerator.state.deepspeed_plugin
        plugin.hf_ds_config.trainer_config_finalize(trainer.args, trainer.model, num_training_steps)
        return None, None

    stream_saving(module)
    write_once(module)
    cls.train = train_again
    module.deepspeed_init = deepspeed_init  # type: ignore[attr-defined]


def repair_accelerate_plugin(module: ModuleType) -> None:
    """accelerate's DeepSpeedPlugin without a Trainer: a process group for a lone process, the optimizer as given.

    Mends too: ACCELERATE_USE_CPU makes the plugin mean nothing, silently.
    """
    from hf_zero_plugin.integration.comm import describe_single_process
    from hf_zero_plugin.integration.use_cpu import hide_gpus_instead_of_use_cpu

    cls = module.DeepSpeedPlugin
    post_init = cls.__post_init__

    @functools.wraps(post_init)
    def __post_init__(self: Any) -> None:
        hide_gpus_instead_of_use_cpu()
        describe_single_process()
        post_init(self)
        self.deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)

    cls.__post_init__ = __post_init__


def repair_accelerate_state(module: ModuleType) -> None:
    """Several CPU processes see each other: see ``cpu_ranks.py``."""
    repair_partial_state(module)
