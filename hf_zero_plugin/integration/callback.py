"""ZeroCallback: switch the engine on from Python, and watch any training.

::

    import hf_zero_plugin
    hf_zero_plugin.activate()                                    # before transformers
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(...)
    trainer = Trainer(args=args, ..., callbacks=[ZeroCallback("configs/zero2_offload.json", args)])

With a configuration it prepares ``args`` as ``TrainingArguments(deepspeed=...)`` would have been; it must be made
before the Trainer. ``ZeroCallback()`` alone only watches, the stock Trainer too. What it adds to every entry of the
log, and so to the history and to every reporter (TensorBoard...), is told in ``LOGGED``; the progress bar shows some.
"""

from __future__ import annotations

import gc
import os
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.registry import engines_of
from hf_zero_plugin.errors import ActivationError
from hf_zero_plugin.integration.monitor import GIB, Monitor, Usage
from hf_zero_plugin.integration.prepare_arguments import prepare_arguments
from hf_zero_plugin.integration.summary import Summary

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["LOGGED", "ZeroCallback"]

LOGGED = {
    "step_ms": "milliseconds a step, mean since the last entry",
    "tokens_per_second": "of all ranks, padding included",
    "mfu": "model FLOP utilisation: share of the device's peak, where that is known",
    "hidden_share": "part of the offloaded update that cost no time, mean since the last entry",
    "wait_ms": "what it did cost: milliseconds a step that the model stood still, waiting for weights",
    "gpu_memory_gib": "peak of allocated GPU memory so far",
    "host_memory_gib": "resident memory of this process",
    "device/KIND_gib, host/KIND_gib": "of this rank of the engine: device/weights_gib, host/moments_gib...",
    "loss_scale": "fp16: the current factor",
    "skipped_steps": "so far, because a gradient was inf or nan",
}
"""Key in the log -> meaning. A key is left out where there is nothing to tell."""
EXACT = ("loss_scale", "skipped_steps")
"""Not rounded: a power of two, and a number of steps."""
POSTFIX_SECONDS = 0.5


class ZeroCallback(TrainerCallback):
    """See the module.

    Args:
        config: path or dict of a ds_config.json; None only watches.
        args: the TrainingArguments that the Trainer will get; needed with ``config``.
        show_summary: print a table when training ends.

    Raises:
        ActivationError: made too late (see ``prepare_arguments``).
        ConfigError: the configuration cannot be honoured.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | dict[str, Any] | None = None,
        args: TrainingArguments | None = None,
        *,
        show_summary: bool = True,
    ) -> None:
        if (config is None) != (args is None):
            missing = "args" if args is None else "config"
            raise TypeError(f"ZeroCallback: {missing} is missing; give config and args, or neither to only watch.")
        if config is not None and not (isinstance(config, (str, os.PathLike, dict)) and hasattr(args, "deepspeed")):
            raise TypeError(
                "ZeroCallback(config, args): config is a path or a dict and args are the TrainingArguments, "
                f"not {type(config).__name__} and {type(args).__name__}."
            )
        self._args = args
        if config is not None and args is not None:
            prepare_arguments(args, config if isinstance(config, dict) else os.fspath(config))
        self.show_summary = show_summary
        self.summary: Summary | None = None
        """Of the last training; shows itself in a terminal and in a notebook."""
        self.history: list[dict[str, float]] = []
        """What was added to the log, entry by entry, with its step."""
        self._monitor = Monitor()
        self._engine: ZeroEngine | None = None
        self._trainer: Trainer | None = None
        self._skipped = 0
        self._postfix_at = 0.0

    # ---------------------------------------------------------------- beginning

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._args is not None and self._args is not args:
            raise ActivationError(
                "ZeroCallback(config, args) has prepared other TrainingArguments than this Trainer's. "
                "Give the same object to both."
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        engines = engines_of(model.parameters())
        self._engine = engines[0] if engines else None
        if self._args is not None and self._engine is None:
            raise ActivationError(
                "ZeroCallback(config, args) came too late: this Trainer was built before it and trains without the "
                "engine. Make the callback before the Trainer and pass it: Trainer(args=args, callbacks=[callback])."
            )
        self._trainer = _trainer_with(self)
        if self._trainer is not None:
            # Before the reporters, which are there first: what is added to an entry of the log must reach them.
            handler = self._trainer.callback_handler
            handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
        if self._engine is not None:
            self._engine.watch()
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        # Its name changed between the supported versions of transformers.
        recomputes = any(getattr(args, f"{what}_checkpointing", False) for what in ("gradient", "activation"))
        self._monitor.attach(model, dtype, args.device, recomputes_forward=recomputes)
        self._skipped = 0
        self.history.clear()

    # ---------------------------------------------------------------- every step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._monitor.step_begins()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._monitor.step_ends()
        report = self._engine.last_step_report() if self._engine is not None else {}
        if "hidden_share" in report:
            self._monitor.update_timed(report["hidden_share"], report.get("wait_ms", 0.0))
        if self._engine is None and self._trainer is not None:
            self._skipped += bool(self._trainer.accelerator.optimizer_step_was_skipped)
        now = time.perf_counter()
        if now - self._postfix_at > POSTFIX_SECONDS:
            self._postfix_at = now
            self._write_postfix(args)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._monitor.pause()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._monitor.pause()

    def _write_postfix(self, args: TrainingArguments) -> None:
        bar = self._progress_bar()
        window = self._monitor._window
        if bar is None or not window.num_steps or window.seconds <= 0:
            return
        parts = [f"{1000 * window.seconds / window.num_steps:.0f} ms/step"]
        if window.num_tokens:
            parts.append(f"{window.num_tokens * args.world_size / window.seconds:,.0f} tok/s")
        if window.num_updates:
            parts.append(f"hidden {window.hidden_share / window.num_updates:.0%}")
        if self._monitor.is_cuda:
            parts.append(f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB")
        utilisation = self._monitor.utilisation(window)
        if utilisation is not None:
            parts.append(f"{utilisation:.0%} MFU")
        if self.num_skipped:
            parts.append(f"{self.num_skipped} skipped")
        bar.set_postfix_str(", ".join(parts), refresh=False)

    def _progress_bar(self) -> Any:
        """The Trainer's own bar; in a notebook the Trainer draws another, which has no room for this."""
        if self._trainer is None:
            return None
        bars = (getattr(other, "training_bar", None) for other in self._trainer.callback_handler.callbacks)
        return next((bar for bar in bars if bar is not None), None)

    # ---------------------------------------------------------------- every entry of the log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        window = self._monitor.take_window()
        if not window.num_steps:
            return
        found = {**self._values(args, window), **self._memory_by_kind()}
        values = {name: value if name in EXACT else float(f"{value:.5g}") for name, value in found.items()}
        logs.update(values)
        # The Trainer has copied the entry into its history already.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
        self.history.append({"step": float(state.global_step), **values})

    def _values(self, args: TrainingArguments, window: Usage) -> dict[str, float]:
        """The values of ``LOGGED`` that there are."""
        values: dict[str, float | None] = {"step_ms": 1000 * window.seconds / window.num_steps}
        if window.num_tokens and window.seconds > 0:
            values["tokens_per_second"] = window.num_tokens * args.world_size / window.seconds
        values["mfu"] = self._monitor.utilisation(window)
        if window.num_updates:
            values["hidden_share"] = window.hidden_share / window.num_updates
            values["wait_ms"] = window.wait_ms / window.num_updates
        if self._monitor.is_cuda:
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
        values["host_memory_gib"] = self._monitor.host_bytes() / GIB
        values["loss_scale"] = self._loss_scale()
        values["skipped_steps"] = float(self.num_skipped)
        return {name: value for name, value in values.items() if value is not None}

    def _memory_by_kind(self) -> dict[str, float]:
        report = self._engine.memory_report() if self._engine is not None else {}
        return {
            f"{place}/{kind.replace(' ', '_')}_gib": size / GIB
            for place, kinds in report.items()
            for kind, size in kinds.items()
            if size
        }

    @property
    def num_skipped(self) -> int:
        return self._engine.skipped_steps if self._engine is not None else self._skipped

    def _loss_scale(self) -> float | None:
        if self._engine is not None:
            return self._engine.loss_scale if self._engine.scaler is not None else None
        scaler = getattr(self._trainer.accelerator, "scaler", None) if self._trainer is not None else None
        # Waits for the device, as the loss in the same entry has just done.
        return float(scaler.get_scale()) if scaler is not None else None

    # ---------------------------------------------------------------- the end

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._monitor.take_window()
        self._monitor.detach()
        self.summary = self._summarise(args, self._monitor.total)
        bar = self._progress_bar()
        if bar is not None:
            bar.close()  # or the table would begin in the middle of its line
        self._engine = self._trainer = None
        if self.show_summary and state.is_world_process_zero:
            self.summary.display()

    def _summarise(self, args: TrainingArguments, total: Usage) -> Summary:
        engine = self._engine
        title = f"ZeRO stage {engine.settings.stage}" if engine is not None else "Trainer without this engine"
        if engine is not None and engine.settings.offload_optimizer.device != "none":
            title += f", optimizer states on {engine.settings.offload_optimizer.device}"
        summary = Summary(title)
        summary.add("steps", f"{total.num_steps:,} ({self.num_skipped} skipped)")
        if total.num_steps and total.seconds > 0:
            values = self._values(args, total)
            for name, (what, form) in SUMMARY_FORMS.items():
                if name in values:
                    summary.add(what, form.format(values[name]))
        for place, kinds in (engine.memory_report() if engine is not None else {}).items():
            where = "GPU" if place == "device" and self._monitor.is_cuda else place
            for kind, size in kinds.items():
                if size:
                    summary.add(f"{kind}, {where}", _bytes(size))
        return summary


SUMMARY_FORMS = {
    "step_ms": ("milliseconds a step", "{:,.1f}"),
    "tokens_per_second": ("tokens a second", "{:,.0f}"),
    "mfu": ("model FLOP utilisation", "{:.1%}"),
    "hidden_share": ("update hidden", "{:.0%}"),
    "wait_ms": ("waiting for weights, ms a step", "{:.1f}"),
    "gpu_memory_gib": ("GPU memory, peak", "{:.2f} GiB"),
    "host_memory_gib": ("host memory, this process", "{:.2f} GiB"),
    "loss_scale": ("loss scale", "{:g}"),
}


def _bytes(size: int) -> str:
    if size >= GIB:
        return f"{size / GIB:,.2f} GiB"
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def _trainer_with(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that has this callback. Callbacks are not told, so it is looked for, once a training (0.1 s)."""
    from transformers import Trainer

    for thing in gc.get_objects():
        if issubclass(type(thing), Trainer):
            handler = getattr(thing, "callback_handler", None)
            if handler is not None and any(other is callback for other in handler.callbacks):
                return thing
    return None
