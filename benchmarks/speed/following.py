"""What it costs to have a teacher follow: `Follow`, and the callback that people write.

A student of eight `Dense` with tanh and a frozen teacher like it; batch 32, Adam, a few steps of `fit`. By hand, a
callback moves each weight of the teacher after every batch. On JAX, where an optimizer changes only what it trains,
`Follow` is a callback as well.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

import equalize
from benchmarks import timing
from benchmarks.task import Case, Options, Record, Row, Task, distinct, where
from equalize.callbacks import PeriodicSync
from equalize.constraints import Follow

LAYERS, BATCH, STEPS, RATE = 8, 32, 10, 0.01
LABELS = {"untied": "no teacher moves", "follow": "Follow", "hand_written": "hand-written callback"}


class MovedByHand(keras.callbacks.Callback):
    """The callback that people write."""

    def __init__(self, student: keras.Model, teacher: keras.Model):
        super().__init__()
        self.pairs = list(zip(student.weights, teacher.weights, strict=True))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        for leader, follower in self.pairs:
            follower.assign(follower.value + RATE * (leader.value - follower.value))


def epoch(name: str, width: int) -> timing.Step:
    """A few steps of a student, with a teacher that follows in the way of that name."""
    student, teacher = (
        keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(width, "tanh") for _ in range(LAYERS))])
        for _ in range(2)
    )
    teacher.trainable = False
    callbacks: list[keras.callbacks.Callback] = []
    registry = equalize.GroupRegistry()
    if name == "follow":
        registry.tie("teacher", [student, teacher], Follow(rate=RATE))
        if keras.backend.backend() == "jax":
            callbacks = [PeriodicSync(registry, every=1)]
    if name == "hand_written":
        callbacks = [MovedByHand(student, teacher)]
    student.compile(keras.optimizers.Adam(1e-4), "mse")
    x = np.random.default_rng(0).standard_normal((BATCH * STEPS, width)).astype("float32")

    def step() -> None:
        assert teacher.built  # a registry keeps no model alive
        student.fit(x, x, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks)

    return step


class Following(Task):
    """Time of training with a teacher that follows."""

    title = "A teacher that follows: step time"
    main = False
    size = (6.0, 3.6)

    def cases(self, options: Options) -> Sequence[Case]:
        return [{"width": width} for width in options.choose((8,), (512,), (64, 512, 1024))]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        generator = options.generator()
        makers = {name: lambda name=name: epoch(name, case["width"]) for name in LABELS}
        return timing.interleave(makers, options.choose(2, 5, 15), 1, generator)

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for width in distinct(records, "width"):
            found = timing.ratios(where(records, width=width))
            goals = {"follow": round(found["hand_written"][1], 2)}
            lines += [
                timing.goal_row(LABELS[name], found[name], goals.get(name), f"width {width}")
                for name in ("follow", "hand_written")
            ]
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        widths = distinct(records, "width")
        for place, name in enumerate(("follow", "hand_written")):
            ratios = [timing.ratios(where(records, width=width))[name] for width in widths]
            lows, middles, highs = zip(*ratios, strict=True)
            at = [x + 0.3 * (place - 0.5) for x in range(len(widths))]
            errors = [np.subtract(middles, lows), np.subtract(highs, middles)]
            axes.bar(at, middles, 0.28, yerr=errors, label=LABELS[name], color=("#1f77b4", "#999999")[place])
        axes.axhline(1.0, color="#999999", linewidth=0.8)
        axes.set_xticks(range(len(widths)), [f"width {width}" for width in widths])
        axes.set(ylabel="step time / without (median, quartiles)")
        axes.legend(frameon=False)
