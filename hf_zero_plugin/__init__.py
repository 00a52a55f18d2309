"""ZeRO and offload for the Hugging Face Trainer, built of PyTorch parts only.

Importing this package costs next to nothing: no torch, no transformers. Names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["ConfigError", "HfZeroError", "ZeroCallback", "ZeroEngine", "__version__", "activate", "initialize"]

_HOMES = {
    "activate": "hf_zero_plugin.integration.activate",
    "ConfigError": "hf_zero_plugin.errors",
    "HfZeroError": "hf_zero_plugin.errors",
    "ZeroCallback": "hf_zero_plugin.integration.callback",
    "ZeroEngine": "hf_zero_plugin.engine.engine",
    "initialize": "hf_zero_plugin.integration.initialize",
}

if TYPE_CHECKING:
    from hf_zero_plugin.engine.engine import ZeroEngine
    from hf_zero_plugin.errors import ConfigError, HfZeroError
    from hf_zero_plugin.integration.activate import activate
    from hf_zero_plugin.integration.callback import ZeroCallback
    from hf_zero_plugin.integration.initialize import initialize


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
