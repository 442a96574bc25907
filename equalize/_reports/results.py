"""What a comparison of ways to tie came to: a row for each way, from the records of its runs."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

WITHIN = 2.0
"""So many standard errors of the difference to the best still count as chance."""


@dataclass(frozen=True)
class Point:
    """The score at one strength: the mean over the seeds, and its standard error."""

    strength: float | None
    mean: float
    error: float


@dataclass(frozen=True)
class Row:
    """One way, at the strength that was chosen.

    Attributes:
        way: Its name.
        strength: The strength, where it has one.
        scores: The score of each seed.
        curve: The scores of all strengths.
        close: Whether the difference to the best way is within the error.
        step: The time of a step, over that of the untied way where there is one, else in seconds.
        free: How many weights training can choose.
        spread: How far apart members came to be, at most.
        problem: Why there is no score; None where there is one.
        at_end: Whether the strength is the smallest or largest of several.
    """

    way: str
    strength: float | None
    scores: tuple[float, ...]
    curve: tuple[Point, ...]
    step: float
    free: int | None
    spread: float
    problem: str | None
    at_end: bool
    close: bool = False

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.scores)) if self.scores else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return _error(self.scores)


def rows(records: Sequence[Mapping[str, Any]], *, lower: bool) -> list[Row]:
    """A row for each way, the best first, and at last those that have no score."""
    names = list(dict.fromkeys(record["way"] for record in records))
    untied = {record["seed"]: record["step_seconds"] for record in records if record["way"] == "untied"}
    made = [_row([record for record in records if record["way"] == name], untied, lower) for name in names]
    made.sort(key=lambda row: (math.isnan(row.score), row.score if lower else -row.score))
    best = made[0]
    return [best, *(replace(row, close=_close(row, best)) for row in made[1:])]


def _row(records: Sequence[Mapping[str, Any]], untied: Mapping[int, float], lower: bool) -> Row:
    by_strength: dict[float | None, list[Mapping[str, Any]]] = {}
    for record in records:
        by_strength.setdefault(record["strength"], []).append(record)
    choices = {}
    for strength, runs in by_strength.items():
        chosen_by = "score" if len(by_strength) == 1 else "choice_score"
        choices[strength] = float(np.mean([run[chosen_by] for run in runs]))  # not a number where one run failed
    finite = {strength: score for strength, score in choices.items() if math.isfinite(score)}
    strength = (min if lower else max)(finite or choices, key=(finite or choices).__getitem__)
    runs = by_strength[strength]
    problem = next((run["error"] for run in runs if run["error"] is not None), None)
    if problem is None and not finite:
        problem = "diverged: a result is not a finite number"
    steps = [run["step_seconds"] / untied.get(run["seed"], 1.0) for run in runs]
    return Row(
        way=runs[0]["way"],
        strength=strength,
        scores=() if problem else tuple(run["score"] for run in runs),
        curve=tuple(Point(each, *_mean_and_error(by_strength[each])) for each in by_strength),
        step=statistics.median(steps),
        free=runs[0]["free_weights"],
        spread=max(run["spread"] for run in runs),
        problem=problem,
        at_end=len(by_strength) > 1 and strength in (min(finite or choices), max(finite or choices)),
    )


def _mean_and_error(runs: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    scores = [run["score"] for run in runs]
    return float(np.mean(scores)), _error(scores)


def _error(scores: Sequence[float]) -> float:
    return float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan


def _close(row: Row, best: Row) -> bool:
    """Whether the difference to the best, seed by seed, is within its error.

    That counts up to what it would be if both erred as the best does: a way that is bad at random is not close to it.
    """
    if len(row.scores) != len(best.scores):
        return False
    apart = np.subtract(row.scores, best.scores)
    return bool(abs(np.mean(apart)) <= WITHIN * min(_error(list(apart)), math.sqrt(2) * best.error))
