"""A checkpoint of the Trainer is written once, also where weights are not gathered.

With ``stage3_gather_16bit_weights_on_model_save: false`` the Trainer asks for one folder twice::

    _save_checkpoint
        save_model                      weights are refused -> engine.save_checkpoint("checkpoint-120")   put off
        _save_optimizer_and_scheduler                          engine.save_checkpoint("checkpoint-120")   written

It is the second that has always stayed on the disk. The first is put off until then, and no longer: should the second
not come, because a subclass saves optimizer states in a way of its own, it is made up for when the saving ends.
``save_only_model`` asks once, and so does ``save_model`` when it is called by itself.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["engine_of", "in_save_model", "write_once"]

_WRITES = "_zero_writes"


def engine_of(trainer: Any) -> ZeroEngine | None:
    engine = getattr(trainer, "deepspeed", None)
    return engine if isinstance(engine, ZeroEngine) else None


class _Writes:
    """What is asked of ``engine.save_checkpoint`` while the Trainer saves the checkpoint ``name``."""

    def __init__(self, write: Callable[..., bool], name: str) -> None:
        self._write = write
        self._name = name
        self._put_off: str | None = None
        self.in_save_model = False

    def save_checkpoint(self, save_dir: str, *args: Any, **kwargs: Any) -> bool:
        is_plain = not args and not kwargs
        if self.in_save_model and is_plain and os.path.basename(os.path.normpath(save_dir)) == self._name:
            self._put_off = save_dir
            return True
        if self._put_off is not None and os.path.normpath(save_dir) == os.path.normpath(self._put_off):
            self._put_off = None
        return self._write(save_dir, *args, **kwargs)

    def make_up(self) -> None:
        if self._put_off is not None:
            self._write(self._put_off)


def write_once(module: ModuleType) -> None:
    """Wrap ``_save_checkpoint`` of the Trainer in ``module`` (transformers.trainer)."""
    cls = module.Trainer
    save = cls._save_checkpoint

    @functools.wraps(save)
    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = engine_of(self)
        if engine is None or self.args.save_only_model:
            return save(self, *args, **kwargs)
        writes = _Writes(engine.save_checkpoint, f"{module.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with _standing_in(engine, writes):
            vars(self)[_WRITES] = writes
            try:
                result = save(self, *args, **kwargs)
            finally:
                del vars(self)[_WRITES]
            writes.make_up()
        return result

    cls._save_checkpoint = _save_checkpoint


@contextmanager
def _standing_in(engine: ZeroEngine, writes: _Writes) -> Iterator[None]:
    @functools.wraps(engine.save_checkpoint)  # the Trainer looks at its parameters
    def save_checkpoint(*args: Any, **kwargs: Any) -> bool:
        return writes.save_checkpoint(*args, **kwargs)

    before = {name: method for name, method in vars(engine).items() if name == "save_checkpoint"}
    vars(engine)["save_checkpoint"] = save_checkpoint
    try:
        yield
    finally:
        del vars(engine)["save_checkpoint"]
        vars(engine).update(before)


@contextmanager
def in_save_model(trainer: Any) -> Iterator[None]:
    """Around ``Trainer.save_model``: what it saves in place of weights may wait, inside ``_save_checkpoint``."""
    writes: _Writes | None = vars(trainer).get(_WRITES)
    if writes is None:
        yield
        return
    writes.in_save_model = True
    try:
        yield
    finally:
        writes.in_save_model = False
