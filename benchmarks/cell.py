"""Measure one engine on one model in this process: step time, GPU memory, host memory, time to the first step.

    python benchmarks/cell.py --engine ours --model t5-base --precision fp16 --batches 1,8,64,256 --steps 20

Every cell is the unmodified Seq2SeqTrainer on random tokens with the lengths of WMT16 sentences, the same for every
engine. One JSON line per batch size goes to standard output, after the word RESULT.

Engines: plain (the Trainer with --fp16 or --bf16), ours, ours-host (update on host cores), ours-device (no offload),
deepspeed (ZeRO-2 offload), torchao (CPUOffloadOptimizer, bf16 weights without fp32 masters).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil

PROCESS_START = psutil.Process().create_time()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DISTINCT_BATCHES = 5

MODELS: dict[str, dict[str, Any]] = {
    "t5-tiny": {"kind": "t5", "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
    "t5-small": {"kind": "t5", "d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6, "num_heads": 8},
    "t5-base": {"kind": "t5", "d_model": 768, "d_ff": 3072, "d_kv": 64, "num_layers": 12, "num_heads": 12},
    "decoder-3b": {
        "kind": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "decoder-tiny": {
        "kind": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
}


def build_model(name: str, device: str) -> Any:
    import torch

    spec = dict(MODELS[name])
    kind = spec.pop("kind")
    with torch.device(device):  # random weights of the true size; made where making them is fast
        if kind == "t5":
            from transformers import T5Config, T5ForConditionalGeneration

            return T5ForConditionalGeneration(T5Config(vocab_size=32128, decoder_start_token_id=0, **spec))
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(max_position_embeddings=8192, **spec))


def make_data(name: str, batch: int, steps: int, length: int) -> Any:
    """``steps`` batches of random tokens; T5: sentence lengths log-normal around 35 tokens, as WMT16's are."""
    import numpy as np
    import torch
    from torch.utils.data import Dataset

    rng = np.random.default_rng(0)
    if MODELS[name]["kind"] == "llama":
        vocab = MODELS[name]["vocab_size"]
        rows = rng.integers(3, vocab, (min(64, batch * steps), length))

        class Fixed(Dataset):
            def __len__(self) -> int:
                return batch * steps

            def __getitem__(self, index: int) -> dict[str, Any]:
                ids = torch.from_numpy(rows[index % len(rows)])
                return {"input_ids": ids, "labels": ids}

        return Fixed(), None
    # A handful of batches in turn: a matrix shape seen for the first time costs the libraries about as much host
    # time as the step itself, and in a real epoch shapes come back.
    distinct = batch * min(steps, DISTINCT_BATCHES)
    lengths = np.clip(rng.lognormal(3.4, 0.55, (distinct, 2)), 4, 128).astype(int)
    pool = rng.integers(3, 32000, 4096)

    class Sentences(Dataset):
        def __len__(self) -> int:
            return batch * steps

        def __getitem__(self, index: int) -> dict[str, Any]:
            source, target = lengths[index % distinct]
            start = (index * 37) % 3800
            return {"input_ids": pool[start : start + source].tolist(), "labels": pool[start : start + target].tolist()}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        def pad(key: str, value: int) -> Any:
            width = -(-max(len(row[key]) for row in rows) // 8) * 8
            return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

        ids = pad("input_ids", 0)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": pad("labels", -100)}

    return Sentences(), collate


def engine_config(engine: str, precision: str) -> dict[str, Any] | None:
    if engine in ("plain", "torchao"):
        return None
    config = json.loads((ROOT / "configs" / "zero2_offload.json").read_text())
    offload = config["zero_optimization"]["offload_optimizer"]
    if engine == "ours-host":
        offload["step_on"] = "host"
    if engine == "ours-device":
        del config["zero_optimization"]["offload_optimizer"]
    return config


def run_batch(args: argparse.Namespace, batch: int, is_first: bool) -> dict[str, Any]:
    import torch
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    cuda = torch.cuda.is_available()
    config = engine_config(args.engine, args.precision)
    half = args.precision if cuda else None
    if not cuda and config is not None:
        for key in ("fp16", "bf16"):
            config.pop(key, None)
    pure = args.engine == "torchao"
    training = Seq2SeqTrainingArguments(
        output_dir=f"/tmp/bench_{os.getpid()}",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.steps,
        learning_rate=1e-4,
        warmup_steps=1,
        weight_decay=0.01,
        logging_steps=10**6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        fp16=half == "fp16" and not pure,
        bf16=half == "bf16" and not pure,
        gradient_checkpointing=args.checkpointing,
        deepspeed=copy.deepcopy(config),
        dataloader_num_workers=0,
        **({} if cuda or config is not None else {"use_cpu": True}),
    )
    model = build_model(args.model, "cuda" if cuda else "cpu")
    num_parameters = sum(p.numel() for p in model.parameters())
    if pure:
        model = model.to(torch.bfloat16)
    data, collate = make_data(args.model, batch * args.accumulation, args.steps, args.length)
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda and len(stamps) in (args.warmup, args.steps):
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            if len(stamps) == 1:
                self.first_step_at = time.time()
            if len(stamps) == args.warmup:
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                self.cpu = psutil.cpu_times()
                self.own = psutil.Process().cpu_times()

    clock = Clock()
    extra: dict[str, Any] = {}
    if pure:
        from torchao.optim import CPUOffloadOptimizer

        optimizer = CPUOffloadOptimizer(
            model.parameters(), torch.optim.AdamW, offload_gradients=False, fused=True, lr=1e-4
        )
        extra["optimizers"] = (
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(
                torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), lambda _: 1.0
            ),
        )

    class InOrder(Seq2SeqTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    trainer = InOrder(model=model, args=training, train_dataset=data, data_collator=collate, callbacks=[clock], **extra)
    if args.profile:
        profile(trainer, args)
        sys.exit()
    trainer.train()
    if cuda:
        torch.cuda.synchronize()
    end = time.perf_counter()
    own = psutil.Process().cpu_times()
    steps_ms = [1000 * (b - a) for a, b in zip(stamps[args.warmup - 1 :], stamps[args.warmup :])]
    # The last step's pending work counts: total time over the timed steps, up to a full synchronize.
    total_ms = 1000 * (end - stamps[args.warmup - 1]) / len(steps_ms)
    losses = [h["train_loss"] for h in trainer.state.log_history if "train_loss" in h]
    wall = end - stamps[args.warmup - 1]
    result = {
        "engine": args.engine,
        "model": args.model,
        "precision": args.precision,
        "batch": batch,
        "accumulation": args.accumulation,
        "length": args.length if MODELS[args.model]["kind"] == "llama" else None,
        "num_parameters": num_parameters,
        "steps": len(steps_ms),
        "step_ms_median": statistics.median(steps_ms),
        "step_ms_mean": total_ms,
        "step_ms": [round(x, 2) for x in steps_ms],
        "cpu_seconds_per_second": ((own.user + own.system) - (clock.own.user + clock.own.system)) / wall,
        "rss_bytes": psutil.Process().memory_info().rss,
        "first_step_s": clock.first_step_at - PROCESS_START if is_first else None,
        "loss": losses[-1] if losses else None,
    }
    if cuda:
        result["peak_allocated"] = torch.cuda.max_memory_allocated()
        result["peak_reserved"] = torch.cuda.max_memory_reserved()
    trainer.accelerator.free_memory()
    return result


def profile(trainer: Any, args: argparse.Namespace) -> None:
    """Where the host's time goes: one run under cProfile, and kernel launches counted by the profiler."""
    import cProfile
    import pstats

    import torch
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback

    python, counted = (
        cProfile.Profile(),
        torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]),
    )

    class Window(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == args.warmup:
                python.enable()
            if state.global_step == args.warmup + 5:
                python.disable()
                counted.__enter__()
            if state.global_step == args.warmup + 7:
                torch.cuda.synchronize()
                counted.__exit__(None, None, None)

    trainer.add_callback(Window())
    trainer.train()
    pstats.Stats(python).sort_stats("tottime").print_stats(28)
    print(counted.key_averages().table(sort_by="self_cpu_time_total", row_limit=28, max_name_column_width=50))
    if args.trace:
        counted.export_chrome_trace(args.trace)


def run_cell(args: argparse.Namespace, batch: int, is_first: bool) -> dict[str, Any]:
    import torch

    try:
        result = run_batch(args, batch, is_first)
    except torch.cuda.OutOfMemoryError as error:
        result = {"engine": args.engine, "model": args.model, "precision": args.precision, "batch": batch}
        result["error"] = f"out of memory: {str(error)[:120]}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", default="t5-base", choices=sorted(MODELS))
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=7)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where host time goes, measure nothing")
    parser.add_argument("--trace", help="with --profile: write a chrome trace here")
    parser.add_argument("--serve", action="store_true", help="read one JSON object of options a line, run it, repeat")
    args = parser.parse_args()
    if args.engine.startswith("ours"):
        import hf_zero_plugin

        hf_zero_plugin.activate()
    import torch  # noqa: F401 - the engines are compared from here on
    import transformers  # noqa: F401

    if not args.serve:
        for number, batch in enumerate(int(b) for b in args.batches.split(",")):
            print("RESULT " + json.dumps(run_cell(args, batch, number == 0)), flush=True)
        return
    print("READY", flush=True)
    for number, line in enumerate(sys.stdin):
        job = argparse.Namespace(**{**vars(args), **json.loads(line)})
        print("RESULT " + json.dumps(run_cell(job, job.batch, number == 0)), flush=True)


if __name__ == "__main__":
    main()
