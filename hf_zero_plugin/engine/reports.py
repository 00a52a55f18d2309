"""What a configuration asks to be printed: steps_per_print, wall_clock_breakdown, memory_breakdown, throughput.

The lines are asked for, so they are shown whatever the level of the Trainer's own messages (``$.log_level`` decides
instead), and once: a program that has set up logging finds them there, one that has not sees them on stderr.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from hf_zero_plugin.config.settings import EngineSettings

if TYPE_CHECKING:
    from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["StepReports", "describe_memory", "reports", "set_log_level"]

reports = logging.getLogger("hf_zero_plugin.report")


class _UnlessHeard(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes a record to stderr if no other handler will."""

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = reports
        while logger is not None:
            if any(handler is not self and record.levelno >= handler.level for handler in logger.handlers):
                return
            logger = logger.parent
        super().emit(record)


_handler = _UnlessHeard()
_handler.setFormatter(logging.Formatter("[hf-zero] %(message)s"))
reports.addHandler(_handler)
reports.setLevel(logging.INFO)


def set_log_level(level: str | None) -> None:
    """``$.log_level`` for everything this package says; None leaves the levels as they are."""
    if level is not None:
        logging.getLogger("hf_zero_plugin").setLevel(level.upper())
        reports.setLevel(level.upper())


class StepReports:
    """Prints about steps of one engine, on rank 0. Measures nothing where nothing was asked for."""

    def __init__(self, settings: EngineSettings, device: torch.device, world_size: int) -> None:
        self._settings = settings
        self._device = device
        breaks_down = settings.wall_clock_breakdown or settings.memory_breakdown
        self.every = settings.steps_per_print or (1 if breaks_down else None)
        """Steps between reports; a breakdown without steps_per_print is one of every step."""
        micro = settings.train_micro_batch_size_per_gpu
        total = None if micro is None else micro * settings.gradient_accumulation_steps * world_size
        self._batch_size = settings.train_batch_size or total
        self._since: tuple[int, float] | None = None
        """Step and time at which counting of samples began."""

    def step_done(self, engine: ZeroEngine) -> None:
        """Call after every step, skipped ones included."""
        if self.every is None or engine.global_rank != 0:
            return
        if self._since is None:
            self._since = (engine.global_steps, self._now())  # the first step warms up
        if engine.global_steps % self.every == 0:
            self._print(engine)

    def _print(self, engine: ZeroEngine) -> None:
        assert engine.optimizer is not None
        step = f"step {engine.global_steps}"
        if self._settings.steps_per_print:
            rates = ", ".join(f"{group['lr']:.3g}" for group in engine.optimizer.param_groups)
            scale = f", loss scale {engine.scaler.scale:g}" if engine.scaler is not None else ""
            speed = self._speed(engine.global_steps)
            reports.info("%s, skipped %d, lr [%s]%s%s", step, engine.skipped_steps, rates, scale, speed)
        times = engine.last_step_report() if self._settings.wall_clock_breakdown else {}
        if times:
            shown = ", ".join(f"{name.removesuffix('_ms')} {ms:.1f} ms" for name, ms in times.items() if "_ms" in name)
            hidden = f", hidden {times['hidden_share']:.0%}" if "hidden_share" in times else ""
            reports.info("%s: %s%s", step, shown, hidden)
        if self._settings.memory_breakdown:
            reports.info("%s: memory: %s", step, describe_memory(engine.memory_report()))

    def _speed(self, step: int) -> str:
        """Samples per second over all ranks since the last report, as ``, 812.3 samples/s``."""
        if not self._settings.throughput or self._batch_size is None or self._since is None:
            return ""
        now, (first, began) = self._now(), self._since
        self._since = (step, now)
        return f", {(step - first) * self._batch_size / (now - began):.1f} samples/s" if step > first else ""

    def _now(self) -> float:
        if self._settings.throughput and self._settings.throughput_synchronized and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # once a report
        return time.perf_counter()


def describe_memory(report: dict[str, dict[str, int]]) -> str:
    """``device: weights 1.2 MiB, gradients ...; host: ...`` of an engine's memory_report."""
    return "; ".join(
        f"{place}: " + ", ".join(f"{kind} {size / 2**20:,.1f} MiB" for kind, size in kinds.items() if size)
        for place, kinds in report.items()
        if any(kinds.values())
    )
