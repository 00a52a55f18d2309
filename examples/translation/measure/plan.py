"""Which cells are still to be measured, in which order and in which processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

from measure.rows import Key
from measure.spec import DATA_PARALLEL, Spec


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
                if engine == DATA_PARALLEL and template.num_gpus == 1:
                    continue  # that is the plain Trainer
                whole = dataclasses.replace(
                    template, model=model, engine=engine, round=round_number, batches=list(wanted.batches)
                )
                left = [batch for batch, key in zip(whole.batches, keys_of(whole)) if key not in done]
                if grouped and left:
                    specs.append(dataclasses.replace(whole, batches=left))
                elif left:
                    specs.extend(dataclasses.replace(whole, batches=[batch]) for batch in left)
    return specs


def lanes(specs: Sequence[Spec], gpus: Sequence[str]) -> list[list[Spec]]:
    """Share processes of one GPU among ``gpus``, to run side by side; those of several GPUs run one after the other.

    A model stays on its GPU: its engines run there in turn, so that a difference between GPUs meets all of them.
    """
    if not gpus or not specs or specs[0].num_gpus > 1:
        chosen = ",".join(gpus[: specs[0].num_gpus]) if specs else ""
        return [[dataclasses.replace(spec, gpus=chosen) for spec in specs]]
    models = list(dict.fromkeys(spec.model for spec in specs))
    place = {model: number % len(gpus) for number, model in enumerate(models)}
    num_lanes = len(set(place.values()))
    return [
        [
            dataclasses.replace(spec, gpus=gpus[lane], num_side_by_side=num_lanes)
            for spec in specs
            if place[spec.model] == lane
        ]
        for lane in range(num_lanes)
    ]
