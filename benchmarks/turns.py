"""Engines that are loaded at once and take turns of a few steps, so that a drifting machine drifts for all of them.

A cell with ``turns=8`` is loaded by every engine of its list; after the warm-up each waits. A turn is some steps that
are not timed and ``TURN_STEPS`` that are; then the device runs dry and the next engine has its turn. Time is taken at
the ends of steps, without waiting for the device: work that is under way when the first timed step begins is as much as
what is under way when the last one ends. A round is one turn of each engine. Waiting engines have emptied their
device caches, so every shape of batch comes once before time is taken: what a cache takes from the driver again costs
no training that goes on.

Two runs of one engine, seconds apart, differed by half on a host whose cores others use too; only this tells engines
apart there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
from spans import describe_peaks, describe_span
from workloads import DISTINCT_BATCHES, is_decoder

TURN_STEPS = DISTINCT_BATCHES
"""Timed steps of a turn: each batch once."""


def untimed_steps(job: argparse.Namespace) -> int:
    """Of each turn, before those that are timed: one of every shape."""
    return 1 if is_decoder(job.model) else DISTINCT_BATCHES


def steps_of_turns(job: argparse.Namespace) -> int:
    """All steps of a run: the warm-up, then untimed and TURN_STEPS timed ones a turn."""
    return int(job.warmup + job.turns * (untimed_steps(job) + TURN_STEPS))


def wait_for_turn() -> bool:
    """Say that this process waits, and read one line: whether there is another turn, or time is up.

    Raises:
        EOFError: nobody will say it.
    """
    print("RESULT " + json.dumps({"waits": True}), flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError("nobody gives turns any more")
    return "stop" not in json.loads(line)


class TurnClock:
    """``Clock`` of a run in turns: the same callback after every step, the same fields for every turn."""

    def __init__(self, job: argparse.Namespace, cuda: bool, wait: Callable[[], bool] = wait_for_turn) -> None:
        self.warmup, self.turns, self.cuda = job.warmup, job.turns, cuda
        self.untimed = untimed_steps(job)
        self.first_step_at = 0.0
        self.is_over = False
        """There is no further turn; training should end."""
        self._wait = wait
        self.num_steps = 0
        self._stamps: list[float] = []
        self._own = psutil.Process().cpu_times()
        self._records: list[dict[str, Any]] = []
        self._peak_before = 0

    def _place_of(self, step: int) -> tuple[int, int]:
        """(turn, place in it); turns are negative in the warm-up. Untimed steps come first; the last has place 0."""
        return divmod(step - self.warmup, self.untimed + TURN_STEPS)

    def times_step(self, step: int) -> bool:
        """Whether step ``step``, counted from 1, is one of a turn's timed steps."""
        return step > self.warmup and not 0 < self._place_of(step)[1] <= self.untimed

    def on_step_end(self) -> None:
        self.num_steps += 1
        if self.num_steps == 1:
            self.first_step_at = time.time()
        turn, place = self._place_of(self.num_steps)
        if turn < 0:
            return
        if place == self.untimed:
            self._own = psutil.Process().cpu_times()
            self._stamps = [time.perf_counter()]
        elif place > self.untimed:
            self._stamps.append(time.perf_counter())
        elif place == 0 and turn > 0:
            self._stamps.append(time.perf_counter())
            self._records.append(describe_span(self._stamps, self._stamps[-1], self._own))
        if place == 0 and turn < self.turns:
            self._pause(is_first=turn == 0)

    def _pause(self, *, is_first: bool) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            if is_first:
                self._peak_before = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()
        self.is_over = not self._wait()

    def finish(self) -> dict[str, Any]:
        """Means over all turns, and every turn's own figures in ``turns``.

        Raises:
            RuntimeError: there was no turn.
        """
        if not self._records:
            raise RuntimeError("time was up before the first turn")
        means = [record["step_ms_mean"] for record in self._records]
        result: dict[str, Any] = {
            "steps": sum(record["steps"] for record in self._records),
            "step_ms_median": statistics.median(ms for record in self._records for ms in record["step_ms"]),
            "step_ms_mean": statistics.mean(means),
            "turns": self._records,
        }
        return result | (describe_peaks(self._peak_before) if self.cuda else {})


def split_turns(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One result a turn, in order; the whole run's time to the first step stays with the first turn alone."""
    shared = {name: value for name, value in result.items() if name != "turns"}
    found = []
    for number, record in enumerate(result["turns"]):
        tokens_per_s = 1000 * result["tokens"] / record["step_ms_mean"]
        first = {} if number == 0 else {"first_step_s": None}
        found.append({**shared, **record, **first, "tokens_per_s": tokens_per_s})
    return found
