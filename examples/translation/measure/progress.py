"""The live table of a sweep: a line a cell. Where output is not a terminal, a line is printed as each cell ends."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from measure.rows import OK, Key, Row
from measure.spec import Spec

HEADINGS = ("model", "engine", "GPUs", "batch", "GPU GiB", "CPU %", "step ms", "epoch s", "steps", "loss")
WIDTHS = (8, 13, 4, 5, 7, 5, 7, 8, 8, 6)
"""Together, and with a space between two, 80 columns."""
NUM_OTHER_LINES = 8
"""Title, headings, the line below, and some for cells whose status takes two lines."""


class Progress:
    """Use as a context; tell it what happens. Memory is that of all GPUs of a cell together."""

    def __init__(self, rows: dict[Key, Row]) -> None:
        self._rows = rows
        self._running: dict[tuple[str, str], int] = {}
        self._said: set[str] = set()
        self._live: Any = None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
            self._refresh()
        else:
            print("  ".join(text.rjust(width) for text, width in zip(HEADINGS, WIDTHS)), flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.vertical_overflow = "visible"  # the last picture may scroll, so it shows all
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def say_once(self, text: str) -> None:
        """A line above the table, however often it is said."""
        if text not in self._said:
            self._said.add(text)
            print(text, file=sys.stderr, flush=True)

    def cell_started(self, spec: Spec, batch_size: int) -> None:
        self._running[spec.model, spec.engine] = batch_size
        self._refresh()

    def cell_finished(self, row: Row) -> None:
        self._running.pop((row.model, row.engine), None)
        if self._live is None:
            print("  ".join(text.rjust(width) for text, width in zip(_cells(row), WIDTHS)), row.error, flush=True)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            # What does not fit the screen is cut off below, and what is measured now stands there.
            room = self._live.console.height - NUM_OTHER_LINES - len(self._running)
            self._live.update(self._table(max(1, room)), refresh=True)

    def _table(self, num_rows: int | None = None) -> Any:
        """The last ``num_rows`` cells and those that are being measured; None means all."""
        from rich.table import Table

        rows = list(self._rows.values())
        shown = rows if num_rows is None else rows[-num_rows:]

        title = "GPU memory, processor, time over batch size (~: scaled from measured steps)"
        if len(shown) < len(rows):
            title += f"\n{len(rows) - len(shown)} cells above"
        table = Table(title=title, title_justify="left", box=None)
        table.padding = (0, 1, 0, 0)
        for number, (heading, width) in enumerate(zip(HEADINGS, WIDTHS)):
            table.add_column(heading, justify="left" if number < 2 else "right", width=width)
        for row in shown:
            table.add_row(*_cells(row), style="" if row.status == OK else "yellow")
        for (model, engine), batch_size in self._running.items():
            table.add_row(model, engine, "", str(batch_size), "...", style="dim")
        return table


def _cells(row: Row) -> list[str]:
    if row.status != OK:
        return [row.model, row.engine, str(row.num_gpus), str(row.batch_size), row.status, *[""] * 5]
    scaled = "" if row.is_full_epoch else "~"
    return [
        row.model,
        row.engine,
        str(row.num_gpus),
        str(row.batch_size),
        _number(row.gpu_allocated_sum_gib, ".2f"),
        _number(row.cpu_percent_mean, ".1f"),
        _number(row.step_seconds_median, ".1f", 1000),
        scaled + _number(row.epoch, ".1f"),
        f"{row.measured_steps}/{row.epoch_steps}",
        _number(row.loss, ".3f"),
    ]


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value:{form}}"
