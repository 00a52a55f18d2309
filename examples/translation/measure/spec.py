"""What one process is to measure. Standard library only: the parent process knows it too, and loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure.rows import Row

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "configs" / "zero2_offload.json"
PLAIN, ZERO, DEEPSPEED = "plain", "zero2_offload", "deepspeed"
ENGINES = (PLAIN, ZERO, DEEPSPEED)
NUM_WARMUP = 9
"""The largest batch once, every other shape at least once, and three steps from which a step's time is guessed."""
NUM_GUESS = 3
MIN_MEASURED, MAX_MEASURED = 6, 60


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one process measures; travels as JSON."""

    model: str
    engine: str
    batches: list[int]
    train_file: str
    tokenizer: str
    num_samples: int = 10_000
    max_length: int = 128
    steps: int | None = None
    """Steps to measure after the warm-up; None means what fits ``cell_seconds``."""
    full: bool = False
    """The whole epoch, the warm-up being part of it."""
    cell_seconds: float = 8.0
    precision: str = "fp16"
    num_gpus: int = 1
    gpu_memory_limit_gib: float = 0.0
    round: int = 0
    seed: int = 42

    def row(self, batch_size: int, **values: Any) -> Row:
        return Row(
            model=self.model,
            engine=self.engine,
            batch_size=batch_size,
            num_gpus=self.num_gpus,
            gpu_memory_limit_gib=self.gpu_memory_limit_gib,
            round=self.round,
            **values,
        )
