"""The short table at the start of a run."""

from __future__ import annotations

from hf_zero_plugin.config.auto import ResolvedConfig

__all__ = ["short_table"]


def short_table(resolved: ResolvedConfig) -> str:
    rows = [(e.path, e.value, e.source) for e in resolved.entries if e.matters]
    width = max(len(path) for path, *_ in rows)
    return "\n".join(f"[hf-zero] {path:<{width}}  {value!s:<12}  {source}" for path, value, source in rows)
