"""Optimizer states of one rank in a file, on NVMe: read into a staging buffer, changed there, written back.

::

    index       0        1        2        3        4  ...       pieces, each at a multiple of 4096 bytes in the file
    buffer 0    read ................. used | write ........
    buffer 1             read ........ used ...                  ``num_buffers`` of them, reused in turn

Transfers are cut into blocks, and a pool of threads moves ``num_in_flight`` blocks at once: reads and writes leave the
interpreter lock alone. The file is opened past the page cache where the file system allows it, so that states do not
come back into the memory that they were moved out of. It has no name once it is open: nothing is left behind when the
process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hf_zero_plugin.errors import ConfigError

__all__ = ["StateFile", "refuse_directory"]

ALIGNMENT = 4096
"""Of places in the file, in memory, and of lengths: what reads and writes past the page cache need."""


@dataclass
class _Buffer:
    memory: mmap.mmap
    index: int | None = None
    """The piece that is in it, or on its way."""
    pending: list[Future[None]] = field(default_factory=list)
    """Transfers under way; over when all of them are."""

    def wait(self) -> None:
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()


class StateFile:
    """Bytes of pieces in a file of ``directory``. Not thread-safe: one thread at a time.

    Args:
        sizes: bytes of every piece.
        num_buffers: staging buffers, each as large as the largest piece; at least 1.
        block_bytes: size of one read or write.
        num_in_flight: reads and writes under way at once.
        writes_behind: return from ``write`` before the data is in the file.

    Raises:
        ConfigError: the directory cannot be written to, or has too little room.
    """

    def __init__(
        self,
        directory: str,
        sizes: Sequence[int],
        *,
        num_buffers: int,
        block_bytes: int,
        num_in_flight: int,
        writes_behind: bool,
    ) -> None:
        self._sizes = [_round_up(size) for size in sizes]
        self._starts = [sum(self._sizes[:index]) for index in range(len(sizes))]
        self._block = _round_up(block_bytes)
        self._writes_behind = writes_behind
        self.num_bytes = sum(self._sizes)
        self._file = _open_nameless(directory, self.num_bytes)
        self._buffers = [_Buffer(mmap.mmap(-1, max(self._sizes, default=ALIGNMENT))) for _ in range(num_buffers)]
        self._free = deque(self._buffers)
        """Those that nobody uses; writes may still be under way in them, the oldest first."""
        self._pool = ThreadPoolExecutor(num_in_flight, thread_name_prefix="hf-zero-nvme")
        self._reading: dict[int, _Buffer] = {}

    @property
    def buffer_bytes(self) -> int:
        return sum(len(buffer.memory) for buffer in self._buffers)

    def read_ahead(self, index: int) -> bool:
        """Begin to read piece ``index``, unless every buffer is in use. False if so."""
        if index in self._reading:
            return True
        if not self._free:
            return False
        # A piece that is still being written must be in the file before it is read again.
        for buffer in self._free:
            if buffer.index == index:
                buffer.wait()
        buffer = self._free.popleft()
        buffer.wait()
        buffer.index = index
        buffer.pending = self._transfer(os.preadv, buffer, index)
        self._reading[index] = buffer
        return True

    def read(self, index: int) -> Tensor:
        """The bytes of piece ``index``, in a buffer that is its own until ``write`` or ``drop``."""
        if not self.read_ahead(index):
            # Read ahead, and not used: give the buffer of the last one up.
            self.drop(max(self._reading))
            self.read_ahead(index)
        buffer = self._reading[index]
        buffer.wait()
        return torch.frombuffer(buffer.memory, dtype=torch.uint8)[: self._sizes[index]]

    def write(self, index: int) -> None:
        """Bring what was changed in the buffer of ``index`` into the file, and give the buffer up."""
        buffer = self._reading.pop(index)
        buffer.pending = self._transfer(os.pwritev, buffer, index)
        if not self._writes_behind:
            buffer.wait()
        self._free.append(buffer)

    def drop(self, index: int) -> None:
        """Give the buffer of ``index`` up; nothing was changed in it."""
        buffer = self._reading.pop(index)
        buffer.wait()
        self._free.appendleft(buffer)

    def drain(self) -> None:
        """Wait until everything is in the file and nothing is read ahead."""
        for index in list(self._reading):
            self.drop(index)
        for buffer in self._buffers:
            buffer.wait()

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _transfer(self, move: object, buffer: _Buffer, index: int) -> list[Future[None]]:
        start, size = self._starts[index], self._sizes[index]
        view = memoryview(buffer.memory)
        return [
            self._pool.submit(_move_all, move, self._file, view[low : min(low + self._block, size)], start + low)
            for low in range(0, size, self._block)
        ]


def _move_all(move: object, file: int, part: memoryview, offset: int) -> None:
    """A system call may move less than it was asked to."""
    while part:
        moved = move(file, [part], offset)  # type: ignore[operator]
        if moved == 0:
            raise OSError(f"the file of optimizer states ends at byte {offset}")
        part, offset = part[moved:], offset + moved


def _round_up(size: int) -> int:
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def refuse_directory(directory: str) -> None:
    """Raises ConfigError: no file can be made in ``directory``."""
    os.close(_open_nameless(directory, 0))


def _open_nameless(directory: str, num_bytes: int) -> int:
    key = "$.zero_optimization.offload_optimizer.nvme_path"
    file = -1
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(prefix="hf-zero-states-", dir=directory)
        if num_bytes:
            os.posix_fallocate(file, 0, num_bytes)
        with contextlib.suppress(OSError):  # file systems in memory have no cache to go past
            direct = os.open(name, os.O_RDWR | os.O_DIRECT)
            os.close(file)
            file = direct
        os.unlink(name)
    except OSError as error:
        if file >= 0:
            os.close(file)
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise ConfigError(
            f"{key}: {num_bytes / 2**30:.2f} GiB of optimizer states cannot be kept in {directory} ({error.strerror}). "
            "Name a directory on a disk with that much room for every rank, which you may write to."
        ) from error
    return file
