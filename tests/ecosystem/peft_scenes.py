"""Scenes of LoRA by PEFT: training, saving, reading back, merging."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.ecosystem.play import Scene
from tests.ecosystem.tiny import config_file, decoder, rows

STEPS = 4


def _adapted() -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    base = decoder()
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def _trainer(out: Path, config: Any, model: Any, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    ranks, accumulated = int(os.environ.get("WORLD_SIZE", "1")), options.get("gradient_accumulation_steps", 1)
    arguments = TrainingArguments(
        str(out),
        deepspeed=config,
        use_cpu=config is None,
        per_device_train_batch_size=4 // ranks // accumulated,
        max_steps=STEPS,
        learning_rate=0.02,
        max_grad_norm=0.2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=5,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows())


def _whole(model: Any, config: Any) -> Any:
    """In this context the weights of ``model`` are whole, and changes of them stay."""
    if config is None:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)


def _logits(model: Any) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.stack([row["input_ids"] for row in rows(2)])).logits


def _lora(out: Path, config: Any, **options: Any) -> dict[str, Any]:
    trainer = _trainer(out, config, _adapted(), **options)
    trainer.train()
    trainer.save_model(str(out))
    trainer.accelerator.wait_for_everyone()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    seen: dict[str, Any] = {key: [log[key] for log in logs] for key in ("loss", "grad_norm")}
    seen["trainable"], seen["elements"] = trainer.model.get_nb_trainable_parameters()
    if config is not None:
        seen["memory"] = trainer.model_wrapped.memory_report()
    return {**seen, **_afterwards(trainer.model, out, config)}


def _afterwards(model: Any, out: Path, config: Any) -> dict[str, Any]:
    """How far the outputs are from the trained model's: read back, merged in place, merged and unloaded."""
    from peft import PeftModel

    trained = _logits(model)

    def distance(other: Any) -> float:
        return (_logits(other) - trained).abs().max().item()

    far: dict[str, Any] = {"untrained": distance(decoder())}
    far["read back"] = distance(PeftModel.from_pretrained(decoder(), str(out)))
    with _whole(model, config):
        model.merge_adapter()
    far["merged in place"] = distance(model)
    with _whole(model, config):
        model.unmerge_adapter()
    far["unmerged"] = distance(model)
    with _whole(model, config):
        merged = {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}
    plain = decoder()
    plain.load_state_dict(merged)
    far["merged and unloaded"] = distance(plain)
    return {"far": far}


def scenes(kind: str, root: Path) -> dict[str, Scene]:
    if kind == "stock":
        configs: dict[str, Any] = {"plain": None}
    else:
        states = {"offload_optimizer": {"device": "cpu"}}
        configs = {
            "stage 2": config_file("zero2_offload"),
            "stage 3": config_file("zero3", stage3_param_persistence_threshold=0, **states),
            "stage 3, small ones whole": config_file("zero3", **states),
            "stage 3, offloaded": config_file("zero3_offload", stage3_param_persistence_threshold=0),
        }
    found: dict[str, Scene] = {}
    for label, config in configs.items():
        found[label] = lambda label=label, config=config: _lora(root / label, config)
        found[f"accumulated, {label}"] = lambda label=label, config=config: _lora(
            root / f"accumulated, {label}", config, gradient_accumulation_steps=2
        )
    return found
