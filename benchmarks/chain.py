"""What tying adds to a training step of a chain of large layers.

A chain of n `Dense(1024, use_bias=False)` with tanh, all kernels in one group; batch 32, Adam, graph mode. Ratios are
to the untied step, which an Adam update of all n kernels dominates.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from benchmarks import timing, ways
from benchmarks.task import Options, Record, Row, Task

WIDTH = 1024
BATCH = 32
PENALTIES = ("mean_l2", "pairwise_l2", "chain_l2", "pairwise_norm", "pairwise_l1", "trace_norm")
WAYS = ("untied", "reference", "hard", *PENALTIES, "stack", "callback", "all_pairs")

# The ratios to reach, for each length.
GOALS = {
    ("hard", 4): 1.06,
    ("hard", 16): 1.08,
    ("mean_l2", 4): 1.22,
    ("mean_l2", 16): 1.22,
    ("pairwise_l2", 4): 1.22,
    ("pairwise_l2", 16): 1.22,
    ("chain_l2", 4): 1.3,
    ("chain_l2", 16): 1.3,
    ("pairwise_norm", 4): 1.6,
    ("pairwise_l1", 4): 1.6,
    ("trace_norm", 16): 2.0,
}


def build(length: int, way: ways.Way) -> tuple[keras.Model, ways.Groups]:
    """The chain, and its layers to tie."""
    layers = way.layers(lambda: keras.layers.Dense(WIDTH, activation="tanh", use_bias=False), length)
    model = keras.Sequential([keras.Input((WIDTH,)), *layers])
    return model, {"chain": layers}


def rounds(options: Options) -> dict[int, int]:
    """How many rounds to time for each length; a quick run leaves out the long chain."""
    numbers = {4: options.choose(2, 24, 80), 16: options.choose(0, 10, 40)}
    return {length: number for length, number in numbers.items() if number}


def by_length(records: Sequence[Record]) -> dict[int, list[Record]]:
    """The records of each length."""
    lengths = dict.fromkeys(record["length"] for record in records)
    return {length: [record for record in records if record["length"] == length] for length in lengths}


def goals(length: int) -> dict[str, float]:
    """The ratios to reach for one length."""
    return {way: goal for (way, n), goal in GOALS.items() if n == length}


class Chain(Task):
    """Step times of chains of large layers."""

    title = "Chain of n Dense(1024): step"
    part = "speed"

    def count(self, options: Options) -> int:
        return sum(len(WAYS) + number for number in rounds(options).values())

    def measure(self, options: Options) -> Iterator[Record]:
        generator = options.generator()
        x, y = generator.standard_normal((2, BATCH, WIDTH)).astype("float32")
        for length, number in rounds(options).items():
            chain = functools.partial(build, length)
            makers = {name: functools.partial(timing.training_step, chain, name, x, y, 1e-4) for name in WAYS}
            for record in timing.interleave(makers, number, 1, generator):
                yield {"length": length, **record}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        return [
            row
            for length, part in by_length(records).items()
            for row in timing.rows(f"n = {length:<2} ", part, goals(length))
        ]

    def draw(self, axes: Any, records: Sequence[Record]) -> None:
        parts = {f"n = {length}": (part, goals(length)) for length, part in by_length(records).items()}
        timing.draw(axes, parts)
