"""What the order of transfers is worth: ways to move the states, taken in turns inside one engine. Needs a GPU.

    python benchmarks/transfers.py --model decoder-3b --batch 16 --ways sizes+kernels+held=0.2,kernels,now --rounds 3

``now`` is the engine as it is. Other ways are joined with ``+``:

    sizes       every buffer has its piece's size, and a piece takes the smallest that is large enough
    kernels     downloads go through one stream, a tiny kernel after every 72 MiB
    whole       uploads are not cut, so that the next batch waits behind a piece
    cut=36      MiB of a cut, both ways
    in_place    nothing is copied: updates read and write page-locked host memory themselves
    held=0.2    ``staging_room.HELD_SHARE``
    ahead=0.65  ``staging_room.MAX_AHEAD_SHARE``

A turn is ``--warmup`` steps and then ``--timed`` ones. The last line is JSON: milliseconds a step and peak GiB by way.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import defaultdict
from functools import cache
from typing import Any

import cell
import torch
import trial
from torch import Tensor

from hf_zero_plugin.engine import staging_room
from hf_zero_plugin.engine.cut_copies import cut_bytes
from hf_zero_plugin.engine.leaving import LeavingBuffer, LeavingBuffers
from hf_zero_plugin.engine.offload_stream import StreamedHome

_take_first = LeavingBuffers.take_first
_defaults = {"held": staging_room.HELD_SHARE, "ahead": staging_room.MAX_AHEAD_SHARE}
_methods = {name: getattr(StreamedHome, name) for name in ("_capacity", "_upload", "_download", "_launch", "prefetch")}


def take_closest(
    leaving: LeavingBuffers, num_bytes: int, *, among: set[int] | None = None, **_: Any
) -> LeavingBuffer | None:
    if among is not None:
        return _take_first(leaving, num_bytes, among=among)
    fits = [one.numel() for one in leaving.buffers if one.numel() >= num_bytes]
    return _take_first(leaving, min(fits), below=min(fits) + 1) if fits else None


def own_size(home: StreamedHome, index: int) -> int:
    return home._bytes_each * (home._longest if index < len(home._slots) else home.pieces[index].numel)


@cache
def make_tick(device: torch.device) -> Tensor:
    """Something for a tiny kernel to write to, ready for any stream."""
    tick = torch.zeros(1, device=device)
    torch.cuda.synchronize()
    return tick


def with_kernels(home: StreamedHome, index: int, buffer: Tensor, ready: torch.cuda.Event) -> torch.cuda.Event:
    stream, slab, cut = home._downloads._streams[0], home._slabs[index], 72 * 2**20
    tick = make_tick(buffer.device)
    torch.cuda.set_stream(stream)
    stream.wait_event(ready)
    for host, device in zip(slab.split(cut), buffer[: slab.numel()].split(cut)):
        host.copy_(device, non_blocking=True)
        tick.zero_()
    return stream.record_event()


def uncut(home: StreamedHome, index: int, buffer: Tensor, *after: torch.cuda.Event) -> torch.cuda.Event:
    stream, slab = home._slots[index % len(home._slots)], home._slabs[index]
    torch.cuda.set_stream(stream)
    for event in after:
        stream.wait_event(event)
    buffer[: slab.numel()].copy_(slab, non_blocking=True)
    return stream.record_event()


class Mapped:
    """Page-locked bytes as device memory: with unified addresses a kernel may use the host's."""

    def __init__(self, slab: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(slab.shape),
            "typestr": "|u1",
            "data": (slab.data_ptr(), False),
            "version": 3,
        }


@cache
def mapped(home: StreamedHome) -> list[Tensor]:
    return [torch.as_tensor(Mapped(slab), device=home.context.device) for slab in home._slabs]


def launch_in_place(home: StreamedHome, inputs: Any, number: Tensor) -> None:
    for index, slab in enumerate(mapped(home)):
        torch.cuda.set_stream(home._slots[index % len(home._slots)])
        home._finish(index, slab, inputs, number)
        home._returned[index] = home._updated[index]


def find_home() -> StreamedHome:
    return next(one for one in gc.get_objects() if isinstance(one, StreamedHome))


def take_way(home: StreamedHome, way: str) -> None:
    """Nothing is under way when it changes, and the allocator begins anew."""
    parts = way.split("+")
    home.forget_prefetched()
    home.synchronize()
    torch.cuda.synchronize()
    shares = _defaults | {name: float(value) for name, _, value in (part.partition("=") for part in parts) if value}
    staging_room.HELD_SHARE, staging_room.MAX_AHEAD_SHARE = shares["held"], shares["ahead"]
    for copies in (home._uploads, home._downloads):
        copies.cut = int(shares["cut"] * 2**20) if "cut" in shares else cut_bytes(home._total * home._bytes_each)
    home._max_ahead = staging_room.pieces_ahead(home.pieces, len(home._slots))
    StreamedHome._capacity = own_size if "sizes" in parts else _methods["_capacity"]  # type: ignore[method-assign]
    StreamedHome._upload = uncut if "whole" in parts else _methods["_upload"]  # type: ignore[method-assign]
    StreamedHome._launch = launch_in_place if "in_place" in parts else _methods["_launch"]  # type: ignore[method-assign]
    StreamedHome.prefetch = (lambda _: None) if "in_place" in parts else _methods["prefetch"]  # type: ignore[method-assign]
    StreamedHome._download = with_kernels if "kernels" in parts else _methods["_download"]  # type: ignore[method-assign]
    LeavingBuffers.take_first = take_closest if "sizes" in parts else _take_first  # type: ignore[method-assign]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


class Turns:
    """``on_step_end`` is called after every step. Each round begins with another way."""

    def __init__(self, ways: list[str], rounds: int, warmup: int, timed: int) -> None:
        self.turns = [ways[(at + number) % len(ways)] for number in range(rounds) for at in range(len(ways))]
        self.warmup, self.timed = warmup, timed
        self.step_ms: dict[str, list[float]] = defaultdict(list)
        self.peak_gib: dict[str, float] = {}
        self._step, self._begun = -1, 0.0

    @property
    def num_steps(self) -> int:
        return 1 + len(self.turns) * (self.warmup + self.timed)

    def on_step_end(self) -> None:
        turn, step = divmod(self._step, self.warmup + self.timed)
        self._step += 1
        now = time.perf_counter()
        if turn >= 0 and step == self.warmup - 1:
            self._begun = now
        if turn >= 0 and step == self.warmup + self.timed - 1:
            way = self.turns[turn]
            self.step_ms[way].append(round(1000 * (now - self._begun) / self.timed, 1))
            self.peak_gib[way] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            print(f"{way:30} {self.step_ms[way][-1]:8.1f} ms {self.peak_gib[way]} GiB", flush=True)
        if self._step % (self.warmup + self.timed) == 0 and self._step < self.num_steps - 1:
            take_way(find_home(), self.turns[self._step // (self.warmup + self.timed)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t5-base")
    parser.add_argument("--precision", default="bf16", choices=["fp16", "bf16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--ways", default="sizes+kernels+held=0.2,now")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--timed", type=int, default=10, help="a multiple of 5 sees every batch equally often")
    args = parser.parse_args()
    turns = Turns(args.ways.split(","), args.rounds, args.warmup, args.timed)
    cell.prepare("ours")
    job = cell.build_parser().parse_args(["--engine", "ours", "--model", args.model, "--precision", args.precision])
    job.batch, job.steps, job.checkpointing = args.batch, turns.num_steps, int(args.checkpointing)
    trainer, clock, *_ = trial.make_trainer(job, True)
    clock.on_step_end = turns.on_step_end  # type: ignore[method-assign]
    trainer.train()
    found = {"step_ms": turns.step_ms, "peak_gib": turns.peak_gib}
    print(json.dumps({"device": torch.cuda.get_device_name(), **vars(args), **found}))


if __name__ == "__main__":
    main()
