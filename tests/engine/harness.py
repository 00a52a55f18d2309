"""A tiny model, an engine around it, and the same training written out by hand with torch: the oracle.

Sizes are multiples of 16, so that torch's kernels round every element alike (see test_optimizers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_zero_plugin.config.settings import (
    EngineSettings,
    LossScaleSettings,
    OffloadOptimizerSettings,
    OptimizerSettings,
)
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.low_precision import DTYPES

__all__ = ["ADAMW", "OFFLOADS", "Reference", "Tiny", "batch", "decay_groups", "make_engine", "settings_for", "weights"]

CPU = torch.device("cpu")
ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "cpu": {"device": "cpu"},
    "host thread": {"device": "cpu", "step_on": "host"},
}


class Tiny(nn.Module):
    """Two layers, a norm, and an output that may share the first layer's weight."""

    def __init__(self, *, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 16)
        self.register_buffer("seen", torch.zeros(3))
        if tied:
            self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(x)))
        return self.last(x)


def batch(step: int, micro: int = 0, rows: int = 4) -> Tensor:
    """Rows (rows, 16) of one micro-step, always the same."""
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(1000 * step + micro))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two param groups: matrices decay, vectors do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def settings_for(
    stage: int = 0, precision: str = "fp32", offload: str | dict[str, Any] = "none", **options: Any
) -> EngineSettings:
    """AdamW, clipping at 1.0, and for fp16 a dynamic scale from 2**8; ``options`` override."""
    if precision == "fp16":
        options.setdefault("loss_scale", LossScaleSettings(initial_scale_power=8, window=3))
    options.setdefault("gradient_clipping", 1.0)
    options.setdefault("optimizer", OptimizerSettings(type="AdamW", params=dict(ADAMW)))
    where = OFFLOADS[offload] if isinstance(offload, str) else offload
    return EngineSettings(
        stage=stage,
        precision=precision,  # type: ignore[arg-type]
        offload_optimizer=OffloadOptimizerSettings(**where),
        **options,
    )


def make_engine(model: nn.Module, settings: EngineSettings | None = None, **options: Any) -> ZeroEngine:
    """An engine over ``model``; options of ``ZeroEngine`` (lr_scheduler...) or of ``settings_for``."""
    own = {k: options.pop(k) for k in ("param_groups", "client_optimizer", "lr_scheduler") if k in options}
    if "client_optimizer" in own:
        options.setdefault("optimizer", None)
        own.setdefault("param_groups", own["client_optimizer"].param_groups)
    own.setdefault("param_groups", decay_groups(model))
    return ZeroEngine(model, settings or settings_for(**options), device=CPU, **own)


def train(engine: ZeroEngine, steps: int, *, first: int = 0, micros: int = 1) -> list[float]:
    """Train through the engine; returns the losses."""
    dtype = next(engine.module.parameters()).dtype
    losses = []
    for step in range(first, first + steps):
        for micro in range(micros):
            loss = loss_of(engine, batch(step, micro).to(dtype))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


class Reference:
    """Mixed precision by hand: weights of ``precision`` are narrowed fp32 masters, which torch's optimizer steps."""

    def __init__(
        self,
        model: nn.Module,
        precision: str = "fp32",
        *,
        clip: float = 1.0,
        scale: float = 1.0,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.model = model
        self.clip, self.scale = clip, scale
        self.reduce = reduce
        """Averages the sum of a step's gradients over ranks, in place."""
        self.params = [p for p in model.parameters() if p.requires_grad]
        groups = decay_groups(model)
        self.masters = [nn.Parameter(p.detach().clone().float()) for p in self.params]
        model.to(DTYPES[precision])
        master_of = {id(p): m for p, m in zip(self.params, self.masters)}
        groups = [{**group, "params": [master_of[id(p)] for p in group["params"]]} for group in groups]
        make = optimizer or (lambda groups: torch.optim.AdamW(groups, **ADAMW, fused=True))  # type: ignore[arg-type]
        self.optimizer = make(groups)
        self.norms: list[float] = []

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> list[float]:
        """One optimizer step over several micro-batches; returns the losses."""
        sums = [torch.zeros_like(master) for master in self.masters]
        seen = []
        for make_loss in losses:
            loss = make_loss()
            seen.append(loss.item())
            (loss / len(losses) * self.scale).backward()
            for total, param in zip(sums, self.params):
                if param.grad is not None:
                    total += param.grad.float()
                param.grad = None
        for master, total, param in zip(self.masters, sums, self.params):
            if self.reduce is not None:
                total = total.to(param.dtype) if len(losses) == 1 else total
                self.reduce(total)
            master.grad = total.float() / self.scale
        if self.clip:
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.masters, self.clip).item())
        self.optimizer.step()
        with torch.no_grad():
            for param, master in zip(self.params, self.masters):
                param.copy_(master)
        return seen

    def train(self, steps: int, *, first: int = 0, micros: int = 1) -> list[float]:
        dtype = self.params[0].dtype
        losses = []
        for step in range(first, first + steps):
            xs = [batch(step, micro).to(dtype) for micro in range(micros)]
            losses += self.step([lambda x=x: loss_of(self.model, x) for x in xs])  # type: ignore[misc]
        return losses
