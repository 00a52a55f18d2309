"""Cells of one CSV are compared with each other, so they must have been measured alike: same text, settings, device."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from errors import UserError

from measure.rows import Row
from measure.spec import Spec

ANOTHER_FOLDER = "name another folder for these, such as --out out/sweep_2"


SHARED = "cells_share_processes"
"""Key of sweep.json: whether some cells were measured one after the other in one process (``--group``)."""


def settings_of(spec: Spec) -> dict[str, Any]:
    """What sweep.json keeps of a sweep."""
    return {
        "text": Path(spec.train_file).parent.name,
        "samples": spec.num_samples,
        "max_length": spec.max_length,
        "seed": spec.seed,
    }


def check_settings(csv: Path, rows: Collection[Row], known: dict[str, Any], spec: Spec) -> None:
    """Raises UserError: the file's cells were measured with other settings than these."""
    if not rows:
        return
    differing = [
        f"{name} {known[name]}, asked is {now}"
        for name, now in settings_of(spec).items()
        if name in known and known[name] != now
    ]
    # A CPU trains in fp32 whatever is asked.
    precisions = {row.precision for row in rows if row.precision and row.device != "cpu"} - {spec.precision}
    if precisions:
        differing.append(f"precision {', '.join(sorted(precisions))}, asked is {spec.precision}")
    if differing:
        raise UserError(
            f"{csv}: its cells were measured with {'; '.join(differing)}. Ask the same, or {ANOTHER_FOLDER}."
        )


def check_device(csv: Path, rows: Collection[Row], facts: dict[str, Any]) -> None:
    """Raises UserError: the file's cells were measured on another device than the one that ``facts`` describe."""
    here = str(facts["device"]) if facts["num_visible_gpus"] else "cpu"
    others = sorted({row.device for row in rows if row.device} - {here})
    if others:
        raise UserError(
            f"{csv}: its cells were measured on {', '.join(others)}, and this is {here}. Times of different devices "
            f"do not belong into one comparison: {ANOTHER_FOLDER}. To mix them all the same: --mix-devices."
        )
