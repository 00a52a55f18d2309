"""Engines that are loaded at once and take turns of a few steps, so that a drifting machine drifts for all of them.

A cell with ``turns=8`` is loaded by every engine of its list; after the warm-up each waits. A turn is one step that is
not timed and ``TURN_STEPS`` that are; then the device runs dry and the next engine has its turn. Time is taken at the
ends of steps, without waiting for the device: work that is under way when the first timed step begins is as much as
what is under way when the last one ends. A round is one turn of each engine. Waiting engines have emptied their
device caches.

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

TURN_STEPS = 4


def steps_of_turns(turns: int, warmup: int) -> int:
    """All steps of a run: the warm-up, then one untimed and TURN_STEPS timed ones a turn."""
    return warmup + turns * (1 + TURN_STEPS)


def wait_for_turn() -> None:
    """Say that this process waits, and read one line: the word to go on. Raises EOFError if nobody will say it."""
    print("RESULT " + json.dumps({"waits": True}), flush=True)
    if not sys.stdin.readline():
        raise EOFError("nobody gives turns any more")


class TurnClock:
    """``Clock`` of a run in turns: the same callback after every step, the same fields for every turn."""

    def __init__(self, job: argparse.Namespace, cuda: bool, wait: Callable[[], None] = wait_for_turn) -> None:
        self.warmup, self.turns, self.cuda = job.warmup, job.turns, cuda
        self.first_step_at = 0.0
        self._wait = wait
        self.num_steps = 0
        self._stamps: list[float] = []
        self._own = psutil.Process().cpu_times()
        self._records: list[dict[str, Any]] = []
        self._peak_before = 0

    def on_step_end(self) -> None:
        self.num_steps += 1
        if self.num_steps == 1:
            self.first_step_at = time.time()
        after_warmup = self.num_steps - self.warmup
        if after_warmup < 0:
            return
        turn, place = divmod(after_warmup, 1 + TURN_STEPS)
        if place == 1:
            self._own = psutil.Process().cpu_times()
            self._stamps = [time.perf_counter()]
        elif place > 1:
            self._stamps.append(time.perf_counter())
        elif turn > 0:
            self._stamps.append(time.perf_counter())
            self._end_turn()
        if place == 0 and turn < self.turns:
            self._pause(is_first=turn == 0)

    def _end_turn(self) -> None:
        end, own = self._stamps[-1], psutil.Process().cpu_times()
        steps_ms = [1000 * (b - a) for a, b in zip(self._stamps, self._stamps[1:])]
        elapsed = end - self._stamps[0]
        self._records.append(
            {
                "steps": len(steps_ms),
                "step_ms_median": statistics.median(steps_ms),
                "step_ms_mean": 1000 * elapsed / len(steps_ms),
                "step_ms": [round(ms, 2) for ms in steps_ms],
                "cpu_seconds_per_second": (own.user + own.system - self._own.user - self._own.system) / elapsed,
            }
        )

    def _pause(self, *, is_first: bool) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            if is_first:
                self._peak_before = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()
        self._wait()

    def finish(self) -> dict[str, Any]:
        """Means over all turns, and every turn's own figures in ``turns``."""
        means = [record["step_ms_mean"] for record in self._records]
        result: dict[str, Any] = {
            "steps": sum(record["steps"] for record in self._records),
            "step_ms_median": statistics.median(ms for record in self._records for ms in record["step_ms"]),
            "step_ms_mean": statistics.mean(means),
            "turns": self._records,
        }
        if self.cuda:
            import torch

            result["peak_allocated"] = torch.cuda.max_memory_allocated()
            result["peak_reserved"] = torch.cuda.max_memory_reserved()
            result["peak_allocated_whole_run"] = max(self._peak_before, torch.cuda.max_memory_allocated())
        return result


def split_turns(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One result a turn, in order; the whole run's time to the first step stays with the first turn alone."""
    shared = {name: value for name, value in result.items() if name != "turns"}
    found = []
    for number, record in enumerate(result["turns"]):
        tokens_per_s = 1000 * result["tokens"] / record["step_ms_mean"]
        first = {} if number == 0 else {"first_step_s": None}
        found.append({**shared, **record, **first, "tokens_per_s": tokens_per_s})
    return found
