"""Who must wait before weights are read.

Overlap means that after ``step`` returns, weights may still be on their way. Everything that looks at them goes
through one of these doors, and each door waits for no more than it needs:

    a module's forward           its own parameters' buckets (pre-forward hooks on modules that own parameters), and
                                 those of modules below it that others read without calling them (``settle``);
                                 all buckets, once, if the model is compiled (``wait_at``)
    named_parameters, parameters, state_dict, load_state_dict, copying, pickling, moving (``to``) and casting, of any
    module of the model or around it                                                           all buckets
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

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_zero_plugin.engine.buckets import BucketLayout
from hf_zero_plugin.engine.master_weights import MasterWeights

__all__ = ["Doors", "is_training", "unguarded"]

_open: weakref.WeakSet[Doors] = weakref.WeakSet()
_patched: dict[str, Callable[..., Any] | None] = {}
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
        self._buckets = tuple(layout.index for layout in layouts)
        bucket_of = {id(params[slot.spec.index]): layout.index for layout in layouts for slot in layout.slots}
        self._waits: dict[str, tuple[_Wait, RemovableHandle]] = {}
        """Hook of every module by name, until ``settle``."""
        for name, module in model.named_modules():
            own = {bucket_of[id(p)] for p in module._parameters.values() if p is not None and id(p) in bucket_of}
            wait = _Wait(self, tuple(sorted(own)))
            self._waits[name] = wait, module.register_forward_pre_hook(wait)
        self._modules = weakref.WeakSet(model.modules())

    def settle(self) -> None:
        """Before the first update: find the modules whose parameters are read although nobody calls them.

        ``nn.MultiheadAttention`` reads ``out_proj.weight`` and never calls ``out_proj``, so a hook there never runs.
        Nothing is pending in the forward passes up to here, so they show who is called. The others' buckets are
        waited for by the nearest module above that is; hooks that wait for nothing are removed.
        """
        if not self._waits:
            return
        called = {name: wait for name, (wait, _) in self._waits.items() if wait.was_called}
        for name, (wait, _) in self._waits.items():
            if wait.was_called or not wait.buckets:
                continue
            above = name
            while above and above not in called:
                above = above.rpartition(".")[0]
            for reader in [called[above]] if above in called else called.values():
                reader.buckets = tuple(sorted({*reader.buckets, *wait.buckets}))
        for wait, handle in self._waits.values():
            if wait.buckets:
                self._handles.append(handle)
            else:
                handle.remove()
        self._waits = {}

    def wait_at(self, model: nn.Module) -> None:
        """One hook, on ``model``, in the place of those on its modules: for a model that will be compiled.

        A compiler traces through hooks: they would cut every graph, and each new set of pending buckets would be
        compiled anew. The price is that updates no longer overlap with the forward pass.
        """
        self._remove_hooks()
        self._handles.append(model.register_forward_pre_hook(_opaque_wait()(self, self._buckets)))

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

    def holds_part_of(self, module: nn.Module) -> bool:
        """Whether ``module`` is one of the model's, or a wrapper around one."""
        return self.holds(module) or any(self.holds(part) for part in module.modules())

    def wait_if_mine(self, module: nn.Module) -> None:
        if self._masters is not None and self._masters.any_pending and self.holds_part_of(module):
            self._masters.wait_all()

    def refresh_if_mine(self, module: nn.Module) -> None:
        """``module`` was loaded: the masters must follow."""
        if self._masters is not None and self.holds_part_of(module):
            self._masters.refresh_from_weights()

    def _remove_hooks(self) -> None:
        for handle in [*self._handles, *(handle for _, handle in self._waits.values())]:
            handle.remove()
        self._handles.clear()
        self._waits = {}

    def close(self) -> None:
        self._remove_hooks()
        with _lock:
            _open.discard(self)
            if not _open:
                _unpatch()
        self._masters = None


class _Wait:
    """Pre-forward hook of one module. A copied or pickled module does not take the engine along: its hook is dead."""

    def __init__(self, doors: Doors | None, buckets: tuple[int, ...]) -> None:
        self._doors = weakref.ref(doors) if doors is not None else lambda: None
        self.buckets = buckets
        self.was_called = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.was_called = True
        doors = self._doors()
        masters = doors.masters if doors is not None else None
        if masters is not None and masters.any_pending:
            for bucket in self.buckets:
                masters.wait(bucket)

    def __deepcopy__(self, memo: Any) -> _Wait:
        return _Wait(None, ())

    def __reduce__(self) -> tuple[Any, ...]:
        return _Wait, (None, ())


@functools.cache
def _opaque_wait() -> type[_Wait]:
    """A hook that compilers call and do not trace. Made on demand: loading the compiler takes seconds."""

    class Opaque(_Wait):
        __call__ = torch.compiler.disable(_Wait.__call__)

    return Opaque


def _guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_state, "unguarded", False):
            for doors in list(_open):
                doors.wait_if_mine(self)
        result = original(self, *args, **kwargs)
        if name == "load_state_dict":
            for doors in list(_open):
                doors.refresh_if_mine(self)
        return result

    return call


def _patch() -> None:
    """Enumerating parameters is how callbacks (averaging, norms, loggers) reach weights: wait there.

    nn.Module has no hook for it. The methods are wrapped only while an engine lives.
    """
    if _patched:
        return
    # __reduce_ex__ is what copy.deepcopy and pickle ask first; _apply is behind to(), cpu(), half() and their kin.
    for name in ("named_parameters", "state_dict", "load_state_dict", "__reduce_ex__", "_apply"):
        _patched[name] = nn.Module.__dict__.get(name)
        setattr(nn.Module, name, _guarded(name, getattr(nn.Module, name)))


def _unpatch() -> None:
    for name, original in _patched.items():
        if original is None:  # inherited
            delattr(nn.Module, name)
        else:
            setattr(nn.Module, name, original)
    _patched.clear()
