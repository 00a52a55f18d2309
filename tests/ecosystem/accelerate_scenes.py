"""Scenes of Accelerate without the Trainer: a loop of the user's own, the optimizer in it or in the configuration.

The stock loop is Accelerate's own, without an engine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.ecosystem.play import Scene
from tests.ecosystem.tiny import decoder, rows

CODE = "optimizer in the code"
CONFIGURATION = "optimizer in the configuration"
BOTH = "optimizer and schedule in the configuration"
STEPS = 6
LR, DECAY, CLIP = 0.01, 0.1, 0.5
WARM = 2


def _accelerator(config: Any, accumulated: int) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if config is None:
        return Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    from accelerate.utils import DeepSpeedPlugin

    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), gradient_accumulation_steps=accumulated)


def _warm_up(optimizer: Any) -> Any:
    """As WarmupLR of DeepSpeed, linear: it counts from the first step's end, and that step has no rate."""
    import torch

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, max(0, step - 1) / WARM))


def _prepared(accelerator: Any, batch_size: int, optimizer: str) -> tuple[Any, Any, Any, Any]:
    import torch

    model = decoder()
    loader = torch.utils.data.DataLoader(rows(4 * STEPS), batch_size=batch_size)  # type: ignore[arg-type]
    if optimizer != CODE:
        from accelerate.utils import DummyOptim, DummyScheduler

        named = DummyOptim(model.parameters(), lr=LR, weight_decay=DECAY)
        made = _warm_up if optimizer == CONFIGURATION else None
        schedule = DummyScheduler(named, warmup_num_steps=WARM, lr_scheduler_callable=made)
        return accelerator.prepare(model, named, loader, schedule)
    real = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    return accelerator.prepare(model, real, loader, _warm_up(real))


def _train(prepared: Any, accelerator: Any, first: int, last: int) -> dict[str, list[float]]:
    """Micro-steps ``first`` to ``last`` of one pass over the data."""
    model, optimizer, loader, schedule = prepared
    model.train()
    losses, norms, rates = [], [], []
    for index, batch in enumerate(loader):
        if not first <= index < last:
            continue
        rates.append(optimizer.param_groups[0]["lr"])
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), CLIP)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return {"loss": losses, "norm": norms, "rate": rates}


def _weights(model: Any, accelerator: Any) -> dict[str, list[float]]:
    """As ``get_state_dict`` gives them: on the main process."""
    state = accelerator.get_state_dict(model)
    return {name: tensor.flatten().tolist() for name, tensor in state.items()} if accelerator.is_main_process else {}


def _loop(out: Path, config: Any, *, optimizer: str = CODE, accumulated: int = 1) -> dict[str, Any]:
    accelerator = _accelerator(config, accumulated)
    size = 4 // accumulated // accelerator.num_processes
    prepared = _prepared(accelerator, size, optimizer)
    half, whole = STEPS * accumulated // 2, STEPS * accumulated
    seen = _train(prepared, accelerator, 0, half)
    accelerator.save_state(str(out / "state"))
    rest = _train(prepared, accelerator, half, whole)
    final = _weights(prepared[0], accelerator)
    accelerator.load_state(str(out / "state"))
    again = _train(prepared, accelerator, half, whole)
    model = accelerator.unwrap_model(prepared[0])
    return {
        **{key: seen[key] + rest[key] for key in seen},
        "weights": final,
        "resumed": again["loss"] == rest["loss"] and _weights(prepared[0], accelerator) == final,
        "kinds": [type(prepared[0]).__name__, type(model).__name__],
    }


def _config(stage: int, optimizer: str, *, offload: bool = False, **zero: Any) -> dict[str, Any]:
    cpu = {"device": "cpu"}
    config: dict[str, Any] = {
        "zero_optimization": {"stage": stage, **({"offload_optimizer": cpu} if offload else {}), **zero},
        "gradient_clipping": CLIP,
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }
    if optimizer != CODE:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
    if optimizer == BOTH:
        auto = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
        config["scheduler"] = {"type": "WarmupLR", "params": {**auto, "warmup_type": "linear"}}
    return config


def scenes(kind: str, root: Path) -> dict[str, Scene]:
    if kind == "stock":
        return {
            "plain": lambda: _loop(root / "plain", None),
            "accumulated plain": lambda: _loop(root / "accumulated plain", None, accumulated=2),
        }
    sizes = dict.fromkeys(
        ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
    )
    saves = {"stage3_gather_16bit_weights_on_model_save": True}
    configs: dict[str, dict[str, Any]] = {
        "stage 2": {"stage": 2, "offload": True},
        "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0, **saves},
        "stage 3 offloaded": {"stage": 3, "offload": True, "offload_param": {"device": "cpu"}, **sizes, **saves},
    }
    # Accelerate steps a schedule once a rank; the engine, which owns those of the configuration, once a step.
    places = (CODE, CONFIGURATION, BOTH) if os.environ.get("WORLD_SIZE", "1") == "1" else (CODE,)
    found: dict[str, Scene] = {}
    for label, options in configs.items():
        for place in places:
            for accumulated in (1, 2):
                name = f"{'accumulated ' if accumulated > 1 else ''}{label}, {place}"
                found[name] = lambda name=name, options=options, place=place, accumulated=accumulated: _loop(
                    root / name, _config(optimizer=place, **options), optimizer=place, accumulated=accumulated
                )
    return found
