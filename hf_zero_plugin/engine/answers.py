"""What an engine answers about its settings, its memory and its last step, by the names that its callers know.

The Trainer, accelerate and code written for DeepSpeed ask; nothing here changes anything or waits for the device.
"""

from __future__ import annotations

from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.engine.loss_scaler import LossScaler
from hf_zero_plugin.engine.parts import Assembly
from hf_zero_plugin.engine.zero_optimizer import ZeroOptimizer

__all__ = ["Answering"]


class Answering:
    """What an engine inherits: answers."""

    settings: EngineSettings
    parts: Assembly
    optimizer: ZeroOptimizer | None
    scaler: LossScaler | None
    _grad_norm: float | None = None

    def get_global_grad_norm(self) -> float | None:
        """L2 norm over all ranks of the last step's gradients, before clipping, loss scale taken out."""
        return self._grad_norm

    @property
    def was_step_applied(self) -> bool:
        return self.optimizer is not None and not self.optimizer.overflow

    @property
    def loss_scale(self) -> float:
        return self.scaler.scale if self.scaler is not None else 1.0

    def gradient_accumulation_steps(self) -> int:
        return self.settings.gradient_accumulation_steps

    def train_micro_batch_size_per_gpu(self) -> int | None:
        return self.settings.train_micro_batch_size_per_gpu

    def train_batch_size(self) -> int | None:
        return self.settings.train_batch_size

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    def zero_optimization_stage(self) -> int:
        return self.settings.stage

    def zero_optimization_partition_gradients(self) -> bool:
        return self.parts.sharding.shards_grads

    def memory_report(self) -> dict[str, dict[str, int]]:
        """Bytes of this rank by place ("device", "host") and kind."""
        return self.parts.memory_report()
