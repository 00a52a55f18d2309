"""How often clipping changes a step, from the gradient norms that the Trainer has logged.

    hf-zero run examples/translation/run_translation.py ... --max_grad_norm 1.0 --logging_steps 1 --output_dir out
    python benchmarks/clipping.py out/trainer_state.json --max-norm 1.0 --out benchmarks/raw/clipping.json

An update that begins before the norm is known, during the backward pass, has to be undone in these steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path


def norms_of(state: Path) -> list[float]:
    """Every logged ``grad_norm``, in the order of the steps.

    Raises:
        SystemExit: with code 2 if the file is not a Trainer's state or holds no norms.
    """
    try:
        history = json.loads(state.read_text())["log_history"]
        norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
        if not norms:
            raise ValueError("no grad_norm was logged")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{state}: expected the trainer_state.json of a training with --logging_steps 1 ({error!r})")
        raise SystemExit(2) from error
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, help="trainer_state.json")
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="keep the norms here")
    args = parser.parse_args()
    norms = norms_of(args.state)
    clipped = sum(norm > args.max_norm for norm in norms)
    spread = f"{min(norms):.2f} to {max(norms):.2f}, median {statistics.median(norms):.2f}"
    print(f"{clipped} of {len(norms)} steps have a norm above {args.max_norm:g} ({spread})")
    if args.out is not None:
        args.out.write_text(json.dumps({"max_norm": args.max_norm, "clipped": clipped, "norms": norms}) + "\n")


if __name__ == "__main__":
    main()
