"""The time-line: what it names, that it costs nothing when off, that it changes no weight, that a trace can be read."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.reports import describe_memory
from hf_zero_plugin.engine.timeline import TRACE_VARIABLE, Timeline
from tests.engine.harness import Tiny, batch, decay_groups, loss_of, make_engine, settings_for, weights

CPU = torch.device("cpu")


def _train(engine: ZeroEngine, num_steps: int = 4) -> None:
    for step in range(num_steps):
        engine.backward(loss_of(engine, batch(step)))
        engine.step()


@pytest.fixture(params=["none", "cpu", "host thread"])
def offload(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_report_names_the_phases(offload: str) -> None:
    engine = make_engine(Tiny(), settings_for(offload=offload, wall_clock_breakdown=True))
    _train(engine)
    report = engine.last_step_report()
    assert {"step_ms", "forward_ms", "backward_ms", "norm_ms", "update_ms"} <= set(report)
    assert all(value >= 0 for value in report.values())
    parts = report["forward_ms"] + report["backward_ms"] + report["norm_ms"] + report["update_ms"]
    assert parts <= 1.05 * report["step_ms"] + 0.5
    assert ("host_step_ms" in report) == (offload != "none")
    engine.destroy()


def test_off_by_default_and_empty() -> None:
    engine = make_engine(Tiny(), settings_for(offload="cpu"))
    _train(engine)
    assert engine.timeline is None
    assert engine.last_step_report() == {}
    assert not engine._forward_hooks
    assert engine.parts.masters is not None
    assert all(home.timeline is None for home in engine.parts.masters.homes)
    with pytest.raises(RuntimeError, match="wall_clock_breakdown"):
        engine.export_trace("nowhere.json")
    engine.destroy()


def test_watching_changes_no_weight(offload: str) -> None:
    plain, watched = Tiny(), Tiny()
    for model, on in ((plain, False), (watched, True)):
        engine = make_engine(model, settings_for(offload=offload, wall_clock_breakdown=on))
        _train(engine)
        engine.destroy()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(watched)[name], value, rtol=0, atol=0)


def test_inline_host_step_is_not_called_hidden() -> None:
    engine = make_engine(Tiny(), settings_for(offload="cpu", wall_clock_breakdown=True))
    _train(engine)
    assert engine.last_step_report()["hidden_share"] == 0.0
    engine.destroy()


def test_hidden_share_counts_who_waited() -> None:
    """Work of 30 ms on another thread, of which the training thread waits for 10."""
    import threading

    timeline = Timeline(CPU)
    worker = threading.Thread(target=lambda: timeline.end_host_work(time.perf_counter() - 0.030))
    worker.start()
    worker.join()
    start = timeline.begin()
    timeline.end("wait", start._replace(host=start.host - 0.010))
    timeline.close_step()
    assert timeline.report["host_step_ms"] == pytest.approx(30, abs=5)
    assert timeline.report["hidden_share"] == pytest.approx(2 / 3, abs=0.15)


def test_watch_may_begin_in_the_middle() -> None:
    engine = make_engine(Tiny(), settings_for())
    _train(engine, 2)
    assert engine.last_step_report() == {}
    engine.watch()
    engine.watch()
    _train(engine, 2)
    assert len(engine._forward_hooks) == 1
    assert engine.last_step_report()["forward_ms"] > 0
    engine.destroy()


def test_trace_is_written_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "trace.json"
    monkeypatch.setenv(TRACE_VARIABLE, str(path))
    engine = make_engine(Tiny(), settings_for(offload="host thread"))
    _train(engine)
    engine.destroy()
    trace: dict[str, Any] = json.loads(path.read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {"forward", "backward", "norm", "update", "host_step"} <= {event["name"] for event in spans}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    assert {event["args"]["step"] for event in spans} >= {1, 2, 3}


def test_breakdowns_are_logged_every_so_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_for(offload="cpu", wall_clock_breakdown=True, memory_breakdown=True, steps_per_print=2)
    engine = make_engine(Tiny(), settings)
    with caplog.at_level(logging.INFO, logger="hf_zero_plugin"):
        _train(engine)
    engine.destroy()
    lines = [record.getMessage() for record in caplog.records]
    assert sum("forward" in line and "backward" in line for line in lines) == 2
    assert sum("memory: device: weights" in line for line in lines) == 2


def test_memory_is_told_by_place_and_kind() -> None:
    report = {"device": {"weights": 2**20, "buffers": 0}, "host": {"moments": 3 * 2**20}, "nvme": {}}
    assert describe_memory(report) == "device: weights 1.0 MiB; host: moments 3.0 MiB"


@pytest.mark.gpu
def test_streamed_update_is_timed_on_the_device() -> None:
    settings = settings_for(precision="fp16", offload="cpu", wall_clock_breakdown=True)
    model = Tiny()
    engine = ZeroEngine(model, settings, device=torch.device("cuda"), param_groups=decay_groups(model))
    for step in range(6):
        engine.backward(loss_of(engine, batch(step).cuda().half()))
        engine.step()
    torch.cuda.synchronize()
    engine.backward(loss_of(engine, batch(9).cuda().half()))
    engine.step()
    report = engine.last_step_report()
    assert report["flight_ms"] > 0
    assert 0.0 <= report["hidden_share"] <= 1.0
    engine.destroy()
