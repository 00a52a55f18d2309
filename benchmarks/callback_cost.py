"""What ZeroCallback costs a step: with and without it in turn (A B B A), and the time inside its own methods.

    python benchmarks/callback_cost.py [--rounds 4] [--steps 60] [--engine]

Both figures, because they err in different ways: the difference of medians holds everything, and all noise of the
machine (noise_percent is the difference between two halves of the runs without it, so between equals); the time inside
the methods holds no noise, and not the engine's time-line. The model is tiny, so a step is short and the share large.
Prints one JSON line; about half a minute on a GPU. Target: below 1 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WARMUP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--engine", action="store_true", help="watch this engine (its time-line on), not the stock Trainer"
    )
    options = parser.parse_args()
    if options.engine:
        import hf_zero_plugin

        hf_zero_plugin.activate()
    samples: dict[bool, list[float]] = {False: [], True: []}
    inside = 0.0
    run(options, watched=False)  # the first training of a process pays for what the others find ready
    for number in range(2 * options.rounds):
        watched = number % 4 in (1, 2)  # a drift of the machine meets both
        steps, spent = run(options, watched)
        samples[watched] += steps[WARMUP:]
        inside += spent
    without, with_it = (statistics.median(samples[watched]) for watched in (False, True))
    half = len(samples[False]) // 2
    first, second = (statistics.median(part) for part in (samples[False][:half], samples[False][half:]))
    num_watched = options.rounds * options.steps
    result = {
        "engine": options.engine,
        "step_ms_without": 1000 * without,
        "step_ms_with": 1000 * with_it,
        "difference_percent": 100 * (with_it / without - 1),
        "noise_percent": 100 * abs(second / first - 1),
        "inside_us_per_step": 1e6 * inside / num_watched,
        "inside_percent": 100 * inside / num_watched / without,
        "rounds": options.rounds,
        "steps": options.steps,
    }
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def run(options: argparse.Namespace, watched: bool) -> tuple[list[float], float]:
    """Seconds of each step, and seconds inside the callback in all steps but the ends of training."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

    from hf_zero_plugin.integration.callback import ZeroCallback

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=4096, d_model=128, d_ff=344, d_kv=16, num_layers=2, num_heads=8, decoder_start_token_id=0
    )
    rows = [{"input_ids": torch.arange(3, 35), "labels": torch.arange(4, 36)} for _ in range(256)]
    stamps: list[float] = []
    spent = [0.0]

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - start

        return call

    callbacks: list[TrainerCallback] = [Clock()]
    if watched:
        watcher = ZeroCallback(show_summary=False)
        for name in ("on_step_begin", "on_step_end", "on_log"):
            setattr(watcher, name, timed(getattr(watcher, name)))
        watcher._monitor._on_forward = timed(watcher._monitor._on_forward)  # type: ignore[method-assign]
        callbacks.append(watcher)
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir="/tmp/callback_cost",
        max_steps=options.steps,
        per_device_train_batch_size=16,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=cuda,
        deepspeed=str(ROOT / "configs" / "zero2_offload.json") if options.engine else None,
        use_cpu=not cuda and not options.engine,
    )
    trainer = Trainer(model=T5ForConditionalGeneration(config), args=arguments, train_dataset=rows, callbacks=callbacks)
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [after - before for before, after in itertools.pairwise(stamps)], spent[0]


if __name__ == "__main__":
    main()
