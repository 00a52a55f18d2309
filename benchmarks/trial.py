"""One trial: one engine trains one model for a few steps under the unmodified Seq2SeqTrainer, and is measured."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from typing import Any

import psutil
from compute import measure
from engines import config_name, engine_config, library_of, stage_of
from host_memory import peak_resident_bytes, reset_peak, resident_bytes
from spans import describe_peaks, describe_span
from turns import TurnClock, steps_of_turns
from workloads import DEFAULT_DECODER_LENGTH, TokenCount, build_model, build_sharded_model, is_decoder, make_data

PROCESS_START = psutil.Process().create_time()


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def half_type(precision: str) -> Any:
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def warmup_of(job: argparse.Namespace) -> int:
    """Steps that are not timed; at least half of a short run's steps are."""
    return min(job.warmup, max(1, job.steps // 2))


def describe(job: argparse.Namespace) -> dict[str, Any]:
    """What a cell is: the fields that results are compared by."""
    length = job.length or (DEFAULT_DECODER_LENGTH if is_decoder(job.model) else None)
    return {
        "engine": job.engine,
        "model": job.model,
        "precision": job.precision,
        "batch": job.batch,
        "accumulation": job.accumulation,
        "length": length,
        "checkpointing": bool(job.checkpointing),
        "config": config_name(job.engine, job.config),
        "ratio": job.ratio,
        "budget_gib": job.budget,
        "host_share": job.share,
        "dropout": job.dropout,
        "gpu_gib": job.gpu_gib,
        "world_size": world_size(),
    }


class Clock:
    """Time, processor time and memory from the end of the warm-up on. ``on_step_end`` is called after every step."""

    is_over = False

    def __init__(self, job: argparse.Namespace, cuda: bool) -> None:
        self.steps, self.warmup, self.cuda = job.steps, warmup_of(job), cuda
        self.stamps: list[float] = []
        self.first_step_at = 0.0
        self.peak_before = 0
        self._own = psutil.Process().cpu_times()

    def on_step_end(self) -> None:
        import torch

        # Both ends of the measured span are moments at which the GPU has nothing left to do.
        if self.cuda and len(self.stamps) + 1 in (self.warmup, self.steps):
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        if len(self.stamps) == 1:
            self.first_step_at = time.time()
        if len(self.stamps) == self.warmup:
            if self.cuda:
                self.peak_before = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            self._own = psutil.Process().cpu_times()

    def finish(self) -> dict[str, Any]:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        # The last step's pending work counts: all of the time, up to a full synchronize.
        result = describe_span(self.stamps[self.warmup - 1 :], time.perf_counter(), self._own)
        return result | (describe_peaks(self.peak_before) if self.cuda else {})


def training_arguments(job: argparse.Namespace, config: dict[str, Any] | None, cuda: bool) -> Any:
    from transformers import Seq2SeqTrainingArguments

    half = job.precision if cuda and job.engine != "torchao" else None
    return Seq2SeqTrainingArguments(
        output_dir=f"/tmp/bench_{os.getpid()}",
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.accumulation,
        max_steps=job.steps,
        learning_rate=1e-4,
        warmup_steps=1,  # DeepSpeed does not start with 0
        weight_decay=0.01,
        logging_steps=1 if job.losses else 10**6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        fp16=half == "fp16",
        bf16=half == "bf16",
        gradient_checkpointing=bool(job.checkpointing),
        remove_unused_columns=False,
        deepspeed=copy.deepcopy(config),
        dataloader_num_workers=0,
        **({} if cuda or config is not None else {"use_cpu": True}),
    )


def make_model(job: argparse.Namespace, config: dict[str, Any] | None, cuda: bool) -> Any:
    """For stage 3 under the engine's own ``Init``, in half precision; otherwise whole, in fp32, on the device.

    ``job.half``: engines with fp32 masters of their own are given half-precision weights from the beginning.
    """
    import torch

    half = half_type(job.precision) if cuda else torch.float32
    if stage_of(config) == 3:
        return build_sharded_model(job.model, half, job.dropout)
    where = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    model = build_model(job.model, where, job.dropout, half if job.half and config is not None else None)
    return model.to(half) if job.engine in ("torchao", "compute") else model


def num_parameters(model: Any) -> int:
    """Sharded parameters say their whole size; DeepSpeed's are empty between uses, and say it in ``ds_numel``."""
    return sum(int(getattr(param, "ds_numel", param.numel())) for param in model.parameters())


def torchao_optimizers(model: Any) -> tuple[Any, Any]:
    """The optimizer, and a schedule of a constant rate: it has no param groups that a schedule could write to."""
    import torch
    from torchao.optim import CPUOffloadOptimizer

    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, offload_gradients=False, fused=True, lr=1e-4)
    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(nothing, lambda _: 1.0)


def make_trainer(job: argparse.Namespace, cuda: bool) -> tuple[Any, Clock | TurnClock, TokenCount, int]:
    import torch
    from transformers import Seq2SeqTrainer, TrainerCallback

    config = engine_config(job.engine, job.config, job.ratio, job.budget, job.share)
    if config is not None and not cuda:
        config.pop("fp16"), config.pop("bf16")
    arguments = training_arguments(job, config, cuda)
    model = make_model(job, config, cuda)
    total = num_parameters(model)
    data, collate, tokens = make_data(job.model, job.batch * job.accumulation * world_size(), job.steps, job.length)
    clock = TurnClock(job, cuda) if job.turns else Clock(job, cuda)

    class Watcher(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            clock.on_step_end()
            control.should_training_stop |= clock.is_over

    class InOrder(Seq2SeqTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    extra = {"optimizers": torchao_optimizers(model)} if job.engine == "torchao" else {}
    trainer = InOrder(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Watcher()], **extra
    )
    return trainer, clock, tokens, total


def run_training(job: argparse.Namespace, is_first: bool, baseline: int) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    can_reset = reset_peak()
    before = resident_bytes()
    if job.turns:
        job.steps = steps_of_turns(job)
    trainer, clock, tokens, total = make_trainer(job, cuda)
    trainer.train()
    result = {**describe(job), "num_parameters": total, **clock.finish()}
    result |= _tokens(tokens, job, result["step_ms_mean"])
    logged = trainer.state.log_history
    result["loss"] = next((line["train_loss"] for line in reversed(logged) if "train_loss" in line), None)
    if job.losses:
        result["losses"] = [line["loss"] for line in logged if "loss" in line]
    result["rss_bytes"] = resident_bytes()
    result["rss_peak_bytes"] = peak_resident_bytes() if can_reset or is_first else None
    result["rss_baseline_bytes"] = baseline
    result["rss_before_bytes"] = before
    result["first_step_s"] = clock.first_step_at - PROCESS_START if is_first else None
    report = getattr(trainer.model_wrapped, "memory_report", None)
    if report is not None and library_of(job.engine) == "ours":
        result["memory_report"] = report()
    trainer.accelerator.free_memory()
    return result


def _tokens(tokens: TokenCount, job: argparse.Namespace, mean_ms: float) -> dict[str, float]:
    """Of this rank: tokens of a step, and tokens/s over the measured steps."""
    real, padded = tokens.per_batch(warmup_of(job) * job.accumulation, job.steps * job.accumulation)
    real, padded = real * job.accumulation, padded * job.accumulation
    return {"tokens": real, "tokens_padded": padded, "tokens_per_s": 1000 * real / mean_ms}


def run_compute(job: argparse.Namespace) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    model = make_model(job, None, cuda)
    if job.checkpointing:
        model.gradient_checkpointing_enable()
    data, collate, tokens = make_data(job.model, job.batch, job.steps * job.accumulation, job.length)
    device = next(model.parameters()).device
    indices = [list(range(start, start + job.batch)) for start in range(0, len(data), job.batch)]
    batches = [{key: value.to(device) for key, value in collate(rows).items()} for rows in indices]
    warmup = warmup_of(job)
    found = measure(model, batches, accumulation=job.accumulation, steps=job.steps - warmup, warmup=warmup)
    steps_ms = found["step_ms"]
    result = {**describe(job), "num_parameters": num_parameters(model), "steps": len(steps_ms), **found}
    result |= {"step_ms_median": statistics.median(steps_ms), "step_ms_mean": statistics.mean(steps_ms)}
    if cuda:
        result["peak_allocated"] = torch.cuda.max_memory_allocated()
    return result | _tokens(tokens, job, result["step_ms_mean"])
