"""ACCELERATE_USE_CPU without its side effect: accelerate ignores a DeepSpeed configuration where it is set.

``accelerate launch --cpu`` sets it for the processes that it starts, and people set it by hand. It means "train on
the CPU", so that is what it becomes: the GPUs are hidden, and the configuration stays in force.
"""

from __future__ import annotations

import os
import sys

__all__ = ["USE_CPU_VARIABLE", "hide_gpus_instead_of_use_cpu"]

USE_CPU_VARIABLE = "ACCELERATE_USE_CPU"
_TRUE = ("1", "true", "yes", "y", "on", "t")


def hide_gpus_instead_of_use_cpu() -> bool:
    """Take the variable out of the environment and hide the GPUs; say so, once per run. True if it was set."""
    if os.environ.get(USE_CPU_VARIABLE, "").lower() not in _TRUE:
        return False
    del os.environ[USE_CPU_VARIABLE]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if os.environ.get("RANK", "0") == "0":
        print(
            f"hf-zero: note: {USE_CPU_VARIABLE} makes accelerate ignore --deepspeed; the GPUs are hidden instead, "
            "and it is honoured.",
            file=sys.stderr,
            flush=True,
        )
    return True
