"""Names that exist so that asking for them gives a clear answer."""

from __future__ import annotations

from typing import Any, NoReturn

from hf_zero_plugin.errors import UnsupportedFeature

__all__ = ["init_inference", "tp_model_init"]


def tp_model_init(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedFeature(
        "$.tensor_parallel.autotp_size: tensor parallelism is not part of this engine. "
        "Remove the tensor_parallel section; use ZeRO stage 3 to divide a model over devices."
    )


def init_inference(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedFeature("deepspeed.init_inference: this engine trains only. Call model.generate directly.")
