"""A quality task that `equalize.compare` measures: a model, what to tie in it, and data."""

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

import equalize
from benchmarks import ways
from benchmarks.task import Case, Options, Record, Row, Task

FAMILIES = ("untied", "shared", "exact", "hard", "partial", "soft")
"""The ways to compare: one of each family. Other soft ties are among the schools and the speeds."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What `equalize.compare` takes.

    Attributes:
        settings: Its arguments, but for `ways` and `seeds`.
        scale: What to multiply its scores with, for per cent or bits.
    """

    settings: Mapping[str, Any]
    scale: float = 1.0


class Compared(Task):
    """A task whose cases are one call of `equalize.compare` each: a part of the task, and a split of the data.

    Attributes:
        known: The ways by the names that `compare` gives them.
    """

    timed = False
    known: Mapping[str, ways.Way] = {name: ways.WAYS[name] for name in FAMILIES}

    @abc.abstractmethod
    def problem(self, options: Options, case: Case) -> Problem:
        """The model and the data of a case."""

    @abc.abstractmethod
    def splits(self, options: Options) -> int:
        """How many random splits of the data."""

    def parts(self, options: Options) -> Sequence[Case]:
        """What is compared apart, for instance sizes of a model."""
        return [{}]

    def ways(self, options: Options, case: Case) -> Sequence[Any]:
        """The argument `ways` of `compare`."""
        return [way.compared(options) for way in self.known.values()]

    def cases(self, options: Options) -> Sequence[Case]:
        return [{**part, "split": split} for split in range(self.splits(options)) for part in self.parts(options)]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        problem = self.problem(options, case)
        seed = options.seed_of(case["split"])
        found = equalize.compare(**problem.settings, ways=self.ways(options, case), seeds=[seed])
        for record in found.records:
            yield {
                "way": record["way"],
                "strength": record["strength"],
                "test": problem.scale * record["score"],
                "validation": None if math.isnan(record["choice_score"]) else problem.scale * record["choice_score"],
                "free_weights": record["free_weights"],
                "spread": record["spread"],
                "error": record["error"],
            }

    def spread(self, records: Sequence[Record]) -> Row:
        """The line of the table that says whether the hard ways stayed equal."""
        hard = [r["spread"] for r in records if self.known[r["way"]].hard and r["way"] != "shared"]
        spread = max(hard)
        return Row("spread of the hard ways", f"{spread:g}", "0", spread == 0.0)


def epochs(steps: int, samples: int, batch: int) -> int:
    """How many epochs have so many steps, of so many samples of which a fifth may be held out."""
    return max(1, round(steps / math.ceil(0.8 * samples / batch)))


def stretch(steps: int) -> dict[str, Any]:
    """Settings of `model.compile`: so many steps at a stretch in TensorFlow, without a return to Python."""
    return {"steps_per_execution": steps if keras.backend.backend() == "tensorflow" else 1}
