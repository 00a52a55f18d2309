"""The checkpoint on disk: slices of named parameters, so that any number of ranks can read what any number wrote.

::

    DIR/latest                              the newest tag
    DIR/global_step120/
        zero_state.json                     format, step counts, loss scaler, hyperparameters
        zero_client.pt                      the caller's client_state and the schedule's state (torch.save)
        zero_module.safetensors             what is not trained: frozen parameters and buffers
        zero_shard_00000_of_00002_0000.safetensors   slices that rank 0 owned, cut into files of about 2 GB

A tensor in a shard file is named ``parameter|kind|start:end``: elements [start, end) of the flattened parameter.
``kind`` is "master" or the name of an optimizer state. A state that is not elementwise (Adafactor's factors, step
counts) is stored whole as ``parameter|kind|*``. Where a slice began and ended is all a reader has to know.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_zero_plugin.errors import CheckpointError

__all__ = [
    "CLIENT_FILE",
    "FORMAT",
    "LATEST",
    "MODULE_FILE",
    "STATE_FILE",
    "ShardReader",
    "Slice",
    "newest_tag",
    "reading",
    "write_shard",
]

FORMAT = 1
LATEST = "latest"
STATE_FILE = "zero_state.json"
CLIENT_FILE = "zero_client.pt"
MODULE_FILE = "zero_module.safetensors"
SHARD_BYTES = 2 * 10**9
_SHARD_PATTERN = re.compile(r"zero_shard_(\d+)_of_(\d+)_(\d+)\.safetensors")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[Path]:
    """Whatever goes wrong while ``file`` is read is the file's fault, and said so.

    Raises:
        CheckpointError: the body failed.
    """
    try:
        yield file
    except Exception as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}). The file is missing, damaged or was cut short; resume from another "
            "checkpoint."
        ) from error


class Slice(NamedTuple):
    """Elements [start, end) of one flattened parameter's master or state; ``end`` -1 marks a whole, shaped state."""

    param: str
    kind: str
    start: int
    end: int
    tensor: Tensor

    @property
    def key(self) -> str:
        span = "*" if self.end < 0 else f"{self.start}:{self.end}"
        return f"{self.param}|{self.kind}|{span}"


def write_shard(directory: Path, rank: int, world_size: int, slices: Iterable[Slice]) -> int:
    """Write one rank's slices; at most one file's worth is copied at a time. Returns the bytes written."""
    total = written = part = 0
    batch: dict[str, Tensor] = {}

    def flush() -> None:
        nonlocal batch, written, part
        name = f"zero_shard_{rank:05d}_of_{world_size:05d}_{part:04d}.safetensors"
        save_file(batch, directory / name)
        part, written, batch = part + 1, 0, {}

    for item in slices:
        # A copy: slices of one flat buffer share memory, which safetensors refuses.
        batch[item.key] = item.tensor.detach().to("cpu", copy=True).contiguous()
        size = item.tensor.numel() * item.tensor.element_size()
        written, total = written + size, total + size
        if written >= SHARD_BYTES:
            flush()
    if batch or part == 0:
        flush()
    return total


class _Place(NamedTuple):
    start: int
    end: int
    file: Path
    key: str


class ShardReader:
    """Finds and reads slices of parameters, however they were cut.

    Raises:
        CheckpointError: files of a rank are missing, or a file cannot be read.
    """

    def __init__(self, directory: Path, *, declared: dict[str, int] | None = None) -> None:
        """``declared``: elements of every parameter, when only this node's files are here (node-local storage)."""
        self.directory = directory
        self._declared = declared
        self._places: dict[tuple[str, str], list[_Place]] = {}
        self._open: dict[Path, safe_open] = {}
        ranks: dict[int, set[int]] = {}
        for file in sorted(directory.glob("zero_shard_*.safetensors")):
            match = _SHARD_PATTERN.fullmatch(file.name)
            if match:
                ranks.setdefault(int(match[2]), set()).add(int(match[1]))
                self._index(file)
        for world_size, found in ranks.items() if declared is None else ():
            missing = sorted(set(range(world_size)) - found)
            if missing:
                raise CheckpointError(
                    f"{directory}: written by {world_size} ranks, but the files of rank {missing} are not here. "
                    "Copy them from the machines that wrote them, or resume from another checkpoint."
                )

    def _index(self, file: Path) -> None:
        with reading(file):
            handle = safe_open(file, framework="pt")
        self._open[file] = handle
        for key in handle.keys():  # noqa: SIM118 - not a dict
            param, kind, span = key.rsplit("|", 2)
            start, end = (0, -1) if span == "*" else map(int, span.split(":"))
            self._places.setdefault((param, kind), []).append(_Place(start, end, file, key))

    @property
    def params(self) -> set[str]:
        if self._declared is not None:
            return set(self._declared)
        return {param for param, kind in self._places if kind == "master"}

    def kinds(self, param: str) -> list[str]:
        kinds = sorted(kind for name, kind in self._places if name == param)
        if not kinds and self._declared is not None:
            raise CheckpointError(
                f"{self.directory}: no part of {param!r} is on this node. On node-local storage a checkpoint resumes "
                "at the number of ranks that wrote it; to resume at another, gather all files in one folder."
            )
        return kinds

    def read(self, param: str, kind: str, start: int, end: int) -> Tensor | None:
        """Elements [start, end) as a flat tensor, or the whole state if it was stored whole; None if absent."""
        places = self._places.get((param, kind))
        if not places:
            return None
        if places[0].end < 0:
            return self._open[places[0].file].get_tensor(places[0].key)
        out: Tensor | None = None
        covered = 0
        for place in places:
            low, high = max(start, place.start), min(end, place.end)
            if low < high:
                part = self._open[place.file].get_slice(place.key)[low - place.start : high - place.start]
                out = torch.empty(end - start, dtype=part.dtype) if out is None else out
                out[low - start : high - start] = part
                covered += high - low
        if out is None or covered != end - start:
            raise CheckpointError(
                f"{self.directory}: {kind} of {param!r} has {covered} of elements {start} to {end}. "
                "The checkpoint is incomplete; resume from another one."
            )
        return out

    def is_whole(self, param: str, kind: str) -> bool:
        """The state was stored in its own shape, not in slices of the flattened parameter."""
        places = self._places.get((param, kind), [])
        return bool(places) and places[0].end < 0

    def numel(self, param: str) -> int:
        if self._declared is not None:
            return self._declared[param]
        return max(place.end for place in self._places[(param, "master")])

    def close(self) -> None:
        self._open.clear()


def newest_tag(directory: Path) -> str | None:
    """The tag in ``latest``, or the highest global_stepN, or None."""
    latest = directory / LATEST
    tag = latest.read_text().strip() if latest.is_file() else ""
    if tag and (directory / tag).is_dir():
        return tag
    steps = [d.name for d in directory.glob("global_step*") if d.is_dir() and d.name[11:].isdigit()]
    return max(steps, key=lambda name: int(name[11:]), default=None)
