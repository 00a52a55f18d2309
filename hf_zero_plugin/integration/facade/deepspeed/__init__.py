"""What transformers, accelerate, PEFT and TRL import from ``deepspeed``, served by hf_zero_plugin."""

from hf_zero_plugin.engine.engine import ZeroEngine as DeepSpeedEngine
from hf_zero_plugin.integration.initialize import add_config_arguments, init_distributed, initialize
from hf_zero_plugin.integration.unsupported import init_inference, tp_model_init

from . import accelerator, checkpoint, comm, ops, runtime, utils, zero

__version__ = "0.19.6+hfzero"
version = __version__

__all__ = [
    "DeepSpeedEngine",
    "__version__",
    "accelerator",
    "add_config_arguments",
    "checkpoint",
    "comm",
    "init_distributed",
    "init_inference",
    "initialize",
    "ops",
    "runtime",
    "tp_model_init",
    "utils",
    "zero",
]
