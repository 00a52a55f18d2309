"""Write the tables of README.md from raw JSON lines. Ratios are taken within a round, then their median is shown.

python benchmarks/table.py benchmarks/raw/*.jsonl > benchmarks/tables.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]


def read(paths: Iterable[Path]) -> tuple[dict[str, Any], dict[Key, dict[str, dict[str, Any]]]]:
    """The limits measured beside the cells, and cells by (model, precision, batch), then engine/round."""
    limits: dict[str, Any] = {}
    cells: dict[Key, dict[str, dict[str, Any]]] = defaultdict(dict)
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if "limits" in record:
                limits = record["limits"]
            elif "step_ms" in record:
                key = (record["model"], record["precision"], record["batch"])
                cells[key][f"{record['engine']}/{path.name}/{record['round']}"] = record
    return limits, cells


def rounds_of(cell: dict[str, dict[str, Any]], engine: str) -> dict[str, dict[str, Any]]:
    return {name.split("/", 1)[1]: record for name, record in cell.items() if name.split("/")[0] == engine}


def show_ms(cell: dict[str, dict[str, Any]], engine: str) -> str:
    steps = [ms for record in rounds_of(cell, engine).values() for ms in record["step_ms"]]
    if not steps:
        return ""
    return f"{statistics.median(steps):.0f} ({min(steps):.0f}-{max(steps):.0f})"


def ratio(cell: dict[str, dict[str, Any]], above: str, below: str, field: str = "step_ms_median") -> str:
    top, bottom = rounds_of(cell, above), rounds_of(cell, below)
    both = [top[name][field] / bottom[name][field] for name in top if name in bottom]
    return f"{statistics.median(both):.2f}" if both else ""


def peak(cell: dict[str, dict[str, Any]], engine: str) -> str:
    peaks = [record.get("peak_allocated", 0) for record in rounds_of(cell, engine).values()]
    return f"{max(peaks) / 2**30:.2f}" if peaks else ""


def main() -> None:
    limits, cells = read(Path(name) for name in sys.argv[1:])
    print(
        f"{limits.get('device', 'CPU')}, torch {limits['torch']}, {limits['threads']} host threads. "
        f"Limits measured in the same run, GB/s: host to device {limits.get('h2d_gb_s', 0):.0f}, "
        f"device to host {limits.get('d2h_gb_s', 0):.0f}, both at once {limits.get('both_gb_s', 0):.0f}, "
        f"host copy {limits['host_copy_gb_s']:.0f}, fused AdamW on the host {limits['host_adamw_gb_s']:.0f}.\n"
    )
    print("| model | batch | rounds | plain ms | ours ms | DeepSpeed ms | ours / plain | DeepSpeed / ours |")
    print("|---|---|---|---|---|---|---|---|")
    for (model, precision, batch), cell in sorted(cells.items()):
        print(
            f"| {model} {precision} | {batch} | {len(rounds_of(cell, 'ours'))} | {show_ms(cell, 'plain')} | "
            f"{show_ms(cell, 'ours')} | {show_ms(cell, 'deepspeed')} | {ratio(cell, 'ours', 'plain')} | "
            f"{ratio(cell, 'deepspeed', 'ours')} |"
        )
    print("\nMilliseconds: median (least-most) over the measured steps of all rounds.\n")
    print(
        "| model | batch | plain GiB | ours GiB | DeepSpeed GiB | ours / plain | ours / DeepSpeed | "
        "cores busy: plain, ours, DeepSpeed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (model, precision, batch), cell in sorted(cells.items()):
        cores = [
            f"{statistics.median(r['cpu_seconds_per_second'] for r in found.values()):.1f}" if found else "-"
            for found in (rounds_of(cell, engine) for engine in ("plain", "ours", "deepspeed"))
        ]
        print(
            f"| {model} {precision} | {batch} | {peak(cell, 'plain')} | {peak(cell, 'ours')} | "
            f"{peak(cell, 'deepspeed')} | "
            f"{ratio(cell, 'ours', 'plain', 'peak_allocated')} | "
            f"{ratio(cell, 'ours', 'deepspeed', 'peak_allocated')} | "
            f"{', '.join(cores)} |"
        )
    print("\nPeak device memory allocated.\n")
    firsts = defaultdict(list)
    for cell in cells.values():
        for name, record in cell.items():
            if record["first_step_s"]:
                firsts[name.split("/")[0]].append(record["first_step_s"])
    print("| engine | process start to first optimizer step, s |\n|---|---|")
    for engine, values in firsts.items():
        print(f"| {engine} | {statistics.median(values):.1f} |")
    print()
    heaviest = [item for cell in cells.values() for item in cell.items() if item[1]["num_parameters"] > 10**8]
    for engine in ("plain", "ours", "deepspeed"):
        found = [r["rss_bytes"] / r["num_parameters"] for n, r in heaviest if n.split("/")[0] == engine]
        if found:
            print(
                f"- {engine}: {max(found):.1f} bytes of resident host memory per parameter, the libraries' own included"
            )


if __name__ == "__main__":
    main()
