"""Offload with host arithmetic: a background thread updates masters and states in host memory.

Per bucket, in the order in which the next forward pass needs them::

    gradient ready -> download stream -> page-locked buffer                       (2 B/parameter; sums in fp32: 4)
    worker thread: widen, multiply, update rule, narrow                          (host cores)
    upload stream: weights back to the device                                    (2 B/parameter)

The forward pass waits for its own bucket only: first for the worker (a host wait), then for the upload (a wait on the
device). Calls are few and large: every Python call of the worker takes the interpreter lock from the thread that
launches kernels. On a CPU device there is nothing to copy and the same thread updates the gradients where they are.

Gradients of offloaded weights that rest in host memory are read there. The home may work beside one that streams
through the device: each has pieces of its own (``state_homes.py``). Whether an overflow skips the step goes down ahead
of the gradients, so nobody waits for the device to launch one.
"""

from __future__ import annotations

import atexit
import queue
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.carriers import Carriers
from hf_zero_plugin.engine.host_threads import host_threads
from hf_zero_plugin.engine.master_weights import Context, Home, StepInputs
from hf_zero_plugin.engine.piece_states import PieceStates
from hf_zero_plugin.engine.pinned import PinnedArena

__all__ = ["HostHome", "Job"]


class Job(NamedTuple):
    """The update of one bucket."""

    bucket: int
    inputs: StepInputs
    number: Tensor
    multiplier: float
    """For the gradients. Not used if they come from a device: then it is on its way down, ahead of them."""


Jobs: TypeAlias = "queue.SimpleQueue[tuple[HostHome, Job] | None]"


class HostHome(Home):
    """See the module. With ``threaded`` false the update runs inside ``step``: the reference for tests."""

    def __init__(
        self,
        context: Context,
        pieces: Sequence[Piece],
        *,
        pin_memory: bool = True,
        threaded: bool = True,
        threads_share: float = 1.0,
        num_spared: int = 0,
    ) -> None:
        super().__init__(context, pieces)
        self._pieces_of: dict[int, list[int]] = {}
        for index, piece in enumerate(self.pieces):
            self._pieces_of.setdefault(piece.bucket, []).append(index)
        self.place_states()
        longest = max((piece.numel for piece in self.pieces), default=0)
        self._scratch = torch.empty(longest)
        self._crosses = self._on_cuda and not context.grads.is_on_host
        """Gradients come down from the device. If they rest in host memory, so do the weights."""
        weights = [context.weight_of(piece) for piece in self.pieces] if self._crosses else []
        self._carriers = Carriers(weights, sums_in_fp32=context.sums_in_fp32, pin=pin_memory)
        if self._on_cuda:
            self._copies = torch.cuda.Stream(context.device)
            self._uploads = torch.cuda.Stream(context.device)
            self._tick = torch.zeros(1, device=context.device)
            self._numbers = torch.zeros(2, pin_memory=torch.cuda.is_available())
            self._numbers_on_device = torch.zeros(2, device=context.device)
        self._grad_ready: dict[int, torch.cuda.Event] = {}
        self._uploaded: dict[int, torch.cuda.Event] = {}
        self._done = {bucket: threading.Event() for bucket in self._pieces_of}
        self._error: BaseException | None = None
        self._jobs: Jobs = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if threaded and self.pieces:
            self._start_thread(max(1, host_threads(threads_share, num_spared)))

    def place_states(self) -> None:
        """Make room for masters and states."""
        num_states, types = len(self.context.rule.state_names), self.context.types
        each = types.bytes_per_element(num_states)
        # Only host cores touch them: nothing to page-lock.
        arena = PinnedArena(sum(piece.numel for piece in self.pieces) * each, pin=False, dtype=torch.uint8)
        self._storage = [types.rows(arena.take(piece.numel * each), piece.numel, num_states) for piece in self.pieces]
        self._states = PieceStates(self.context.rule, self.pieces, types)

    @property
    def _on_cuda(self) -> bool:
        return self.context.device.type == "cuda"

    def _start_thread(self, num_threads: int) -> None:
        for done in self._done.values():
            done.set()
        # The thread keeps a home alive while there is work to do, and no longer: otherwise an engine that nobody
        # destroys would never end it.
        self._thread = threading.Thread(target=_work, args=(self._jobs, num_threads), name="hf-zero-host-optimizer")
        self._thread.daemon = True
        self._thread.start()
        _working[self._thread] = self._jobs
        # Does not wait for the thread: the garbage collector may run anywhere, inside locks that the thread needs.
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def set_master(self, index: int, values: Tensor) -> None:
        master, *storage = self._storage[index]
        master.copy_(values)
        self._states.start(index, master, self.context.groups[self.pieces[index].group], storage)

    def step(self, inputs: StepInputs) -> None:
        number = torch.full((), float(inputs.number))
        multiplier = 1.0
        if self._on_cuda:
            self._send_numbers(inputs)
            for bucket in self._pieces_of:
                self._start_download(bucket)
        elif inputs.multiplier is not None:
            multiplier = inputs.multiplier.item()
        for bucket in self._pieces_of:
            job = Job(bucket, inputs, number, multiplier)
            self._done[bucket].clear()
            if self._thread is None:
                self.run(job)
            else:
                self._jobs.put((self, job))

    def _send_numbers(self, inputs: StepInputs) -> None:
        """Multiplier and overflow flag go down ahead of the gradients, so that nobody waits for them here."""
        given = (inputs.multiplier, 1.0), (inputs.found_inf, 0.0)
        for place, (number, otherwise) in zip(self._numbers_on_device, given):
            place.fill_(otherwise) if number is None else place.copy_(number)
        self._copies.wait_stream(torch.cuda.current_stream(self.context.device))
        with torch.cuda.stream(self._copies):
            self._numbers.copy_(self._numbers_on_device, non_blocking=True)

    def _start_download(self, bucket: int) -> None:
        with torch.cuda.stream(self._copies):
            for index in self._pieces_of[bucket] if self._crosses else ():
                piece = self.pieces[index]
                self._download(index, self.context.grad_of(piece))
                self.context.clear_grad(piece)
            # After gradients that rest on the host, too: they are on their way down already.
            self._grad_ready[bucket] = self._copies.record_event()

    def _download(self, index: int, grad: Tensor) -> None:
        if grad.element_size() > self._carriers.down[index].element_size():  # micro-steps that nobody had announced
            for stream in (self._copies, self._uploads):
                stream.synchronize()
            self._carriers.widen(index)
        self._carriers.down[index].copy_(grad, non_blocking=True)
        self._tick.zero_()  # see cut_copies.py: others read numbers meanwhile; here copies come singly, behind kernels

    def run(self, job: Job) -> None:
        """Update one bucket; on the worker thread, or inline without one."""
        try:
            if self._error is not None or self.is_broken:
                return
            with torch.no_grad():
                if self._on_cuda:
                    self._grad_ready[job.bucket].synchronize()
                started = time.perf_counter()
                multiplier, is_skipped = job.multiplier, False
                if self._on_cuda:
                    multiplier, is_skipped = self._numbers[0].item(), bool(self._numbers[1])
                for index in self._pieces_of[job.bucket] if not is_skipped else ():
                    self._update_piece(index, job, multiplier)
                for index in self._pieces_of[job.bucket] if not self._crosses else ():
                    self.context.clear_grad(self.pieces[index])
                if self._on_cuda:
                    with torch.cuda.stream(self._uploads):
                        self.context.finish_bucket(job.bucket, self)
                        self._uploaded[job.bucket] = self._uploads.record_event()
                else:
                    self.context.finish_bucket(job.bucket, self)
                if self.timeline is not None:
                    self.timeline.end_host_work(started)
        except BaseException as error:  # a thread has nobody to raise to: the next wait raises it
            self._error = error
            if self._thread is None:
                raise
        finally:
            self._done[job.bucket].set()

    def _update_piece(self, index: int, job: Job, multiplier: float) -> None:
        piece = self.pieces[index]
        grad = self._carriers.down[index] if self._crosses else self.context.grad_of(piece)
        if grad.dtype != torch.float32:
            grad = self._scratch[: piece.numel].copy_(grad)
        if multiplier != 1.0:
            grad.mul_(multiplier)
        master = self.apply(index, grad, job)
        weight = self.context.weight_of(piece)
        if self._crosses and weight.device == self.context.device:
            up = self._carriers.up[index].copy_(master)
            with torch.cuda.stream(self._uploads):
                weight.copy_(up, non_blocking=True)
        else:
            weight.copy_(master)
        self.finish_piece(index)

    def apply(self, index: int, grad: Tensor, job: Job) -> Tensor:
        """Update a piece by its fp32 gradient; return the new master, readable until ``finish_piece``."""
        self._states.update(index, grad, job.inputs.groups[self.pieces[index].group], job.number, None)
        return self._storage[index][0]

    def finish_piece(self, index: int) -> None:
        """The master was read."""

    def wait(self, bucket: int) -> None:
        done = self._done.get(bucket)
        if done is None:
            return
        done.wait()
        if self._error is not None:
            self.is_broken = True
            error, self._error = self._error, None
            raise error
        if bucket in self._uploaded:
            torch.cuda.current_stream(self.context.device).wait_event(self._uploaded[bucket])

    def synchronize(self) -> None:
        for bucket in self._pieces_of:
            if self._thread is not None:
                self.wait(bucket)
        if self._on_cuda:
            self._uploads.synchronize()

    def tensors(self, index: int) -> dict[str, Tensor]:
        return self._states.tensors(index)

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        self._states.load(index, tensors)

    def close(self) -> None:
        if self._thread is not None:
            _end(self._thread, self._jobs)
            self._thread = None
        if self._on_cuda:
            for stream in (self._copies, self._uploads):
                stream.synchronize()
        self._carriers.release()

    def __del__(self) -> None:
        # The engine was dropped, and the thread has done all its work: the memory is not unlocked under a copy.
        if not sys.is_finalizing():
            with suppress(Exception):  # it may not have been made to its end
                for stream in (self._copies, self._uploads) if self._on_cuda else ():
                    stream.synchronize()

    @property
    def num_bytes(self) -> dict[str, int]:
        return {**self._states.num_bytes(), "buffers": self.buffer_bytes}

    @property
    def buffer_bytes(self) -> int:
        return self._carriers.num_bytes + self._scratch.numel() * 4

    @property
    def skips_on_device(self) -> bool:
        # On a CPU a number is read at no cost, and the worker must not start on gradients that turn out to be inf.
        return self._on_cuda

    @property
    def is_on_host(self) -> bool:
        return True


_working: weakref.WeakKeyDictionary[threading.Thread, Jobs] = weakref.WeakKeyDictionary()


def _end(thread: threading.Thread, jobs: Jobs) -> None:
    """Let the thread do what it has been given, and end."""
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()


@atexit.register
def _end_all() -> None:
    """A daemon thread that holds page-locked memory aborts the interpreter when that ends."""
    for thread, jobs in list(_working.items()):
        _end(thread, jobs)


def _work(jobs: Jobs, num_threads: int) -> None:
    # A new thread has no thread count of its own until the first query; set before that, the count would be undone
    # by the first parallel call. See torch.get_num_threads.
    torch.get_num_threads()
    torch.set_num_threads(num_threads)
    while (work := jobs.get()) is not None:
        home, job = work
        del work
        home.run(job)
        del home, job
