from hf_zero_plugin.integration.accelerator import get_accelerator
from hf_zero_plugin.integration.zero_api import (
    GatheredParameters,
    Init,
    ZeroParamStatus,
    orig_torch_arange,
    zero_wrapper_for_fp_tensor_constructor,
)

_orig_torch_arange = orig_torch_arange

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "_orig_torch_arange",
    "get_accelerator",
    "zero_wrapper_for_fp_tensor_constructor",
]
