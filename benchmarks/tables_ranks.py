"""Tables about several GPUs, models that fill a machine, and lost ranks; the list of what we lose at."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from raw import WITHOUT_CONFIG, Cell, Raw, Record
from tables import GIB, NAMES, first_steps, gib, host_bytes, is_sizeable, limited_cells, median_or_none, spread, table


def several_gpus(raw: Raw, device: str) -> list[str]:
    rows = []
    for cell in raw.cells(device, several=True):
        if not any(cell.has(engine) for engine in ("ours", "deepspeed")):
            continue
        speeds = [spread(cell.values(engine, "tokens_per_s"), "{:.0f}") for engine in ("plain", "ours", "deepspeed")]
        sums = [gib(cell, engine, "peak_allocated_sum") for engine in ("plain", "ours", "deepspeed")]
        ratios = [spread(cell.ratios("ours", other, "tokens_per_s")) for other in ("plain", "deepspeed")]
        ratios.append(spread(cell.ratios("ours", "deepspeed", "peak_allocated_sum")))
        label = f"{cell.setting.label}, {cell.variant.config}"
        rows.append([f"{cell.setting.world_size} x {label}", *speeds, *ratios[:2], " / ".join(sums), ratios[2]])
    names = [NAMES[engine] for engine in ("plain", "ours", "deepspeed")]
    heads = ["ranks x cell", *(f"{name} tokens/s" for name in names), "ours / plain", "ours / DeepSpeed"]
    return table([*heads, "GiB of all GPUs: " + " / ".join(names), "ours / DeepSpeed GiB"], rows)


def parity_pairs(raw: Raw, device: str) -> list[tuple[Cell, str, list[float], list[float]]]:
    """(cell on several ranks, engine, its losses, losses of one rank at the same global batch)."""
    alone: dict[Any, list[float]] = {}
    for cell in raw.cells(device, losses=True):
        for engine in NAMES:
            for record in cell.records(engine):
                alone[_global(cell, engine)] = record["losses"]
    found: dict[Any, tuple[Cell, str, list[float], list[float]]] = {}
    for cell in raw.cells(device, several=True, losses=True):
        for engine in NAMES:
            key = _global(cell, engine)
            if key in alone and cell.has(engine):
                found.setdefault((key, cell.setting), (cell, engine, cell.records(engine)[-1]["losses"], alone[key]))
    return list(found.values())


def _global(cell: Cell, engine: str) -> tuple[Any, ...]:
    """The same for runs that see the same global batches under the same configuration."""
    setting = cell.setting
    rows = setting.batch * setting.accumulation * setting.world_size
    same = setting._replace(batch=0, accumulation=0, world_size=0)
    return rows, same, engine, None if engine in WITHOUT_CONFIG else cell.variant


def parity_difference(several: list[float], one: list[float]) -> tuple[float, float]:
    """(scale, largest relative difference with the scale taken out).

    The Trainer multiplies the loss that it reports by the number of ranks for models that do not divide by the number
    of tokens themselves (T5), in every engine; the scale, that of the first step, shows it.
    """
    scale = several[0] / one[0]
    return scale, max(abs(a / scale - b) / abs(b) for a, b in zip(several, one))


def parity(raw: Raw, device: str) -> list[str]:
    rows = []
    for cell, engine, several, one in parity_pairs(raw, device):
        scale, difference = parity_difference(several, one)
        shown = f"{one[0]:.4f} to {one[-1]:.4f}"
        config = cell.variant.config if engine != "plain" else "DDP"
        what = f"{cell.setting.world_size} x {cell.setting.label}"
        rows.append([what, NAMES[engine], config, str(len(one)), shown, f"{scale:.3f}", f"{difference:.1e}"])
    heads = ["ranks x cell", "engine", "config", "steps", "loss on one GPU", "scale", "largest relative difference"]
    return table(heads, rows)


def _searches(raw: Raw, device: str) -> dict[tuple[Any, ...], dict[str, list[Record]]]:
    found: dict[tuple[Any, ...], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in raw.largest:
        if record["device"] == device:
            found[tuple(record["largest"].items())][record["engine"]].append(record)
    return found


def _search_label(search: tuple[Any, ...]) -> str:
    asked = dict(search)
    parts = [f"width {asked['width']} {asked['precision']}", f"batch {asked['batch']}", f"length {asked['length']}"]
    parts += [f"{asked['gpu_gib']:g} GiB of GPU"] if asked.get("gpu_gib") else []
    parts += [f"{asked['host_gib']:g} GiB of host"] if asked.get("host_gib") else []
    parts += [f"{asked['gpus']} GPUs"] if asked.get("gpus", 1) > 1 else []
    return ", ".join(parts)


def largest(raw: Raw, device: str) -> list[str]:
    rows = []
    for search, engines in _searches(raw, device).items():
        for engine, tries in engines.items():
            best = max((one for one in tries if one["worked"]), key=lambda one: one["layers"], default=None)
            failed = min((one for one in tries if not one["worked"]), key=lambda one: one["layers"], default=None)
            why = "" if failed is None else f"{failed['layers']}: {failed.get('failed') or failed.get('error')}"
            why = why.replace("|", "/").replace("\n", " ")[:160]
            if best is None:
                rows.append([_search_label(search), engine, "none", "", "", "", why])
                continue
            peaks = [best.get("peak_allocated_whole_run"), best.get("rss_peak_bytes"), best.get("machine_used_bytes")]
            shown = [f"{peak / GIB:.1f}" if peak else "-" for peak in peaks]
            size = f"{best['num_parameters'] / 1e9:.2f} B ({best['layers']})"
            row = [size, f"{best['tokens_per_s']:.0f}", shown[0], " / ".join(shown[1:]), why]
            rows.append([_search_label(search), engine, *row])
    heads = ["search", "engine", "largest (layers)", "tokens/s", "GPU GiB", "host GiB: process / machine"]
    return table([*heads, "smallest that failed"], rows)


def common_sizes(raw: Raw, device: str) -> list[tuple[str, int, Record, Record]]:
    """(search, layers, ours, DeepSpeed) for every size that both trained with stage 3."""
    found = []
    for search, engines in _searches(raw, device).items():
        ours, theirs = (
            {one["layers"]: one for one in engines.get(name, []) if one["worked"]}
            for name in ("ours-z3", "deepspeed-z3")
        )
        found += [
            (_search_label(search), layers, ours[layers], theirs[layers]) for layers in sorted(ours) if layers in theirs
        ]
    return found


def _host_bytes(record: Record) -> int:
    """What the machine had less of, or, where others used it too, what the process held at its peak."""
    return record.get("machine_used_bytes") or record.get("rss_peak_bytes") or 0


def common(raw: Raw, device: str) -> list[str]:
    rows = []
    for label, layers, ours, theirs in common_sizes(raw, device):
        size = f"{ours['num_parameters'] / 1e9:.2f} B ({layers})"
        speeds = [f"{one['tokens_per_s']:.0f}" for one in (ours, theirs)]
        peaks = [f"{one.get('peak_allocated_whole_run', 0) / GIB:.1f}" for one in (ours, theirs)]
        hosts = [f"{_host_bytes(one) / one['num_parameters']:.1f}" for one in (ours, theirs)]
        ratio = f"{ours['tokens_per_s'] / theirs['tokens_per_s']:.2f}"
        rows.append([label, size, *speeds, ratio, " / ".join(peaks), " / ".join(hosts)])
    heads = ["search", "size (layers)", "ours tokens/s", "DeepSpeed tokens/s", "ours / DeepSpeed"]
    return table([*heads, "GPU GiB: ours / DeepSpeed", "host B a parameter: ours / DeepSpeed"], rows)


def lost_ranks(raw: Raw, device: str) -> list[str]:
    rows = []
    for record in raw.lost_ranks:
        if record["device"] != device:
            continue
        asked = record["lost_rank"]
        told = (record.get("failed") or record.get("message") or "").replace("|", "/")[:300]
        after = "never" if record.get("seconds") is None else f"{record['seconds']:.1f}"
        ended = [after, str(record.get("exit_code")), told]
        rows.append([asked["config"], asked["how"], asked["launcher"], f"{asked['timeout_s']:g}", *ended])
    heads = [
        "config",
        "the last rank",
        "started by",
        "time-out s",
        "the rest ended after s",
        "exit code",
        "what it said",
    ]
    return table(heads, rows)


def losses(raw: Raw, device: str) -> list[str]:
    """Every number that misses its target, as a list."""
    found: list[str] = []

    def judge(what: str, value: float | None, is_missed: bool, target: str) -> None:
        if value is not None and is_missed:
            found.append(f"- {what}: {value:.2f} (target {target})")

    present = {cell.setting for cell in raw.cells(device)}
    for cell in raw.cells(device):
        if not (cell.setting.other and cell.setting._replace(other="") in present):
            _judge_steps(cell, judge)
    for limited in limited_cells(raw, device):
        if limited.cell.setting.model.startswith("decoder"):
            limit = limited.over("gpu", "dram", "pcie")
            judge(f"{limited.cell.label}: step / the largest of the three limits", limit, limit > 1.3, "<= 1.3")
    for model, times in sorted(first_steps(raw, device).items()):
        ours, theirs = median_or_none(times["ours"]), median_or_none(times["deepspeed"])
        value = ours / theirs if ours and theirs else None
        judge(f"{model}: first step, ours / DeepSpeed on a clean cache", value, bool(value and value > 0.3), "<= 0.3")
    for cell in raw.cells(device, several=True):
        for other, target in (("plain", 1.0), ("deepspeed", 1.0)):
            value = median_or_none(cell.ratios("ours", other, "tokens_per_s"))
            what = f"{cell.setting.world_size} x {cell.label}: tokens/s, ours / {NAMES[other]}"
            judge(what, value, bool(value and value < target), f">= {target:g}")
    for label, layers, ours, theirs in common_sizes(raw, device):
        value = ours["tokens_per_s"] / theirs["tokens_per_s"]
        judge(f"{label}, {layers} layers: stage 3 tokens/s, ours / DeepSpeed", value, value < 1.5, ">= 1.5")
    return found


def _judge_steps(cell: Cell, judge: Any) -> None:
    decoder, base = cell.setting.model.startswith("decoder"), cell.setting.model == "t5-base"
    value = median_or_none(cell.ratios("ours", "plain"))
    judge(f"{cell.label}: step, ours / plain", value, bool(value and value > 1.0), "<= 1.0")
    value = median_or_none(cell.ratios("deepspeed", "ours"))
    target = 2.0 if decoder else 1.8 if base and cell.setting.batch <= 64 else 1.2
    if cell.variant.config == "zero3_offload":
        target = 1.5
    judge(f"{cell.label}: step, DeepSpeed / ours", value, bool(value and value < target), f">= {target}")
    value = median_or_none(cell.ratios("torchao", "ours"))
    judge(f"{cell.label}: step, torchao / ours", value, bool(value and value < 1.0), ">= 1.0")
    value = median_or_none(cell.ratios("ours", "deepspeed", "peak_allocated"))
    judge(f"{cell.label}: GPU memory, ours / DeepSpeed", value, bool(value and value > 0.95), "<= 0.95")
    value = median_or_none(cell.ratios("ours", "plain", "peak_allocated"))
    judge(f"{cell.label}: GPU memory, ours / plain", value, bool(value and value > 1.0), "<= 1.0")
    own = host_bytes(cell, "ours")[0] if is_sizeable(cell) else None
    judge(f"{cell.label}: host bytes a parameter, libraries left out", own, bool(own and own > 15), "<= 15")
    cores = [cell.values(engine, "cpu_seconds_per_second") for engine in ("ours", "plain")]
    if all(cores):
        value = statistics.median(cores[0]) - statistics.median(cores[1])
        judge(f"{cell.label}: cores busy beyond plain's", value, value > 1.0, "<= 1")
