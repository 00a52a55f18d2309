"""Which cells are still to be measured, in which order and in which processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

from measure.rows import Key
from measure.spec import Spec


class Wanted(NamedTuple):
    """The axes of a sweep."""

    models: Sequence[str]
    engines: Sequence[str]
    batches: Sequence[int]
    num_rounds: int


def keys_of(spec: Spec) -> list[Key]:
    return [spec.row(batch_size).key for batch_size in spec.batches]


def plan(wanted: Wanted, template: Spec, done: Collection[Key], *, grouped: bool) -> list[Spec]:
    """Processes in the order in which they should run: engines in turn, so that a machine's drift meets all of them.

    Args:
        done: cells that are left out.
        grouped: one process measures all batch sizes of one (model, engine); otherwise one process a cell.
    """
    specs: list[Spec] = []
    for round_number in range(wanted.num_rounds):
        for model in wanted.models:
            for engine in wanted.engines:
                whole = dataclasses.replace(
                    template, model=model, engine=engine, round=round_number, batches=list(wanted.batches)
                )
                left = [batch for batch, key in zip(whole.batches, keys_of(whole)) if key not in done]
                if grouped and left:
                    specs.append(dataclasses.replace(whole, batches=left))
                elif left:
                    specs.extend(dataclasses.replace(whole, batches=[batch]) for batch in left)
    return specs
