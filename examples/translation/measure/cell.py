"""The process that trains: one model, one engine, some batch sizes. ``experiments.py`` starts it; you need not.

    python -m measure.cell '{"model": "t5-small", "engine": "plain", "batches": [1, 2], ...}'

Every cell is the unmodified Seq2SeqTrainer. What it finds goes to standard output, one line each: MACHINE, then
STARTED and RESULT for every batch size; or REFUSED, if no cell can be measured with what was given. Any other line is
the Trainer's. Under a launcher every rank trains and rank 0 speaks for all.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError

from measure.rows import OUT_OF_MEMORY, Row
from measure.spec import CONFIG, MAX_MEASURED, NUM_WARMUP, TRAINER_ALONE, ZERO, Spec

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainer, TrainerCallback

MAX_LEFTOVER_BYTES = 256 * 2**20


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    if spec.engine == ZERO:
        import hf_zero_plugin

        hf_zero_plugin.activate()
    import torch

    from measure.usage import gpus_of

    try:
        choose_gpu(spec)
        say("MACHINE", describe_machine())
        materials = Materials(spec)
    except UserError as error:
        say("REFUSED", {"message": str(error)})
        sys.stdout.flush()
        os._exit(2)
    for batch_size in spec.batches:
        say("STARTED", {"batch_size": batch_size})
        say("RESULT", asdict(measure(spec, batch_size, materials)))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            leftover = [torch.cuda.memory_allocated(gpu) for gpu in gpus_of(spec)]
            if max(max(found) for found in over_ranks(spec, leftover)) > MAX_LEFTOVER_BYTES:
                # After an error somebody may still hold tensors: the rest is measured in a fresh process.
                break
    sys.stdout.flush()
    os._exit(0)  # no waiting for threads and process groups of libraries


def say(word: str, content: dict[str, Any]) -> None:
    if int(os.environ.get("RANK", "0")) == 0 or content.get("status") == OUT_OF_MEMORY:
        print(f"\n{word} {json.dumps(content)}", flush=True)


def choose_gpu(spec: Spec) -> None:
    """This rank's GPU becomes the current one; a limit of its memory is set.

    Raises:
        UserError: there are fewer GPUs than asked for. Without any, ranks train on the processor, if none was named.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < spec.num_gpus and (found or spec.gpus):
        named = f"--gpus {spec.gpus}" if spec.gpus else f"--num-gpus {spec.num_gpus}"
        raise UserError(f"{named}: {spec.num_gpus} wanted, {found or 'none'} can be seen.")
    if spec.gpu_memory_limit_gib and not found:
        raise UserError("--gpu-memory-gib: there is no GPU whose memory could be limited.")
    if found:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if spec.gpu_memory_limit_gib:
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, spec.gpu_memory_limit_gib * 2**30 / total))


def describe_machine() -> dict[str, Any]:
    """Device, cores and versions: what figures are worth nothing without."""
    import importlib.metadata
    import platform

    import psutil
    import torch

    from measure.usage import num_cores

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "num_visible_gpus": torch.cuda.device_count() if cuda else 0,
        "device_memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None,
        "num_cores": num_cores(),
        "host_memory_gib": psutil.virtual_memory().total / 2**30,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("torch", "transformers", "accelerate", "hf-zero-plugin", "deepspeed")},
    }


class Materials:
    """What the batch sizes of one process share: text, tokenizer, and the random weights each of them starts from."""

    def __init__(self, spec: Spec) -> None:
        import torch
        from presets import PRESETS
        from transformers import T5Config, T5ForConditionalGeneration, set_seed

        from measure import texts

        tokenizer = texts.load_tokenizer(spec.tokenizer)
        texts.check_vocabulary(tokenizer, PRESETS[spec.model], spec.model)
        pairs = texts.read_pairs(Path(spec.train_file), spec.num_samples)
        self.pairs = texts.tokenised(pairs, tokenizer, spec.max_length)
        self.collator = texts.collator(tokenizer)
        set_seed(spec.seed)
        # Made where making them is fast, kept where they take no memory that is measured.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            self.weights = T5ForConditionalGeneration(T5Config(**PRESETS[spec.model])).cpu()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(spec: Spec, batch_size: int, materials: Materials) -> Row:
    """One cell; running out of memory is a result, any other error ends the process."""
    started = time.perf_counter()
    try:
        row = train_and_measure(spec, batch_size, materials)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        row = spec.row(batch_size, status=OUT_OF_MEMORY, error=str(error).splitlines()[0][:160])
        if spec.num_ranks > 1:
            say("RESULT", asdict(row))
            os._exit(3)  # the other ranks wait for this one: the parent process ends them
    row.seconds = time.perf_counter() - started
    return row


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("out of memory", "cublas_status_alloc_failed", "can't allocate memory")
    )


def train_and_measure(spec: Spec, batch_size: int, materials: Materials) -> Row:
    import torch

    from measure import texts
    from measure.clock import Clock
    from measure.usage import gpus_of

    step_rows = batch_size * spec.num_gpus
    longest = NUM_WARMUP + (spec.steps or MAX_MEASURED)
    if spec.full:
        schedule = texts.whole_epoch(materials.pairs, step_rows, spec.seed)
        num_warmup, most = min(NUM_WARMUP, schedule.epoch_steps - 1), schedule.epoch_steps
    else:
        schedule = texts.sampled_epoch(materials.pairs, step_rows, longest, spec.seed)
        num_warmup, most = NUM_WARMUP, longest
    for gpu in gpus_of(spec):
        torch.cuda.reset_peak_memory_stats(gpu)
    clock = Clock(spec, num_warmup=num_warmup)
    trainer = build_trainer(spec, batch_size, most, texts.Chosen(materials.pairs, schedule.rows), materials, clock)
    clock.trainer = trainer
    try:
        trainer.train()
        row = to_row(spec, batch_size, trainer, clock, schedule.epoch_steps)
        row.num_samples = len(materials.pairs)
        return row
    finally:
        clock.trainer = None
        release(trainer)


def build_trainer(
    spec: Spec, batch_size: int, max_steps: int, dataset: Any, materials: Materials, clock: TrainerCallback
) -> Seq2SeqTrainer:
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    cuda = torch.cuda.is_available()
    config = None if spec.engine in TRAINER_ALONE else json.loads(CONFIG.read_text(encoding="utf-8"))
    arguments = Seq2SeqTrainingArguments(
        output_dir=os.path.join(tempfile.gettempdir(), f"translation_sweep_{os.getpid()}"),
        per_device_train_batch_size=batch_size,
        max_steps=max_steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=1,  # as the WarmupLR of the configuration; DeepSpeed does not start with 0
        fp16=cuda and spec.precision == "fp16",
        bf16=cuda and spec.precision == "bf16",
        seed=spec.seed,
        logging_steps=10**9,  # the clock asks for the two entries that it needs
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        # T5's loss is a mean over its own tokens whatever the others have; the Trainer takes it for a share of a sum
        # over all ranks, and would multiply it by their number.
        average_tokens_across_devices=False,
        deepspeed=config,
        use_cpu=not cuda and config is None,
    )

    class InOrder(Seq2SeqTrainer):
        """Takes the samples in the order given: the schedule has shuffled them."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(dataset)

    return InOrder(
        model=copy.deepcopy(materials.weights),
        args=arguments,
        train_dataset=dataset,
        data_collator=materials.collator,
        callbacks=[clock],
    )


def release(trainer: Seq2SeqTrainer) -> None:
    """Give the device back before the next batch size."""
    engine = trainer.model_wrapped
    try:
        if hasattr(engine, "destroy"):
            engine.destroy()
        trainer.accelerator.free_memory()
    except Exception:  # after running out of memory; what is left over is looked at by the caller
        traceback.print_exc()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None


def to_row(spec: Spec, batch_size: int, trainer: Seq2SeqTrainer, clock: Any, epoch_steps: int) -> Row:
    import torch

    from measure.usage import GIB, num_cores

    cuda = torch.cuda.is_available()
    usage, steps = clock.usage, clock.step_seconds
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ranks = over_ranks(spec, [usage.cpu_s, usage.rss_bytes / GIB])
    busy, cores = sum(cpu_s for cpu_s, _ in ranks) / usage.wall_s, num_cores()
    share = busy / max(usage.cpu_s / usage.wall_s, 1e-9)
    median = statistics.median(steps)
    return spec.row(
        batch_size,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        precision=spec.precision if cuda else "fp32",
        num_parameters=sum(p.numel() for p in trainer.model.parameters()),
        epoch_steps=epoch_steps,
        warmup_steps=clock.num_warmup,
        measured_steps=len(steps),
        is_full_epoch=spec.full,
        step_seconds_median=median,
        step_seconds_mean=usage.wall_s / len(steps),
        step_seconds_p90=sorted(steps)[int(0.9 * (len(steps) - 1))],
        epoch_seconds=clock.train_seconds if spec.full else None,
        epoch_seconds_scaled=median * epoch_steps,
        samples_per_second=batch_size * spec.num_gpus / median,
        num_cores=cores,
        cpu_percent_mean=100 * busy / cores,
        cpu_percent_machine=usage.machine_percent,
        cpu_percent_per_second=";".join(f"{100 * share * value / cores:.1f}" for value in usage.cores_per_second),
        cpu_seconds_per_second=busy,
        host_rss_gib=max(rss for _, rss in ranks),
        loss_warmup=losses[0] if losses else None,
        loss=losses[-1] if losses else None,
        skipped_steps=clock.num_skipped,
        **gpu_memory(spec, clock.device_used),
    )


def gpu_memory(spec: Spec, device_used: dict[int, int]) -> dict[str, float]:
    """The row's columns of GPU memory, GiB: the largest of the GPUs, and all of them added up."""
    import torch

    from measure.usage import GIB, gpus_of

    mine = [
        (torch.cuda.max_memory_allocated(gpu), torch.cuda.max_memory_reserved(gpu), device_used[gpu])
        for gpu in gpus_of(spec)
    ]
    if not mine:
        return {}
    # Several GPUs in this process, or one in each of several ranks.
    peaks = mine if len(mine) > 1 else over_ranks(spec, list(mine[0]))
    columns = dict(zip(("allocated", "reserved", "device"), zip(*peaks)))
    largest = {f"gpu_{name}_gib": max(values) / GIB for name, values in columns.items()}
    return largest | {f"gpu_{name}_sum_gib": sum(values) / GIB for name, values in columns.items()}


def over_ranks(spec: Spec, values: list[float]) -> list[list[float]]:
    """``values`` of every rank."""
    if spec.num_ranks == 1:
        return [values]
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(spec.num_ranks)]
    dist.all_gather(gathered, mine)
    return [tensor.tolist() for tensor in gathered]


if __name__ == "__main__":
    main()
