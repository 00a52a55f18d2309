"""Measurements that nobody made, with the proportions of real ones."""

from __future__ import annotations

from measure.rows import OUT_OF_MEMORY, Row
from measure.spec import DEEPSPEED, PLAIN, ZERO

BATCHES = [2**power for power in range(9)]


def row(model: str, engine: str, batch: int, num_gpus: int = 1, **changes: object) -> Row:
    """A made-up measurement with the proportions of a real one."""
    size = 3.4 if model == "t5-base" else 1.0
    memory_gib = size * (1.0 if engine == PLAIN else 0.4) + 0.4 * batch * (1.0 if engine == PLAIN else 0.8)
    step = max(0.2, 0.002 * batch) * (1.9 if engine == DEEPSPEED else 1.0)
    values: dict[str, object] = {
        "num_gpus": num_gpus, "device": "NVIDIA H200", "precision": "fp16", "num_parameters": int(size * 6e7),
        "num_samples": 9999, "epoch_steps": -(-9999 // (batch * num_gpus)), "measured_steps": 30,
        "step_seconds_median": step, "epoch_seconds_scaled": step * -(-9999 // (batch * num_gpus)),
        "gpu_allocated_sum_gib": num_gpus * memory_gib,
        "gpu_allocated_gib": memory_gib, "gpu_reserved_gib": memory_gib + 0.5, "cpu_percent_mean": 7.0,
        "cpu_seconds_per_second": 1.1, "cpu_percent_per_second": "6.5;7.5", "loss_warmup": 10.25, "loss": 9.5,
    }  # fmt: skip
    return Row(model=model, engine=engine, batch_size=batch, **{**values, **changes})  # type: ignore[arg-type]


def sweep(num_gpus: int = 1, engines: tuple[str, ...] = (PLAIN, ZERO)) -> list[Row]:
    rows = [row(m, e, b, num_gpus) for m in ("t5-small", "t5-base") for e in engines for b in BATCHES]
    lost = Row(model="t5-base", engine=PLAIN, batch_size=256, num_gpus=num_gpus, status=OUT_OF_MEMORY)
    return [lost if one.key == lost.key else one for one in rows]
