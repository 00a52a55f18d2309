"""Scenes of real Trainer runs, played in a process of their own; test_trainer.py and test_trainer_ranks.py compare.

``python -m tests.integration.scenes stock OUT`` plays what the stock Trainer does, ``... plugin OUT`` the same through
the engine and more. Every scene writes its weights to OUT/NAME and what it saw into OUT/results.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 6
Scene = Callable[[], Any]


def _config(
    stage: int, *, offload: str | None = None, optimizer: bool = False, scheduler: bool = False
) -> dict[str, Any]:
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"}
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "step_on": offload}
    if optimizer:
        auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        config["optimizer"] = {"type": "AdamW", "params": auto}
    if scheduler:
        auto = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
        config["scheduler"] = {"type": "WarmupLR", "params": auto}
    return config


def _t5() -> Any:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config)


def _data() -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, 64, (64, 2, 8), generator=generator)
    return [{"input_ids": row[0], "labels": row[1]} for row in rows]


def _trainer(out: Path, deepspeed: Any = None, optimizers: Any = (None, None), cls: Any = None, **options: Any) -> Any:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
    }
    if options.get("bf16"):
        # Without a GPU, TrainingArguments takes --bf16 only with --use_cpu, which switches DeepSpeed configs off.
        import transformers.training_args

        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    arguments = Seq2SeqTrainingArguments(str(out), **{**defaults, "deepspeed": deepspeed, **options})
    data = _data()
    return (cls or Seq2SeqTrainer)(
        _t5(), arguments, train_dataset=data[:48], eval_dataset=data[48:], optimizers=optimizers
    )


def _history(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _train(out: Path, **options: Any) -> dict[str, Any]:
    trainer = _trainer(out, **options)
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return _seen(trainer, out)


def _seen(trainer: Any, out: Path) -> dict[str, Any]:
    trainer.save_model(str(out))
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    groups = [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    return {
        "loss": _history(trainer, "loss"),
        "grad_norm": _history(trainer, "grad_norm"),
        "groups": groups,
        "engine": type(trainer.model_wrapped).__name__,
    }


# ---------------------------------------------------------------- stock


def _warmup_lr(out: Path, **options: Any) -> dict[str, Any]:
    """WarmupLR (log) over two steps by a LambdaLR: 0 before the first step, then ln(i + 1) / ln 2."""
    import math

    import torch
    from transformers import Trainer

    model = _t5()
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trainer = _trainer(out, **options)
    named = list(trainer.model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    trainer.optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: 0.0 if step == 0 else min(1.0, math.log(step) / math.log(2))
    )
    trainer.train()
    return _seen(trainer, out)


def _stock_scenes(root: Path) -> dict[str, Scene]:
    return {
        "linear": lambda: _train(root / "linear"),
        "accumulated": lambda: _train(root / "accumulated", gradient_accumulation_steps=2),
        "warmup": lambda: _warmup_lr(root / "warmup"),
        "checkpointed": lambda: _train(root / "checkpointed", gradient_checkpointing=True),
        "adafactor": lambda: _train(root / "adafactor", optim="adafactor"),
    }


# ---------------------------------------------------------------- plugin


def _parity_scenes(root: Path) -> dict[str, Scene]:
    def scene(name: str, config: dict[str, Any], **options: Any) -> tuple[str, Scene]:
        return name, lambda: _train(root / name, deepspeed=config, **options)

    scenes = []
    for stage in (0, 1, 2):
        for offload in (None, "auto", "host"):
            where = {"offload": offload}
            label = f"{stage} {offload or 'none'}"
            scenes.append(scene(f"linear {label}", _config(stage, **where)))  # type: ignore[arg-type]
        scenes.append(scene(f"linear {stage} config optimizer", _config(stage, optimizer=True)))
        scenes.append(scene(f"warmup {stage}", _config(stage, optimizer=True, scheduler=True)))
    scenes += [
        scene("accumulated 2 host", _config(2, offload="host"), gradient_accumulation_steps=2),
        scene("checkpointed 2 host", _config(2, offload="host"), gradient_checkpointing=True),
        scene("adafactor 2 auto", _config(2, offload="auto"), optim="adafactor"),
        scene("warmup file", "configs/zero2_offload.json"),  # type: ignore[arg-type]
    ]
    return dict(scenes)


def _resume(root: Path, **options: Any) -> dict[str, Any]:
    whole = _train(root / "whole", save_strategy="steps", save_steps=3, **options)
    trainer = _trainer(root / "whole", save_strategy="no", **options)
    trainer.train(resume_from_checkpoint=str(root / "whole" / "checkpoint-3"))
    resumed = _seen(trainer, root / "resumed")
    return {"whole": whole, "resumed": resumed, "files": [p.name for p in (root / "whole" / "checkpoint-3").iterdir()]}


def _around_training(root: Path) -> dict[str, Any]:
    """evaluate and predict before, after and between two trainings."""
    trainer = _trainer(root, deepspeed=_config(2, offload="host", optimizer=True), predict_with_generate=True)
    data = _data()
    seen: dict[str, Any] = {"before": trainer.evaluate()["eval_loss"]}
    seen["predicted before"] = trainer.predict(data[:4]).predictions.shape[0]
    trainer.train()
    seen["after"] = trainer.evaluate()["eval_loss"]
    trainer.train()
    seen["after second"] = trainer.evaluate()["eval_loss"]
    seen["predicted after"] = trainer.predict(data[:4]).predictions.shape[0]
    seen["steps"] = trainer.state.global_step
    return seen


def _best_model(root: Path) -> dict[str, Any]:
    """The learning rate grows without bound, so the first evaluation is the best."""
    trainer = _trainer(
        root,
        deepspeed=_config(2, offload="host"),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=20.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    trainer.train()
    losses = _history(trainer, "eval_loss")
    return {"losses": losses, "at end": trainer.evaluate()["eval_loss"], "best": trainer.state.best_model_checkpoint}


def _saved_model(root: Path) -> dict[str, Any]:
    import torch
    from transformers import T5ForConditionalGeneration

    trainer = _trainer(root, deepspeed=_config(2, offload="host"), bf16=True)
    trainer.train()
    trainer.save_model(str(root / "model"))
    again = T5ForConditionalGeneration.from_pretrained(root / "model", dtype="auto")
    ours = dict(trainer.model.named_parameters())
    return {
        "equal": all(torch.equal(p, ours[name]) for name, p in again.named_parameters()),
        "dtype": str(next(again.parameters()).dtype),
        "engine dtype": str(next(trainer.model_wrapped.parameters()).dtype),
    }


def _out_of_memory(root: Path) -> dict[str, Any]:
    from transformers import Seq2SeqTrainer

    sizes: list[int] = []

    class Tight(Seq2SeqTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 5:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = _trainer(
        root, deepspeed=_config(2, optimizer=True), cls=Tight, per_device_train_batch_size=8, auto_find_batch_size=True
    )
    trainer.train()
    return {"sizes": sizes, "steps": trainer.state.global_step}


def _schedule_logged(root: Path) -> dict[str, Any]:
    trainer = _trainer(root, deepspeed=_config(1, optimizer=True, scheduler=True), warmup_steps=0)
    trainer.train()
    return {"loss": _history(trainer, "loss"), "lr": _history(trainer, "learning_rate")}


def _without_deepspeed(root: Path) -> dict[str, Any]:
    trainer = _trainer(root)
    enabled = trainer.is_deepspeed_enabled
    trainer.train()
    return {**_seen(trainer, root), "enabled": enabled}


def _plain_accelerate(root: Path) -> dict[str, Any]:
    """An Accelerate loop without the Trainer, against plain torch in the same process."""
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    loader = torch.utils.data.DataLoader(_data()[:24], batch_size=4)  # type: ignore[arg-type]
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_clipping=0.5, gradient_accumulation_steps=2)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model, plain = _t5().eval(), _t5().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model, optimizer, prepared = accelerator.prepare(model, optimizer, loader)
    norms = []
    for batch in prepared:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    theirs, expected = torch.optim.AdamW(plain.parameters(), lr=0.01, fused=True), []
    for index, batch in enumerate(loader):
        (plain(**batch).loss / 2).backward()
        if index % 2:
            expected.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item())
            theirs.step()
            theirs.zero_grad()
    unwrapped = accelerator.unwrap_model(model)
    pairs = zip(unwrapped.parameters(), plain.parameters())
    return {"equal": all(torch.equal(a, b) for a, b in pairs), "norms": norms, "expected": expected}


def _facade(root: Path) -> dict[str, Any]:
    import importlib

    from hf_zero_plugin.errors import UnsupportedFeature

    names = """deepspeed deepspeed.comm deepspeed.zero deepspeed.utils deepspeed.ops.adam deepspeed.ops.adagrad
        deepspeed.ops.lion deepspeed.runtime.engine deepspeed.runtime.lr_schedules deepspeed.accelerator
        deepspeed.runtime.zero.partition_parameters deepspeed.checkpoint.utils deepspeed.launcher.runner"""
    homes = {name: importlib.import_module(name).__file__ for name in names.split()}
    deepspeed = importlib.import_module("deepspeed")
    refused = []
    for name in ("tp_model_init", "init_inference"):
        try:
            getattr(deepspeed, name)(None)
        except UnsupportedFeature:
            refused.append(name)
    try:
        importlib.import_module("deepspeed.moe")
        missing = "found"
    except ModuleNotFoundError:
        missing = "ModuleNotFoundError"
    return {"homes": homes, "refused": refused, "missing": missing, "version": deepspeed.__version__}


def _plugin_scenes(root: Path) -> dict[str, Scene]:
    bf16 = {"deepspeed": _config(2, offload="host", optimizer=True, scheduler=True), "bf16": True}
    return {
        "facade": lambda: _facade(root),
        **_parity_scenes(root),
        "resume": lambda: _resume(root / "resume", deepspeed=_config(2, offload="host")),
        "resume bf16": lambda: _resume(root / "resume bf16", **bf16),
        "around training": lambda: _around_training(root / "around"),
        "best model": lambda: _best_model(root / "best"),
        "saved model": lambda: _saved_model(root / "saved"),
        "out of memory": lambda: _out_of_memory(root / "oom"),
        "warmup of no steps": lambda: _schedule_logged(root / "warmup0"),
        "linear without deepspeed": lambda: _without_deepspeed(root / "linear without deepspeed"),
        "plain accelerate": lambda: _plain_accelerate(root),
    }


def _rank_scenes(root: Path, kind: str) -> dict[str, Scene]:
    if kind == "stock":
        return {"linear": lambda: _train(root / "linear", use_cpu=True)}
    return {
        f"linear {stage} {offload}": lambda stage=stage, offload=offload: _train(  # type: ignore[misc]
            root / f"linear {stage} {offload}", deepspeed=_config(stage, offload=offload, optimizer=stage == 2)
        )
        for stage, offload in ((0, None), (1, "host"), (2, "auto"))
    } | {"resume": lambda: _resume(root / "resume", deepspeed=_config(2, offload="host"))}


def main(kind: str, out: str, ranks: str = "") -> None:
    if kind == "plugin" and not ranks:
        import hf_zero_plugin

        hf_zero_plugin.activate()
    import os

    import torch

    torch.set_num_threads(1)
    root = Path(out)
    scenes = _rank_scenes(root, kind) if ranks else {"stock": _stock_scenes, "plugin": _plugin_scenes}[kind](root)
    results = {}
    for name, scene in scenes.items():
        try:
            results[name] = scene()
        except Exception as error:
            import traceback

            results[name] = {"error": f"{error!r}\n{traceback.format_exc()}"}
    rank = os.environ.get("RANK", "0")
    root.mkdir(parents=True, exist_ok=True)
    (root / f"results{rank if ranks else ''}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
