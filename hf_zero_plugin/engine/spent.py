"""Models whose weights were taken apart when an error interrupted the making of an engine.

Sharding replaces a model's parameters by empty shards and fills these one at a time. What is left after an error in
between computes, and would train and be saved, with whatever was in memory. So it does nothing any more but say so.
What can be found out about a configuration is found out before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from hf_zero_plugin.errors import HfZeroError

__all__ = ["refuse_spent", "taking_apart"]

ATTRIBUTE = "_zero_spent"


@contextmanager
def taking_apart(model: nn.Module) -> Iterator[None]:
    """An error inside leaves no weights in ``model``."""
    try:
        yield
    except BaseException as error:
        _spend(model, error)
        raise


def _spend(model: nn.Module, error: BaseException) -> None:
    """From now on no part of ``model`` computes or has a state dict."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]

    def refuse(*_: Any) -> NoReturn:
        raise HfZeroError(
            "this model has no weights any more: while its ZeRO-3 engine was made and its parameters were moved into "
            f"shards, there was an error ({reason}). Load or build the model anew."
        )

    setattr(model, ATTRIBUTE, refuse)
    for module in model.modules():
        module.register_forward_pre_hook(refuse, prepend=True)
        module.register_state_dict_pre_hook(refuse)


def refuse_spent(model: nn.Module) -> None:
    """Raises HfZeroError: ``model``, or a part of it, has been spent."""
    for module in model.modules():
        if refuse := vars(module).get(ATTRIBUTE):
            refuse()
