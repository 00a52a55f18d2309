"""Measure one engine in this process: step time, tokens/s, GPU memory, host memory, time to the first step.

    python benchmarks/cell.py --engine ours --model t5-base --precision fp16 --batches 1,8,64,256 --steps 20

Every cell is the unmodified Seq2SeqTrainer on random tokens, the same for every engine. One JSON line per batch size
goes to standard output, after the word RESULT. ``engines.py`` lists the engines, ``workloads.py`` the models, and
``run.py``, which starts this with --serve, says what else a cell may ask for.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from engines import ENGINES, ROOT, library_of

sys.path.insert(0, str(ROOT))

from trial import describe, make_trainer, run_compute, run_training, warmup_of

DEVICE_IS_FULL = "the device is out of memory"


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
            if state.global_step == warmup_of(args):
                python.enable()
            if state.global_step == warmup_of(args) + 5:
                python.disable()
                counted.__enter__()
            if state.global_step == warmup_of(args) + 7:
                torch.cuda.synchronize()
                counted.__exit__(None, None, None)

    trainer.add_callback(Window())
    trainer.train()
    pstats.Stats(python).sort_stats("tottime").print_stats(28)
    print(counted.key_averages().table(sort_by="self_cpu_time_total", row_limit=28, max_name_column_width=50))
    if args.trace:
        counted.export_chrome_trace(args.trace)


def run_cell(job: argparse.Namespace, is_first: bool, baseline: int) -> dict[str, Any]:
    """Never raises for what a cell may do wrong: the line says what it was."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.gpu_gib * 2**30 / whole) if job.gpu_gib else 1.0)
        torch.cuda.reset_peak_memory_stats()
    try:
        result = run_compute(job) if job.engine == "compute" else run_training(job, is_first, baseline)
    except torch.cuda.OutOfMemoryError as error:
        result = {**describe(job), "error": f"{DEVICE_IS_FULL}: {str(error)[:160]}"}
    except Exception as error:
        traceback.print_exc()
        what = DEVICE_IS_FULL if "out of memory" in str(error) else type(error).__name__
        result = {**describe(job), "error": f"{what}: {str(error)[:240]}"}
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return result


def prepare(engine: str) -> int:
    """Import everything and touch the device; resident bytes after that, which are the libraries' own."""
    if library_of(engine) == "ours":
        import hf_zero_plugin

        hf_zero_plugin.activate()
    import torch
    from transformers import LlamaForCausalLM, Seq2SeqTrainer, T5ForConditionalGeneration  # noqa: F401

    if library_of(engine) in ("ours", "deepspeed"):
        import deepspeed  # noqa: F401
    if engine == "torchao":
        import torchao.optim  # noqa: F401
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.zeros(1, device="cuda")
    from host_memory import resident_bytes

    return resident_bytes()


def offer_to_be_killed() -> None:
    """If the machine runs out of memory, let the system end this process and not the one that keeps the results."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument("--model", default="t5-base")
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=7, help="steps before the measured ones; at most half of --steps")
    parser.add_argument("--turns", type=int, default=0, help="in place of --steps: wait for a line before each turn")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--length", type=int, help="tokens of a row; a decoder's default is 1024, T5's WMT16's lengths")
    parser.add_argument("--checkpointing", type=int, nargs="?", const=1, default=0)
    parser.add_argument("--config", help="file of configs/ for ours and deepspeed, without .json")
    parser.add_argument("--ratio", type=float, help="offload_optimizer.ratio")
    parser.add_argument("--budget", type=float, help="GiB for the states of ours-auto")
    parser.add_argument("--share", type=float, help="host_share of ours-both")
    parser.add_argument("--dropout", type=float, help="of T5 in place of its own 0.1")
    parser.add_argument("--half", type=int, default=0, help="1: make ours' and DeepSpeed's weights in half precision")
    parser.add_argument("--losses", type=int, default=0, help="1: record every step's loss (reads it from the device)")
    parser.add_argument("--gpu-gib", type=float, help="let the process use no more GPU memory than this")
    parser.add_argument("--profile", action="store_true", help="print where host time goes, measure nothing")
    parser.add_argument("--trace", help="with --profile: write a chrome trace here")
    parser.add_argument("--serve", action="store_true", help="read one JSON object of options a line, run it, repeat")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    offer_to_be_killed()
    baseline = prepare(args.engine)
    if args.profile:
        import torch

        args.batch = int(args.batches.split(",")[0])
        profile(make_trainer(args, torch.cuda.is_available())[0], args)
        return
    if not args.serve:
        for number, batch in enumerate(int(b) for b in args.batches.split(",")):
            args.batch = batch
            print("RESULT " + json.dumps(run_cell(args, number == 0, baseline)), flush=True)
        return
    print("READY", flush=True)
    for number, line in enumerate(sys.stdin):
        job = argparse.Namespace(**{**vars(args), **json.loads(line)})
        print("RESULT " + json.dumps(run_cell(job, number == 0, baseline)), flush=True)


if __name__ == "__main__":
    main()
