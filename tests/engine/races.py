"""A race detector for code that uses CUDA streams, run on the CPU.

Operations are carried out at once, in the order of the calls. Beside that every stream has a vector clock, which only
events, waits and synchronisation carry over to others, as they would order the work on a GPU. An access to memory that
is not ordered after the last conflicting access is a race, whether or not anything would have gone wrong this time:

    with RaceDetector() as detector:   # torch.cuda.Stream and its kin are the detector's own inside
        ...
    assert detector.races == []

Ranges of bytes are tracked, so views of one buffer may be used by several streams at once. Memory that is freed and
handed out anew starts without a history: what a caching allocator does with it is not modelled.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Clock = dict[str, int]


def _join(into: Clock, other: Clock) -> None:
    for name, count in other.items():
        into[name] = max(into.get(name, 0), count)


class Access(NamedTuple):
    start: int
    end: int
    stream: str
    count: int
    """The stream's own clock when the access was queued."""
    writes: bool
    where: str


class Event:
    def __init__(self, detector: RaceDetector) -> None:
        self._detector = detector
        self.clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)

    def query(self) -> bool:
        """If the host is one that sees ends, true every second time, and then it knows that the work is over."""
        self._detector.num_queries += 1
        if self._detector.num_queries % 2 or not self._detector.sees_ends:
            return False
        _join(self._detector.host, self.clock)
        return True

    def synchronize(self) -> None:
        _join(self._detector.host, self.clock)


class Stream:
    def __init__(self, detector: RaceDetector, name: str) -> None:
        self._detector = detector
        self.name = name
        self.clock: Clock = {name: 0}

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._detector)
        self.advance()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        _join(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        _join(self.clock, other.clock)

    def synchronize(self) -> None:
        _join(self._detector.host, self.clock)

    def advance(self) -> int:
        """What the host queues now comes after all that the host knows to be over."""
        _join(self.clock, self._detector.host)
        self.clock[self.name] += 1
        return self.clock[self.name]


class Host(Stream):
    """Work of the host itself: over when the call returns, and ordered after nothing but what the host waited for."""

    def advance(self) -> int:
        self.clock = {**self._detector.host, self.name: self.clock[self.name] + 1}
        self._detector.host[self.name] = self.clock[self.name]
        return self.clock[self.name]


def _range(tensor: Tensor) -> tuple[int, int]:
    """Addresses between which the elements lie."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


class RaceDetector(TorchDispatchMode):
    """See the module. ``races`` are sentences."""

    def __init__(self, *, sees_ends: bool = False) -> None:
        super().__init__()
        self.sees_ends = sees_ends
        self.host: Clock = {}
        self.compute = Stream(self, "compute")
        self.races: list[str] = []
        self.num_queries = 0
        self.num_side_operations = 0
        self.harmless: list[Tensor] = []
        """Memory that anybody may write at any time."""
        self.on_host = Host(self, "host")
        """Make it the current stream for what the host computes between launches."""
        self._current: Stream = self.compute
        self._num_streams = 0
        self._history: list[Access] = []
        self._patch = pytest.MonkeyPatch()

    # ---------------------------------------------------------------- in the place of torch.cuda

    def __enter__(self) -> RaceDetector:
        @contextlib.contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, self._current = self._current, chosen
            try:
                yield
            finally:
                self._current = before

        def make(*_: Any) -> Stream:
            self._num_streams += 1
            return Stream(self, f"side {self._num_streams}")

        for name, replacement in (
            ("Stream", make),
            ("Event", lambda **_: Event(self)),
            ("current_stream", lambda *_: self._current),
            ("set_stream", lambda chosen: setattr(self, "_current", chosen)),
            ("stream", stream),
        ):
            self._patch.setattr(torch.cuda, name, replacement)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._patch.undo()

    # ---------------------------------------------------------------- every operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        aliases = [one.alias_info for one in schema.returns]
        is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not is_view:
            count = self._current.advance()
            self.num_side_operations += self._current is not self.compute
            for position, argument in enumerate(schema.arguments):
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in _tensors(value):
                    self._check(tensor, count, writes, str(func))
        result = func(*args, **kwargs)
        if not is_view:
            for alias, value in zip(aliases, (result,) if len(aliases) == 1 else result or ()):
                if alias is None:
                    for tensor in _tensors(value):
                        self._begin_anew(tensor, str(func))
            if str(func) == "aten._local_scalar_dense.default":
                self._current.synchronize()
        return result

    def _begin_anew(self, tensor: Tensor, where: str) -> None:
        """New memory: written by this operation, and without a past."""
        start, end = _range(tensor)
        self._history = [one for one in self._history if one.end <= start or one.start >= end]
        stream = self._current
        self._history.append(Access(start, end, stream.name, stream.clock[stream.name], True, where))

    def _check(self, tensor: Tensor, count: int, writes: bool, operation: str) -> None:
        if any(tensor is one for one in self.harmless):
            return
        start, end = _range(tensor)
        stream, kept = self._current, []
        for one in self._history:
            touches = one.start < end and start < one.end
            if not touches:
                kept.append(one)
                continue
            is_ordered = stream.clock.get(one.stream, 0) >= one.count
            if (writes or one.writes) and not is_ordered:
                self.races.append(
                    f"{operation} on {stream.name} is not ordered after {one.where} on {one.stream}\n{_caller()}"
                )
            is_covered = start <= one.start and one.end <= end
            if not (is_covered and is_ordered and (writes or (not one.writes and one.stream == stream.name))):
                kept.append(one)
        self._history = [*kept, Access(start, end, stream.name, count, writes, operation)]


def _caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if "hf_zero_plugin" in frame.filename]
    return "".join(traceback.format_list(frames[-4:]))
