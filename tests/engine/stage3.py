"""A small model with everything that sharding makes difficult, and its training at any stage, on one rank or two.

Sizes do not divide by two: 7 rows of embeddings, 30 and 10 rows of weights, scalars, norms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.config.settings import (
    ActivationCheckpointingSettings,
    EngineSettings,
    LossScaleSettings,
    OffloadOptimizerSettings,
    OffloadParamSettings,
    OptimizerSettings,
    Stage3Settings,
)
from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["Block", "Net", "batch", "engine_for", "hold_equal", "loss_of", "rank_and_size", "train"]

ROWS = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Tied embeddings, a scalar, a buffer, a layer that is never used, and one that may be frozen."""

    def __init__(self, width: int = 10, *, depth: int = 3, frozen: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.idle = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.full((width,), 0.25))
        if frozen:
            self.layers[0].requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.offset.to(self.embed.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)) * self.scale


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batch(number: int) -> Tensor:
    """This rank's share of the rows of one micro-step."""
    rank, world_size = rank_and_size()
    tokens = torch.randint(0, 7, (ROWS, 5), generator=torch.Generator().manual_seed(number))
    return tokens.chunk(world_size)[rank]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())


def engine_for(
    model: nn.Module | None = None,
    *,
    stage: int = 3,
    precision: str = "fp32",
    whole: int = 0,
    params_on: str = "none",
    states_on: str = "none",
    device: str = "cpu",
    micros: int = 1,
    frozen: bool = False,
    offload: dict[str, Any] | None = None,
    trains: bool = True,
    cpu_checkpointing: bool = False,
    stage3: dict[str, Any] | None = None,
    lr: float = 1e-2,
    left_out: str | None = None,
    **options: Any,
) -> ZeroEngine:
    """``whole``: persistence threshold. Weight decay differs between matrices and the rest. The optimizer does not know
    parameters with ``left_out`` in their names."""
    model = model if model is not None else Net(frozen=frozen)
    settings = EngineSettings(
        stage=stage,
        precision=precision,  # type: ignore[arg-type]
        loss_scale=LossScaleSettings(initial_scale_power=10, window=3) if precision == "fp16" else None,
        gradient_accumulation_steps=micros,
        offload_param=OffloadParamSettings(device=params_on),  # type: ignore[arg-type]
        offload_optimizer=OffloadOptimizerSettings(device=states_on, **(offload or {})),  # type: ignore[arg-type]
        stage3=Stage3Settings(param_persistence_threshold=whole, **(stage3 or {})),
        activation_checkpointing=ActivationCheckpointingSettings(cpu_checkpointing=cpu_checkpointing),
        **{
            "gradient_clipping": 0.5,
            "optimizer": OptimizerSettings(type="AdamW", params={"lr": lr}),
            **options,
        },
    )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    params = [p for name, p in named if left_out is None or left_out not in name]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return ZeroEngine(model, settings, device=torch.device(device), param_groups=groups if trains else None)


def train(engine: ZeroEngine, steps: int = 4, *, first: int = 0, poison: int | None = None) -> dict[str, Any]:
    """Losses and norms of this rank, and the whole state dict (on rank 0)."""
    micros = engine.settings.gradient_accumulation_steps
    losses, norms = [], []
    for step in range(first, first + steps):
        for micro in range(micros):
            loss = loss_of(engine, batch(micros * step + micro).to(engine.device))
            engine.backward(loss * float("inf") if step == poison else loss)
            engine.step()
            losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    weights = engine._zero3_consolidated_16bit_state_dict()
    return {"losses": losses, "norms": norms, "weights": weights, "skipped": engine.skipped_steps}


def hold_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Two results of ``train``, to the bit."""
    assert found["losses"] == wanted["losses"]
    assert found["norms"] == wanted["norms"]
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, tensor in wanted["weights"].items():
        assert torch.equal(found["weights"][name], tensor), name
