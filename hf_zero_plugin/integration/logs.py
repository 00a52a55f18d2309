"""The logger that transformers sets the level of."""

import logging

logger = logging.getLogger("hf_zero_plugin")

__all__ = ["logger"]
