"""What a benchmark task is, and the settings of a run that every task reads."""

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

Case: TypeAlias = dict[str, Any]
"""What is measured at a stretch, of JSON types only: a way and its factor, or the size of a model."""

Record: TypeAlias = dict[str, Any]
"""One measurement, of JSON types only. The runner adds the name of the task and the case."""

SIZES = ("smoke", "quick", "full")


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a run.

    Attributes:
        seed: Where all randomness comes from.
        size: How long to measure: "smoke" only proves that everything runs, "quick" takes minutes, "full" narrows the
            errors.
    """

    seed: int = 0
    size: str = "quick"

    def choose(self, smoke: Any, quick: Any, full: Any) -> Any:
        """What belongs to the size of the run."""
        return (smoke, quick, full)[SIZES.index(self.size)]

    def generator(self, *stream: int) -> np.random.Generator:
        """A random generator of its own for each `stream`, for instance for each split."""
        return np.random.default_rng([self.seed, *stream])

    def seed_of(self, *stream: int) -> int:
        """A seed of its own for each `stream`."""
        return int(self.generator(*stream, 1).integers(2**31))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, what came out, what was hoped for.

    Attributes:
        goal: The figure to reach, as a reader would say it; empty where there is none.
        reached: Whether it was reached; None where there is no goal.
        heading: What it stands under, together with the lines before and after it that stand there.
    """

    what: str
    measured: str
    goal: str = ""
    reached: bool | None = None
    heading: str = ""


class Task(abc.ABC):
    """Something to measure, in a module of its own that says what is measured and on what data.

    What a case gives depends on the options and the case only, not on what was measured before: a run that was
    interrupted goes on with the cases that are left.

    Attributes:
        title: What the table and the picture call it.
        timed: Whether times or memory are measured, for which a case must have the machine to itself.
        main: Whether it belongs to the comparison of hard with soft ties, which is what a run of all parts does.
        size: Width and height of the picture, in inches.
    """

    title: str
    timed: bool = True
    main: bool = True
    size: tuple[float, float] = (7.0, 4.0)

    @abc.abstractmethod
    def cases(self, options: Options) -> Sequence[Case]:
        """What to measure, in this order."""

    @abc.abstractmethod
    def measure(self, options: Options, case: Case) -> Iterable[Record]:
        """Measures one case."""

    @abc.abstractmethod
    def rows(self, records: Sequence[Record]) -> list[Row]:
        """The lines of the table that the records give."""

    @abc.abstractmethod
    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        """Draws the records into an empty Matplotlib figure."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; that of a single value is 0."""
    array = np.asarray(values, dtype="float64")
    error = array.std(ddof=1) / np.sqrt(array.size) if array.size > 1 else 0.0
    return float(array.mean()), float(error)


def plus_minus(values: Sequence[float], unit: str = "", *, digits: int = 1, sign: str = "") -> str:
    """The mean of the values with its standard error, as text."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "") + unit


def where(records: Sequence[Record], **values: Any) -> list[Record]:
    """The records that have these values."""
    return [record for record in records if all(record.get(key) == value for key, value in values.items())]


def distinct(records: Sequence[Record], key: str) -> list[Any]:
    """The values that the records have under a key, each once, in their order."""
    return list(dict.fromkeys(record[key] for record in records if key in record))
