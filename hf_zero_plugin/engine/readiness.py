"""Who must wait before weights are read.

Overlap means that after ``step`` returns, weights may still be on their way. Everything that looks at them goes
through one of these doors, and each door waits for no more than it needs:

    a module's forward           its own parameters' buckets (pre-forward hooks on modules that own parameters)
    named_parameters, parameters, state_dict, load_state_dict of any module of the model     all buckets
    GatheredParameters, save, evaluate, export, destroy                                       all buckets

Code that keeps a tensor of its own and reads it right after ``step`` calls ``engine.synchronize()``. Code that walks
over parameters for their sizes or types alone, every step, does so inside ``unguarded()``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_zero_plugin.engine.buckets import BucketLayout
from hf_zero_plugin.engine.master_weights import MasterWeights

__all__ = ["Doors", "is_training", "unguarded"]

_open: weakref.WeakSet[Doors] = weakref.WeakSet()
_patched: dict[str, Callable[..., Any]] = {}
_lock = threading.Lock()
_state = threading.local()


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Enumerate parameters without waiting for their values; for looking at shapes, types and devices."""
    previous = getattr(_state, "unguarded", False)
    _state.unguarded = True
    try:
        yield
    finally:
        _state.unguarded = previous


def is_training(module: nn.Module) -> bool:
    """Whether a living engine holds ``module``."""
    return any(doors.holds(module) for doors in list(_open))


class Doors:
    """Hooks of one engine; ``close`` removes every trace."""

    def __init__(self, model: nn.Module, layouts: list[BucketLayout], params: list[nn.Parameter]) -> None:
        self._masters: MasterWeights | None = None
        self._handles: list[RemovableHandle] = []
        bucket_of = {id(params[slot.spec.index]): layout.index for layout in layouts for slot in layout.slots}
        for module in model.modules():
            own = {bucket_of[id(p)] for p in module._parameters.values() if p is not None and id(p) in bucket_of}
            if own:
                self._handles.append(module.register_forward_pre_hook(_Wait(self, tuple(sorted(own)))))
        self._modules = weakref.WeakSet(model.modules())

    def guard(self, masters: MasterWeights) -> None:
        self._masters = masters
        with _lock:
            _open.add(self)
            _patch()

    @property
    def masters(self) -> MasterWeights | None:
        return self._masters

    def holds(self, module: nn.Module) -> bool:
        return module in self._modules

    def wait_if_mine(self, module: nn.Module) -> None:
        if self._masters is not None and self._masters.any_pending and self.holds(module):
            self._masters.wait_all()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with _lock:
            _open.discard(self)
            if not _open:
                _unpatch()
        self._masters = None


class _Wait:
    """Pre-forward hook of one module. A copied or pickled module does not take the engine along: its hook is dead."""

    def __init__(self, doors: Doors | None, buckets: tuple[int, ...]) -> None:
        self._doors = weakref.ref(doors) if doors is not None else lambda: None
        self._buckets = buckets

    def __call__(self, module: nn.Module, args: Any) -> None:
        doors = self._doors()
        masters = doors.masters if doors is not None else None
        if masters is not None and masters.any_pending:
            for bucket in self._buckets:
                masters.wait(bucket)

    def __deepcopy__(self, memo: Any) -> _Wait:
        return _Wait(None, ())

    def __reduce__(self) -> tuple[Any, ...]:
        return _Wait, (None, ())


def _guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_state, "unguarded", False):
            for doors in list(_open):
                doors.wait_if_mine(self)
        return original(self, *args, **kwargs)

    return call


def _patch() -> None:
    """Enumerating parameters is how callbacks (averaging, norms, loggers) reach weights: wait there.

    nn.Module has no hook for it. The methods are wrapped only while an engine lives.
    """
    if _patched:
        return
    for name in ("named_parameters", "state_dict"):
        original = getattr(nn.Module, name)
        _patched[name] = original
        setattr(nn.Module, name, _guarded(name, original))


def _unpatch() -> None:
    for name, original in _patched.items():
        setattr(nn.Module, name, original)
    _patched.clear()
