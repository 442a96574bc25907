"""How long the first training step takes, with tracing and compiling, over the number of members and of groups.

The weights are the kernels, of 8×8 entries, of as many dense layers in a chain; all are in one group, or in groups of
two. Adam, batch 8.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from benchmarks import timing, ways
from benchmarks.scale.linking import exponent
from benchmarks.task import Case, Options, Record, Row, Task, distinct, where

SIZE = 8
GROUPINGS = {"members of one group": None, "groups of two": 2}
WAYS = ("untied", "hard", "partial", "soft")


class Chain(keras.Model):
    """Dense layers, one after the other, without biases."""

    def __init__(self, count: int):
        super().__init__()
        self.kernels = [self.add_weight(shape=(SIZE, SIZE), name=f"kernel_{i}") for i in range(count)]
        self.built = True

    def call(self, x: Any) -> Any:
        for kernel in self.kernels:
            x = ops.tanh(ops.matmul(x, kernel))
        return x


def seconds(way: ways.Way, count: int, members: int) -> float:
    """The time of the first step of so many weights, in groups of so many."""
    model = Chain(count)
    groups = {f"group_{i}": model.kernels[i : i + members] for i in range(0, count, members)}
    tied = way.attach(groups, 0.1, keras.optimizers.Adam(1e-4))
    model.compile(tied.optimizer, "mse", jit_compile=keras.backend.backend() == "jax")
    x = np.ones((8, SIZE), "float32")
    started = time.perf_counter()
    model.train_on_batch(x, x)
    return time.perf_counter() - started


class FirstStep(Task):
    """Time of the first step over members and groups."""

    title = "Many members and many groups: first step"
    main = False
    size = (8.0, 3.6)

    def cases(self, options: Options) -> Sequence[Case]:
        counts = options.choose((4, 8), (10, 30), (10, 30, 100, 300, 1000))
        return [{"grouping": grouping, "count": count} for grouping in GROUPINGS for count in counts]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        members = GROUPINGS[case["grouping"]]
        count = case["count"] * (members or 1)
        seconds(ways.WAYS["untied"], members or 2, 2)  # what is slow once for all
        for name in options.choose(WAYS, ("untied", "hard"), WAYS):
            yield {"way": name, "seconds": seconds(ways.WAYS[name], count, members or count)}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for grouping in distinct(records, "grouping"):
            for name in distinct(records, "way"):
                part = where(records, grouping=grouping, way=name)
                times = {record["count"]: record["seconds"] for record in part}
                power, most = exponent(times), max(times)
                heading, what = f"{most:,} {grouping}", timing.label(name)
                lines.append(Row(what, f"{times[most]:.1f} s", heading=heading))
                goal = ("<= 1.15", power <= 1.15) if name != "untied" else ()
                lines.append(Row(f"{what}, exponent", f"{power:.2f}", *goal, heading=heading))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        groupings = distinct(records, "grouping")
        for grouping, axes in zip(
            groupings, figure.subplots(1, len(groupings), sharey=True, squeeze=False)[0], strict=True
        ):
            for name in distinct(records, "way"):
                part = where(records, grouping=grouping, way=name)
                counts, times = [r["count"] for r in part], [r["seconds"] for r in part]
                axes.plot(counts, times, "o-", color=timing.color(name), label=timing.label(name), markersize=4)
            axes.set(xscale="log", yscale="log", xlabel=grouping, ylabel="first step (s)")
            axes.minorticks_off()
            axes.set_xticks(counts, [f"{count:,}" for count in counts])
            axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False)
