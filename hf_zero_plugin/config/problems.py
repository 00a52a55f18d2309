"""One mistake in a configuration, and how it is told: what, where, why, how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from hf_zero_plugin.errors import ConfigError

__all__ = ["ConfigProblems", "Position", "Problem", "did_you_mean", "raise_problems"]


class Position(NamedTuple):
    """Counted from 1, as editors do."""

    line: int
    column: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    path: str
    """``$.zero_optimization.stage``."""
    what: str
    why: str = ""
    fix: str = ""
    position: Position | None = None

    def told(self, origin: str) -> str:
        place = f"{origin}:{self.position.line}:{self.position.column}" if self.position else origin
        lines = [f"{place}: {self.path}: {self.what}"]
        if self.why:
            lines.append(f"    Why: {self.why}")
        if self.fix:
            lines.append(f"    Fix: {self.fix}")
        return "\n".join(lines)


class ConfigProblems(ConfigError):
    """Every mistake found in one configuration, in the order of the file."""

    def __init__(self, origin: str, problems: Iterable[Problem]) -> None:
        self.origin = origin
        self.problems = tuple(problems)
        told = [problem.told(origin) for problem in self.problems]
        heading = [] if len(told) == 1 else [f"{len(told)} problems in the configuration:"]
        super().__init__("\n".join([*heading, *told]))


def raise_problems(origin: str, problems: Iterable[Problem], positions: Mapping[str, Position]) -> None:
    """Raise all problems at once, in the order of the file; do nothing if there are none.

    Raises:
        ConfigProblems: there is at least one.
    """
    placed = [place(problem, positions) for problem in problems]
    unknown = Position(0, 0)
    placed.sort(key=lambda problem: problem.position or unknown)
    if placed:
        raise ConfigProblems(origin, placed)


def place(problem: Problem, positions: Mapping[str, Position]) -> Problem:
    """The problem with its position: of its key, or of the nearest section around it that the file has."""
    if problem.position is not None:
        return problem
    path = problem.path
    while path not in positions and path != "$":
        path = path[: max(path.rfind("."), path.rfind("["))]
    return replace(problem, position=positions.get(path))


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The closest known word without regard to case, or None."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None
