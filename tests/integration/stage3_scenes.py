"""Scenes of Trainer runs at stage 3, played by one or two processes; test_stage3_trainer.py compares.

``python -m tests.integration.stage3_scenes OUT OTHER``: every scene leaves its weights in OUT/NAME and what it saw in
OUT/results.json (rank 0). OTHER is a folder that another number of ranks has left, or "-".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 4


def _config(name: str, **zero: Any) -> dict[str, Any]:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config["zero_optimization"].update(zero)
    return config


def _model() -> Any:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=65,  # does not divide by two
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return T5ForConditionalGeneration(config)


def _data() -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(1)

    def row(index: int) -> dict[str, Any]:
        length = 4 + (index * 7) % 7
        tokens = torch.randint(2, 64, (10,), generator=generator)
        mask = (torch.arange(10) < length).long()
        return {
            "input_ids": tokens * mask,
            "attention_mask": mask,
            "labels": torch.randint(2, 64, (6,), generator=generator),
        }

    return [row(index) for index in range(32)]


def _trainer(out: Path, config: Any, model: Any = None, **options: Any) -> Any:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    arguments = Seq2SeqTrainingArguments(
        str(out),
        **{
            "deepspeed": config,
            "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")),
            "per_device_eval_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_strategy": "no",
            "predict_with_generate": True,
            "generation_max_length": 9,
            "report_to": [],
            "disable_tqdm": True,
            **options,
        },
    )
    model = model() if model is not None else _model()
    if hasattr(model, "generation_config"):
        # Rows end early, each at a length of its own: the ranks' loops do too.
        model.generation_config.eos_token_id = list(range(1, 30))
    return Seq2SeqTrainer(model=model, args=arguments, train_dataset=_data(), eval_dataset=_data()[:7])


def _experts() -> Any:
    """Transformers stacks the weights of experts when it loads them, and cuts them again when it saves them."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=65,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=3,
    )
    return MixtralForCausalLM(config)


def _encode(trainer: Any) -> float:
    """The encoder called by itself, as code of users does."""
    import torch

    tokens = _data()[0]["input_ids"][None]
    with torch.no_grad():
        return float(trainer.model.get_encoder()(input_ids=tokens).last_hidden_state.float().norm())


def _save_experts(out: Path, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Saved as it is; ``options`` change how the Trainer saves."""
    trainer = _trainer(out, config, _experts, **options)
    trainer.evaluate(_texts())
    with _counted_streams() as streams:
        trainer.save_model(str(out))
    trainer.accelerator.wait_for_everyone()
    return {"streams": len(streams)}


def _texts() -> list[dict[str, Any]]:
    return [{"input_ids": row["labels"], "labels": row["labels"]} for row in _data()[:4]]


@contextmanager
def _counted_streams() -> Iterator[list[str]]:
    from hf_zero_plugin.integration import streamed_saving

    written, stream = [], streamed_saving.stream_safetensors

    def counted(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        written.append(str(path))
        stream(tensors, path, *args, **kwargs)

    streamed_saving.stream_safetensors = counted
    try:
        yield written
    finally:
        streamed_saving.stream_safetensors = stream


def _play(trainer: Any, out: Path, *, evaluate_first: bool = False, resume: str | None = None) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    if evaluate_first:
        seen["before"] = trainer.evaluate()["eval_loss"]
        seen["predicted before"] = trainer.predict(_data()[:7]).predictions.tolist()
    trainer.train(resume_from_checkpoint=resume)
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    seen["loss"] = [log["loss"] for log in logs]
    seen["after"] = trainer.evaluate()["eval_loss"]
    seen["generated"] = trainer.predict(_data()[:7]).predictions.tolist()
    with _counted_streams() as streams:
        trainer.save_model(str(out))
    seen["streams"] = len(streams)
    trainer.accelerator.wait_for_everyone()
    return seen


def _lora(out: Path, config: dict[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    def model() -> Any:
        base = _model()
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))

    trainer = _trainer(out, config, model)
    seen = _play(trainer, out)
    report = trainer.model_wrapped.memory_report()
    seen["states"] = sum(place.get("moments", 0) for place in report.values())
    seen["files"] = sorted(file.name for file in out.iterdir()) if trainer.args.process_index == 0 else []
    return seen


def main(out: Path, other: str) -> None:
    import hf_zero_plugin

    hf_zero_plugin.activate()
    import torch

    torch.set_num_threads(1)
    sharded = _config("zero3", stage3_param_persistence_threshold=0)
    offloaded = _config("zero3_offload")
    results: dict[str, Any] = {}

    def scene(name: str, config: Any, model: Any = None, resume: str | None = None, **options: Any) -> Any:
        first = options.pop("evaluate_first", False)
        trainer = _trainer(out / name, config, model, **options)
        results[name] = _play(trainer, out / name, evaluate_first=first, resume=resume)
        return trainer

    scene("stage 0", _config("zero0"), evaluate_first=True, save_strategy="steps", save_steps=2)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    scene("sharded", sharded, evaluate_first=True, **saving)
    scene("offloaded", offloaded, **saving)
    scene(
        "checkpointed layers",
        {**sharded, "activation_checkpointing": {"cpu_checkpointing": True}},
        gradient_checkpointing=True,
    )
    trainer = scene("trained twice", sharded)
    trainer.train()
    results["trained twice"]["again"] = trainer.state.log_history[-1]["train_loss"]
    scene("accumulated", sharded, gradient_accumulation_steps=2)
    scene("accumulated at stage 0", _config("zero0"), gradient_accumulation_steps=2)
    scene("resumed", offloaded, resume=str(out / "sharded" / "checkpoint-2"))
    scene("resumed from stage 0", sharded, resume=str(out / "stage 0" / "checkpoint-2"))
    scene("resumed at stage 0", _config("zero0"), resume=str(out / "offloaded" / "checkpoint-2"))
    if other != "-":
        scene("resumed from other ranks", sharded, resume=f"{other}/offloaded/checkpoint-2")

    def loaded() -> Any:
        from transformers import T5ForConditionalGeneration

        return T5ForConditionalGeneration.from_pretrained(out / "sharded")

    scene("loaded", sharded, loaded, evaluate_first=True, learning_rate=0.0)

    def resized() -> Any:
        model = loaded()
        torch.manual_seed(2)
        model.resize_token_embeddings(70, mean_resizing=False)
        assert model.get_input_embeddings() is model.get_output_embeddings() or model.config.tie_word_embeddings
        return model

    resizing: dict[str, Any] = {"generation_num_beams": 3}
    scene("resized", sharded, resized, **resizing)
    trainer = scene("resized and offloaded", offloaded, resized, **resizing)
    results["encoded"] = _encode(trainer)
    trainer = scene("resized at stage 0", _config("zero0"), resized, **resizing)
    results["encoded at stage 0"] = _encode(trainer)
    for name, config in (
        ("lora", sharded),
        ("lora offloaded", offloaded),
        ("lora at stage 2", _config("zero2_offload")),
    ):
        results[name] = _lora(out / name, config)
    results["experts"] = _save_experts(out / "experts", sharded, predict_with_generate=False)
    results["experts at stage 0"] = _save_experts(
        out / "experts at stage 0", _config("zero0"), predict_with_generate=False
    )
    if trainer.args.process_index == 0:
        (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
