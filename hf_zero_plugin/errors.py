"""Every exception this package raises on purpose.

::

    HfZeroError
     +-- ConfigError            (also ValueError)    the user's ds_config.json or arguments cannot be honoured
     +-- LaunchError            (also RuntimeError)  hosts, devices or ports that cannot be used
     +-- ActivationError        (also RuntimeError)  activate() came too late, or the wrong engine was found
     +-- CheckpointError        (also RuntimeError)  a checkpoint is missing, incomplete or of another model
     +-- LossScaleError         (also RuntimeError)  fp16 gradients overflow at the smallest loss scale
     +-- CollectiveError        (also RuntimeError)  ranks did not meet in a collective, or one of them has ended
     +-- UnsupportedFeature     (also NotImplementedError)  a DeepSpeed feature that this engine does not have

Every message says what is wrong, where (file and ``$.json.path`` if there is one), why, and how to fix it.
The command line prints the message alone and exits with code 2.
"""

from __future__ import annotations

__all__ = [
    "ActivationError",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "HfZeroError",
    "LaunchError",
    "LossScaleError",
    "UnsupportedFeature",
]


class HfZeroError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(HfZeroError, ValueError):
    """The user's ds_config.json or TrainingArguments cannot be honoured."""


class LaunchError(HfZeroError, RuntimeError):
    """Hosts, devices or ports named to the launcher cannot be used."""


class ActivationError(HfZeroError, RuntimeError):
    """activate() was called too late, or another engine answers ``import deepspeed``."""


class CheckpointError(HfZeroError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class LossScaleError(HfZeroError, RuntimeError):
    """fp16 gradients still overflow at the smallest allowed loss scale."""


class CollectiveError(HfZeroError, RuntimeError):
    """Ranks did not meet in a collective, or one of them has ended."""


class UnsupportedFeature(HfZeroError, NotImplementedError):
    """A DeepSpeed feature that this engine does not have."""
