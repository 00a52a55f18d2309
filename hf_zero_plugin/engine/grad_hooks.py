"""Calling an object when a parameter's gradient is there, without keeping the object alive.

A hook of a parameter is hidden from the garbage collector: what it held on to would stay for ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["when_grad_is_there"]

Owner = TypeVar("Owner")


def when_grad_is_there(param: nn.Parameter, owner: Owner, call: Callable[[Owner, Tensor], None]) -> RemovableHandle:
    """``call(owner, param)`` each time ``param.grad`` is complete; ``call`` itself must not hold ``owner``."""
    reference = weakref.ref(owner)

    def hook(ready: Tensor) -> None:
        mine = reference()
        if mine is not None:
            call(mine, ready)

    handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)
    return handle
