"""A store that does not answer holds nobody up, and ends no process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from hf_zero_plugin.engine.heartbeats import Listener
from hf_zero_plugin.engine.patient_store import PatientStore
from tests.helpers import free_port


class Frozen:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.thaws = threading.Event()

    def check(self, keys: list[str]) -> bool:
        self.thaws.wait(30)
        return True

    def get(self, key: str) -> bytes:
        return b"1 step 3, forward"


def test_an_answer_that_does_not_come_is_not_waited_for() -> None:
    frozen = Frozen()
    store = PatientStore(frozen, 0.05)  # type: ignore[arg-type]
    begun = time.monotonic()
    listener = Listener([1, 2, 3], store)
    assert time.monotonic() - begun < 10
    assert "does not answer: look there first" in listener.report(0.0)
    assert listener.silent(0.0) == [1, 2, 3]
    frozen.thaws.set()
    for _ in range(100):
        listener.hear()
        if "Rank 3 lives: step 3, forward." in listener.report(60.0):
            return
        time.sleep(0.05)
    raise AssertionError(listener.report(60.0))


class Lost:
    """The other end has gone."""

    def __init__(self) -> None:
        self.num_asked = 0

    def set(self, key: str, value: str) -> None:
        self.num_asked += 1
        raise dist.DistNetworkError("Broken pipe")


def test_a_lost_store_is_asked_once() -> None:
    """torch writes a page about each time."""
    lost = Lost()
    store = PatientStore(lost, 5.0)  # type: ignore[arg-type]
    for error in (dist.DistNetworkError, OSError, OSError):
        with pytest.raises(error):
            store.set("key", "value")
    assert lost.num_asked == 1


def test_what_a_store_says_is_passed_on() -> None:
    store = PatientStore(dist.HashStore(), 5.0)
    assert not store.check(["key"])
    store.set("key", "value")
    assert (store.check(["key"]), store.get("key")) == (True, b"value")


BEATS_UNTIL_THE_END = """
import sys, threading, time
import torch.distributed as dist
from hf_zero_plugin.engine.patient_store import PatientStore

host = dist.TCPStore("127.0.0.1", int(sys.argv[1]), 1, True, wait_for_workers=False)
store = PatientStore(host.clone(), 5.0)

def beat():
    while True:
        store.set("key", "value")
        store.check(["key"])

threading.Thread(target=beat, daemon=True).start()
time.sleep(0.05)
"""


def test_the_interpreter_ends_as_it_should_while_others_beat(tmp_path: Any) -> None:
    """A thread inside torch's store at that moment would abort the process."""
    script = tmp_path / "beats.py"
    script.write_text(BEATS_UNTIL_THE_END)
    for _ in range(2):
        ended = subprocess.run([sys.executable, str(script), str(free_port())], capture_output=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, b"")
