"""``save_model`` of weights that are not gathered: a checkpoint is saved, and how to make weights of it is said.

With ``stage3_gather_16bit_weights_on_model_save: false`` the Trainer saves a checkpoint and points at a script of
DeepSpeed's that is not there. In its place stands the command that works on what was saved, once, on one rank.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["advising_export"]

_KEY = "stage3_gather_16bit_weights_on_model_save"
_LOGGERS = ("transformers.trainer", "hf_zero_plugin")

logger = logging.getLogger("hf_zero_plugin")


@contextmanager
def advising_export(engine: ZeroEngine, output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Around one saving into ``output_dir``. If others speak of the key inside, this speaks for them afterwards."""
    held_back: list[logging.LogRecord] = []

    def is_of_something_else(record: logging.LogRecord) -> bool:
        if _KEY not in record.getMessage():
            return True
        held_back.append(record)
        return False

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for one in loggers:
        one.addFilter(is_of_something_else)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(is_of_something_else)
    if held_back and engine.global_rank == 0:
        folder = shlex.quote(os.fspath(output_dir))
        logger.warning(
            "%s: a checkpoint is saved in place of the weights, because $.zero_optimization.%s is false. Make "
            "safetensors of it, beside its config.json, with: hf-zero export %s %s\n"
            "Or set the key to true, and save_model writes them.",
            folder,
            _KEY,
            folder,
            folder,
        )
