"""How much memory a projection adds at its peak, in members.

A fresh process makes n kernels that differ, and projects once. What people write first stands beside it: stack,
average, assign, which needs more than n members and so shows that the measure works. A projection runs eagerly, or as
one compiled graph, which is what a training step runs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from benchmarks import colors, peaks
from benchmarks.task import Case, Options, Record, Row, Task

PROBES = [("hard", "graph"), ("hard", "eager"), ("stack", "graph")]
COUNTS = (4, 16)
COLORS = {"hard": colors.VERMILLION, "stack": colors.PINK}
LABELS = {"hard": "hard: Equal", "stack": "hand-written: stacked mean"}
GOAL = 1.5
SHAPE = (2048, 2048)
MEMBER = SHAPE[0] * SHAPE[1] * 4


def probe(name: str, mode: str, count: int) -> float:
    """The peak that one projection adds in this process, in members."""
    import numpy as np

    variables = [keras.Variable(np.zeros(SHAPE, "float32")) for _ in range(count)]
    project = projection(name, variables)
    run = compiled(project) if mode == "graph" else project
    run()
    for i, variable in enumerate(variables):
        # Each in a buffer of its own again, as after an optimizer's step.
        variable.assign(np.full(SHAPE, i, "float32"))
    filling = fill_cache()
    before = peaks.resident()
    added = peaks.peak(run) - before
    del filling
    return added / MEMBER


def fill_cache() -> list[Any]:
    """Tensors in all the buffers that the backend keeps for later, in which a projection's own would not show."""
    from keras import ops

    tensors = []
    grown = 0
    while grown < 2:
        before = peaks.resident()
        tensors.append(ops.ones(SHAPE))
        grown += peaks.resident() - before > 0.9 * MEMBER
    return tensors


def projection(name: str, variables: Sequence[Any]) -> Callable[[], None]:
    """What makes the variables equal, in the way of that name."""
    from keras import ops

    import equalize

    def stack() -> None:
        mean = ops.mean(ops.stack([variable.value for variable in variables]), axis=0)
        for variable in variables:
            variable.assign(mean)

    if name == "stack":
        return stack
    registry = equalize.GroupRegistry()
    registry.tie("kernels", list(variables), equalize.constraints.Equal())
    return registry.project


def compiled(function: Callable[[], None]) -> Callable[[], None]:
    """The function as one graph. Only TensorFlow has graphs outside of `fit` that write Keras variables."""
    import tensorflow as tf

    return tf.function(function)


def label(record: Record) -> str:
    """What tables and pictures call a record."""
    return f"{LABELS[record['way']]}, n = {record['count']}, {record['mode']}"


class Memory(Task):
    """Peak memory of one projection."""

    title = "Hard projection: peak memory added"
    size = (7.0, 3.2)

    def cases(self, options: Options) -> Sequence[Case]:
        return [{}]  # all in one process, since starting one takes longer than measuring

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        if peaks.AVAILABLE and keras.backend.backend() == "tensorflow":
            yield from peaks.probes(__name__)

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = [] if records else [Row("not measured", "needs Linux and TensorFlow")]
        for record in records:
            added = record["members_added"]
            goal = ("about 1", added <= GOAL) if record["way"] == "hard" else ()
            lines.append(Row(label(record), f"{added:.2f} members, {added * MEMBER / 2**20:.0f} MiB", *goal))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        peaks.draw(axes, [(label(record), record["members_added"], COLORS[record["way"]]) for record in records])
        axes.set(xlabel="peak memory added by one projection (members)")


if __name__ == "__main__":
    for name, mode in PROBES:
        for members in COUNTS:
            added = probe(name, mode, members)
            print(json.dumps({"way": name, "mode": mode, "count": members, "members_added": added}), flush=True)
