"""Scenes of ``torch_compile=True``: the same training, compiled and not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.ecosystem.play import Scene
from tests.ecosystem.tiny import config_file, decoder, rows

STEPS = 4


def _train(out: Path, config: Any, backend: str | None, *, evaluates: bool = False, **options: Any) -> dict[str, Any]:
    import torch
    from transformers import Trainer, TrainingArguments

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ranks, accumulated = int(os.environ.get("WORLD_SIZE", "1")), options.get("gradient_accumulation_steps", 1)
    arguments = TrainingArguments(
        str(out),
        deepspeed=config,
        use_cpu=config is None,
        torch_compile=backend is not None,
        torch_compile_backend=backend,
        per_device_train_batch_size=4 // ranks // accumulated,
        per_device_eval_batch_size=4,
        max_steps=STEPS,
        learning_rate=0.01,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(decoder(), arguments, train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    trainer.save_model(str(out))
    trainer.accelerator.wait_for_everyone()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    seen: dict[str, Any] = {key: [log[key] for log in logs] for key in ("loss", "grad_norm")}
    seen["graphs"] = graphs
    if evaluates:
        seen["after"] = trainer.evaluate()["eval_loss"]
    return seen


def scenes(kind: str, root: Path) -> dict[str, Scene]:
    if kind == "stock":
        return {
            "plain": lambda: _train(root / "plain", None, None, evaluates=True),
            "plain, compiled": lambda: _train(root / "plain, compiled", None, "aot_eager"),
        }
    # On the host's own thread, so that updates are on their way when the next forward pass begins.
    threaded = config_file("zero2_offload", offload_optimizer={"device": "cpu", "step_on": "host"})
    offloaded = config_file("zero3_offload", stage3_param_persistence_threshold=0)
    name = "accumulated, stage 3"
    return {
        "stage 2": lambda: _train(root / "stage 2", threaded, "aot_eager", evaluates=True),
        name: lambda: _train(root / name, offloaded, "aot_eager", gradient_accumulation_steps=2),
    }
