"""Which engine holds a parameter: for callers who have the parameter and nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["engines_of", "register", "unregister"]

_engines: weakref.WeakSet[ZeroEngine] = weakref.WeakSet()


def register(engine: ZeroEngine) -> None:
    _engines.add(engine)


def unregister(engine: ZeroEngine) -> None:
    _engines.discard(engine)


def engines_of(params: Iterable[nn.Parameter]) -> list[ZeroEngine]:
    """Living engines that train any of ``params``."""
    wanted = {id(param) for param in params}
    return [engine for engine in _engines if wanted & engine.parts.param_ids]
