"""One cell of the sweep is one row. The CSV file is the only thing that figures and tables are made from."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from errors import UserError

OK, OUT_OF_MEMORY, FAILED, TIMED_OUT = "ok", "out of memory", "failed", "timed out"
STATUSES = (OK, OUT_OF_MEMORY, FAILED, TIMED_OUT)
SETTLED = (OK, OUT_OF_MEMORY)
"""Status of a cell that need not be measured again: running out of memory is a result."""


class Key(NamedTuple):
    """What makes a cell: two rows with the same key measure the same thing."""

    model: str
    engine: str
    batch_size: int
    num_gpus: int
    gpu_memory_limit_gib: float
    round: int


@dataclass(kw_only=True)
class Row:
    """Units are in the names. None (an empty field) where there is nothing to measure, as GPU memory without GPU."""

    model: str
    engine: str
    batch_size: int
    """Per GPU."""
    num_gpus: int = 1
    gpu_memory_limit_gib: float = 0.0
    """What the process may allocate; 0 means all of the device."""
    round: int = 0
    """Repetition of the whole sweep."""
    num_side_by_side: int = 1
    """Cells measured at the same time on the machine, this one included, each on GPUs and cores of its own."""

    status: str = OK
    error: str = ""
    device: str = ""
    precision: str = ""
    num_parameters: int | None = None

    num_samples: int | None = None
    epoch_steps: int | None = None
    """Optimizer steps of one epoch over all samples."""
    warmup_steps: int | None = None
    measured_steps: int | None = None
    """Steps behind the medians below, after the warm-up. Less than an epoch unless is_full_epoch."""
    is_full_epoch: bool = False

    step_seconds_median: float | None = None
    step_seconds_mean: float | None = None
    """Wall time over the measured steps, up to the device's last work, by their number."""
    step_seconds_p90: float | None = None
    epoch_seconds: float | None = None
    """Measured; only with is_full_epoch."""
    epoch_seconds_scaled: float | None = None
    """step_seconds_median times epoch_steps."""
    samples_per_second: float | None = None

    gpu_allocated_gib: float | None = None
    """Peak of tensors, over the GPUs the largest; the longest batch of the epoch is among those measured."""
    gpu_reserved_gib: float | None = None
    """Peak of what PyTorch's allocator holds, over the GPUs the largest."""
    gpu_device_gib: float | None = None
    """Peak of what a device reports as used, the CUDA context and other processes included; the largest."""
    gpu_allocated_sum_gib: float | None = None
    """The peaks of all GPUs added up; they need not be reached at the same moment. Likewise the two that follow."""
    gpu_reserved_sum_gib: float | None = None
    gpu_device_sum_gib: float | None = None

    num_cores: float | None = None
    cpu_percent_mean: float | None = None
    """Processor time of the training processes over wall time and all cores: 100 means every core is busy."""
    cpu_percent_machine: float | None = None
    """The same of all processes, as the operating system reports it; None if it does not."""
    cpu_percent_per_second: str = ""
    """cpu_percent of each second of the measured steps, joined by ';'."""
    cpu_seconds_per_second: float | None = None
    """Cores kept busy."""
    host_rss_gib: float | None = None
    """Largest resident memory of one training process."""

    loss_warmup: float | None = None
    """Mean loss of the warm-up steps: the same batches for every engine."""
    loss: float | None = None
    """Mean loss of the measured steps."""
    skipped_steps: int | None = None
    """Measured steps without an update: a gradient was inf."""
    seconds: float | None = None
    """Wall time of the whole cell."""

    @property
    def key(self) -> Key:
        return Key(*(getattr(self, name) for name in Key._fields))

    @property
    def epoch(self) -> float | None:
        """Seconds of one epoch: measured if it was, else scaled."""
        return self.epoch_seconds if self.epoch_seconds is not None else self.epoch_seconds_scaled


def side_by_side(number: int) -> str:
    """How cells of one GPU were measured on a machine of several."""
    share = "half" if number == 2 else f"1/{number}"
    return f"one GPU: {number} models measured at the same time, each with a GPU and {share} of the cores"


COLUMNS = [field.name for field in dataclasses.fields(Row)]
_TYPES = get_type_hints(Row)


def _parse(name: str, text: str) -> Any:
    kind = _TYPES[name]
    if kind is str:
        return text
    if kind is bool:
        return {"True": True, "False": False}[text]
    if not text and kind not in (int, float):
        return None
    return int(text) if kind in (int, int | None) else float(text)


def _format(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: Path) -> list[Row]:
    """Rows in the order written; of rows with the same key only the last.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a file of this sweep, or a line is damaged; the message has its number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            columns = next(lines, [])
            _check_columns(path, columns)
            rows = [_row_of(path, lines.line_num, columns, line) for line in lines if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error}). Restore it, or name another.") from error
    newest = {row.key: row for row in rows}
    return list(newest.values())


def _check_columns(path: Path, columns: list[str]) -> None:
    missing = [name for name in ("model", "engine", "batch_size", "status") if name not in columns]
    if missing:
        found = f"it begins with {', '.join(columns)[:60]}" if columns else "it is empty"
        raise UserError(f"{path}: not a file of this sweep, it has no column {', '.join(missing)}; {found}.")
    unknown = [name for name in columns if name not in _TYPES]
    if unknown:
        # Reading past them would lose them when the file is written again.
        raise UserError(f"{path}: unknown columns {', '.join(unknown)}. Another version wrote it, or another program.")


def _row_of(path: Path, number: int, columns: list[str], line: list[str]) -> Row:
    mend = "The file was left as it is. Restore this line, or delete it: its cell is then measured again."
    if len(line) != len(columns):
        raise UserError(f"{path}, line {number}: {len(line)} values for {len(columns)} columns, cut short? {mend}")
    values = {}
    for name, text in zip(columns, line):
        try:
            values[name] = _parse(name, text)
        except (ValueError, KeyError):
            raise UserError(f"{path}, line {number}, column {name}: {text!r} is not a value for it. {mend}") from None
    if values["status"] not in STATUSES:
        raise UserError(
            f"{path}, line {number}, column status: {values['status']!r} is none of {', '.join(STATUSES)}. {mend}"
        )
    return Row(**values)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file in one move, so that an interruption leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.new")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([_format(getattr(row, name)) for name in COLUMNS] for row in rows)
    os.replace(draft, path)
