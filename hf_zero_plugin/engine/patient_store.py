"""A store that is asked from aside, so that nobody waits for its answer longer than he likes.

torch's store waits for an answer without end. If the process that holds it is frozen, so is whoever asks, and a thread
that is inside such a call when the interpreter ends takes the process down with it. So a thread of its own asks, one
question at a time, and asks no more when the interpreter is about to end.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import queue
import threading
import weakref
from typing import Any

import torch.distributed as dist

__all__ = ["PatientStore"]

_Calls = queue.SimpleQueue[tuple["concurrent.futures.Future[Any]", str, tuple[Any, ...]] | None]
_living: weakref.WeakSet[PatientStore] = weakref.WeakSet()

AT_EXIT_S = 1.0
"""How long the end of the interpreter waits for an answer that is on its way."""


class PatientStore:
    """``set``, ``check`` and ``get`` of ``store``, from any thread.

    Raises:
        TimeoutError: no answer for ``patience_s``, or none yet to an earlier question. Later ones may be answered.
        RuntimeError: what the store says itself. Once the connection is lost it is not asked again.
    """

    def __init__(self, store: dist.Store, patience_s: float) -> None:
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._calls: _Calls = queue.SimpleQueue()
        self._last: concurrent.futures.Future[Any] | None = None
        self._is_lost = False
        self._thread = threading.Thread(target=_ask, args=(store, self._calls), name="hf-zero-store", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._calls.put, None).atexit = False
        _living.add(self)

    def set(self, key: str, value: str) -> None:
        self._call("set", key, value)

    def check(self, keys: list[str]) -> bool:
        return bool(self._call("check", keys))

    def get(self, key: str) -> bytes:
        answer: bytes = self._call("get", key)
        return answer

    def _call(self, method: str, *args: Any) -> Any:
        with self._lock:
            if self._is_lost:
                raise ConnectionError("the store has closed the connection")
            if self._last is not None and not self._last.done():
                raise TimeoutError("the store has not answered yet")
            self._last = concurrent.futures.Future()
            self._calls.put((self._last, method, args))
            try:
                return self._last.result(self._patience_s)
            except concurrent.futures.TimeoutError:
                raise TimeoutError(f"the store has not answered for {self._patience_s:g} s") from None
            except dist.DistNetworkError:
                self._is_lost = True
                raise

    def end(self) -> None:
        """Ask no more; wait a little for what is under way."""
        self._calls.put(None)
        self._thread.join(AT_EXIT_S)


def _ask(store: dist.Store, calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        answer, method, args = call
        try:
            answer.set_result(getattr(store, method)(*args))
        except Exception as error:  # for the one who has asked
            answer.set_exception(error)
        del call, answer, args


@atexit.register
def _end_all() -> None:
    for store in list(_living):
        store.end()
