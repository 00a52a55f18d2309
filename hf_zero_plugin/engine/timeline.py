"""A time-line of a step: forward, waiting for weights, backward, norm, update, host step, and what was hidden of it.

Off, it costs one attribute look-up a phase. On, every phase is a pair of host times and, on a GPU, a pair of events on
the stream that does the work. Events are read one step later, when they have passed: nothing ever waits for the device.

What the report says (milliseconds; sums over the micro-steps of a step):

    step_ms       from one boundary to the next, on the host's clock
    forward_ms    includes wait_ms
    wait_ms       forward (or backward) stood still because weights of the last update were on their way
    backward_ms   with the reduction of gradients
    norm_ms       norm, non-finite flag, clip coefficient
    update_ms     the update, if it runs on the compute stream or inside step()
    flight_ms     offload: from launching the copies of an update to its last weights being there; told of the step in
                  which that was waited for, the next one, if there is one rank
    host_step_ms  offload: host cores at work
    hidden_share  offload: part of flight and host step during which nobody waited; 1 is what offload should cost
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from hf_zero_plugin.engine.parts import Assembly

__all__ = ["TRACE_VARIABLE", "Mark", "Timed", "Timeline"]

TRACE_VARIABLE = "HF_ZERO_TRACE"
"""Environment variable: where to write a chrome trace (chrome://tracing, ui.perfetto.dev) when the engine ends."""
MAX_TRACED_STEPS = 200
LANES = ("host", "device", "offload in flight", "host optimizer")
COMPUTE_LANE, FLIGHT_LANE, WORKER_LANE = 1, 2, 3


class Mark(NamedTuple):
    """A moment: on the host's clock, and on the current stream of the device if there is one."""

    host: float
    event: torch.cuda.Event | None


class _Span(NamedTuple):
    name: str
    start: Mark
    end: Mark
    lane: int
    is_hidden: bool
    """Work that runs beside the training thread."""


@dataclass
class _Step:
    number: int
    spans: list[_Span] = field(default_factory=list)
    closed_at: float = 0.0
    seconds: float = 0.0

    @property
    def is_over(self) -> bool:
        """The device has passed all of its events."""
        return all(span.end.event is None or span.end.event.query() for span in self.spans)


class Timeline:
    """Collects spans of steps. ``begin`` and ``end`` cost a few microseconds each."""

    def __init__(self, device: torch.device, keep_steps: int = 0) -> None:
        self.device = device
        self._on_cuda = device.type == "cuda"
        self._open = _Step(1)
        self._closed: deque[_Step] = deque()
        self._past: deque[_Step] = deque(maxlen=keep_steps or 1)
        self._report: dict[str, float] = {}
        self._thread = threading.get_ident()
        self._side = torch.cuda.Stream(device) if self._on_cuda else None
        if self._on_cuda:
            torch.cuda.synchronize(device)  # once: host and device start from the same moment
        self._origin = self.begin()
        self._open.closed_at = self._origin.host
        self._last_close = self._origin.host

    def begin(self) -> Mark:
        event = None
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        return Mark(time.perf_counter(), event)

    def end(self, name: str, start: Mark) -> None:
        self._open.spans.append(_Span(name, start, self.begin(), COMPUTE_LANE, False))

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self.begin()
        try:
            yield
        finally:
            self.end(name, start)

    def end_flight(self, start: Mark, done: Sequence[Sequence[torch.cuda.Event]]) -> None:
        """An update that streams through the device is launched; ``done`` holds its events bucket by bucket.

        Each bucket has its own span in a trace. Without one only the whole counts, and two events are cheaper.
        """
        if self._side is None:
            return
        if self._past.maxlen == 1:
            done = [[event for events in done for event in events]]
        ends = []
        with torch.cuda.stream(self._side):
            for events in done:
                for event in events:
                    self._side.wait_event(event)
                ends.append(self.begin())
        for end in ends:
            self._open.spans.append(_Span("flight", start, end, FLIGHT_LANE, True))
            start = end

    def end_host_work(self, started: float) -> None:
        """One bucket's host arithmetic, on whichever thread it ran."""
        beside = threading.get_ident() != self._thread
        end = Mark(time.perf_counter(), None)
        self._open.spans.append(_Span("host_step", Mark(started, None), end, WORKER_LANE, beside))

    def close_step(self) -> None:
        """A boundary: the open step ends; older ones are read if the device has passed them."""
        now = time.perf_counter()
        done, self._open = self._open, _Step(self._open.number + 1)
        done.closed_at, done.seconds, self._last_close = now, now - self._last_close, now
        self._closed.append(done)
        while self._closed and self._closed[0].is_over:
            step = self._closed.popleft()
            self._report = _summary(step)
            self._past.append(step)
        while len(self._closed) > 8:  # a device that far behind: give up on the oldest
            self._closed.popleft()

    @property
    def report(self) -> dict[str, float]:
        """Of the newest step that the device has passed; empty before the second."""
        return dict(self._report)

    def chrome_trace(self, rank: int = 0) -> dict[str, Any]:
        """The kept steps in Chrome's trace format, microseconds from the beginning. Waits for the device."""
        if self._on_cuda:
            torch.cuda.synchronize(self.device)
        lanes = [
            {"name": "thread_name", "ph": "M", "pid": rank, "tid": tid, "args": {"name": name}}
            for tid, name in enumerate(LANES)
        ]
        events: list[dict[str, Any]] = []
        for step in [*self._past, *self._closed]:
            for span in step.spans:
                events.extend(self._trace_events(span, step.number, rank))
        return {"traceEvents": [*lanes, *events], "displayTimeUnit": "ms"}

    def _trace_events(self, span: _Span, step: int, rank: int) -> Iterator[dict[str, Any]]:
        common = {"name": span.name, "ph": "X", "pid": rank, "args": {"step": step}}
        if span.lane != FLIGHT_LANE:
            start, end = (1e6 * (mark.host - self._origin.host) for mark in (span.start, span.end))
            yield {**common, "tid": WORKER_LANE if span.lane == WORKER_LANE else 0, "ts": start, "dur": end - start}
        if span.start.event is not None and span.end.event is not None and self._origin.event is not None:
            start = 1e3 * self._origin.event.elapsed_time(span.start.event)
            duration = 1e3 * span.start.event.elapsed_time(span.end.event)
            yield {**common, "tid": span.lane, "ts": start, "dur": duration}


def _milliseconds(span: _Span) -> float:
    if span.start.event is not None and span.end.event is not None:
        return span.start.event.elapsed_time(span.end.event)
    return 1000 * (span.end.host - span.start.host)


def _summary(step: _Step) -> dict[str, float]:
    sums: dict[str, float] = {"step_ms": 1000 * step.seconds}
    work = shown = 0.0
    for span in step.spans:
        taken = _milliseconds(span)
        sums[f"{span.name}_ms"] = sums.get(f"{span.name}_ms", 0.0) + taken
        if span.lane in (FLIGHT_LANE, WORKER_LANE):
            work += taken
            shown += 0.0 if span.is_hidden else taken
    if work > 0:
        sums["hidden_share"] = max(0.0, 1.0 - min(1.0, (shown + sums.get("wait_ms", 0.0)) / work))
    return sums


_OFF: AbstractContextManager[None] = contextlib.nullcontext()


class Timed:
    """What an engine inherits: a time-line that may be on or off."""

    timeline: Timeline | None = None
    parts: Assembly
    device: torch.device
    global_rank: int

    def _span(self, name: str) -> AbstractContextManager[None]:
        return _OFF if self.timeline is None else self.timeline.span(name)

    def watch(self, *, keep_steps: int = 0) -> None:
        """Begin to time steps, if that has not begun. ``keep_steps`` of them stay for ``export_trace``.

        ``wall_clock_breakdown`` and the environment variable HF_ZERO_TRACE do this when the engine is made.
        """
        if self.timeline is not None:
            return
        self.timeline = timeline = Timeline(self.device, keep_steps)
        if self.parts.masters is not None:
            self.parts.masters.watch(timeline)
        open_marks: list[Mark] = []
        hooks: Any = self
        hooks.register_forward_pre_hook(lambda *_: open_marks.append(timeline.begin()))
        hooks.register_forward_hook(
            lambda *_: timeline.end("forward", open_marks.pop()) if open_marks else None, always_call=True
        )

    def _watch_if_asked(self, wall_clock_breakdown: bool) -> None:
        path = os.environ.get(TRACE_VARIABLE)
        if not (wall_clock_breakdown or path):
            return
        self.watch(keep_steps=MAX_TRACED_STEPS)
        if path:
            self._export_at_end = atexit.register(self.export_trace, path)

    def _end_watching(self) -> None:
        """At the end of the engine: the trace that was asked for is written once."""
        path = os.environ.get(TRACE_VARIABLE)
        export = self.__dict__.pop("_export_at_end", None)
        if path and export is not None:
            atexit.unregister(export)
            self.export_trace(path)

    def last_step_report(self) -> dict[str, float]:
        """Milliseconds by phase of the newest step that the device has passed; see engine/timeline.py. Empty if off."""
        return self.timeline.report if self.timeline is not None else {}

    def export_trace(self, path: str | os.PathLike[str]) -> Path:
        """Write the last steps as a chrome trace; of several ranks, each its own file (``.rank1`` before the suffix).

        Raises:
            RuntimeError: steps are not timed.
        """
        if self.timeline is None:
            raise RuntimeError(
                'export_trace: steps are not timed. Set "wall_clock_breakdown": true, or call engine.watch() first.'
            )
        target = Path(path)
        if self.global_rank:
            target = target.with_name(f"{target.stem}.rank{self.global_rank}{target.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.timeline.chrome_trace(self.global_rank)), encoding="utf-8")
        return target
