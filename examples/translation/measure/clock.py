"""The Trainer callback that times a cell: warm-up, then steps with the device in step at both ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from measure.spec import MAX_MEASURED, MIN_MEASURED, NUM_GUESS, Spec
from measure.usage import Sampler, Usage, gpus_of

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainer, TrainerControl, TrainerState


class Clock(TrainerCallback):
    """Times of the steps after the warm-up. Only the first and the last of them wait for the device."""

    def __init__(self, spec: Spec, *, num_warmup: int) -> None:
        self.spec = spec
        self.num_warmup = num_warmup
        self.trainer: Seq2SeqTrainer | None = None
        self.step_seconds: list[float] = []
        self.num_skipped = 0
        self.train_seconds = 0.0
        self.usage: Usage
        self.device_used: dict[int, int] = {}
        """GPU -> most bytes that it reported as used."""
        self._gpus = gpus_of(spec)
        self._sampler = Sampler(self._gpus)
        self._stamps: list[float] = []
        self._last = -1
        """Number of the step after which the cell is over."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.perf_counter()
        if self.num_warmup == 0:
            self._plan(state)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.num_warmup:
            self._synchronize()
            self._stamps = [time.perf_counter()]
            self._sampler.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stamps.append(time.perf_counter())
        step = state.global_step
        if step == self.num_warmup:
            self._plan(state)
            control.should_log = True  # the mean loss of the warm-up, before timing begins
        if step <= self.num_warmup:
            return
        assert self.trainer is not None
        self.num_skipped += bool(self.trainer.accelerator.optimizer_step_was_skipped)
        if step == self._last:
            self._finish()
            control.should_log = control.should_training_stop = True

    def _plan(self, state: TrainerState) -> None:
        """How many steps to measure: as asked, the whole epoch, or what fits; all ranks agree."""
        if self.spec.full:
            self._last = state.max_steps
            return
        if self.spec.steps is not None:
            self._last = self.num_warmup + self.spec.steps
            return
        guess = (self._stamps[-1] - self._stamps[-1 - NUM_GUESS]) / NUM_GUESS
        left = self.spec.cell_seconds - (time.perf_counter() - self._started)
        number = max(MIN_MEASURED, min(MAX_MEASURED, int(left / guess)))
        if self.spec.num_ranks > 1:
            import torch.distributed as dist

            agreed = torch.tensor([number], device="cuda" if torch.cuda.is_available() else "cpu")
            dist.broadcast(agreed, src=0)
            number = int(agreed.item())
        self._last = self.num_warmup + number

    def _finish(self) -> None:
        self._synchronize()
        self.usage = self._sampler.stop()
        self.device_used = self._sampler.device_used_bytes
        self.train_seconds = time.perf_counter() - self._started
        self.step_seconds = [after - before for before, after in zip(self._stamps, self._stamps[1:])]

    def _synchronize(self) -> None:
        """Also work that an engine has put off: it belongs to the steps that caused it."""
        assert self.trainer is not None
        wait = getattr(self.trainer.model_wrapped, "synchronize", None)
        if callable(wait):
            wait()
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
