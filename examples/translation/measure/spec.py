"""What one process is to measure. Standard library only: the parent process knows it too, and loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure.rows import Row

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "configs" / "zero2_offload.json"
PLAIN, ZERO, DEEPSPEED, DATA_PARALLEL = "plain", "zero2_offload", "deepspeed", "data_parallel"
ENGINES = (PLAIN, ZERO, DEEPSPEED, DATA_PARALLEL)
"""plain: the Trainer alone; of several GPUs each has a process, as under torchrun, and the Trainer wraps the model in
DistributedDataParallel. data_parallel: the Trainer alone started without a launcher, so that one process drives all
GPUs with DataParallel; it exists only for several GPUs."""
TRAINER_ALONE = (PLAIN, DATA_PARALLEL)
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
    gpus: str = ""
    """The GPUs to use, as in CUDA_VISIBLE_DEVICES; empty means the first ones."""
    num_side_by_side: int = 1
    """Cells that are measured at the same time, each on a GPU and cores of its own."""
    gpu_memory_limit_gib: float = 0.0
    round: int = 0
    seed: int = 42

    @property
    def num_ranks(self) -> int:
        """Processes that train together."""
        return 1 if self.engine == DATA_PARALLEL else self.num_gpus

    def row(self, batch_size: int, **values: Any) -> Row:
        return Row(
            model=self.model,
            engine=self.engine,
            batch_size=batch_size,
            num_gpus=self.num_gpus,
            num_side_by_side=self.num_side_by_side,
            gpu_memory_limit_gib=self.gpu_memory_limit_gib,
            round=self.round,
            **values,
        )
