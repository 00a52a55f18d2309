"""Host memory while a model is built under ``zero.Init`` and sharded: rank 0 has it once, others their part of it.

Shards are in host memory here, as the device is the CPU, so what stays is counted too: half of the model on each rank.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.integration.sharded_init import Init
from tests.helpers import run_ranks

from .stage3 import engine_for
from .test_serving import DEPTH, LAYER_BYTES, _Deep, _peak_bytes, _status

pytestmark = pytest.mark.slow


def _build() -> ZeroEngine:
    with Init():
        model = _Deep()
    return engine_for(model, trains=False)


def _load() -> dict[str, float]:
    """In layers."""
    _build()  # libraries that load with the first engine are not its doing
    engines: list[ZeroEngine] = []
    before = _status("VmRSS")
    peak = _peak_bytes(lambda: engines.append(_build()))
    return {"peak": peak / LAYER_BYTES, "rest": (_status("VmRSS") - before) / LAYER_BYTES}


def test_rank_0_needs_the_model_once_and_the_others_their_part() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    first, second = run_ranks(_load, 2, env={"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert first["peak"] < DEPTH + 1
    assert second["peak"] < DEPTH / 2 + 1
    for found in (first, second):
        assert DEPTH / 2 - 0.5 < found["rest"] < DEPTH / 2 + 0.5
