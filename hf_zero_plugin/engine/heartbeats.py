"""Ranks that hear of each other without meeting: each writes into the process group's store that it lives, and where.

A rank that waits too long reads what the others wrote. Whoever's line changes is alive, and the line says where that
rank is; whoever's does not is silent, which means ended or frozen. Clocks of several hosts need not agree: silence is
counted by the listener, from the moment it began to listen.

The connection is one of its own, because the group's is held for as long as something waits on it. Every engine has
its own place in the store. Groups of processes share the store, so the place is named after the group's ranks, and
numbered among theirs: a group's engines are made in the same order on all of its ranks, whatever else these make. Ranks
are global ones, by which a launcher knows them.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist

from hf_zero_plugin.engine.patient_store import PatientStore

__all__ = ["Heartbeats", "Listener"]

_KEY = "hf_zero_plugin/alive/{}"
MOST_NAMED = 8
PATIENCE_S = 5.0
"""So long the store may take for an answer."""

_made: Counter[tuple[int, ...]] = Counter()
"""Places in the store so far, by ranks of the group."""


class Heartbeats:
    """What this process writes. Nothing here raises: a store that does not answer is a finding.

    Args:
        rank: global rank of this process.
        ranks: global ranks of the group, this one's among them; a number means that so many are all there are.
    """

    def __init__(self, rank: int, ranks: int | Sequence[int], patience_s: float = PATIENCE_S) -> None:
        self.rank = rank
        self.ranks = tuple(range(ranks) if isinstance(ranks, int) else ranks)
        self._count = 0
        self._store = _connect(_place_of(self.ranks), patience_s)

    def beat(self, where: str) -> None:
        """Write that this rank lives. ``where`` is for people."""
        self._count += 1
        if self._store is not None:
            try:
                self._store.set(_KEY.format(self.rank), f"{self._count} {where}")
            except (RuntimeError, OSError):
                return

    def listen(self) -> Listener:
        """Begin to listen to the other ranks."""
        return Listener([other for other in self.ranks if other != self.rank], self._store)


class Listener:
    """What one waiting thread has heard since it began to listen. Call ``hear`` from time to time."""

    def __init__(self, others: list[int], store: dist.Store | PatientStore | None) -> None:
        self._others = others
        self._store = store
        self._store_fails = False
        self._heard: dict[int, tuple[str, float]] = {}
        """Rank -> its last line, and when that line was first read here."""
        self._moved: dict[int, tuple[str, float]] = {}
        """Rank -> where it is, and when it was first heard of there."""
        self.hear()

    def hear(self) -> None:
        now = time.monotonic()
        self._store_fails = False
        for other in self._others:
            line = self._read(other)
            for kept, value in ((self._heard, line), (self._moved, _where(line))):
                if other not in kept or kept[other][0] != value:
                    kept[other] = value, now

    def _read(self, other: int) -> str:
        key = _KEY.format(other)
        try:
            if self._store is None or not self._store.check([key]):
                return ""
            return str(self._store.get(key).decode())
        except (RuntimeError, OSError):
            self._store_fails = True
            return self._heard[other][0] if other in self._heard else ""

    def silent(self, at_least_s: float) -> list[int]:
        """Ranks that have said nothing new for so long; none if there is no store to hear them by."""
        if self._store is None:
            return []
        now = time.monotonic()
        return [other for other, (_, since) in self._heard.items() if now - since >= at_least_s]

    def elsewhere(self, place: str, at_least_s: float) -> list[int]:
        """Ranks that were at one and the same place for so long, and not at ``place``; silent ones wherever they were.

        Ranks that are all at ``place`` may each be busy there: a first forward pass may compile for minutes.
        """
        now = time.monotonic()
        stuck = [other for other, (where, since) in self._moved.items() if where != place and now - since >= at_least_s]
        return sorted({*stuck, *self.silent(at_least_s)}) if self._store is not None else []

    def report(self, at_least_s: float) -> str:
        """A sentence for each of the other ranks, silent ones (for ``at_least_s``) first; "" without a store."""
        if self._store is None:
            return ""
        if self._store_fails:
            return "The store of the process group, on rank 0 or in its launcher, does not answer: look there first."
        silent = self.silent(at_least_s)
        lost = [f"Rank {other} gives no sign of life{_last(self._heard[other][0])}." for other in silent]
        alive = [_alive(other, line) for other, (line, _) in self._heard.items() if other not in silent]
        return " ".join([*lost, *alive][:MOST_NAMED])


def _place_of(ranks: tuple[int, ...]) -> str:
    """A new one, the same on all of ``ranks``; short, however many they are."""
    number, _made[ranks] = _made[ranks], _made[ranks] + 1
    group = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    return f"hf_zero_plugin/{group}/{number}"


def _connect(place: str, patience_s: float) -> PatientStore | None:
    """None where the store cannot be reached a second time."""
    if not dist.is_initialized():
        return None
    clone = getattr(dist.distributed_c10d._get_default_store(), "clone", None)
    try:
        own = dist.PrefixStore(place, clone()) if clone is not None else None
    except RuntimeError:
        return None
    return PatientStore(own, patience_s) if own is not None else None


def _where(line: str) -> str:
    return line.partition(" ")[2]


def _last(line: str) -> str:
    return f" (last: {_where(line)})" if _where(line) else ""


def _alive(other: int, line: str) -> str:
    where = _where(line)
    return f"Rank {other} lives: {where}." if where else f"Rank {other} has not begun."
