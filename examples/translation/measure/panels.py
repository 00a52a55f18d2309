"""One panel of a figure: a line an engine over batch size, its scales, crosses where memory ran out, the legend."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from measure.rows import OK, OUT_OF_MEMORY, Row


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
FONT = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False}


class Quantity(NamedTuple):
    """What a figure shows over batch size."""

    name: str
    title: str
    label: str
    value: Callable[[Row], float | None]
    log_base: int | None


def gpus(number: int) -> str:
    return {1: "one GPU", 2: "two GPUs"}.get(number, f"{number} GPUs")


def draw_panel(
    axes: Axes,
    rows: Sequence[Row],
    quantity: Quantity,
    *,
    num_gpus: int | None = None,
    batches: Sequence[int] = (),
) -> None:
    """A line an engine. With ``num_gpus`` lines of several numbers share the panel, over the batch of all GPUs.

    ``batches`` are marked on the axis though the panel may have none of them.
    """
    scale = num_gpus or 1
    look: dict[str, Any] = {} if scale == 1 else HOLLOW
    several = any(row.num_gpus > 1 for row in rows)
    for engine, style in STYLES.items():
        points = medians([row for row in rows if row.engine == engine], quantity)
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
                label=label if num_gpus is None else f"{label}, {gpus(scale)}",
                **look,
            )
    scales(axes, quantity, [*batches, *(row.batch_size * scale for row in rows)])
    if several:
        axes.set_xlabel("batch size per GPU")


def finish(panels: Sequence[Axes], quantity: Quantity, rows_of: Sequence[Sequence[Row]] = ()) -> None:
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


def medians(rows: Sequence[Row], quantity: Quantity) -> list[tuple[int, float]]:
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


def scales(axes: Axes, quantity: Quantity, batches: Sequence[int]) -> None:
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


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
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


def save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=150)
    # Without a date, and with names that do not change, the same CSV gives the same file.
    with plt.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
