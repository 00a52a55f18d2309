"""Write the tables of README.md from raw JSON lines. Ratios are taken within a round; their median and spread is shown.

python benchmarks/table.py benchmarks/raw/*.jsonl                              # print them
python benchmarks/table.py benchmarks/raw/*.jsonl --write benchmarks/README.md # put them between the markers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import tables
import tables_ranks
from raw import Raw

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"

SECTIONS: tuple[tuple[str, str, Callable[[Raw, str], list[str]]], ...] = (
    ("Step time", "Milliseconds: median (least-most) over the measured steps of all rounds.", tables.steps),
    ("GPU memory", "Peak memory allocated by a step, after the warm-up.", tables.memory),
    (
        "Tokens",
        "Tokens a second without padding, over the median step; source and target count. Other columns as above.",
        tables.throughput,
    ),
    ("From the start of the process to the end of the first optimizer step", "", tables.first_step),
    (
        "Host memory",
        "Bytes a parameter, at the peak: what the process gained after importing its libraries and touching the GPU / "
        "all that was resident, libraries included / what the machine as a whole had less of meanwhile.",
        tables.host_memory,
    ),
    (
        "The limit of a step",
        "GPU: time in which a kernel of forward and backward ran (engine compute). 28 B: the bytes of a host update, a "
        "parameter, over the measured memory bandwidth. 2 B: half-precision gradients down and weights up. 12 B: what "
        "this engine moves in each direction instead, because it streams the states through the GPU.",
        tables.limits,
    ),
    (
        "Our other ways",
        "ours-host updates on host cores, ours-both there and on the GPU, ours-device offloads nothing, ours-auto "
        "fills a budget on the GPU first, ratio is the share of the states on the host.",
        tables.variants,
    ),
    ("Several GPUs", "Tokens a second of all ranks; batch is per GPU.", tables_ranks.several_gpus),
    (
        "The same losses on several GPUs",
        "Against one GPU with the same global batch and order of the data, step by step. Scale: the Trainer multiplies "
        "the reported loss by the number of ranks where the model does not divide by the number of tokens itself.",
        tables_ranks.parity,
    ),
    (
        "The largest decoder",
        "Three steps, zero3_offload.json for z3; GPU memory over the whole run.",
        tables_ranks.largest,
    ),
    ("Sizes that both trained at stage 3", "", tables_ranks.common),
    ("A rank is lost", "", tables_ranks.lost_ranks),
    ("Cells that failed", "", tables.failures),
    ("What we lose at", "Every number that misses its target, made by the script.", tables_ranks.losses),
)


def render(raw: Raw) -> str:
    parts: list[str] = []
    for device in raw.devices:
        parts.append(f"## {device}\n\n{tables.machine(raw.limits[device])}" if device in raw.limits else f"## {device}")
        for title, note, make in SECTIONS:
            if lines := make(raw, device):
                parts.append("\n\n".join(filter(None, [f"### {title}", note, "\n".join(lines)])))
    return "\n\n".join(parts)


def replace_between_markers(text: str, tables_text: str) -> str:
    """Raises ValueError if a marker is missing."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:begin]}\n{tables_text}\n{text[end:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, help="file with the two markers")
    args = parser.parse_args()
    text = render(Raw(args.raw))
    if args.write is None:
        print(text)
    else:
        args.write.write_text(replace_between_markers(args.write.read_text(), text))


if __name__ == "__main__":
    main()
