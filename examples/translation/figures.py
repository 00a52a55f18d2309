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
from measure.rows import OK, OUT_OF_MEMORY, Row, read_rows, side_by_side
from measure.spec import PLAIN, ZERO

HERE = Path(__file__).resolve().parent
CSV = HERE / "results" / "sweep.csv"
FIGURES = HERE / "results" / "figures"


class Style(NamedTuple):
    label: str
    colour: str
    marker: str
    line: str
    width: float = 2
    size: float = 7


STYLES = {
    "plain": Style("Trainer alone", "#D55E00", "o", "-"),
    "data_parallel": Style("Trainer alone, one process (DataParallel)", "#CC79A7", "D", "-."),
    "deepspeed": Style("ZeRO-2 + offload (DeepSpeed)", "#009E73", "^", "--", width=2.5, size=10),
    "zero2_offload": Style("ZeRO-2 + offload (this engine)", "#0072B2", "s", "-"),
}
"""In the order of drawing: what lies below is wider, so that equal lines are both seen."""
OF_SEVERAL = {"plain": "Trainer alone, a process a GPU (DDP)"}
"""Labels that differ with several GPUs."""
HOLLOW = {"markerfacecolor": "white", "markeredgewidth": 2}
"""Markers of two GPUs where one GPU is drawn beside them."""
BATCHES = [2**power for power in range(9)]
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
            figures["two_gpus_memory"] = over_batch_size(two, MEMORY_OF_BOTH)
            figures["two_gpus_time"] = over_batch_size(two, TIME)
            figures["one_and_two_gpus"] = one_and_two(one, two)
            figures["saved"] = saved(one, two)
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


def over_batch_size(rows: Sequence[Row], quantity: Quantity) -> Figure | None:
    """A panel a model, a line an engine; None if nothing was measured."""
    if not any(quantity.value(row) is not None for row in rows):
        return None
    models = _models(rows)
    figure, panels = plt.subplots(
        1, len(models), figsize=(max(7.5, 5.2 * len(models)), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, model in zip(panels[0], models):
        mine = [row for row in rows if row.model == model]
        _panel(axes, mine, quantity)
        axes.set_title(f"{model}{_size(mine)}")
    _finish(panels[0], quantity, [[row for row in rows if row.model == model] for model in models])
    panels[0][0].set_ylabel(quantity.label)
    figure.suptitle(f"{quantity.title}, over batch size\n{_conditions(rows)}", fontsize=12)
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
        _finish([axes], quantity, [mine])
        axes.set_title(quantity.title)
        axes.set_ylabel(quantity.label)
    figure.suptitle(f"{models[-1]}{_size(mine)}: {_conditions(mine)}", fontsize=12)
    _legend(figure, panels[0])
    return figure


def one_and_two(one: Sequence[Row], two: Sequence[Row]) -> Figure:
    """Time of an epoch over the batch size of all GPUs together, one and two of them."""
    models = _models(two)
    figure, panels = plt.subplots(
        1, len(models), figsize=(max(7.5, 5.2 * len(models)), 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, model in zip(panels[0], models):
        for number, rows in ((1, one), (2, two)):
            mine = [row for row in rows if row.model == model and row.engine in (PLAIN, ZERO)]
            _panel(axes, mine, TIME, num_gpus=number)
        axes.set_title(f"{model}{_size([row for row in two if row.model == model])}")
        axes.set_xlabel("batch size of a step, all GPUs together")
    _finish(panels[0], TIME)
    panels[0][0].set_ylabel(TIME.label)
    figure.suptitle(f"Time of one epoch, one GPU and two\n{_conditions([*one, *two])}", fontsize=12)
    _legend(figure, panels[0])
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
                    label=_gpus(number),
                    **look,
                )
            _scales(axes, ratio, BATCHES)
            axes.axhline(1.0, color="#555555", linewidth=1.5)
            axes.set_title(model if line == 0 else "")
            axes.set_xlabel("batch size per GPU" if line == 1 else "")
        _finish(panels[line], ratio)
    figure.suptitle(
        f"This engine over the Trainer alone: below 1 is less memory, or faster\n{_conditions([*one, *two])}",
        fontsize=12,
    )
    _legend(figure, panels[0])
    return figure


def _ratios(rows: Sequence[Row], quantity: Quantity) -> list[tuple[int, float]]:
    """(batch size per GPU, this engine over the Trainer alone) where both were measured."""
    plain, ours = (dict(_medians([row for row in rows if row.engine == engine], quantity)) for engine in (PLAIN, ZERO))
    return [(batch, value / plain[batch]) for batch, value in ours.items() if batch in plain]


def _gpus(number: int) -> str:
    return {1: "one GPU", 2: "two GPUs"}.get(number, f"{number} GPUs")


def _panel(axes: Axes, rows: Sequence[Row], quantity: Quantity, *, num_gpus: int | None = None) -> None:
    """A line an engine. With ``num_gpus`` lines of several numbers share the panel, over the batch of all GPUs."""
    scale = num_gpus or 1
    look: dict[str, Any] = {} if scale == 1 else HOLLOW
    several = any(row.num_gpus > 1 for row in rows)
    for engine, style in STYLES.items():
        points = _medians([row for row in rows if row.engine == engine], quantity)
        if points:
            label = OF_SEVERAL.get(engine, style.label) if several and num_gpus is None else style.label
            axes.plot(
                [batch * scale for batch, _ in points],
                [value for _, value in points],
                color=style.colour,
                marker=style.marker,
                linestyle=style.line if num_gpus is None else "-" if scale == 1 else ":",
                linewidth=style.width,
                markersize=style.size,
                label=label if num_gpus is None else f"{label}, {_gpus(scale)}",
                **look,
            )
    _scales(axes, quantity, [row.batch_size * scale for row in rows])
    if several:
        axes.set_xlabel("batch size per GPU")


def _finish(panels: Sequence[Axes], quantity: Quantity, rows_of: Sequence[Sequence[Row]] = ()) -> None:
    """What needs all lines of panels that share an axis: its range, and the crosses of cells without memory."""
    lost = [_out_of_memory(rows) for rows in rows_of]
    room = 0.12 if any(lost) else 0.0
    if quantity.log_base is None:
        most = max((max(line.get_ydata()) for axes in panels for line in axes.get_lines()), default=1.0)
        panels[0].set_ylim(0, most * (1.06 + room))
    elif room:
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(low, high * (high / low) ** room)
    for axes, cells in zip(panels, lost):
        _mark_out_of_memory(axes, cells)


def _out_of_memory(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """(batch size, engine) of the cells that ran out of memory in every round."""
    measured = {(row.batch_size, row.engine) for row in rows if row.status == OK}
    return sorted({(row.batch_size, row.engine) for row in rows if row.status == OUT_OF_MEMORY} - measured)


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
    devices: dict[str, list[int]] = {}
    for number, device in sorted({(row.num_gpus, row.device) for row in good}):
        devices.setdefault(device, []).append(number)
    parts = []
    for device, numbers in devices.items():
        counts = " and ".join(map(str, numbers))
        parts.append(device if numbers == [1] else f"{counts} x {device}")
    parts += sorted({row.precision for row in good if row.precision})
    parts += [f"{number:,} sentence pairs" for number in sorted({row.num_samples for row in good if row.num_samples})]
    text = ", ".join(parts)
    together = max((row.num_side_by_side for row in good), default=1)
    return text if together == 1 else f"{text}\n{side_by_side(together)}"


if __name__ == "__main__":
    sys.exit(exit_code_of(main, "figures.py"))
