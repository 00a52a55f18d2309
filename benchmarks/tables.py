"""One function a table: a list of lines of Markdown, empty if nothing was measured for it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from raw import Cell, Raw, Record, Variant

NAMES = {"plain": "plain", "ours": "ours", "deepspeed": "DeepSpeed", "torchao": "torchao"}
GIB = 2**30
VARIANTS = ("ours-host", "ours-both", "ours-device", "ours-auto")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings), *body] if body else []


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median, and least to most if there are several; empty for nothing."""
    if not values:
        return ""
    shown = form.format(statistics.median(values))
    if len(values) > 1:
        shown += f" ({form.format(min(values))}-{form.format(max(values))})"
    return shown


def median_or_none(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def has_configured(cell: Cell) -> bool:
    """Engines without a configuration are in every variant's cell, so by themselves they count in the default one."""
    return cell.has("ours") or cell.has("deepspeed") or (cell.has("torchao") and cell.variant == Variant())


def step_ms(cell: Cell, engine: str) -> str:
    return spread([ms for record in cell.records(engine) for ms in record["step_ms"]], "{:.0f}")


def steps(raw: Raw, device: str) -> list[str]:
    rows = []
    for cell in raw.cells(device):
        if not has_configured(cell):
            continue
        times = [step_ms(cell, engine) for engine in NAMES]
        ratios = [
            spread(cell.ratios(*pair)) for pair in (("ours", "plain"), ("deepspeed", "ours"), ("torchao", "ours"))
        ]
        rows.append([cell.label, str(len(cell.runs.get("ours", {}))), *times, *ratios])
    heads = ["cell", "rounds", *(f"{name} ms" for name in NAMES.values())]
    return table([*heads, "ours / plain", "DeepSpeed / ours", "torchao / ours"], rows)


def gib(cell: Cell, engine: str, field: str = "peak_allocated") -> str:
    values = cell.values(engine, field)
    return f"{max(values) / GIB:.2f}" if values else ""


def memory(raw: Raw, device: str) -> list[str]:
    rows = []
    for cell in raw.cells(device):
        if not cell.values("ours", "peak_allocated") and not cell.values("deepspeed", "peak_allocated"):
            continue
        peaks = [gib(cell, engine) for engine in NAMES]
        ratios = [spread(cell.ratios("ours", other, "peak_allocated")) for other in ("plain", "deepspeed")]
        cores = [
            f"{statistics.median(found):.1f}" if (found := cell.values(engine, "cpu_seconds_per_second")) else "-"
            for engine in NAMES
        ]
        rows.append([cell.label, *peaks, *ratios, ", ".join(cores)])
    heads = ["cell", *(f"{name} GiB" for name in NAMES.values()), "ours / plain", "ours / DeepSpeed"]
    return table([*heads, "cores busy: " + ", ".join(NAMES.values())], rows)


def is_clean(record: Record) -> bool:
    """Lines from before ``clean_cache`` was recorded were all taken with a clean cache."""
    return bool(record.get("clean_cache", True))


def first_steps(raw: Raw, device: str) -> dict[str, dict[str, list[float]]]:
    """Model -> engine -> seconds; DeepSpeed with extensions that were compiled before counts as "compiled"."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    done: set[int] = set()
    for cell in raw.cells(device):
        for engine in NAMES:
            for record in cell.records(engine):
                if record.get("first_step_s") and id(record) not in done:
                    done.add(id(record))
                    kind = "compiled" if engine == "deepspeed" and not is_clean(record) else engine
                    found[record["model"]][kind].append(record["first_step_s"])
    return found


def first_step(raw: Raw, device: str) -> list[str]:
    rows = []
    for model, found in sorted(first_steps(raw, device).items()):
        ours, theirs = median_or_none(found["ours"]), median_or_none(found["deepspeed"])
        shown = [spread(found[kind], "{:.1f}") for kind in ("plain", "ours", "deepspeed", "compiled")]
        rows.append([model, *shown, f"{ours / theirs:.2f}" if ours and theirs else ""])
    heads = ["model", "plain s", "ours s", "DeepSpeed s, clean cache", "DeepSpeed s, compiled before"]
    return table([*heads, "ours / DeepSpeed, clean"], rows)


def is_sizeable(cell: Cell) -> bool:
    """Whether the model is large beside the libraries that train it."""
    return any(record["num_parameters"] > 10**8 for engine in NAMES for record in cell.records(engine))


def saw_all(record: Record) -> bool:
    """Whether the machine was watched from before the process took its memory. Lines of turns once said otherwise."""
    gained = (record.get("rss_peak_bytes") or 0) - (record.get("rss_baseline_bytes") or 0)
    return bool(record.get("machine_used_bytes")) and record["machine_used_bytes"] >= gained


def host_bytes(cell: Cell, engine: str) -> tuple[float | None, float | None, float | None]:
    """Bytes a parameter: the engine's own, with the libraries, and what the machine as a whole lost; largest run.

    Only first cells of a process count: later ones may find memory that an earlier one has left.
    """
    first = [record for record in cell.records(engine) if record.get("first_step_s")]
    total = [(record.get("rss_peak_bytes") or record["rss_bytes"]) / record["num_parameters"] for record in first]
    own = [
        (record["rss_peak_bytes"] - record["rss_baseline_bytes"]) / record["num_parameters"]
        for record in first
        if record.get("rss_peak_bytes") and record.get("rss_baseline_bytes")
    ]
    outside = [record["machine_used_bytes"] / record["num_parameters"] for record in first if saw_all(record)]
    return tuple(max(values, default=None) for values in (own, total, outside))  # type: ignore[return-value]


def host_memory(raw: Raw, device: str) -> list[str]:
    rows = []
    for cell in raw.cells(device):
        shown = {engine: host_bytes(cell, engine) for engine in NAMES}
        if not is_sizeable(cell) or not has_configured(cell) or not any(any(found) for found in shown.values()):
            continue
        texts = [
            " / ".join("-" if value is None else f"{value:.1f}" for value in shown[engine])
            if any(shown[engine])
            else ""
            for engine in NAMES
        ]
        rows.append([cell.label, *texts])
    return table(["cell", *NAMES.values()], rows)


def throughput(raw: Raw, device: str) -> list[str]:
    rows = []
    for cell in raw.cells(device):
        tokens = cell.values("ours", "tokens") or cell.values("deepspeed", "tokens")
        if not tokens:
            continue
        padded = cell.values("ours", "tokens_padded") or cell.values("deepspeed", "tokens_padded")
        speeds = [spread(cell.values(engine, "tokens_per_s"), "{:.0f}") for engine in NAMES]
        ratios = [spread(cell.ratios("ours", other, "tokens_per_s")) for other in ("deepspeed", "plain")]
        shown = f"{statistics.median(tokens):.0f} ({statistics.median(padded):.0f})"
        rows.append([cell.label, shown, *speeds, *ratios])
    heads = ["cell", "tokens a step (padded)", *(f"{name} tokens/s" for name in NAMES.values())]
    return table([*heads, "ours / DeepSpeed", "ours / plain"], rows)


def limit_terms(record: Record, gpu_ms: float) -> dict[str, float]:
    """Milliseconds of a step's limits. DRAM: the faster of the two bandwidths that were measured. PCIe: both directions
    are in use at once, so each has half of what both had together."""
    found, params = record["limits"], record["num_parameters"]
    terms = {"gpu": gpu_ms}
    dram = max(found.get("host_adamw_gb_s", 0), found.get("host_copy_gb_s", 0))
    terms["dram"] = 28 * params / dram / 1e6 if dram else 0.0
    one_way = found.get("both_gb_s", 0) / 2
    terms["pcie"] = 2 * params / one_way / 1e6 if one_way else 0.0
    terms["stream"] = 12 * params / one_way / 1e6 if one_way else 0.0
    return terms


class Limited(NamedTuple):
    """A cell whose GPU time was measured."""

    cell: Cell
    runs: list[tuple[float, dict[str, float]]]
    """Mean step of a run in milliseconds, and the terms of the machine that it ran on."""

    @property
    def step_ms(self) -> float:
        return statistics.median(step for step, _ in self.runs)

    def term(self, name: str) -> float:
        return statistics.median(terms[name] for _, terms in self.runs)

    def over(self, *names: str) -> float:
        """The step over the largest of these terms, each run by its own."""
        return statistics.median(step / max(terms[name] for name in names) for step, terms in self.runs)


def limited_cells(raw: Raw, device: str) -> list[Limited]:
    """Of steps by our engine, which a budget makes ours-auto."""
    found = []
    for cell in raw.cells(device):
        engine = "ours-auto" if cell.has("ours-auto") else "ours"
        if not cell.has("compute", engine):
            continue
        field = "gpu_busy_ms" if cell.values("compute", "gpu_busy_ms") else "step_ms_median"
        gpu_ms = statistics.median(cell.values("compute", field))
        runs = [(record["step_ms_mean"], limit_terms(record, gpu_ms)) for record in cell.records(engine)]
        found.append(Limited(cell, runs))
    return found


def limits(raw: Raw, device: str) -> list[str]:
    rows = []
    for found in limited_cells(raw, device):
        launched = spread(found.cell.values("compute", "step_ms_median"), "{:.0f}")
        shown = [f"{found.term(name):.0f}" for name in ("gpu", "dram", "pcie", "stream")]
        ratios = [f"{found.over('gpu', 'dram', 'pcie'):.2f}", f"{found.over('gpu', 'stream'):.2f}"]
        rows.append([found.cell.label, f"{found.step_ms:.0f}", *shown, *ratios, launched])
    heads = ["cell", "ours ms", "GPU ms", "28 B DRAM ms", "2 B PCIe ms", "12 B PCIe ms"]
    return table([*heads, "ours / max(GPU, 28 B, 2 B)", "ours / max(GPU, 12 B)", "with launch gaps ms"], rows)


def placed(record: Record) -> str:
    """Where an engine of ours keeps masters and moments, GiB."""
    report = record.get("memory_report", {})
    sums = {
        place: sum(size for kind, size in kinds.items() if kind in ("master weights", "moments"))
        for place, kinds in report.items()
    }
    return ", ".join(f"{place} {size / GIB:.2f}" for place, size in sums.items()) if sums else ""


def variants(raw: Raw, device: str) -> list[str]:
    """Other ways of our own, against the default one of the same setting in the same round."""
    default = {cell.setting: cell for cell in raw.cells(device) if cell.variant == Variant()}
    rows = []
    for cell in raw.cells(device):
        names = [name for name in VARIANTS if cell.has(name)]
        names += ["ours"] if cell.has("ours") and cell.variant.ratio != 1.0 else []
        for name in names:
            both = Cell(cell.setting, cell.variant)
            both.runs["other"] = cell.runs[name]
            for beside in ("ours", "deepspeed") if cell.setting in default else ():
                both.runs[beside] = default[cell.setting].runs.get(beside, {})
            ratios = [spread(both.ratios("other", "ours", field)) for field in ("step_ms_median", "peak_allocated")]
            theirs = spread(both.ratios("deepspeed", "other"))
            where = placed(cell.records(name)[-1])
            rows.append([cell.label, name, step_ms(cell, name), ratios[0], theirs, gib(cell, name), ratios[1], where])
    heads = ["cell", "engine", "ms", "/ ours", "DeepSpeed / it", "GiB", "/ ours", "masters and moments, GiB"]
    return table(heads, rows)


def failures(raw: Raw, device: str) -> list[str]:
    counted: dict[tuple[str, str], int] = defaultdict(int)
    for record in raw.failures:
        if record["device"] == device:
            options = ("accumulation", "length", "config", "ratio", "gpus")
            asked = [f"{name} {record[name]}" for name in options if record.get(name) not in (None, 1)]
            cell = ", ".join([f"{record['model']} {record['precision']}", f"batch {record['batch']}", *asked])
            why = str(record.get("failed") or record.get("error")).replace("|", "/").replace("\n", " ")
            counted[f"{record['engine']}: {cell}", why] += 1
    return table(["engine and cell", "why", "times"], [[*key, str(times)] for key, times in counted.items()])


def machine(limits: dict[str, Any]) -> str:
    return (
        f"torch {limits['torch']}, {limits['threads']} host threads. Limits in one of the runs, GB/s (raw lines have "
        f"those of every run): host to device {limits.get('h2d_gb_s', 0):.0f}, device to host "
        f"{limits.get('d2h_gb_s', 0):.0f}, both at once {limits.get('both_gb_s', 0):.0f}, host copy "
        f"{limits['host_copy_gb_s']:.0f}, fused AdamW on the host {limits['host_adamw_gb_s']:.0f}."
    )
