"""activate(): from now on ``import deepspeed`` means this engine. Standard library only.

transformers and accelerate look for the module ``deepspeed`` when they are imported, so this must happen before.
Two things go into ``sys.meta_path``: a finder that answers for ``deepspeed`` (the package in ``facade/`` and its
version), and a hook that mends a few functions of transformers and accelerate right after their modules load
(``repairs.py`` says which and why).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_zero_plugin.errors import ActivationError

__all__ = ["activate", "is_active", "real_deepspeed_version"]

FACADE_DIR = str(Path(__file__).parent / "facade")

# Whoever imports one of these has already decided whether there is a deepspeed.
_TOO_LATE = ("transformers.trainer", "transformers.integrations.deepspeed", "accelerate.accelerator")

_REPAIRED = {
    "transformers.integrations.deepspeed": "repair_transformers_deepspeed",
    "transformers.modeling_utils": "repair_modeling_utils",
    "transformers.training_args": "repair_training_args",
    "transformers.trainer": "repair_trainer",
    "accelerate.utils.dataclasses": "repair_accelerate_plugin",
    "accelerate.state": "repair_accelerate_state",
}


class _FacadeFinder(importlib.abc.MetaPathFinder):
    """Answers for ``deepspeed`` and for its installed version; nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "deepspeed":
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, [FACADE_DIR])

    def find_distributions(self, context: Any = None) -> Any:
        context = context or importlib.metadata.DistributionFinder.Context()
        if context.name is not None and context.name.lower() != "deepspeed":
            return iter(())
        facade = importlib.metadata.DistributionFinder.Context(name="deepspeed", path=[FACADE_DIR])
        return iter(importlib.metadata.MetadataPathFinder().find_distributions(facade))


class _RepairFinder(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find a module, and runs its repair once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REPAIRED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _RepairingLoader(spec.loader, _REPAIRED[fullname])  # type: ignore[assignment]
        return spec


class _RepairingLoader(importlib.abc.Loader):
    def __init__(self, loader: Any, repair: str) -> None:
        self._loader = loader
        self._repair = repair

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        from hf_zero_plugin.integration import repairs

        repair: Callable[[ModuleType], None] = getattr(repairs, self._repair)
        repair(module)


_finders: list[importlib.abc.MetaPathFinder] = []


def is_active() -> bool:
    """Whether this process has called ``activate``."""
    return bool(_finders) and all(finder in sys.meta_path for finder in _finders)


def real_deepspeed_version() -> str | None:
    """Version of the real deepspeed if it is installed, whoever answers for it now."""
    for distribution in importlib.metadata.MetadataPathFinder().find_distributions(
        importlib.metadata.DistributionFinder.Context(name="deepspeed")
    ):
        return distribution.version
    return None


def activate(*, prefer_ours: bool = True) -> None:
    """Make this engine the one that ``--deepspeed`` and ``TrainingArguments(deepspeed=...)`` reach.

    Call it before transformers or accelerate are imported; calling it again does nothing.

    Args:
        prefer_ours: take over even if the real deepspeed is installed. With false the real one wins.

    Raises:
        ActivationError: transformers or accelerate have looked for deepspeed already, or the real one is loaded.
    """
    if is_active():
        return
    real = real_deepspeed_version()
    if real is not None and not prefer_ours:
        _say(f"the installed deepspeed {real} stays in charge; call activate() to use hf_zero_plugin instead")
        return
    loaded = sys.modules.get("deepspeed")
    if loaded is not None:
        raise ActivationError(
            f"activate() came too late: deepspeed is already imported from {getattr(loaded, '__file__', '?')}. "
            "Put these two lines at the very top of the script, before every other import:\n"
            "    import hf_zero_plugin\n    hf_zero_plugin.activate()"
        )
    for name in _TOO_LATE:
        if name in sys.modules:
            raise ActivationError(
                f"activate() came too late: {name} is already imported and has found no deepspeed. "
                "Put these two lines at the very top of the script (in a notebook: first cell, then restart the "
                "kernel), before transformers, accelerate, trl or peft are imported:\n"
                "    import hf_zero_plugin\n    hf_zero_plugin.activate()"
            )
    _finders[:] = [_FacadeFinder(), _RepairFinder()]
    sys.meta_path[:0] = _finders
    importlib.invalidate_caches()
    for name in _REPAIRED:
        if name in sys.modules:  # loaded, but too early to have asked about deepspeed
            from hf_zero_plugin.integration import repairs

            getattr(repairs, _REPAIRED[name])(sys.modules[name])
    from hf_zero_plugin import __version__

    beside = f" (the installed deepspeed {real} is not used)" if real is not None else ""
    _say(f"hf_zero_plugin {__version__} is the engine behind --deepspeed{beside}")


def _say(message: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"[hf-zero] {message}", file=sys.stderr)
