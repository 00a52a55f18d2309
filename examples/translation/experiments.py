"""The sweep: GPU memory, processor load and time over batch size, with and without ZeRO-2 and optimizer offload.

T5 of true size with random weights (memory and time do not depend on their values), English to Romanian, 128 tokens,
fp16, one epoch of up to 10,000 pairs, batch 1 to 256, each cell in a process of its own, or in one a GPU::

    python examples/translation/experiments.py                                 # the text that this example ships
    python examples/translation/experiments.py --data DIR --tokenizer DIR      # DIR/wmt16_en_ro/train.json; T5's own
    python examples/translation/figures.py                                     # figures from the CSV
    python examples/translation/report.py                                      # RESULTS.md from the CSV

The first writes to out/sweep and says how to draw what it measured; with ``--data`` the default is results/, whose
figures and page the last two write. Without a GPU there is no GPU memory, and T5 takes seconds to minutes a step; a
look at everything in three minutes: ``--models t5-demo --batches 1,4,16``.

A cell measures as many steps as fit ``--cell-seconds`` and scales to the epoch (columns measured_steps, epoch_steps,
epoch_seconds_scaled); ``--full`` trains whole epochs. Running out of memory is a result. Interrupted or run again, the
sweep goes on where it was: cells in the CSV are not measured twice.

One GPU, 36 cells: each starts for 15 to 20 s and trains for 6 to 10 s, so a quarter of an hour. With ``--group`` the
batch sizes of one model and engine share a process, which gives the device's memory back between them: four starts in
place of 36, five to seven minutes::

    python examples/translation/experiments.py --data DATA --tokenizer DATA/tokenizer_t5 --cell-seconds 4 --group

Two GPUs, grouped: the 36 cells of one GPU side by side, t5-small on the first and t5-base on the second with half of
the cores each (2 starts and 18 cells: about 3 minutes), then 36 cells on both together, one after the other (4 starts
and 36 cells: 5 to 6 minutes). ``--max-minutes`` bounds a call; what is missing then, a second call of the same line
measures::

    python examples/translation/experiments.py --data DATA --tokenizer DATA/tokenizer_t5 --num-gpus 1,2 --gpus 0,1 \\
        --cell-seconds 3 --max-minutes 9.4 --group

The plain Trainer on two GPUs is one process a GPU with DistributedDataParallel (as torchrun starts it), the engine has
one process a GPU too. Without a launcher the Trainer takes DataParallel instead: ``--engines data_parallel``.

A smaller GPU, enforced (a process may allocate no more than this), to see where each engine runs out::

    python examples/translation/experiments.py ... --models t5-base --gpu-memory-gib 16 --cell-seconds 2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from errors import UserError, exit_code_of, make_folder, read_json
from measure.alike import SHARED, check_device, check_settings, settings_of
from measure.child import SETUP, Events, run_process
from measure.limit import TimeLimit
from measure.options import (
    check_engines,
    check_models,
    check_tokenizer,
    length,
    names_of,
    numbers_of,
    positive,
    positive_float,
    steps_or_auto,
)
from measure.plan import Wanted, keys_of, lanes, plan
from measure.progress import Progress
from measure.rows import SETTLED, Key, Row, read_rows, write_rows
from measure.spec import ENGINES, PLAIN, ZERO, Spec
from presets import PRESETS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CSV_NAME, MACHINE_NAME = "sweep.csv", "sweep.json"
BATCHES = [2**power for power in range(9)]
NO_GPU = (
    "No GPU here: cells train in fp32 on the processor and have no GPU memory. T5 of true size takes seconds to "
    "minutes a step; for a quick look stop this and add --models t5-demo --batches 1,4,16"
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    train_file, tokenizer = find_text(options)
    template = Spec(
        model="",
        engine="",
        batches=[],
        train_file=str(train_file),
        tokenizer=str(tokenizer),
        num_samples=options.samples,
        max_length=options.max_length,
        steps=options.steps,
        full=options.full,
        cell_seconds=options.cell_seconds,
        precision=options.precision,
        gpu_memory_limit_gib=options.gpu_memory_gib,
        seed=options.seed,
    )
    wanted = Wanted(options.models, options.engines, options.batches, options.rounds)
    Sweep(options.out, template, wanted, options).run()


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder of sweep.csv and sweep.json; default: out/sweep, with --data results/")
    add("--data", type=Path, help="folder with wmt16_en_ro/train.json (JSON lines), or such a file")
    add("--tokenizer", type=Path, help="folder of T5's tokenizer")
    add("--models", type=names_of, default=["t5-small", "t5-base"], help=f"of {', '.join(PRESETS)}")
    add("--engines", type=names_of, default=[PLAIN, ZERO], help=f"of {', '.join(ENGINES)}")
    add("--batches", type=numbers_of, default=BATCHES, help="batch sizes per GPU")
    add("--samples", type=positive, default=10_000, help="pairs of an epoch, at most")
    add("--max-length", type=length, default=128, help="tokens to which both sides are cut")
    add("--precision", choices=["fp16", "bf16", "fp32"], default="fp16", help="on a GPU; a CPU trains in fp32")
    add("--steps", type=steps_or_auto, default=None, help="steps to measure in a cell, or auto: as --cell-seconds says")
    add("--cell-seconds", type=positive_float, default=8.0, help="about how long a cell trains with --steps auto")
    add("--full", action="store_true", help="whole epochs: measured, not scaled; hours")
    add("--group", action="store_true", help="one process for all batch sizes of a model and engine: 15 s less each")
    add("--rounds", type=positive, default=1, help="repeat the whole sweep, engines in turn; figures show medians")
    add("--num-gpus", type=numbers_of, default=[1], help="GPUs that train together; 1,2 measures one, then both")
    add("--gpus", type=names_of, default=[], help="which ones; with --num-gpus 1, models share them side by side")
    add("--gpu-memory-gib", type=positive_float, default=0.0, help="let a process allocate no more than this")
    add("--max-minutes", type=positive_float, help="stop then; the cell being measured is left for the next run")
    add("--retry", action="store_true", help="measure cells again that failed before")
    add("--mix-devices", action="store_true", help="go on in a CSV that was begun on another device")
    add("--seed", type=int, default=42)
    options = parser.parse_args(argv)
    check_engines(options.engines, ENGINES)
    check_models(options.models, "--models")
    if options.gpus and len(options.gpus) < max(options.num_gpus):
        raise UserError(f"--num-gpus {max(options.num_gpus)}: --gpus names only {len(options.gpus)}.")
    if options.data is not None and options.tokenizer is None:
        raise UserError("--data needs --tokenizer: the folder of a tokenizer that knows this text, such as T5's.")
    options.out = options.out or default_out(options, "sweep")
    return options


def default_out(options: argparse.Namespace, name: str) -> Path:
    """The committed results for real text; a trial with the text of this example must not write into them."""
    return RESULTS if options.data is not None else HERE.parents[1] / "out" / name


def find_text(options: argparse.Namespace) -> tuple[Path, Path]:
    """The training file and the tokenizer's folder: the user's, or made from the corpus that this example ships.

    Raises:
        UserError: there is no such file, or no tokenizer.
    """
    if options.tokenizer is not None:
        check_tokenizer(options.tokenizer)
    if options.data is not None:
        train_file = options.data if options.data.is_file() else options.data / "wmt16_en_ro" / "train.json"
        if not train_file.is_file():
            raise UserError(
                f"{options.data}: no file, and no folder that holds {train_file.relative_to(options.data)} "
                f"(looked from {Path.cwd()})."
            )
        return train_file.resolve(), options.tokenizer.resolve()
    folder = HERE.parents[1] / "out" / "sweep_text"
    if not (folder / "done").is_file():
        from corpus.build import build_corpus, write_corpus
        from corpus.tokenizer import save_tokenizer

        corpus = build_corpus()
        write_corpus(corpus, folder)
        save_tokenizer([text for pair in corpus.train for text in pair], folder / "tokenizer")
        (folder / "done").touch()
    return folder / "train.json", (options.tokenizer or folder / "tokenizer").resolve()


class Sweep:
    """Runs what is missing in the CSV and keeps the CSV up to date after every cell."""

    def __init__(self, out: Path, template: Spec, wanted: Wanted, options: argparse.Namespace) -> None:
        self.out, self.wanted, self.options = out, wanted, options
        self.templates = [dataclasses.replace(template, num_gpus=number) for number in options.num_gpus]
        make_folder(out, "--out")
        self.csv, self.machine_file = out / CSV_NAME, out / MACHINE_NAME
        rows = read_rows(self.csv) if self.csv.is_file() else []
        self.known: dict[str, Any] = {"machines": [], SHARED: bool(rows)}
        """What sweep.json holds: machines, and the settings of all cells."""
        if self.machine_file.is_file():
            self.known |= read_json(self.machine_file)
        self.known[SHARED] |= options.group
        check_settings(self.csv, rows, self.known, self.templates[0])
        self.rows = {row.key: row for row in rows}
        self.progress = Progress(self.rows)
        self.started = time.monotonic()
        self.limit = TimeLimit(options.max_minutes)
        self._lock = threading.Lock()
        """Lanes report from threads of their own."""
        self.events = Events(self._cell_started, self._finished, self._machine)

    def run(self) -> None:
        # A cell that failed in an earlier run waits for --retry; one that fails in this run is tried once more, alone.
        before = {key for key, row in self.rows.items() if row.status in SETTLED or not self.options.retry}
        is_interrupted = False
        if not self._plan(before, grouped=True):
            devices = ", ".join(sorted({row.device for row in self.rows.values() if row.device})) or "no device"
            print(
                f"Nothing to measure: every cell asked for is in {self.csv}, from {devices}. For others: --out FOLDER"
            )
        try:
            with self.progress:
                self._run_all(self._plan(before, grouped=self.options.group))
                tried = before | {key for key, row in self.rows.items() if row.status in SETTLED}
                failed = {key for key in set(self.rows) - tried if not self.rows[key].error.startswith(SETUP)}
                self._run_all([s for s in self._plan(tried, grouped=False) if failed.intersection(keys_of(s))])
        except KeyboardInterrupt:
            is_interrupted = True
        missing = self._plan(set(self.rows), grouped=False)
        wanted = {key for spec in self._plan((), grouped=True) for key in keys_of(spec)}
        num_failed = sum(row.status not in SETTLED for key, row in self.rows.items() if key in wanted)
        note = f"; {num_failed} failed, see --retry" if num_failed else ""
        note += f"; {len(missing)} cells missing, run again to go on" if missing else ""
        print(f"{len(self.rows)} cells in {self.csv}, {time.monotonic() - self.started:.0f} s{note}", flush=True)
        self._say_what_next()
        if is_interrupted:
            sys.exit(130)
        if num_failed:
            sys.exit(1)

    def _say_what_next(self) -> None:
        example = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
        where = (
            f" --csv {self.csv} --out {self.out / 'figures'}",
            f" --results {self.out} --out {self.out / 'RESULTS.md'}",
        )
        figures, report = ("", "") if self.out == RESULTS else where
        print(f"Figures: python {example / 'figures.py'}{figures}")
        print(f"Page:    python {example / 'report.py'}{report}", flush=True)

    def _plan(self, done: Collection[Key], *, grouped: bool) -> list[Spec]:
        return [spec for template in self.templates for spec in plan(self.wanted, template, done, grouped=grouped)]

    def _run_all(self, specs: list[Spec]) -> None:
        """Cells of one GPU side by side where there are several; then those of several GPUs."""
        for template in self.templates:
            mine = [spec for spec in specs if spec.num_gpus == template.num_gpus]
            shares = lanes(mine, self.options.gpus)
            # Cores are shared out even to a lane that ends early: the load of a cell must not depend on when it ran.
            cores = share_cores(sorted(os.sched_getaffinity(0)), len(shares))
            with ThreadPoolExecutor(len(shares)) as pool:
                futures = [pool.submit(self._run_lane, *pair) for pair in zip(shares, cores)]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    self.limit.stop()  # and the pool waits until the lanes have ended their processes
                    raise

    def _run_lane(self, specs: list[Spec], cores: list[int]) -> None:
        os.sched_setaffinity(0, cores)  # of this thread, so of the processes that it starts
        for spec in specs:
            waiting = spec.batches
            while waiting and self.limit.has_time_to_start():
                waiting = run_process(dataclasses.replace(spec, batches=waiting), self.events, self.limit)

    def _cell_started(self, spec: Spec, batch_size: int) -> None:
        with self._lock:
            self.progress.cell_started(spec, batch_size)

    def _finished(self, row: Row) -> None:
        with self._lock:
            self.rows[row.key] = row
            write_rows(self.csv, sorted(self.rows.values(), key=self._place))
            self.progress.cell_finished(row)

    def _place(self, row: Row) -> tuple[Any, ...]:
        """Where a row stands in the CSV: the same whichever lane was faster."""
        model = self.wanted.models.index(row.model) if row.model in self.wanted.models else len(self.wanted.models)
        engine = ENGINES.index(row.engine) if row.engine in ENGINES else len(ENGINES)
        return row.round, row.num_gpus, row.gpu_memory_limit_gib, model, row.model, engine, row.batch_size

    def _machine(self, facts: dict[str, Any]) -> None:
        with self._lock:
            if not self.options.mix_devices:
                check_device(self.csv, self.rows.values(), facts)
            if not facts["num_visible_gpus"]:
                self.progress.say_once(NO_GPU)
            if facts not in self.known["machines"]:
                self.known["machines"].append(facts)
            self.known |= settings_of(self.templates[0])
            draft = self.machine_file.with_suffix(".new")
            draft.write_text(json.dumps(self.known, indent=2) + "\n", encoding="utf-8")
            os.replace(draft, self.machine_file)


def share_cores(cores: list[int], num_shares: int) -> list[list[int]]:
    """Neighbours stay together: on a machine of several sockets the first half is one of them."""
    each = max(1, len(cores) // max(1, num_shares))
    return [cores[number * each : (number + 1) * each] or cores for number in range(num_shares)]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # measuring processes have sessions of their own: end them, then go
    sys.exit(exit_code_of(main, "experiments.py"))
