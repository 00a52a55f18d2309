"""``make demo``: fine-tune a small T5, English to Romanian, from nothing but this repository.

Writes the corpus and a tokenizer, then runs run_translation.py as a user would, with ``hf-zero run`` and
``--deepspeed``, and shows what came of it. No download, no GPU needed; on a GPU the same command uses it.

    python examples/translation/demo.py            # this engine: ZeRO-2 with optimizer offload
    python examples/translation/demo.py --plain    # the stock Trainer, for comparison: same script, same arguments
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from corpus.build import NUM_TRAIN, Corpus, build_corpus, write_corpus
from errors import UserError, exit_code_of, missing_extra

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path("examples/translation/run_translation.py")
CONFIG = Path("configs/zero2_offload.json")
PREFIX = "translate English to Romanian: "
RESULTS = ("all_results.json", "memory.json", "generated_predictions.txt", "trainer_state.json", "model.safetensors")
MEMORY_KINDS = ("weights", "gradients", "master weights", "moments", "buffers")
NUM_EXAMPLES = 3


class Files(NamedTuple):
    """What the demo prepares, below its output folder."""

    train: Path
    validation: Path
    test: Path
    tokenizer: Path


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    out_dir = Path(options.out_dir).resolve()
    started = time.monotonic()
    files = prepare(out_dir, options.num_train_pairs)
    forget_results_of_the_last_run(out_dir)
    command = training_command(files, out_dir, options)
    print("\n$ " + " ".join(shown(part) for part in command) + "\n", flush=True)
    # The child writes to our own terminal, so its progress bar is seen as it moves.
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    if code != 0:
        sys.exit(code)
    show_results(out_dir, files.test, "stock Trainer" if options.plain else "ZeRO-2, optimizer offloaded")
    print(f"{time.monotonic() - started:.0f} s in all. Everything is in {shown(str(out_dir))}/")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a small T5 from English to Romanian, with nothing to fetch."
    )
    parser.add_argument("--plain", action="store_true", help="the stock Trainer instead of this engine")
    parser.add_argument("--out_dir", default=str(ROOT / "out" / "demo"), help="where everything is written")
    parser.add_argument("--num_train_pairs", type=int, default=NUM_TRAIN, help="size of the training corpus")
    parser.add_argument("--num_train_epochs", type=float, default=4.0, help="times that the corpus is seen")
    options, options.script_args = parser.parse_known_args(argv)
    if options.num_train_pairs < 1:
        raise UserError(f"--num_train_pairs {options.num_train_pairs}: at least 1.")
    return options


def prepare(out_dir: Path, num_train_pairs: int) -> Files:
    """Write the corpus and the tokenizer; some seconds."""
    try:
        from corpus.tokenizer import save_tokenizer
    except ImportError as error:
        raise missing_extra(error.name or "transformers", "the demo") from error
    corpus: Corpus = build_corpus(num_train=num_train_pairs)
    paths = write_corpus(corpus, out_dir / "data")
    tokenizer_dir = out_dir / "tokenizer"
    # Trained on the training split alone; the prefix is repeated so that each of its words becomes one piece.
    texts = [text for pair in corpus.train for text in pair] + [PREFIX] * 2000
    tokenizer = save_tokenizer(texts, tokenizer_dir)
    print(
        f"Corpus: {len(corpus.train)} pairs to train on, {len(corpus.test)} held out, none in common. "
        f"Tokenizer: {len(tokenizer)} pieces."
    )
    return Files(**paths, tokenizer=tokenizer_dir)


def forget_results_of_the_last_run(out_dir: Path) -> None:
    for name in RESULTS:
        (out_dir / name).unlink(missing_ok=True)


def training_command(files: Files, out_dir: Path, options: argparse.Namespace) -> list[str]:
    """The command that a user would type."""
    import torch

    if options.plain:
        # The schedule that the engine's run takes from its config.
        command = [sys.executable, str(SCRIPT), "--lr_scheduler_type", "constant_with_warmup"]
    else:
        command = [find_launcher(), "run", str(SCRIPT), "--deepspeed", str(CONFIG)]
    settings: dict[str, object] = {
        "config_name": "preset:t5-demo",
        "tokenizer_name": files.tokenizer,
        "train_file": files.train,
        "test_file": files.test,
        "source_lang": "en",
        "target_lang": "ro",
        "output_dir": out_dir,
        "num_train_epochs": options.num_train_epochs,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 80,
        "learning_rate": 1.5e-3,
        "warmup_steps": 100,
        "max_source_length": 48,
        "max_target_length": 48,
        "logging_steps": 200,
        "save_strategy": "no",
        # Pinned host memory means nothing, and draws a warning, where there is no GPU to copy to.
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    command += ["--overwrite_output_dir", "--do_train", "--do_predict", "--predict_with_generate"]
    command += ["--predict_before_training"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    return command + options.script_args


def find_launcher() -> str:
    """``hf-zero`` beside the python that runs this, or on the PATH."""
    beside = Path(sys.executable).parent
    launcher = shutil.which("hf-zero", path=os.pathsep.join([str(beside), os.environ.get("PATH", "")]))
    if launcher is None:
        raise UserError("hf-zero is not installed. Run: pip install -e '.[examples]' (or 'make demo', which does).")
    return launcher


def shown(text: str) -> str:
    """Paths below the repository or the environment's bin folder, as a person would type them."""
    for base in (ROOT, Path(sys.executable).parent):
        if text.startswith(f"{base}{os.sep}"):
            return text[len(str(base)) + 1 :]
    return text


def show_results(out_dir: Path, test_file: Path, title: str) -> None:
    """A table of scores, speed and memory, and some translations."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise missing_extra("rich", "the demo's table") from error
    results = json.loads((out_dir / "all_results.json").read_text(encoding="utf-8"))
    console = Console()

    console.print(f"English to Romanian, {title}", style="italic")
    scores = Table(show_header=False)
    scores.add_column()
    scores.add_column(justify="right")
    scores.add_row(f"BLEU before, {results['predict_samples']} held-out sentences", f"{results['before_bleu']:.1f}")
    scores.add_row("BLEU after", f"[bold]{results['predict_bleu']:.1f}[/bold]")
    scores.add_row("seconds per step", f"{1 / results['train_steps_per_second']:.3f}")
    scores.add_row("seconds of training", f"{results['train_runtime']:.0f}")
    console.print(scores)

    memory_file = out_dir / "memory.json"
    memory = json.loads(memory_file.read_text(encoding="utf-8")) if memory_file.is_file() else None
    console.print(memory_table(memory))

    examples = Table(title="Held-out sentences, after training", title_justify="left", show_lines=True)
    for column in ("English", "translated", "reference"):
        examples.add_column(column)
    for row in some_translations(out_dir, test_file):
        examples.add_row(*row)
    console.print(examples)


def memory_table(memory: dict[str, dict[str, int]] | None) -> Any:
    """Bytes by kind and place, as ``engine.memory_report()`` gave them; None if the engine cannot say."""
    import torch
    from rich.table import Table

    table = Table(title="Memory", title_justify="left")
    table.add_column("kind")
    if memory is None:
        table.add_column("host, GPU")
        table.add_row("weights, gradients, master weights, moments", "not available (the stock Trainer does not say)")
        return table
    device = "GPU" if torch.cuda.is_available() else "device (no GPU: host too)"
    places = {"host": "host, MiB", "device": f"{device}, MiB"}
    for heading in places.values():
        table.add_column(heading, justify="right")
    found = {kind for by_kind in memory.values() for kind in by_kind}
    kinds = [kind for kind in MEMORY_KINDS if kind in found] + sorted(found - set(MEMORY_KINDS))
    for kind in kinds:
        table.add_row(kind, *(f"{memory.get(place, {}).get(kind, 0) / 2**20:.1f}" for place in places))
    totals = (sum(memory.get(place, {}).values()) for place in places)
    table.add_row("[bold]all[/bold]", *(f"[bold]{total / 2**20:.1f}[/bold]" for total in totals))
    return table


def some_translations(out_dir: Path, test_file: Path) -> list[tuple[str, str, str]]:
    """English, translation, reference of a few held-out sentences, longer ones as they show more."""
    rows = [json.loads(line)["translation"] for line in test_file.read_text(encoding="utf-8").splitlines()]
    translations = (out_dir / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    triples = [(row["en"], translation, row["ro"]) for row, translation in zip(rows, translations, strict=True)]
    longer = [triple for triple in triples if len(triple[0].split()) >= 7]
    step = max(1, len(longer) // NUM_EXAMPLES)
    return longer[::step][:NUM_EXAMPLES]


if __name__ == "__main__":
    sys.exit(exit_code_of(main, "demo.py"))
