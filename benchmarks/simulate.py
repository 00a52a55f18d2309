"""What a step would take on a machine that is described here: the engine's own order of transfers, run against a clock.

    python benchmarks/simulate.py --model decoder-3b --forward 225 --backward 440 --activations 56
    python benchmarks/simulate.py --model t5-base --forward 45 --backward 85 --launch 95 --activations 11

``StreamedHome`` decides what is uploaded, updated and downloaded after what; nothing is computed or copied, streams and
events only know when they would be done. Forward and backward are as long as they are said to be, spread evenly over
the buckets, and activations come and go evenly. Links serve one copy at a time and direction, in the order in which
they are asked for.
``--launch`` is host time of one step; the rest of a step's host time is not simulated, nor is the device's allocator.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from workloads import build_model

from hf_zero_plugin.engine import offload_stream, staging_room
from hf_zero_plugin.engine.assembly import BUCKET_NUMEL
from hf_zero_plugin.engine.buckets import ParamSpec, Piece, cut_evenly, plan_buckets
from hf_zero_plugin.engine.leaving import LeavingBuffers
from hf_zero_plugin.engine.offload_stream import StreamedHome
from hf_zero_plugin.engine.state_homes import STREAM_PIECE_NUMEL

GIB = 2**30
STATE_BYTES = 12
UPDATE_BYTES = 50
"""What the kernels of an update read and write of device memory, a parameter."""


@dataclass
class Machine:
    """Seconds of a step without transfers, bytes a second, bytes."""

    forward_s: float
    backward_s: float
    activations: float
    launch_s: float = 0.0
    link: float = 49e9
    """One direction, while the other is in use."""
    device_memory: float = 4e12
    capacity: float = 140 * GIB


class Clock:
    """Now, for the thread that launches work."""

    def __init__(self) -> None:
        self.now = 0.0


class Event:
    def __init__(self, clock: Clock, done: float) -> None:
        self.clock, self.done = clock, done

    def query(self) -> bool:
        return self.clock.now >= self.done


class Stream:
    """``done``: when all that was queued so far will be over."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.done = clock, 0.0

    def record_event(self) -> Event:
        return Event(self.clock, self.done)

    def wait_event(self, event: Event) -> None:
        self.done = max(self.done, event.done)

    def wait_stream(self, other: Stream) -> None:
        self.done = max(self.done, other.done)

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.done)

    def run(self, seconds: float) -> None:
        self.done = max(self.done, self.clock.now) + seconds


class Buffer:
    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes

    def numel(self) -> int:
        return self._num_bytes


class SimulatedHome(StreamedHome):
    def __init__(self, pieces: list[Piece], machine: Machine, base: int) -> None:
        self.clock, self.machine = Clock(), machine
        self.compute = self.current = Stream(self.clock)
        self.activations = 0.0
        self._base, self._buffers = base, weakref.WeakSet[Buffer]()
        self._last_up = self._last_down = 0.0
        self.context: Any = SimpleNamespace(
            device=torch.device("cuda", 0), is_alone=True, grads=SimpleNamespace(frees_when_released=False)
        )
        self.pieces, self.timeline, self.is_broken = pieces, None, False
        self._bytes_each, self._longest = STATE_BYTES, max(piece.numel for piece in pieces)
        self._slots: Any = [Stream(self.clock), Stream(self.clock)]
        self._compute: Any = self.compute
        self._max_ahead = staging_room.pieces_ahead(pieces, len(self._slots))
        self._staged, self._leaving = {}, LeavingBuffers()
        self._done, self._updated, self._returned = {}, {}, {}
        self._rest, self._peak_staging = None, 0
        self.peak = 0.0

    def allocated(self, *_: Any) -> int:
        return int(self._base + self.activations + sum(buffer.numel() for buffer in self._buffers))

    def empty(self, num_bytes: int, **_: Any) -> Buffer:
        buffer = Buffer(num_bytes)
        self._buffers.add(buffer)
        return buffer

    def _state_bytes(self, index: int) -> int:
        return STATE_BYTES * self.pieces[index].numel

    def _upload(self, index: int, buffer: Any, *after: Any) -> Any:
        begin = max(self._last_up, self.clock.now, *(event.done for event in after))
        self._last_up = begin + self._state_bytes(index) / self.machine.link
        return Event(self.clock, self._last_up)

    def _update(self, index: int, *_: Any) -> None:
        self.current.run(UPDATE_BYTES * self.pieces[index].numel / self.machine.device_memory)

    def _download(self, index: int, buffer: Any, ready: Any) -> Any:
        begin = max(self._last_down, ready.done, self.clock.now)
        self._last_down = begin + self._state_bytes(index) / self.machine.link
        return Event(self.clock, self._last_down)

    def synchronize(self) -> None:
        """Nothing is under way at the end of a simulation."""

    @contextmanager
    def instead_of_cuda(self) -> Iterator[None]:
        def choose(stream: Stream) -> None:
            self.current = stream

        fake: Any = SimpleNamespace(
            cuda=SimpleNamespace(current_stream=lambda *_: self.current, set_stream=choose, Event=Event),
            empty=self.empty,
            uint8=None,
            full=lambda *_, **__: None,
            OutOfMemoryError=torch.OutOfMemoryError,
        )
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(offload_stream, "torch", fake))
            stack.enter_context(mock.patch.object(staging_room, "allocated_bytes", self.allocated))
            stack.enter_context(
                mock.patch.object(staging_room, "capacity_bytes", return_value=int(self.machine.capacity))
            )
            self._room = staging_room.StagingRoom(self.context.device)
            yield

    def train_step(self) -> tuple[float, float]:
        """Seconds of a step, and of them those that the device waited for weights."""
        machine, num_buckets = self.machine, 1 + self.pieces[-1].bucket
        begun, waited = self.clock.now, 0.0
        self.launch_rest()
        for bucket in range(num_buckets):
            self.clock.now += 0.4 * machine.launch_s / num_buckets
            free = max(self.compute.done, self.clock.now)
            self.wait(bucket)
            waited += max(0.0, self.compute.done - free)
            self.compute.run(machine.forward_s / num_buckets)
            self.activations += machine.activations / num_buckets
            self.peak = max(self.peak, self.allocated())
        self.start_backward()
        for bucket in reversed(range(num_buckets)):
            self.clock.now += 0.6 * machine.launch_s / num_buckets
            self.compute.run(machine.backward_s / num_buckets)
            self.activations -= machine.activations / num_buckets
            if bucket % 2 == 0:
                self.prefetch()
            self.peak = max(self.peak, self.allocated())
        self.step(SimpleNamespace(number=0, multiplier=None))  # type: ignore[arg-type]
        self.clock.now = max(self.clock.now, self.compute.done)  # the norm is read
        return self.clock.now - begun, waited


def pieces_of(name: str) -> list[Piece]:
    model = build_model(name, "meta")
    specs = [
        ParamSpec(index, at, tuple(param.shape), param.numel(), torch.bfloat16, int(param.ndim < 2))
        for index, (at, param) in enumerate(model.named_parameters())
    ]
    layouts = plan_buckets(specs, bucket_numel=BUCKET_NUMEL, num_shards=1)
    return cut_evenly(layouts, [0] * len(layouts), STREAM_PIECE_NUMEL)


def simulate(pieces: list[Piece], machine: Machine, steps: int = 12) -> dict[str, float]:
    """Milliseconds of a step and of waiting in it, and peak GiB: of the second half of ``steps``."""
    home = SimulatedHome(pieces, machine, base=4 * sum(piece.numel for piece in pieces))
    with home.instead_of_cuda():
        found = [home.train_step() for _ in range(steps)][steps // 2 :]
        home._rest = None
    step, waited = (1000 * sum(column) / len(found) for column in zip(*found))
    return {"step_ms": step, "wait_ms": waited, "peak_gib": home.peak / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="decoder-3b")
    parser.add_argument("--forward", type=float, required=True, help="milliseconds of the device")
    parser.add_argument("--backward", type=float, required=True, help="milliseconds of the device")
    parser.add_argument("--launch", type=float, default=0.0, help="milliseconds of the host")
    parser.add_argument("--activations", type=float, required=True, help="GiB at the end of the forward pass")
    parser.add_argument("--link", type=float, default=49.0, help="GB/s of one direction while both are in use")
    parser.add_argument("--held", type=float, default=staging_room.HELD_SHARE)
    parser.add_argument("--ahead", type=float, default=staging_room.MAX_AHEAD_SHARE)
    args = parser.parse_args()
    staging_room.HELD_SHARE, staging_room.MAX_AHEAD_SHARE = args.held, args.ahead
    machine = Machine(
        args.forward / 1000, args.backward / 1000, args.activations * GIB, args.launch / 1000, args.link * 1e9
    )
    for name, value in simulate(pieces_of(args.model), machine).items():
        print(f"{name:8} {value:8.1f}")


if __name__ == "__main__":
    main()
