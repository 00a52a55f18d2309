"""Write RESULTS.md: results_frame.md with the numbers of the CSV. No number on that page is typed by hand.

python examples/translation/report.py [--results results] [--out RESULTS.md]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, exit_code_of, make_folder, read_json
from measure.alike import SHARED
from measure.findings import Cells, cpu_load, largest_batch, memory, speed
from measure.findings_two import two_gpu_findings
from measure.learned import learning_section
from measure.rows import OK, OUT_OF_MEMORY, Row, read_rows, side_by_side
from measure.spec import CONFIG, DATA_PARALLEL, DEEPSPEED, PLAIN, ZERO

HERE = Path(__file__).resolve().parent
FRAME = HERE / "results_frame.md"
FIGURES = {
    "overview": "The largest model at a glance: memory and time.",
    "gpu_memory": "Peak GPU memory over batch size (the article's figure 4).",
    "cpu_utilisation": "Processor load over batch size (figure 5).",
    "epoch_time": "Time of one epoch over batch size (figure 6).",
    "two_gpus_memory": "Two GPUs: memory of both, added up (figure 7).",
    "two_gpus_time": "Two GPUs: time of one epoch (figure 8).",
    "one_and_two_gpus": "One GPU and two: time of one epoch over the batch size of a whole step (figure 9).",
    "saved": "This engine over the Trainer alone, with one GPU and with two.",
}
WORDS = {1: "One", 2: "Two"}
NAMES = {PLAIN: "Trainer", DATA_PARALLEL: "Trainer, DataParallel", ZERO: "this engine", DEEPSPEED: "DeepSpeed"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args(argv)
    make_folder(options.out.parent, "--out, folder")
    csv = options.results / "sweep.csv"
    if not csv.is_file():
        raise UserError(f"{csv}: nothing was measured yet. Run experiments.py first; this page is made of its numbers.")
    page = write_page(read_rows(csv), options.results, FRAME.read_text(encoding="utf-8"), options.out.parent)
    options.out.write_text(page, encoding="utf-8")
    print(options.out)


def write_page(rows: Sequence[Row], results: Path, frame: str, page_dir: Path) -> str:
    """The frame, filled.

    Raises:
        UserError: the rows cannot carry a comparison, or a place of the frame has no filling.
    """
    cells, two = Cells(rows), Cells(rows, num_gpus=2)
    if not cells.models():
        raise UserError("no model was measured both with and without the engine: there is nothing to compare.")
    learning = results / "learning.json"
    where = link(results, page_dir)
    fillings = {
        "results": where,
        "config": link(CONFIG, page_dir),
        "benchmarks": link(HERE.parent.parent / "benchmarks" / "README.md", page_dir),
        "conditions": conditions(rows, results / "sweep.json"),
        "scaling": scaling(rows),
        "findings": "\n\n".join(finding(cells) for finding in (memory, largest_batch, cpu_load, speed)),
        "two_gpus": "\n\n".join(two_gpu_findings(cells, two)),
        "figures": figures(results / "figures", page_dir),
        "tables": "\n\n".join(table(some, model) for some in (cells, two) for model in some.models()),
        "learning": learning_section(read_json(learning), f"{where}/figures") if learning.is_file() else "",
    }
    places = set(re.findall(r"\{\{(\w+)\}\}", frame))
    if places != set(fillings):
        wrong = ", ".join(sorted(places ^ set(fillings)))
        raise UserError(f"{FRAME.name}: its places and what report.py fills do not agree: {wrong}.")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fillings[match[1]], frame)


def conditions(rows: Sequence[Row], machine_file: Path) -> str:
    """A list: device, host, versions, what was trained, what ran at the same time."""
    good = [row for row in rows if row.status == OK]
    lines = []
    for number in sorted({row.num_gpus for row in good}):
        mine = [row for row in good if row.num_gpus == number]
        devices = " or ".join(sorted({row.device for row in mine}))
        cores = " or ".join(sorted({f"{row.num_cores:g}" for row in mine if row.num_cores}))
        if devices == "cpu":
            lines.append(f"No GPU: {number} process{'es' if number > 1 else ''} on a processor of {cores or '?'} cores")
            continue
        lines.append(
            f"{WORDS.get(number, number)} GPU{'s' if number > 1 else ''}: {devices}, with {cores or '?'} host cores"
        )
    shares_processes = True
    if machine_file.is_file():
        known = read_json(machine_file)
        facts, shares_processes = known["machines"][-1], known.get(SHARED, True)
        names = ("torch", "transformers", "accelerate", "deepspeed")
        # Under this engine "deepspeed" is its own stand-in, whose version says so.
        versions = {name: facts[name] for name in names if facts.get(name) and "+hfzero" not in facts[name]}
        lines.append(", ".join(f"{name} {number}" for name, number in versions.items()))
        lines[-1] += f"; {facts['host_memory_gib']:.0f} GiB of host memory"
    precisions, num_pairs = sorted({row.precision for row in good}), max(row.num_samples or 0 for row in good)
    lines.append(f"{', '.join(precisions)}, {num_pairs:,} pairs")
    lines.append(
        "The batch sizes of one model and engine were measured one after the other in one process, which gives the "
        "device's memory back between them"
        if shares_processes
        else "Each cell was measured in a process of its own"
    )
    together = max(row.num_side_by_side for row in good)
    if together > 1:
        text = side_by_side(together)
        lines.append(f"{text[0].upper()}{text[1:]}; the engines of a model in turn on the same GPU")
    if any(row.num_gpus > 1 for row in good):
        lines.append(
            "With two GPUs there is a process a GPU, as under torchrun. The Trainer alone wraps the model in "
            "DistributedDataParallel then; the engine shards over both. Batch sizes are per GPU"
        )
    lines += not_measured(rows)
    return "\n".join(f"- {line}." for line in lines)


def not_measured(rows: Sequence[Row]) -> list[str]:
    """What is missing to a whole sweep of the models, engines and batch sizes that were begun."""
    names = {PLAIN: "the Trainer alone", ZERO: "this engine"}
    missing = []
    for number in sorted({row.num_gpus for row in rows}):
        batches = sorted({row.batch_size for row in rows if row.num_gpus == number})
        for model in dict.fromkeys(row.model for row in rows):
            for engine, name in names.items():
                done = {
                    row.batch_size for row in rows if (row.num_gpus, row.model, row.engine) == (number, model, engine)
                }
                left = [str(batch) for batch in batches if batch not in done]
                which = "at any batch size" if not done else f"at batch {', '.join(left)}"
                if left:
                    missing.append(f"{model} with {name} on {number} GPU{'s' if number > 1 else ''} {which}")
    return [f"Not measured yet: {'; '.join(missing)}"] if missing else []


def scaling(rows: Sequence[Row]) -> str:
    good = [row for row in rows if row.status == OK and not row.gpu_memory_limit_gib]
    if all(row.is_full_epoch for row in good):
        return "Every epoch was trained to its end."
    steps = [row.measured_steps or 0 for row in good]
    number = f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else f"{steps[0]}"
    return (
        f"A cell measures {number} steps after a warm-up, and the median step times the number of steps gives the "
        "epoch (marked ~ in the tables); batches of evenly spaced sizes stand for all of them."
    )


def table(cells: Cells, model: str) -> str:
    """One line a batch size; columns of other engines than the two only where they were measured."""
    engines = [engine for engine in NAMES if cells.of(model, engine)]
    heads, memory_name = ["batch"], "gpu_allocated_sum_gib"
    for what in ("GPU GiB", "epoch s", "CPU %"):
        heads += [f"{what}, {NAMES[engine]}" for engine in engines]
    heads += ["memory ratio", "time ratio", "first loss, Trainer", "first loss, this engine"]
    gpus = "" if cells.num_gpus == 1 else f", {cells.num_gpus} GPUs: batch per GPU, memory of all together"
    lines = [
        f"### {model}, {_size(cells, model)}{gpus}",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    for batch in cells.batches(model):
        found = {engine: cells.of(model, engine).get(batch) for engine in engines}
        values = [str(batch)]
        values += [_cell(found[engine], memory_name, ".2f") for engine in engines]
        values += [_cell(found[engine], "epoch", ",.0f") for engine in engines]
        values += [_cell(found[engine], "cpu_percent_mean", ".1f") for engine in engines]
        values += [_ratio(cells, model, batch, memory_name), _ratio(cells, model, batch, "epoch")]
        # Of the warm-up: the same steps on the same batches, however many were measured after.
        values += [_cell(found[engine], "loss_warmup", ".3f") for engine in (PLAIN, ZERO)]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def _size(cells: Cells, model: str) -> str:
    numbers = [row.num_parameters for row in cells.of(model, PLAIN).values() if row.num_parameters]
    return f"{numbers[0]:,} parameters" if numbers else "size unknown"


def _cell(row: Row | None, name: str, form: str) -> str:
    if row is None:
        return ""
    if row.status == OUT_OF_MEMORY:
        return "out of memory" if name.startswith("gpu") else "-"
    value = getattr(row, name)
    form = ",.1f" if name == "epoch" and value is not None and value < 20 else form
    scaled = "~" if name == "epoch" and not row.is_full_epoch else ""
    return "" if value is None else f"{scaled}{value:{form}}"


def _ratio(cells: Cells, model: str, batch: int, name: str) -> str:
    ratio = cells.ratio(model, batch, name)
    return "" if ratio is None else f"{ratio:.2f}"


def figures(folder: Path, page_dir: Path) -> str:
    found = [(name, text) for name, text in FIGURES.items() if (folder / f"{name}.png").is_file()]
    if not found:
        csv = folder.parent / "sweep.csv"
        raise UserError(f"{folder}: no figures. Run figures.py --csv {csv} --out {folder} first.")
    where = link(folder, page_dir)
    return "\n\n".join(f"![{text}]({where}/{name}.png)\n\n{text}" for name, text in found)


def link(path: Path, page_dir: Path) -> str:
    """``path`` as the page names it."""
    return Path(os.path.relpath(path.resolve(), page_dir.resolve())).as_posix()


if __name__ == "__main__":
    sys.exit(exit_code_of(main, "report.py"))
