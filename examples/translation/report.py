"""Write RESULTS.md: results_frame.md with the numbers of the CSV. No number on that page is typed by hand.

python examples/translation/report.py [--results results] [--out RESULTS.md]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError, exit_code_of
from measure.findings import Cells, cpu_load, largest_batch, memory, speed
from measure.rows import OK, OUT_OF_MEMORY, Row, read_rows
from measure.spec import DEEPSPEED, PLAIN, ZERO

HERE = Path(__file__).resolve().parent
FRAME = HERE / "results_frame.md"
FIGURES = {
    "overview": "The largest model at a glance: memory and time.",
    "gpu_memory": "Peak GPU memory over batch size.",
    "cpu_utilisation": "Processor load over batch size.",
    "epoch_time": "Time of one epoch over batch size.",
    "two_gpus_memory": "Two GPUs: memory of each.",
    "two_gpus_time": "Two GPUs: time of one epoch.",
    "one_and_two_gpus": "One GPU and two.",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args(argv)
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
    cells = Cells(rows)
    if not cells.models():
        raise UserError("no model was measured both with and without the engine: there is nothing to compare.")
    learning = results / "learning.json"
    fillings = {
        "conditions": conditions(rows, results / "sweep.json"),
        "scaling": scaling(cells),
        "findings": "\n\n".join(finding(cells) for finding in (memory, largest_batch, cpu_load, speed)),
        "figures": figures(results / "figures", page_dir),
        "tables": "\n\n".join(table(cells, model) for model in cells.models()),
        "learning": learning_section(json.loads(learning.read_text(encoding="utf-8"))) if learning.is_file() else "",
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fillings.pop(match[1], match[0]), frame)
    if "{{" in page or fillings:
        raise UserError(f"{FRAME.name}: its places and what report.py fills do not agree: {sorted(fillings)}")
    return page


def conditions(rows: Sequence[Row], machine_file: Path) -> str:
    good = [row for row in rows if row.status == OK]
    devices = sorted({row.device for row in good})
    parts = [f"Device: {', '.join(devices)}", f"precision: {', '.join(sorted({row.precision for row in good}))}"]
    parts.append(f"pairs: {max(row.num_samples or 0 for row in good):,}")
    if machine_file.is_file():
        facts = json.loads(machine_file.read_text(encoding="utf-8"))["machines"][-1]
        parts.append(f"{facts['num_cores']:g} cores, {facts['host_memory_gib']:.0f} GiB of host memory")
        names = ("torch", "transformers", "accelerate", "deepspeed")
        parts.append(", ".join(f"{name} {facts[name]}" for name in names if facts.get(name)))
    return "; ".join(parts) + "."


def scaling(cells: Cells) -> str:
    rows = [row for row in cells.single if row.status == OK]
    if all(row.is_full_epoch for row in rows):
        return "Every epoch was trained to its end."
    steps = [row.measured_steps or 0 for row in rows]
    number = f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else f"{steps[0]}"
    return (
        f"A cell measures {number} steps after a warm-up, and the median step times the number of "
        "steps gives the epoch; batches of evenly spaced sizes stand for all of them."
    )


def table(cells: Cells, model: str) -> str:
    """One line a batch size; DeepSpeed's columns only where it was measured."""
    engines = [engine for engine in (PLAIN, ZERO, DEEPSPEED) if cells.of(model, engine)]
    names = {PLAIN: "Trainer", ZERO: "this engine", DEEPSPEED: "DeepSpeed"}
    heads = ["batch"]
    for what in ("GPU GiB", "epoch s", "CPU %"):
        heads += [f"{what}, {names[engine]}" for engine in engines]
    heads += ["memory ratio", "time ratio", "first loss, Trainer", "first loss, this engine"]
    lines = [f"### {model}, {_size(cells, model)}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for batch in cells.batches(model):
        found = {engine: cells.of(model, engine).get(batch) for engine in engines}
        values = [str(batch)]
        values += [_cell(found[engine], "gpu_allocated_gib", ".2f") for engine in engines]
        values += [_cell(found[engine], "epoch", ",.0f") for engine in engines]
        values += [_cell(found[engine], "cpu_percent_mean", ".1f") for engine in engines]
        values += [_ratio(cells, model, batch, "gpu_allocated_gib"), _ratio(cells, model, batch, "epoch")]
        # Of the warm-up: the same steps on the same batches, however many were measured after.
        values += [_cell(found[engine], "loss_warmup", ".3f") for engine in (PLAIN, ZERO)]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def _size(cells: Cells, model: str) -> str:
    return f"{next(iter(cells.of(model, PLAIN).values())).num_parameters or 0:,} parameters"


def _cell(row: Row | None, name: str, form: str) -> str:
    if row is None:
        return ""
    if row.status == OUT_OF_MEMORY:
        return "out of memory"
    value = getattr(row, name)
    return "" if value is None else f"{value:{form}}"


def _ratio(cells: Cells, model: str, batch: int, name: str) -> str:
    ratio = cells.ratio(model, batch, name)
    return "" if ratio is None else f"{ratio:.2f}"


def figures(folder: Path, page_dir: Path) -> str:
    found = [(name, text) for name, text in FIGURES.items() if (folder / f"{name}.png").is_file()]
    if not found:
        raise UserError(f"{folder}: no figures. Run figures.py first.")
    where = folder.resolve().relative_to(page_dir.resolve()).as_posix()
    return "\n\n".join(f"![{text}]({where}/{name}.png)\n\n{text}" for name, text in found)


def learning_section(learned: dict[str, Any]) -> str:
    """Loss, BLEU and translations of the runs, and how far the curves are apart."""
    runs = {run["engine"]: run for run in learned["runs"]}
    first = next(iter(runs.values()))
    names = {PLAIN: "Trainer alone", ZERO: "this engine, states offloaded", DEEPSPEED: "DeepSpeed"}
    lines = ["", "## Is it learned, and the same?", ""]
    lines.append(
        f"From random weights ({first['num_parameters'] / 1e6:.0f} M parameters), {first['num_train_pairs']:,} pairs, "
        f"batch {first['batch_size']}, {first['precision']}, the same seed, order and schedule. BLEU is sacrebleu's, "
        "of greedy translations, diacritics normalised to the comma below, on sentences that were not trained on."
    )
    sets = list(first["bleu"])
    lines += ["", "| | steps | loss | " + " | ".join(f"BLEU, {name}" for name in sets) + " |"]
    lines.append("|---" * (3 + len(sets)) + "|")
    for engine, run in runs.items():
        scores = [f"{run['bleu'][name][-1][1]:.1f}" for name in sets]
        lines.append(f"| {names[engine]} | {run['steps']:,} | {run['loss'][-1][1]:.3f} | " + " | ".join(scores) + " |")
    if PLAIN in runs and ZERO in runs:
        plain, ours = (dict(map(tuple, runs[engine]["loss"])) for engine in (PLAIN, ZERO))
        both = sorted(set(plain) & set(ours))
        gap = sum(abs(plain[step] - ours[step]) / plain[step] for step in both) / len(both)
        lines += ["", f"Over their {len(both)} common entries the two loss curves are {gap:.1%} apart on average."]
    lines += ["", "![Loss and BLEU over steps](results/figures/learning.png)", ""]
    for example in runs.get(ZERO, first)["examples"]:
        lines += [f"- {example['source']}", f"  - translated: {example['translation']}"]
        lines.append(f"  - reference: {example['reference']}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(exit_code_of(main, "report.py"))
