"""What the names of engines mean: which library trains, and what its configuration says.

plain           the Trainer with --fp16 or --bf16: autocast, fp32 weights and states on the GPU; DDP with several
compute         forward and backward alone, in half precision: the GPU's share of a step (compute.py)
ours            configs/zero2_offload.json, or the cell's config=NAME
ours-host       the same, updated by the host's cores
ours-both       the same, updated by both at once; the cell's share=NUMBER is host_share
ours-device     the same without any offload
ours-auto       the same with ratio "auto" and the cell's budget=GIB
ours-z3         configs/zero3_offload.json
deepspeed       the real one, with configs/zero2_offload.json or the cell's config=NAME
deepspeed-z3    the real one, with configs/zero3_offload.json
torchao         CPUOffloadOptimizer: half-precision weights without fp32 masters, gradients kept on the GPU
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = "zero2_offload"
PEERS = ("deepspeed", "torchao")
"""Libraries that are found through --peer-path alone."""

ENGINES = (
    "plain",
    "compute",
    "ours",
    "ours-host",
    "ours-both",
    "ours-device",
    "ours-auto",
    "ours-z3",
    "deepspeed",
    "deepspeed-z3",
    "torchao",
)


def library_of(engine: str) -> str:
    """plain, compute, ours, deepspeed or torchao."""
    return engine.split("-")[0]


def config_name(engine: str, asked: str | None) -> str | None:
    """Name of the file in ``configs/`` that ``engine`` is given; None for engines that read none."""
    if library_of(engine) not in ("ours", "deepspeed"):
        return None
    if engine.endswith("-z3"):
        return "zero3_offload"
    return asked or DEFAULT_CONFIG


def engine_config(
    engine: str,
    asked: str | None = None,
    ratio: float | None = None,
    budget_gib: float | None = None,
    share: float | None = None,
) -> dict[str, Any] | None:
    """The ds_config of a cell, or None. There is no file for zero1_offload: it is zero1 with its states offloaded."""
    name = config_name(engine, asked)
    if name is None:
        return None
    path, adds_offload = ROOT / "configs" / f"{name}.json", False
    if not path.exists() and name.endswith("_offload"):
        path, adds_offload = ROOT / "configs" / f"{name.removesuffix('_offload')}.json", True
    config: dict[str, Any] = json.loads(path.read_text())
    zero = config["zero_optimization"]
    if adds_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if engine == "ours-device":
        zero.pop("offload_optimizer", None)
        zero.pop("offload_param", None)
    offload = zero.get("offload_optimizer", {})
    if engine == "ours-host":
        offload["step_on"] = "host"
    if engine == "ours-both":
        offload["step_on"] = "both"
        if share is not None:
            offload["host_share"] = share
    if engine == "ours-auto":
        offload["ratio"] = "auto"
        if budget_gib is not None:
            offload["gpu_memory_budget"] = budget_gib
    elif ratio is not None:
        offload["ratio"] = ratio
    return config


def stage_of(config: dict[str, Any] | None) -> int:
    return int(config["zero_optimization"]["stage"]) if config is not None else 0
