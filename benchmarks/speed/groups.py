"""What tying adds to a training step of many small groups, where operations cost more than their arithmetic.

Groups of two 16×16 kernels: a chain of `Dense(16, use_bias=False)` with tanh, in which neighbours are tied; batch 32,
Adam.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from benchmarks import timing, ways
from benchmarks.task import Case, Options, Record, Row, Task, distinct, where

WIDTH = 16
BATCH = 32
STEPS = 3
WAYS = ("untied", "shared", "exact", "hard", "soft", "stacked_mean")
GOALS = {("graph", 100): {"hard": 1.06}}


def build(groups: int) -> tuple[keras.Model, ways.Groups]:
    """The chain, and its layers to tie in twos."""
    layer = functools.partial(keras.layers.Dense, WIDTH, activation="tanh", use_bias=False)
    pairs = {f"group_{i}": [layer(), layer()] for i in range(groups)}
    return keras.Sequential([keras.Input((WIDTH,)), *itertools.chain.from_iterable(pairs.values())]), pairs


class SmallGroups(Task):
    """Step times of a chain of many small groups."""

    title = "Groups of two 16×16 kernels: step time"
    size = (7.5, 4.0)

    def cases(self, options: Options) -> Sequence[Case]:
        usual, *_ = timing.modes(options)
        return [{"groups": groups, "mode": usual} for groups in options.choose((2,), (10,), (1, 10, 100, 200))]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        names = options.choose(("untied", "exact", "hard"), ("untied", "exact", "hard"), WAYS)
        generator = options.generator()
        x, y = generator.standard_normal((2, BATCH, WIDTH)).astype("float32")
        chain = functools.partial(build, case["groups"])
        makers = {name: functools.partial(timing.training_step, chain, name, x, y, case["mode"]) for name in names}
        return timing.interleave(makers, options.choose(2, 50, 60), STEPS, generator)

    def rows(self, records: Sequence[Record]) -> list[Row]:
        mode, lines = records[0]["mode"], []
        for groups in distinct(records, "groups"):
            part = where(records, groups=groups)
            lines += timing.rows(f"{groups} groups, {mode}", part, GOALS.get((mode, groups), {}))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        mode = records[0]["mode"]
        counts = distinct(records, "groups")
        parts = {groups: where(records, groups=groups) for groups in counts}
        if len(counts) > 1:
            timing.draw_over(axes, parts, list(timing.ratios(parts[counts[0]])))
            axes.set(xlabel=f"groups ({mode})")
        else:
            timing.draw(axes, parts[counts[0]], GOALS.get((mode, counts[0]), {}))
            axes.set_title(f"{counts[0]} groups, {mode}")
