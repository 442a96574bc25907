"""How much memory training takes at its peak, in members: weights, optimizer slots, gradients and all that tying adds.

A fresh process for each way makes a chain of eight `Dense(2048, use_bias=False)`, all in one group, and trains it by
Adam for a few steps of a small batch. What is reported is the highest resident memory during the last step, less that
before the model was made. Untied, there are the weights and two slots for each: three members a layer, and on top of
them what of the gradients is there at one time.
"""

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import peaks, timing, ways
from benchmarks.speed.chain import build
from benchmarks.task import Case, Options, Record, Row, Task

LENGTH, WIDTH, BATCH = 8, 2048, 4
MEMBER = WIDTH * WIDTH * 4
STEPS = 3


def probe(name: str) -> float:
    """The peak in this process, in members."""
    (mode,) = timing.modes(Options())
    x = np.ones((BATCH, WIDTH), "float32")
    # What a backend sets up for its first model is not the model's.
    timing.training_step(functools.partial(build, 1, 1), "untied", x[:, :1], x[:, :1], mode)()
    before = peaks.resident()
    step = timing.training_step(functools.partial(build, LENGTH, WIDTH), name, x, x, mode)
    for _ in range(STEPS):
        step()
    return (peaks.peak(step) - before) / MEMBER


class StepMemory(Task):
    """Peak memory of a training step."""

    title = "Chain of 8 Dense layers: peak memory of training"
    size = (7.0, 4.0)

    def cases(self, options: Options) -> Sequence[Case]:
        quick = ("untied", "exact", "hard")
        return [{"way": name} for name in options.choose(("untied", "hard"), quick, tuple(ways.WAYS))]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        if peaks.AVAILABLE:
            yield from peaks.probes(__name__, case["way"])

    def rows(self, records: Sequence[Record]) -> list[Row]:
        if not records:
            return [Row("not measured", "needs Linux")]
        found = [(ways.WAYS[record["way"]].label, record["members"]) for record in records]
        return [Row(label, f"{members:.1f} members, {members * MEMBER / 2**20:.0f} MiB") for label, members in found]

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        bars = [(ways.WAYS[record["way"]], record["members"]) for record in records]
        axes = figure.subplots()
        peaks.draw(axes, [(way.label, members, way.color) for way, members in bars])
        axes.set(xlabel="peak memory of training, all included (members)")


if __name__ == "__main__":
    print(json.dumps({"members": probe(sys.argv[1])}))
