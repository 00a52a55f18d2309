"""Small parts of mixed precision: types by name, inputs cast to the weights' type, gradients that may travel narrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_zero_plugin.errors import ConfigError

__all__ = ["DTYPES", "cast_floats", "params_of_safe_modules"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By the names that settings use."""

_PATH = "$.torch_autocast.lower_precision_safe_modules"


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating-point tensor in it, at any depth of lists, tuples and dicts, in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        cast = {key: cast_floats(item, dtype) for key, item in value.items()}
        return cast if type(value) is dict else type(value)(cast)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast_floats(item, dtype) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(cast_floats(item, dtype) for item in value)
    return value


def params_of_safe_modules(module: nn.Module, names: Sequence[str]) -> set[int]:
    """Ids of the parameters that belong to modules of the named classes, and to no other module.

    Args:
        names: import paths, such as ``torch.nn.Linear``.

    Raises:
        ConfigError: there is no such class.
    """
    classes = tuple(_class_of(name) for name in names)
    inside: set[int] = set()
    outside: set[int] = set()
    for submodule, param in _owned_params(module):
        (inside if isinstance(submodule, classes) else outside).add(id(param))
    return inside - outside


def _owned_params(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    for submodule in module.modules():
        for param in submodule._parameters.values():
            if param is not None:
                yield submodule, param


def _class_of(path: str) -> type:
    home, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not isinstance(found, type):
        raise ConfigError(
            f'{_PATH}: there is no class "{path}". Write the import path of a module class, such as torch.nn.Linear.'
        )
    return found
