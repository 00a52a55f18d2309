"""Which engine holds a parameter: for callers who have the parameter and nothing else."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from hf_zero_plugin.engine.readiness import unguarded

if TYPE_CHECKING:
    from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["engines_of", "engines_with", "register", "unregister"]

_engines: weakref.WeakValueDictionary[int, ZeroEngine] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(engine: ZeroEngine) -> None:
    _engines[next(_numbers)] = engine


def unregister(engine: ZeroEngine) -> None:
    for number in [number for number, other in _engines.items() if other is engine]:
        del _engines[number]


def engines_of(params: Iterable[nn.Parameter]) -> list[ZeroEngine]:
    """Living engines that train any of ``params``, in the order in which they were made: the same on every rank."""
    wanted = {id(param) for param in params}
    return [engine for _, engine in sorted(_engines.items()) if wanted & engine.parts.param_ids]


def engines_with(params: Iterable[nn.Parameter]) -> list[tuple[ZeroEngine, dict[int, int]]]:
    """As ``engines_of``, with engines that hold parameters without training them: frozen ones, or all of a model.

    Each comes with the positions of its model's parameters by id, in an order that all ranks share.
    """
    wanted = {id(param) for param in params}
    found = []
    for _, engine in sorted(_engines.items()):
        with unguarded():  # who holds what does not depend on values
            positions = {id(param): position for position, param in enumerate(engine.module.parameters())}
        if wanted & (positions.keys() | engine.parts.param_ids):
            found.append((engine, positions))
    return found
