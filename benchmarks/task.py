"""What a benchmark task is, and the settings of a run that every task reads."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

Record: TypeAlias = dict[str, Any]
"""One measurement, of JSON types only. The runner adds the name of the task."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a run.

    Attributes:
        seed: Where all randomness comes from.
        size: How long to measure: "quick" only proves that everything runs, "full" narrows the errors.
    """

    seed: int = 0
    size: str = "default"

    def choose(self, quick: int, default: int, full: int) -> int:
        """The number that belongs to the size of the run."""
        return {"quick": quick, "default": default, "full": full}[self.size]

    def generator(self, *stream: int) -> np.random.Generator:
        """A random generator of its own for each `stream`, for instance for each split."""
        return np.random.default_rng([self.seed, *stream])


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, what came out, what was hoped for.

    Attributes:
        goal: The figure to reach, as a reader would say it; empty where there is none.
        reached: Whether it was reached; None where there is no goal.
    """

    what: str
    measured: str
    goal: str = ""
    reached: bool | None = None


class Task(abc.ABC):
    """Something to measure, in a module of its own that says what is measured and on what data.

    Attributes:
        title: What the table and the picture call it.
        part: The part of the command line that it belongs to.
    """

    title: str
    part: str

    @abc.abstractmethod
    def count(self, options: Options) -> int:
        """How many records `measure` yields, for the progress bar."""

    @abc.abstractmethod
    def measure(self, options: Options) -> Iterator[Record]:
        """Measures, and yields each record as soon as it is there."""

    @abc.abstractmethod
    def rows(self, records: Sequence[Record]) -> list[Row]:
        """The lines of the table that the records give."""

    @abc.abstractmethod
    def draw(self, axes: Any, records: Sequence[Record]) -> None:
        """Draws the records into Matplotlib axes."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; that of a single value is 0."""
    array = np.asarray(values, dtype="float64")
    error = array.std(ddof=1) / np.sqrt(array.size) if array.size > 1 else 0.0
    return float(array.mean()), float(error)


def plus_minus(values: Sequence[float], unit: str, sign: str = "") -> str:
    """The mean of the values with its standard error, as text."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.1f}" + (f" ± {error:.1f}" if len(values) > 1 else "") + unit


def chosen(records: Sequence[Record], name: str, key: str = "test") -> list[float]:
    """A way's result in each split, at the factor that did best on the split's validation part."""
    best: dict[int, Record] = {}
    for record in records:
        if record["way"] == name:
            known = best.setdefault(record["split"], record)
            best[record["split"]] = max(known, record, key=lambda candidate: candidate["validation"])
    return [best[split][key] for split in sorted(best)]
