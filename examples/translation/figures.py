"""The figures, from the CSV alone::

    python examples/translation/figures.py [--csv results/sweep.csv] [--out results/figures]

gpu_memory, cpu_utilisation, epoch_time     the article's figures 4, 5, 6: over batch size, a panel a model
overview                                    memory and time of the largest model: the two numbers that matter
two_gpus_memory, two_gpus_time              its figures 7 and 8, once the CSV has rows with num_gpus 2
one_and_two_gpus                            its figure 9: time with one GPU and with two
saved                                       what the engine saves and costs, with one GPU and with two, as ratios

PNG and SVG. Colours are Okabe and Ito's, told apart by colour-blind readers, and every line has a marker of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError, exit_code_of, make_folder
from matplotlib.figure import Figure
from measure.panels import (
    BATCHES,
    FONT,
    HOLLOW,
    STYLES,
    Quantity,
    draw_panel,
    finish,
    gpus,
    legend,
    medians,
    plt,
    save,
    scales,
)
from measure.rows import OK, Row, read_rows, side_by_side
from measure.spec import PLAIN, ZERO

HERE = Path(__file__).resolve().parent
CSV = HERE / "results" / "sweep.csv"
FIGURES = HERE / "results" / "figures"
MODEL_ORDER = ("t5-demo", "t5-small", "t5-base", "t5-large")


MEMORY = Quantity("gpu_memory", "Peak GPU memory", "GPU memory allocated, GiB", lambda row: row.gpu_allocated_gib, 2)
CPU = Quantity(
    "cpu_utilisation", "Processor load", "CPU utilisation, % of all cores", lambda row: row.cpu_percent_mean, None
)
TIME = Quantity("epoch_time", "Time of one epoch", "seconds an epoch", lambda row: row.epoch, 10)
MEMORY_OF_BOTH = MEMORY._replace(
    name="two_gpus_memory",
    title="Peak GPU memory, both GPUs added up",
    label="GPU memory, sum of both, GiB",
    value=lambda row: row.gpu_allocated_sum_gib,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--out", type=Path, default=FIGURES)
    options = parser.parse_args(argv)
    if not options.csv.is_file():
        raise UserError(f"--csv {options.csv}: no such file. Measure first, with experiments.py.")
    rows = read_rows(options.csv)
    if not any(row.status == OK and not row.gpu_memory_limit_gib for row in rows):
        raise UserError(f"--csv {options.csv}: no cell in it that could be drawn. Measure first, or name another file.")
    make_folder(options.out, "--out")
    for path in draw_all(rows, options.out):
        print(path)


def draw_all(rows: Sequence[Row], out: Path) -> list[Path]:
    """Every figure for which there are rows. Rows of a limited GPU are left out: they show where it ends, no more."""
    rows = [row for row in rows if not row.gpu_memory_limit_gib]
    one, two = ([row for row in rows if row.num_gpus == number] for number in (1, 2))
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure | None] = {}
    with plt.rc_context(FONT):
        for quantity in (MEMORY, CPU, TIME):
            figures[quantity.name] = over_batch_size(one, quantity)
        figures["overview"] = overview(one)
        if two:
            figures["two_gpus_memory"] = over_batch_size(two, MEMORY_OF_BOTH)
            figures["two_gpus_time"] = over_batch_size(two, TIME)
            figures["one_and_two_gpus"] = one_and_two(one, two)
            figures["saved"] = saved(one, two)
        paths = [path for name, figure in figures.items() if figure is not None for path in save(figure, out / name)]
    plt.close("all")
    return paths


def _models(rows: Sequence[Row]) -> list[str]:
    found = {row.model for row in rows}
    return sorted(found, key=lambda name: (MODEL_ORDER.index(name) if name in MODEL_ORDER else 99, name))


def over_batch_size(rows: Sequence[Row], quantity: Quantity) -> Figure | None:
    """A panel a model, a line an engine; None if nothing was measured."""
    if not any(quantity.value(row) is not None for row in rows):
        return None
    models = _models(rows)
    figure, panels = _row_of_panels(len(models), height=4.4)
    for axes, model in zip(panels[0], models):
        mine = [row for row in rows if row.model == model]
        draw_panel(axes, mine, quantity, batches=[row.batch_size for row in rows])
        axes.set_title(f"{model}{_size(mine)}")
    finish(panels[0], quantity, [[row for row in rows if row.model == model] for model in models])
    panels[0][0].set_ylabel(quantity.label)
    figure.suptitle(f"{_title(quantity, rows)}, over batch size\n{_conditions(rows)}", fontsize=12)
    legend(figure, panels[0])
    return figure


def overview(rows: Sequence[Row]) -> Figure | None:
    """The largest model: how much less memory, at which cost of time."""
    models = _models([row for row in rows if row.status == OK and row.gpu_allocated_gib is not None])
    if not models:
        return None
    mine = [row for row in rows if row.model == models[-1]]
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.4), squeeze=False, layout="constrained")
    for axes, quantity in zip(panels[0], (MEMORY, TIME)):
        draw_panel(axes, mine, quantity)
        finish([axes], quantity, [mine])
        axes.set_title(_title(quantity, mine))
        axes.set_ylabel(quantity.label)
    figure.suptitle(f"{models[-1]}{_size(mine)}: {_conditions(mine)}", fontsize=12)
    legend(figure, panels[0])
    return figure


def one_and_two(one: Sequence[Row], two: Sequence[Row]) -> Figure:
    """Time of an epoch over the batch size of all GPUs together, one and two of them."""
    models = _models(two)
    figure, panels = _row_of_panels(len(models), height=4.8)
    batches = [row.batch_size * row.num_gpus for row in [*one, *two]]
    for axes, model in zip(panels[0], models):
        for number, rows in ((1, one), (2, two)):
            mine = [row for row in rows if row.model == model and row.engine in (PLAIN, ZERO)]
            draw_panel(axes, mine, TIME, num_gpus=number, batches=batches)
        axes.set_title(f"{model}{_size([row for row in two if row.model == model])}")
        axes.set_xlabel("batch size of a step, all GPUs together")
    finish(panels[0], TIME)
    panels[0][0].set_ylabel(TIME.label)
    both = [*one, *two]
    figure.suptitle(f"{_title(TIME, both)}, one GPU and two\n{_conditions(both)}", fontsize=12)
    legend(figure, panels[0])
    return figure


def saved(one: Sequence[Row], two: Sequence[Row]) -> Figure | None:
    """This engine over the Trainer alone, memory above and time below: what is under the line at 1 is less."""
    models = [model for model in _models(two) if _ratios([row for row in two if row.model == model], TIME)]
    if not models:
        return None
    figure, panels = plt.subplots(
        2,
        len(models),
        figsize=(max(7.5, 5.2 * len(models)), 7.2),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    style = STYLES[ZERO]
    for line, (quantity, label) in enumerate(((MEMORY_OF_BOTH, "GPU memory"), (TIME, "time"))):
        ratio = quantity._replace(log_base=None)
        panels[line][0].set_ylabel(f"{label}, ratio")
        for axes, model in zip(panels[line], models):
            for number, rows in ((1, one), (2, two)):
                points = _ratios([row for row in rows if row.model == model], quantity)
                if not points:
                    continue
                look: dict[str, Any] = HOLLOW if number == 2 else {}
                axes.plot(
                    *zip(*points),
                    color=style.colour,
                    marker=style.marker,
                    markersize=7,
                    linewidth=2,
                    linestyle="-" if number == 1 else ":",
                    label=gpus(number),
                    **look,
                )
            scales(axes, ratio, BATCHES)
            axes.axhline(1.0, color="#555555", linewidth=1.5)
            axes.set_title(model if line == 0 else "")
            axes.set_xlabel("batch size per GPU" if line == 1 else "")
        finish(panels[line], ratio)
    figure.suptitle(
        f"This engine over the Trainer alone: below 1 is less memory, or faster\n{_conditions([*one, *two])}",
        fontsize=12,
    )
    legend(figure, panels[0])
    return figure


def _ratios(rows: Sequence[Row], quantity: Quantity) -> list[tuple[int, float]]:
    """(batch size per GPU, this engine over the Trainer alone) where both were measured."""
    plain, ours = (dict(medians([row for row in rows if row.engine == engine], quantity)) for engine in (PLAIN, ZERO))
    return [(batch, value / plain[batch]) for batch, value in ours.items() if batch in plain]


def _row_of_panels(number: int, *, height: float) -> tuple[Figure, Any]:
    """Panels side by side with the same axes: where one has fewer cells than another, that is seen."""
    size = max(7.5, 5.2 * number), height
    return plt.subplots(1, number, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")


def _title(quantity: Quantity, rows: Sequence[Row]) -> str:
    """The quantity's own; of times that were not measured whole, how much of them was."""
    steps = [row.measured_steps or 0 for row in rows if row.status == OK and not row.is_full_epoch]
    if quantity.name != TIME.name or not steps:
        return quantity.title
    number = f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else str(steps[0])
    return f"{quantity.title}, scaled from {number} steps"


def _size(rows: Sequence[Row]) -> str:
    numbers = [row.num_parameters for row in rows if row.num_parameters]
    return f", {numbers[0] / 1e6:.0f} M parameters" if numbers else ""


def _conditions(rows: Sequence[Row]) -> str:
    """What every figure must say about its origin, from the rows themselves."""
    good = [row for row in rows if row.status == OK]
    devices: dict[str, list[int]] = {}
    for number, device in sorted({(row.num_gpus, row.device) for row in good}):
        devices.setdefault(device, []).append(number)
    parts = []
    for device, numbers in devices.items():
        counts = " and ".join(map(str, numbers))
        name = "no GPU" if device == "cpu" else device
        parts.append(name if numbers == [1] else f"{counts} x {device}")
    parts += sorted({row.precision for row in good if row.precision})
    parts += [f"{number:,} sentence pairs" for number in sorted({row.num_samples for row in good if row.num_samples})]
    text = ", ".join(parts)
    together = max((row.num_side_by_side for row in good), default=1)
    return text if together == 1 else f"{text}\n{side_by_side(together)}"


if __name__ == "__main__":
    sys.exit(exit_code_of(main, "figures.py"))
