"""How long `GroupRegistry.link` takes, and whether that grows linearly with the number of variables.

A model of `Dense(4, use_bias=False)` layers side by side, all tied by `constraints.Equal`, in groups of two or all in
one group. What is reported is the median time of `link`, after one that warms up; in between the model is untied.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

import equalize
from benchmarks import colors, timing
from benchmarks.task import Case, Options, Record, Row, Task

GROUPINGS = {"groups of two": 2, "one group": None}
COLORS = {"groups of two": colors.VERMILLION, "one group": colors.BLUE}


class Layers(keras.Model):
    """Layers side by side; they are built, never called."""

    def __init__(self, count: int):
        super().__init__()
        self.dense = [keras.layers.Dense(4, use_bias=False, kernel_initializer="zeros") for _ in range(count)]
        for layer in self.dense:
            layer.build((None, 4))
        self.built = True

    def time_link(self, members: int) -> float:
        """Seconds to find and link the groups, of so many members each."""
        for i, layer in enumerate(self.dense):
            layer.kernel.constraint = equalize.constraints.Equal(f"group_{i // members}")
        gc.disable()  # as `timeit` does, since other tasks have left much to look through
        started = time.perf_counter()
        registry = equalize.GroupRegistry().link(self)
        seconds = time.perf_counter() - started
        gc.enable()
        registry.untie()
        return seconds


def counts(options: Options) -> tuple[int, ...]:
    """How many variables to link."""
    return options.choose((50, 100), (500, 2000), (250, 500, 1000, 2000, 4000))


def repetitions(options: Options) -> int:
    """How often to time each size."""
    return options.choose(2, 3, 15)


def medians(records: Sequence[Record], grouping: str) -> dict[int, float]:
    """The median time for each count of variables."""
    times: dict[int, list[float]] = {}
    for record in records:
        if record["grouping"] == grouping:
            times.setdefault(record["variables"], []).append(record["seconds"])
    return {variables: timing.quartiles(seconds)[1] for variables, seconds in times.items()}


def exponent(seconds: Mapping[int, float]) -> float:
    """The p of the best fit `seconds = c · variables**p`."""
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])


class Scale(Task):
    """Time of `link` over the number of variables."""

    title = "Linking hard groups: time"
    main = False
    size = (7.0, 3.6)

    def cases(self, options: Options) -> Sequence[Case]:
        return [{"variables": variables} for variables in counts(options)]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        variables = case["variables"]
        model = Layers(variables)
        for grouping, members in GROUPINGS.items():
            model.time_link(members or variables)
            for repetition in range(repetitions(options)):
                yield {"grouping": grouping, "repetition": repetition, "seconds": model.time_link(members or variables)}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for grouping in GROUPINGS:
            seconds = medians(records, grouping)
            power = exponent(seconds)
            for variables in (2000, max(seconds)) if max(seconds) > 2000 else (max(seconds),):
                goal = ("< 2 s", seconds[variables] < 2) if variables == 2000 else ()
                lines.append(Row(f"{variables:,} variables", f"{seconds[variables]:.2f} s", *goal, heading=grouping))
            lines.append(Row("exponent", f"{power:.2f}", "<= 1.15", power <= 1.15, grouping))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        for grouping, marker in zip(GROUPINGS, "os", strict=True):
            seconds = medians(records, grouping)
            most = max(seconds)
            axes.plot(list(seconds), list(seconds.values()), f"{marker}-", color=COLORS[grouping])
            place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
            text = f"{grouping}: {seconds[most]:.2f} s"
            axes.annotate(text, (most, seconds[most]), color=COLORS[grouping], **place)
            axes.set_xticks(list(seconds), [f"{variables:,}" for variables in seconds])
        axes.set(xlabel="variables", ylabel="time of link (s)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
