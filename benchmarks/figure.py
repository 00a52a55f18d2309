"""Draw the README's figure from raw JSON lines: step time, device memory and busy host cores, three engines.

python benchmarks/figure.py benchmarks/raw/*.jsonl --out benchmarks/t5-base-fp16.png
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from raw import Cell, Raw

# Okabe and Ito's palette, and hatches: readable without colour.
ENGINES = {
    "plain": ("plain Trainer, no offload", "#999999", ""),
    "ours": ("this plugin, ZeRO-2 offload", "#0072B2", ""),
    "deepspeed": ("DeepSpeed 0.19.8, ZeRO-2 offload", "#E69F00", "//"),
}
BATCHES = (1, 8, 64, 256)


def value(cell: Cell | None, engine: str, field: str) -> float:
    found = cell.values(engine, field) if cell is not None else []
    return statistics.median(found) if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    raw = Raw(args.raw)
    device = raw.devices[-1]
    wanted = [cell for cell in raw.cells(device) if cell.label.startswith("t5-base fp16, batch ")]
    cells = {cell.setting.batch: cell for cell in wanted if "," not in cell.label.partition(", batch ")[2]}
    panels = [
        ("Step time, ms", "step_ms_median", 1.0, "{:.0f}"),
        ("Peak GPU memory, GiB", "peak_allocated", 2.0**-30, "{:.2g}"),
        ("Host cores busy", "cpu_seconds_per_second", 1.0, "{:.1f}"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), dpi=130)
    for axis, (title, field, factor, form) in zip(axes, panels, strict=True):
        for offset, (engine, (label, colour, hatch)) in enumerate(ENGINES.items()):
            heights = [factor * value(cells.get(batch), engine, field) for batch in BATCHES]
            places = [index + 0.27 * (offset - 1) for index in range(len(BATCHES))]
            bars = axis.bar(places, heights, 0.25, label=label, color=colour, hatch=hatch, edgecolor="white")
            axis.bar_label(bars, [form.format(height) for height in heights], fontsize=6.5, padding=1)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
        axis.set_xlabel("batch size")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    axes[1].set_yscale("log")
    axes[1].set_title("Peak GPU memory, GiB (log scale)", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"t5-base, fp16, one {device}, unmodified Seq2SeqTrainer", fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
