"""Tensors whose values come later.

A pending tensor has a shape and a type, lies on the meta device, and knows whom to ask for its values. Whoever plans a
file with it (names, sizes, order) never needs them; whoever writes the file asks for one tensor at a time. What is
computed from pending tensors is pending too, so that renaming, cutting and stacking on the way to the file cost
nothing until the result is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_zero_plugin.errors import HfZeroError

__all__ = ["Pending", "values_of"]


class Pending(Tensor):
    """Make one with ``Pending.of``; ``values_of`` asks for the values, every time anew."""

    _fetch: Callable[[], Tensor]

    @staticmethod
    def of(shape: torch.Size, dtype: torch.dtype, fetch: Callable[[], Tensor]) -> Pending:
        # A tensor of its own, never a view: its storage has the size that the values will have.
        made: Pending = torch.empty(shape, dtype=dtype, device="meta").as_subclass(Pending)  # type: ignore[assignment]
        made._fetch = fetch
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if any(result is arg for arg in args):  # contiguous() of what is contiguous
            if getattr(func, "__name__", "").endswith("_") and not getattr(func, "__name__", "").endswith("__"):
                raise HfZeroError(f"{func.__name__}: weights that are being saved cannot be changed in place.")
            return result
        return _pending_like(result, func, args, kwargs)


def _pending_like(result: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(result, Tensor | tuple | list) or isinstance(result, torch.Size):
        return result
    if not isinstance(result, Tensor) and not any(isinstance(part, Tensor) for part in result):
        return result

    def compute() -> Any:
        real_args, real_kwargs = tree_map(values_of, (args, kwargs))
        return func(*real_args, **real_kwargs)

    if isinstance(result, Tensor):
        return Pending.of(result.shape, result.dtype, compute)

    def part(index: int) -> Tensor:
        return Pending.of(result[index].shape, result[index].dtype, lambda: compute()[index])

    return type(result)(part(index) for index in range(len(result)))


def values_of(value: Any) -> Any:
    """The values of a pending tensor; anything else as it is."""
    return value._fetch() if type(value) is Pending else value
