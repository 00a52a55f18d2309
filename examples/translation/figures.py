"""The figures, from the CSV alone::

    python examples/translation/figures.py [--csv results/sweep.csv] [--out results/figures]

gpu_memory, cpu_utilisation, epoch_time     over batch size, a panel a model, a line an engine
overview                                    memory and time of the largest model: the two numbers that matter
two_gpus_memory, two_gpus_time              the same with two GPUs, once the CSV has rows with num_gpus 2
one_and_two_gpus                            time with one and with two GPUs

PNG and SVG. Colours are Okabe and Ito's, told apart by colour-blind readers, and every line has a marker of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from errors import UserError, exit_code_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measure.rows import OK, OUT_OF_MEMORY, Row, read_rows

HERE = Path(__file__).resolve().parent
CSV = HERE / "results" / "sweep.csv"
FIGURES = HERE / "results" / "figures"


class Style(NamedTuple):
    label: str
    colour: str
    marker: str
    line: str


STYLES = {
    "plain": Style("Trainer alone", "#D55E00", "o", "-"),
    "zero2_offload": Style("ZeRO-2 + offload (this engine)", "#0072B2", "s", "-"),
    "deepspeed": Style("ZeRO-2 + offload (DeepSpeed)", "#009E73", "^", "--"),
}
MODEL_ORDER = ("t5-demo", "t5-small", "t5-base", "t5-large")
FONT = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False}


class Quantity(NamedTuple):
    """What a figure shows over batch size."""

    name: str
    title: str
    label: str
    value: Callable[[Row], float | None]
    log_base: int | None


MEMORY = Quantity("gpu_memory", "Peak GPU memory", "GPU memory allocated, GiB", lambda row: row.gpu_allocated_gib, 2)
CPU = Quantity(
    "cpu_utilisation", "Processor load", "CPU utilisation, % of all cores", lambda row: row.cpu_percent_mean, None
)
TIME = Quantity("epoch_time", "Time of one epoch", "seconds", lambda row: row.epoch, 10)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--out", type=Path, default=FIGURES)
    options = parser.parse_args(argv)
    if not options.csv.is_file():
        raise UserError(f"--csv {options.csv}: no such file. Measure first: python {HERE.name}/experiments.py")
    for path in draw_all(read_rows(options.csv), options.out):
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
            figures["two_gpus_memory"] = over_batch_size(two, MEMORY, note="two GPUs, each")
            figures["two_gpus_time"] = over_batch_size(two, TIME, note="two GPUs")
            figures["one_and_two_gpus"] = one_and_two(one, two)
        paths = [path for name, figure in figures.items() if figure is not None for path in save(figure, out / name)]
    plt.close("all")
    return paths


def save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=150)
    # Without a date, and with names that do not change, the same CSV gives the same file.
    with plt.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _models(rows: Sequence[Row]) -> list[str]:
    found = {row.model for row in rows}
    return sorted(found, key=lambda name: (MODEL_ORDER.index(name) if name in MODEL_ORDER else 99, name))


def over_batch_size(rows: Sequence[Row], quantity: Quantity, note: str = "") -> Figure | None:
    """A panel a model, a line an engine; None if nothing was measured."""
    if not any(quantity.value(row) is not None for row in rows):
        return None
    models = _models(rows)
    figure, panels = plt.subplots(
        1, len(models), figsize=(5.2 * len(models), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, model in zip(panels[0], models):
        mine = [row for row in rows if row.model == model]
        _panel(axes, mine, quantity)
        axes.set_title(f"{model}{_size(mine)}")
    panels[0][0].set_ylabel(quantity.label)
    subject = f"{quantity.title} ({note})" if note else quantity.title
    figure.suptitle(f"{subject} over batch size\n{_conditions(rows)}", fontsize=12)
    _legend(figure, panels[0])
    return figure


def overview(rows: Sequence[Row]) -> Figure | None:
    """The largest model: how much less memory, at which cost of time."""
    models = _models([row for row in rows if row.status == OK and row.gpu_allocated_gib is not None])
    if not models:
        return None
    mine = [row for row in rows if row.model == models[-1]]
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.4), squeeze=False, layout="constrained")
    for axes, quantity in zip(panels[0], (MEMORY, TIME)):
        _panel(axes, mine, quantity)
        axes.set_title(quantity.title)
        axes.set_ylabel(quantity.label)
    figure.suptitle(f"{models[-1]}{_size(mine)}: {_conditions(mine)}", fontsize=12)
    _legend(figure, panels[0])
    return figure


def one_and_two(one: Sequence[Row], two: Sequence[Row]) -> Figure:
    """Time of an epoch over the batch size of all GPUs together, one and two of them."""
    models = _models(two)
    figure, panels = plt.subplots(
        1, len(models), figsize=(5.2 * len(models), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, model in zip(panels[0], models):
        for number, rows, line in ((1, one, "-"), (2, two, ":")):
            mine = [row for row in rows if row.model == model]
            _panel(axes, mine, TIME, scale=number, line=line, suffix=f", {number} GPU{'s' if number > 1 else ''}")
        axes.set_title(model)
        axes.set_xlabel("batch size, all GPUs together")
    panels[0][0].set_ylabel(TIME.label)
    figure.suptitle(f"Time of one epoch with one GPU and with two\n{_conditions(two)}", fontsize=12)
    _legend(figure, panels[0])
    return figure


def _panel(
    axes: Axes, rows: Sequence[Row], quantity: Quantity, *, scale: int = 1, line: str | None = None, suffix: str = ""
) -> None:
    failed: list[tuple[int, str]] = []
    for engine, style in STYLES.items():
        mine = [row for row in rows if row.engine == engine]
        points = _medians(mine, quantity)
        if points:
            axes.plot(
                [batch * scale for batch, _ in points],
                [value for _, value in points],
                color=style.colour,
                marker=style.marker if scale == 1 else {"o": "P", "s": "D", "^": "v"}[style.marker],
                linestyle=line or style.line,
                linewidth=2,
                markersize=7,
                label=style.label + suffix,
            )
        measured = {batch for batch, _ in points}
        lost = {row.batch_size for row in mine if row.status == OUT_OF_MEMORY} - measured
        failed.extend((batch * scale, engine) for batch in sorted(lost))
    _scales(axes, quantity, [row.batch_size * scale for row in rows])
    _mark_out_of_memory(axes, failed)


def _medians(rows: Sequence[Row], quantity: Quantity) -> list[tuple[int, float]]:
    """(batch size, median over the rounds), in order of batch size."""
    values: dict[int, list[float]] = {}
    for row in rows:
        value = quantity.value(row)
        if row.status == OK and value is not None:
            values.setdefault(row.batch_size, []).append(value)
    return [(batch, statistics.median(found)) for batch, found in sorted(values.items())]


def _mark_out_of_memory(axes: Axes, failed: Sequence[tuple[int, str]]) -> None:
    """A cross above the panel's lines for every cell that ran out of memory, in its engine's colour."""
    heights = {engine: 0.97 - 0.06 * place for place, engine in enumerate(STYLES)}
    for batch, engine in failed:
        axes.plot(
            [batch],
            [heights[engine]],
            transform=axes.get_xaxis_transform(),
            color=STYLES[engine].colour,
            marker="x",
            markersize=10,
            markeredgewidth=2.5,
            linestyle="none",
            label="out of memory",
        )
    if failed:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.12 if axes.get_yscale() == "log" else high + 0.12 * (high - low))


def _scales(axes: Axes, quantity: Quantity, batches: Sequence[int]) -> None:
    already = {float(x) for line in axes.get_lines() for x in line.get_xdata()}
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({*map(float, batches), *already}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("batch size")
    if quantity.log_base is not None:
        axes.set_yscale("log", base=quantity.log_base)
        axes.yaxis.set_major_locator(
            LogLocator(quantity.log_base, subs=(1.0, 2.0, 5.0) if quantity.log_base == 10 else (1.0,), numticks=20)
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below all panels: nothing to overlap with. Out-of-memory crosses share one grey entry."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if "out of memory" in entries:
        entries["out of memory"] = plt.Line2D(
            [], [], color="#555555", marker="x", markersize=9, markeredgewidth=2.5, linestyle="none"
        )
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=3 if len(entries) <= 3 else 2, frameon=False
    )


def _size(rows: Sequence[Row]) -> str:
    numbers = [row.num_parameters for row in rows if row.num_parameters]
    return f", {numbers[0] / 1e6:.0f} M parameters" if numbers else ""


def _conditions(rows: Sequence[Row]) -> str:
    """What every figure must say about its origin, from the rows themselves."""
    good = [row for row in rows if row.status == OK]
    devices = sorted({row.device for row in good if row.device})
    samples = sorted({row.num_samples for row in good if row.num_samples})
    precision = sorted({row.precision for row in good if row.precision})
    return ", ".join([*devices, *precision, *(f"{number:,} sentence pairs" for number in samples)])


if __name__ == "__main__":
    sys.exit(exit_code_of(main, "figures.py"))
