"""The result of resolving: what the engine is told, and for people, every key with its origin and verdict."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_zero_plugin.config.fill import OWN_AUTO
from hf_zero_plugin.config.paths import put
from hf_zero_plugin.config.settings import EngineSettings

__all__ = ["Entry", "ResolvedConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One key."""

    path: str
    value: Any
    source: str
    """"file", "TrainingArguments.x", "model", "derived" or "default"."""
    verdict: Literal["applied", "inert", "refused"]
    note: str = ""
    in_file: bool = False
    was_auto: bool = False

    @property
    def matters(self) -> bool:
        """Worth showing to someone who did not ask for every key."""
        return self.in_file or self.source not in ("default",) or self.path in _ALWAYS_SHOWN


_ALWAYS_SHOWN = frozenset(
    {
        "$.gradient_clipping",
        "$.zero_optimization.stage",
        "$.zero_optimization.offload_optimizer.device",
        "$.zero_optimization.reduce_bucket_size",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConfig:
    settings: EngineSettings
    entries: list[Entry]
    warnings: tuple[str, ...]
    origin: str
    filled: dict[str, Any] = field(repr=False)
    """The configuration with "auto" replaced and inherited keys added."""

    def as_ds_dict(self) -> dict[str, Any]:
        """The dict that HF expects in ``engine.config``: today's spellings, a stage, and no "auto" anywhere."""
        config = copy.deepcopy(self.filled)
        config.setdefault("zero_optimization", {}).setdefault("stage", self.settings.stage)
        # accelerate would otherwise swap an offloaded Adafactor or SGD for its own CPU Adam.
        config["zero_force_ds_cpu_optimizer"] = False
        drop_own_autos(config)
        return config


def drop_own_autos(config: dict[str, Any]) -> None:
    """accelerate raises on any "auto" it cannot fill, also on those that are ours."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer")
    if not isinstance(offload, dict):
        return
    for path in OWN_AUTO:
        if offload.get(path.rpartition(".")[2]) == "auto":
            put(config, path, None)
