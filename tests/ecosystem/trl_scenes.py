"""Scenes of TRL's trainers: the three steps of an RLHF pipeline, each from the step before it.

SFT      a decoder learns prompts and completions     -> OUT/PIPELINE/sft
reward   a classifier learns what is preferred        -> OUT/PIPELINE/reward
DPO      the decoder of step one learns preferences, against itself as the reference -> OUT/PIPELINE/dpo
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ecosystem.play import Scene
from tests.ecosystem.tiny import config_file, decoder, sentences, tokenizer

STEPS = 4
ROWS = 16


def _texts(split: str) -> Any:
    from datasets import Dataset

    prompts = [f"{text} " for text in sentences(ROWS, seed=1, words=4)]
    if split == "sft":
        return Dataset.from_dict({"prompt": prompts, "completion": sentences(ROWS, seed=2)})
    return Dataset.from_dict(
        {"prompt": prompts, "chosen": sentences(ROWS, seed=3), "rejected": sentences(ROWS, seed=4)}
    )


def _arguments(cls: Any, out: Path, config: Any, **options: Any) -> Any:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    accumulated = options.get("gradient_accumulation_steps", 1)
    defaults: dict[str, Any] = {
        "deepspeed": config,
        "use_cpu": config is None,
        "bf16": False,
        "per_device_train_batch_size": 4 // accumulated // ranks,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "max_grad_norm": 0.5,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "max_length": 16,
        "seed": 5,
    }
    return cls(str(out), **{**defaults, **options})


def _play(trainer: Any, out: Path) -> dict[str, Any]:
    trainer.train()
    trainer.save_model(str(out))
    trainer.accelerator.wait_for_everyone()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return {
        "loss": [log["loss"] for log in logs],
        "grad_norm": [log["grad_norm"] for log in logs],
        "engine": type(trainer.model_wrapped).__name__,
    }


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def _sft(out: Path, config: Any, *, peft_config: Any = None, **options: Any) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        decoder(),
        _arguments(SFTConfig, out, config, **options),
        train_dataset=_texts("sft"),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    return _play(trainer, out)


def _reward(out: Path, config: Any, sft: Path, **options: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    arguments = _arguments(RewardConfig, out, config, **options)
    torch.manual_seed(7)  # the head is new
    model = AutoModelForSequenceClassification.from_pretrained(sft, num_labels=1)
    return _play(RewardTrainer(model, arguments, train_dataset=_texts("pairs"), processing_class=tokenizer()), out)


def _dpo(out: Path, config: Any, start: Path, *, peft_config: Any = None, **options: Any) -> dict[str, Any]:
    """The reference is a model of its own, or with ``peft_config`` the model without its adapter."""
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    arguments = _arguments(DPOConfig, out, config, **options)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(start),
        args=arguments,
        train_dataset=_texts("pairs"),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    seen = _play(trainer, out)
    seen["reference"] = type(trainer.ref_model).__name__
    if trainer.ref_model is not None:
        seen["of reference"] = _weights_of(trainer.ref_model, trainer)
    return seen


def _weights_of(model: Any, trainer: Any) -> dict[str, float]:
    """Sum of absolute values, by parameter."""
    from contextlib import nullcontext

    if trainer.is_deepspeed_enabled:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(list(model.parameters()))
    else:
        context = nullcontext()
    with context:
        module = trainer.accelerator.unwrap_model(model)
        return {name: param.detach().abs().sum().item() for name, param in module.named_parameters()}


def _untrained(root: Path) -> Path:
    """A folder that rank 0 has written and every rank may read."""
    from accelerate import PartialState

    with PartialState().main_process_first():
        if PartialState().is_main_process:
            decoder().save_pretrained(root / "start")
    return root / "start"


def _pipeline(root: Path, config: Any, **options: Any) -> dict[str, Any]:
    return {
        "sft": _sft(root / "sft", config, **options),
        "reward": _reward(root / "reward", config, root / "sft", **options),
        "dpo": _dpo(root / "dpo", config, root / "sft", **options),
    }


def _adapters(root: Path, config: Any) -> dict[str, Any]:
    seen = {
        "sft": _sft(root / "sft", config, peft_config=_lora()),
        "dpo": _dpo(root / "dpo", config, _untrained(root), peft_config=_lora()),
    }
    seen["sft"]["files"] = sorted(file.name for file in (root / "sft").glob("*.safetensors"))
    return seen


def _generating(root: Path, config: Any) -> dict[str, Any]:
    """Generation between the steps, by TRL's own context; what is trained must not notice."""
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.models import unwrap_model_for_generation

    tokens: list[list[list[int]]] = []

    class Generates(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            import torch

            prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
            was_training = trainer.model.training
            trainer.model.eval()
            with torch.no_grad(), unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
                made = model.generate(prompt, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(prompt))
            tokens.append(made.tolist())
            trainer.model.train(was_training)

    arguments = _arguments(SFTConfig, root, config)
    trainer = SFTTrainer(
        decoder(), arguments, train_dataset=_texts("sft"), processing_class=tokenizer(), callbacks=[Generates()]
    )
    return {**_play(trainer, root), "tokens": tokens}


def _following(root: Path, config: Any) -> dict[str, Any]:
    """The reference moves towards the model every second step."""
    follows = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
    return _dpo(root, config, _untrained(root), **follows)


def _computed_before(root: Path, config: Any) -> dict[str, Any]:
    """The reference's numbers are computed before the training, and no reference stays."""
    return _dpo(root, config, _untrained(root), precompute_ref_log_probs=True)


PLAYS: dict[str, Callable[[Path, Any], Any]] = {
    "pipeline": _pipeline,
    "accumulated": lambda root, config: _pipeline(root, config, gradient_accumulation_steps=2),
    "adapters": _adapters,
    "generating": _generating,
    "following": _following,
    "computed before": _computed_before,
}


def scenes(kind: str, root: Path) -> dict[str, Scene]:
    if kind == "stock":
        configs: dict[str, Any] = {"plain": None}
    else:
        configs = {
            "stage 2": config_file("zero2_offload"),
            "stage 3": config_file("zero3", stage3_param_persistence_threshold=0),
            "stage 3 offloaded": config_file("zero3_offload"),
        }
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    # Ranks read what rank 0 has computed from a file of the data set, and these data sets have none.
    plays = PLAYS if ranks == 1 else {name: play for name, play in PLAYS.items() if name != "computed before"}
    return {
        f"{name} {label}": lambda play=play, name=name, label=label: play(root / f"{name} {label}", configs[label])
        for label in configs
        for name, play in plays.items()
    }
