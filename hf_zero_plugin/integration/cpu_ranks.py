"""Several CPU processes see each other: a repair of how accelerate chooses its backend.

``accelerate.state.PartialState._prepare_backend(cpu, ...)`` decides what a launched process belongs to. Asked with
``cpu=False`` (every Trainer without ``--use_cpu``) on a machine without accelerator, it finds no backend, and every
rank believes to be alone: world size 1, rank 0, each of them training on all of the data and writing all of the
files. Asked with ``cpu=True`` it finds gloo, but then DeepSpeed configs are ignored. So neither ``--use_cpu`` nor
``ACCELERATE_USE_CPU`` is the answer, and there is no other switch from outside.

The repair answers "gloo, several CPU processes" where accelerate answers "nothing": ranks were launched, there is
more than one, and no accelerator. Everywhere else its own answer stands. accelerate does the rest by itself, with
and without DeepSpeed: process group, device, rank.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

__all__ = ["repair_partial_state"]

_REPAIRED = "_hf_zero_cpu_ranks"


def repair_partial_state(accelerate_state: ModuleType) -> None:
    """Wrap ``PartialState._prepare_backend``. Call it once ``accelerate.state`` is imported; twice is harmless.

    Args:
        accelerate_state: the module ``accelerate.state``. A version of it without this method is left as it is.
    """
    partial_state = accelerate_state.PartialState
    prepare = getattr(partial_state, "_prepare_backend", None)
    if prepare is None or getattr(prepare, _REPAIRED, False):
        return
    no_backend = accelerate_state.DistributedType.NO
    cpu_ranks = accelerate_state.DistributedType.MULTI_CPU

    @functools.wraps(prepare)
    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        backend, distributed_type = prepare(self, *args, **kwargs)
        if distributed_type == no_backend and num_launched_ranks() > 1:
            return "gloo", cpu_ranks
        return backend, distributed_type

    setattr(prepare_backend, _REPAIRED, True)
    partial_state._prepare_backend = prepare_backend


def num_launched_ranks() -> int:
    """Processes that a launcher such as torchrun says it started; 1 when none did."""
    if "LOCAL_RANK" not in os.environ:
        return 1
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 1
