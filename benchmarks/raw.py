"""Raw JSON lines, sorted into cells: what was asked for, which engines ran it, in which round of which file."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engines import DEFAULT_CONFIG

Record = dict[str, Any]
Round = tuple[str, int]
"""Name of the file, number of the round in it."""

WITHOUT_CONFIG = ("plain", "compute", "torchao")

OTHER_ENGINES = {"-earlier-": "earlier engine", "-whole-uploads-": "uploads not cut"}
"""What a file's name says about our engine, if it was not the present one. Such rows stand apart, and are kept for what
was measured beside them."""


class Setting(NamedTuple):
    """What is the same for every engine of a comparison."""

    device: str
    world_size: int
    model: str
    precision: str
    batch: int
    accumulation: int
    length: int | None
    checkpointing: bool
    dropout: float | None
    gpu_gib: float | None
    logs_losses: bool
    """Every step's loss was read, which makes the host wait: such cells are no timings."""
    other: str = ""
    """What our engine was, if it was not the present one."""

    @property
    def label(self) -> str:
        parts = [f"{self.model} {self.precision}", f"batch {self.batch}"]
        if self.accumulation > 1:
            parts.append(f"accumulation {self.accumulation}")
        if self.length:
            parts.append(f"length {self.length}")
        if self.checkpointing:
            parts.append("checkpointing")
        if self.gpu_gib:
            parts.append(f"{self.gpu_gib:g} GiB of GPU")
        if self.other:
            parts.append(self.other)
        return ", ".join(parts)


class Variant(NamedTuple):
    """What a configuration adds to a setting."""

    config: str = DEFAULT_CONFIG
    ratio: float = 1.0
    budget_gib: float = 0.0
    host_share: float = 0.0

    @property
    def label(self) -> str:
        parts = [self.config] if self.config != DEFAULT_CONFIG else []
        if self.ratio != 1.0:
            parts.append(f"ratio {self.ratio:g}")
        if self.budget_gib:
            parts.append(f"budget {self.budget_gib:g} GiB")
        if self.host_share:
            parts.append(f"host share {self.host_share:g}")
        return ", ".join(parts)


class Cell:
    """Records of one setting and variant, by engine and round; engines without a config are in every variant's cell."""

    def __init__(self, setting: Setting, variant: Variant) -> None:
        self.setting = setting
        self.variant = variant
        self.runs: dict[str, dict[Round, list[Record]]] = defaultdict(lambda: defaultdict(list))

    @property
    def label(self) -> str:
        return ", ".join(filter(None, [self.setting.label, self.variant.label]))

    def has(self, *engines: str) -> bool:
        return all(self.runs.get(engine) for engine in engines)

    def records(self, engine: str) -> list[Record]:
        return [record for runs in self.runs.get(engine, {}).values() for record in runs]

    def values(self, engine: str, field: str) -> list[float]:
        return [record[field] for record in self.records(engine) if record.get(field) is not None]

    def ratios(self, above: str, below: str, field: str = "step_ms_median") -> list[float]:
        """Within each round in which both were measured."""
        found = []
        for place, tops in self.runs.get(above, {}).items():
            top = [record[field] for record in tops if record.get(field)]
            bottom = [record[field] for record in self.runs.get(below, {}).get(place, []) if record.get(field)]
            if top and bottom:
                found.append(statistics.median(top) / statistics.median(bottom))
        return found


class Raw:
    """Everything that was read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.limits: dict[str, dict[str, Any]] = {}
        """By device: the last measured."""
        self.failures: list[Record] = []
        self.largest: list[Record] = []
        self.lost_ranks: list[Record] = []
        self._shared: dict[Setting, list[tuple[str, Round, Record]]] = defaultdict(list)
        self._cells: dict[tuple[Setting, Variant], Cell] = {}
        for path in paths:
            self._read(path)
        for (setting, _), cell in self._cells.items():
            for engine, place, record in self._shared_with(setting):
                cell.runs[engine][place].append(record)
        for setting, found in self._shared.items():
            if not any(known == setting for known, _ in self._cells):
                cell = self._cells.setdefault((setting, Variant()), Cell(setting, Variant()))
                for engine, place, record in found:
                    cell.runs[engine][place].append(record)

    def _shared_with(self, setting: Setting) -> list[tuple[str, Round, Record]]:
        """The GPU's own share is the same beside every engine of ours."""
        own = self._shared.get(setting, [])
        others = self._shared.get(setting._replace(other=""), []) if setting.other else []
        return [*own, *(found for found in others if found[0] == "compute")]

    def _read(self, path: Path) -> None:
        limits: dict[str, Any] = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if "limits" in record:
                limits = record["limits"]
                self.limits[limits.get("device", "CPU")] = limits
                continue
            if "spec" in record:  # of left_out.py: an engine less something
                continue
            record["device"] = limits.get("device", "CPU")
            record["limits"] = limits
            record["other"] = next((label for part, label in OTHER_ENGINES.items() if part in path.name), "")
            if "largest" in record:
                self.largest.append(record)
            elif "lost_rank" in record:
                self.lost_ranks.append(record)
            elif "step_ms" in record:
                self._sort_in(record, (path.name, record["round"]))
            elif "failed" in record or "error" in record:
                self.failures.append(record)

    def _sort_in(self, record: Record, place: Round) -> None:
        if record.get("tokens"):  # of the median step: the mean of a short span holds a wait for the device at its end
            record["tokens_per_s"] = 1000 * record["tokens"] / record["step_ms_median"]
        engine, config = record["engine"], record.get("config") or DEFAULT_CONFIG
        engine = engine.removesuffix("-z3")
        if engine in WITHOUT_CONFIG:
            self._shared[setting_of(record)].append((engine, place, record))
            return
        ratio = record.get("ratio") if engine != "ours-auto" else None
        budget = record.get("budget_gib") if engine == "ours-auto" else None
        share = record.get("host_share") if engine == "ours-both" else None
        variant = Variant(config, 1.0 if ratio is None else ratio, budget or 0.0, share or 0.0)
        key = (setting_of(record), variant)
        cell = self._cells.setdefault(key, Cell(*key))
        cell.runs[engine][place].append(record)

    @property
    def devices(self) -> list[str]:
        """Of everything that was measured."""
        found = {setting.device for setting, _ in self._cells}
        return sorted(found | {record["device"] for record in [*self.largest, *self.lost_ranks, *self.failures]})

    def cells(self, device: str, *, several: bool = False, losses: bool = False) -> Iterator[Cell]:
        """On one GPU or on several, with or without every step's loss."""
        for (setting, _), cell in sorted(self._cells.items(), key=lambda item: _order(*item[0])):
            if (setting.device, setting.world_size > 1, setting.logs_losses) == (device, several, losses):
                yield cell


def setting_of(record: Record) -> Setting:
    return Setting(
        device=record["device"],
        world_size=record.get("world_size", 1),
        model=record["model"],
        precision=record["precision"],
        batch=record["batch"],
        accumulation=record.get("accumulation", 1),
        length=record.get("length"),
        checkpointing=bool(record.get("checkpointing")),
        dropout=record.get("dropout"),
        gpu_gib=record.get("gpu_gib"),
        logs_losses="losses" in record,
        other=record.get("other", ""),
    )


def _order(setting: Setting, variant: Variant) -> tuple[Any, ...]:
    return tuple("" if value is None else value for value in (*setting[:6], setting.length or 0)) + tuple(
        str(value) for value in (*setting[7:], *variant)
    )
