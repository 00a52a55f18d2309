"""Does it learn to translate, and the same with and without the engine? Loss and BLEU over steps, from random weights.

One process an engine, the same seed, data order and schedule (the Trainer's, so the configuration goes without its
scheduler section)::

    python examples/translation/learning.py                                       # the corpus that this example ships
    python examples/translation/learning.py --train MIX.json --test newstest2016=TEST.json --tokenizer DIR

Writes learning.json and figures/learning.png (and .svg) into results/, without ``--train`` into out/learning/. Both
engines side by side (their speed is not the subject), within a time, on one GPU or, with ``--gpus 0,1``, on a GPU each;
about 40 s of starting and of last translations come on top::

    python examples/translation/learning.py --train DATA/mix/train_mix.json \\
        --test newstest2016=DATA/wmt16_en_ro/test.json --tokenizer DATA/tokenizer_t5 --side-by-side --max-seconds 240

Training text and test text are written with the comma below (ș, ț), as newstest2016 is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from errors import UserError, exit_code_of, make_folder
from experiments import default_out, find_text
from measure.launch import child_environment, first_gpu
from measure.learn import REFUSED, LearnSpec
from measure.learned import NAMES
from measure.options import (
    check_engines,
    check_models,
    length,
    names_of,
    positive,
    positive_float,
    zero_or_more,
)
from measure.spec import PLAIN, ZERO

SMALLER = {
    "num_layers": 4, "num_decoder_layers": 4, "d_ff": 1024, "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1, "initializer_factor": 0.6,
}  # fmt: skip
"""t5-small's width with two thirds of its layers, and T5 1.1's gated units: what learns soonest from random weights."""
START_SECONDS = 150


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    spec = make_spec(options)
    make_folder(options.out, "--out")
    with tempfile.TemporaryDirectory() as folder:
        outs = {engine: Path(folder) / f"{engine}.json" for engine in options.engines}
        specs = [replace(spec, engine=engine) for engine in options.engines]
        groups = [specs] if options.side_by_side else [[one] for one in specs]
        for group in groups:
            run_together(group, outs, options)
        runs = [json.loads(out.read_text(encoding="utf-8")) for out in outs.values() if out.is_file()]
    if not runs:
        raise UserError("no run came to its end; see the messages above.")
    is_whole = len(runs) == len(specs)
    # An earlier comparison is not replaced by half of one.
    path = options.out / ("learning.json" if is_whole else "learning_incomplete.json")
    path.write_text(json.dumps({"runs": runs}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(path)
    if is_whole:
        from measure.learning_figure import draw_learning

        for figure in draw_learning(runs, options.out / "figures"):
            print(figure)
    show(runs)
    if not is_whole:
        sys.exit(1)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", dest="data", type=Path, help="JSON lines to train on; default: the corpus that this example ships")
    add("--test", action="append", default=[], metavar="NAME=FILE", help="a held-out set; may be given again")
    add("--tokenizer", type=Path, help="folder of T5's tokenizer")
    add(
        "--hold-out",
        type=zero_or_more,
        default=300,
        help="training pairs kept for a test set of the same kind; 0 for none",
    )
    add("--max-test-pairs", type=positive, default=500, help="of each file of --test")
    add("--engines", default=f"{PLAIN},{ZERO}", type=names_of, help=f"of {', '.join(NAMES)}")
    add("--model", default="t5-small", help="preset of models.py; t5-small is trained with fewer layers, see --whole")
    add("--whole", action="store_true", help="the preset as it is")
    add("--steps", type=positive, default=4000)
    add("--batch-size", type=positive, default=256)
    add("--eval-steps", type=positive, default=250)
    add("--learning-rate", type=positive_float, default=1e-3)
    add("--warmup", type=zero_or_more, default=200, help="steps")
    add("--max-length", type=length, default=96, help="tokens to which both sides are cut")
    add("--max-seconds", type=float, default=0.0, help="stop a run after this time; 0: never")
    add("--precision", choices=["bf16", "fp16", "fp32"], default="bf16", help="on a GPU; a CPU trains in fp32")
    add("--side-by-side", action="store_true", help="all engines at the same time, on the GPUs of --gpus in turn")
    add("--gpus", type=names_of, default=[], help="GPUs for --side-by-side, such as 0,1; default: all on the first")
    add("--out", type=Path, help="folder of learning.json; default: out/learning, with --train results/")
    add("--seed", type=int, default=42)
    options = parser.parse_args(argv)
    check_engines(options.engines, NAMES)
    check_models([options.model], "--model")
    if options.data is not None and options.tokenizer is None:
        raise UserError("--train needs --tokenizer: the folder of a tokenizer that knows this text, such as T5's.")
    if not options.hold_out and not options.test:
        raise UserError("nothing to score: give --test NAME=FILE, or let --hold-out be more than 0.")
    options.out = options.out or default_out(options, "learning")
    return options


def make_spec(options: argparse.Namespace) -> LearnSpec:
    tests: dict[str, str] = {}
    for item in options.test:
        name, equals, path = item.partition("=")
        if not name or not equals:
            raise UserError(f"--test {item}: write NAME=FILE, such as newstest2016=test.json.")
        if not Path(path).is_file():
            raise UserError(f"--test {item}: no such file (looked from {Path.cwd()}).")
        tests[name] = str(Path(path).resolve())
    train_file, tokenizer = find_text(options)
    return LearnSpec(
        engine="",
        train_file=str(train_file),
        test_files=tests,
        tokenizer=str(tokenizer),
        hold_out=options.hold_out,
        max_test_pairs=options.max_test_pairs,
        preset=options.model,
        overrides=SMALLER if options.model == "t5-small" and not options.whole else {},
        steps=options.steps,
        batch_size=options.batch_size,
        eval_steps=options.eval_steps,
        log_steps=max(1, min(20, options.eval_steps)),
        learning_rate=options.learning_rate,
        num_warmup=options.warmup,
        max_length=options.max_length,
        max_seconds=options.max_seconds,
        precision=options.precision,
        seed=options.seed,
    )


def run_together(specs: Sequence[LearnSpec], outs: dict[str, Path], options: argparse.Namespace) -> None:
    """Start a process each and wait for all; one that fails or hangs costs only its own curve."""
    gpus = options.gpus or [first_gpu()]
    num_threads = max(1, len(os.sched_getaffinity(0)) // len(specs))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "measure.learn", json.dumps(asdict(spec)), str(outs[spec.engine])],
            env={
                **child_environment(),
                # One GPU each: the Trainer alone would drive all that it sees.
                "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)],
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(num_threads)),
            },
        )
        for number, spec in enumerate(specs)
    ]
    limit = 1.5 * options.max_seconds + START_SECONDS if options.max_seconds else None
    try:
        for process, spec in zip(processes, specs):
            code: object
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = f"none after {limit:.0f} s, ended"
                process.kill()
            if code == REFUSED:
                sys.exit(REFUSED)  # it has said why; another engine would be refused for the same
            if code != 0:
                print(f"{spec.engine}: exit code {code}", file=sys.stderr, flush=True)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def show(runs: Sequence[dict[str, Any]]) -> None:
    for run in runs:
        last = ", ".join(f"{name} {curve[-1][1]:.1f}" for name, curve in run["bleu"].items())
        print(f"\n{run['engine']}: {run['steps']} steps, loss {run['loss'][-1][1]:.3f}, BLEU {last}")
        for example in run["examples"]:
            print(f"  {example['source']}\n    -> {example['translation']}\n    == {example['reference']}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main, "learning.py"))
