"""flops_profiler: what one step of the model computes, counted by torch as it runs.

Operations are those of ``torch.utils.flop_counter`` (matrix products, convolutions, attention; a multiplication and
an addition are two). The forward pass is counted module by module; the backward pass as a whole, recomputed
activations included, because they run in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_zero_plugin.config.settings import FlopsProfilerSettings
from hf_zero_plugin.engine.reports import reports

__all__ = ["FlopsProfiler"]


class FlopsProfiler:
    """Counts the first micro-step of step ``profile_step`` and reports when the step ends. Rank 0 only."""

    def __init__(self, settings: FlopsProfilerSettings, module: nn.Module, device: torch.device) -> None:
        self._settings = settings
        self._module = module
        self._device = device
        self._by_module: dict[str, int] = {}
        self._flops = {"forward": 0, "backward": 0}
        self._seconds = {"forward": 0.0, "backward": 0.0}

    def wants(self, step: int, phase: str) -> bool:
        """Whether ``phase`` ("forward" or "backward") of step ``step``, counted from 1, is still to be counted."""
        if step != self._settings.profile_step or self._seconds[phase]:
            return False
        return phase == "forward" or self._seconds["forward"] > 0

    @contextlib.contextmanager
    def count(self, phase: str) -> Iterator[None]:
        counter = FlopCounterMode(display=False)
        began = self._now()
        with counter:
            yield
        self._seconds[phase] = max(self._now() - began, 1e-9)
        self._flops[phase] = counter.get_total_flops()
        if phase == "forward":
            root = type(self._module).__name__
            for name, counts in counter.get_flop_counts().items():
                if name == root or name.startswith(f"{root}."):
                    self._by_module[name[len(root) + 1 :]] = sum(counts.values())

    def step_done(self, step: int) -> None:
        """Report if this was the step; a file, where one is named, or the log."""
        if step != self._settings.profile_step or not self._seconds["forward"]:
            return
        lines = list(self._lines(step))
        if self._settings.output_file is None:
            for line in lines:
                reports.info("%s", line)
            return
        path = Path(self._settings.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        reports.info("flops of step %d: written to %s", step, path)

    def _lines(self, step: int) -> Iterator[str]:
        total = sum(param.numel() for param in self._module.parameters())
        yield f"flops of step {step}, first micro-step, this rank: {_count(total).strip()} parameters"
        for phase, flops in self._flops.items():
            seconds = self._seconds[phase]
            if seconds:
                yield f"  {phase}: {_count(flops)}FLOP in {1000 * seconds:.1f} ms, {_count(flops / seconds)}FLOP/s"
        yield from self._top_modules()
        if self._settings.detailed:
            yield from self._tree()

    def _top_modules(self) -> Iterator[str]:
        """The ``top_modules`` largest of every depth, down to ``module_depth`` (-1: all depths)."""
        by_depth: dict[int, list[tuple[int, str]]] = {}
        for name, flops in self._by_module.items():
            if name:
                by_depth.setdefault(name.count(".") + 1, []).append((flops, name))
        for depth, modules in sorted(by_depth.items()):
            if self._settings.module_depth in (-1, depth):
                largest = sorted(modules, reverse=True)[: self._settings.top_modules]
                yield f"  depth {depth}: " + ", ".join(f"{name} {_count(flops)}FLOP" for flops, name in largest)

    def _tree(self) -> Iterator[str]:
        whole = max(1, self._flops["forward"])
        for name, module in self._module.named_modules():
            depth = name.count(".") + 1 if name else 0
            if self._settings.module_depth >= 0 and depth > self._settings.module_depth:
                continue
            flops = self._by_module.get(name, 0)
            params = sum(param.numel() for param in module.parameters())
            label = f"{name.rpartition('.')[2] or 'model'} ({type(module).__name__})"
            share = f"{flops / whole:.1%}"
            yield f"  {'  ' * depth}{label}: {_count(params).strip()} parameters, {_count(flops)}FLOP, {share}"

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # of the profiled step only
        return time.perf_counter()


def _count(value: float) -> str:
    """1234567 -> "1.23 M"."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
