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
from benchmarks import timing
from benchmarks.task import Options, Record, Row, Task

GROUPINGS = {"groups of two": 2, "one group": None}


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
    return (250, 500) if options.size == "quick" else (250, 500, 1000, 2000)


def repetitions(options: Options) -> int:
    """How often to time each size."""
    return options.choose(3, 3, 15)


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
    part = "scale"

    def count(self, options: Options) -> int:
        return len(GROUPINGS) * len(counts(options)) * repetitions(options)

    def measure(self, options: Options) -> Iterator[Record]:
        for variables in counts(options):
            model = Layers(variables)
            for grouping, members in GROUPINGS.items():
                model.time_link(members or variables)
                for repetition in range(repetitions(options)):
                    seconds = model.time_link(members or variables)
                    yield {"grouping": grouping, "variables": variables, "repetition": repetition, "seconds": seconds}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for grouping in GROUPINGS:
            seconds = medians(records, grouping)
            most, power = max(seconds), exponent(seconds)
            lines.append(Row(f"{most:,} variables, {grouping}", f"{seconds[most]:.2f} s", "< 2 s", seconds[most] < 2))
            lines.append(Row(f"exponent, {grouping}", f"{power:.2f}", "<= 1.15", power <= 1.15))
        return lines

    def draw(self, axes: Any, records: Sequence[Record]) -> None:
        for grouping, color, marker in zip(GROUPINGS, ("#D55E00", "#0072B2"), "os", strict=True):
            seconds = medians(records, grouping)
            most = max(seconds)
            axes.plot(list(seconds), list(seconds.values()), f"{marker}-", color=color)
            place = {"xytext": (-8, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            axes.annotate(f"{grouping}: {seconds[most]:.2f} s", (most, seconds[most]), color=color, **place)
            axes.set_xticks(list(seconds), [f"{variables:,}" for variables in seconds])
        axes.set(xlabel="variables", ylabel="time of link (s)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
