"""What tying adds to a training step of many small groups, where operations cost more than their arithmetic.

100 groups of two 16×16 kernels: a chain of 200 `Dense(16, use_bias=False)` with tanh, in which neighbours are tied;
batch 32, Adam, graph mode.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from benchmarks import timing, ways
from benchmarks.task import Options, Record, Row, Task

WIDTH = 16
BATCH = 32
STEPS = 3
WAYS = ("untied", "hard")
GOALS = {"hard": 1.06}


def build(groups: int, way: ways.Way) -> tuple[keras.Model, ways.Groups]:
    """The chain, and its layers to tie in twos."""
    layer = functools.partial(keras.layers.Dense, WIDTH, activation="tanh", use_bias=False)
    pairs = {f"group_{i}": way.layers(layer, 2) for i in range(groups)}
    return keras.Sequential([keras.Input((WIDTH,)), *itertools.chain.from_iterable(pairs.values())]), pairs


def rounds(options: Options) -> int:
    """How many rounds to time."""
    return options.choose(2, 100, 400)


class SmallGroups(Task):
    """Step times of a chain of many small groups."""

    title = "Groups of two 16×16 kernels: step"
    part = "speed"

    def count(self, options: Options) -> int:
        return len(WAYS) + rounds(options)

    def measure(self, options: Options) -> Iterator[Record]:
        generator = options.generator()
        x, y = generator.standard_normal((2, BATCH, WIDTH)).astype("float32")
        groups = options.choose(10, 100, 100)
        chain = functools.partial(build, groups)
        makers = {name: functools.partial(timing.training_step, chain, name, x, y, 1e-4) for name in WAYS}
        for record in timing.interleave(makers, rounds(options), STEPS, generator):
            yield {"groups": groups, **record}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        return timing.rows(f"{records[0]['groups']} groups ", records, GOALS)

    def draw(self, axes: Any, records: Sequence[Record]) -> None:
        timing.draw(axes, {f"{records[0]['groups']} groups": (records, GOALS)})
