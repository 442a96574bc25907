"""Replicas on different digits that agree now and then: local SGD and DiLoCo, over the number of communications.

Four replicas of a small network in one model, each with a training set of its own that is mostly of two or three
digits, from `scikit-learn`'s 1,797 handwritten ones. `PeriodicSync` makes them equal after every step, every tenth or
every hundredth one: by their mean (local SGD; Stich 2019), or by a step of an outer optimizer (DiLoCo; Douillard et
al. 2023, with its SGD at 0.7 and Nesterov momentum 0.9). What is measured after each synchronization is the accuracy
of what they agree on, on a held-out quarter of the images. Beside it stands one network that sees the samples of all
four, in batches four times as large.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

import equalize
from benchmarks import colors
from benchmarks.curves import explain
from benchmarks.task import Case, Options, Record, Row, Task, distinct, mean_and_error, plus_minus, where

REPLICAS, BATCH, HIDDEN = 4, 16, 32
LEARNING_RATE = 0.1
OWN = 0.9

COLORS = {1: colors.SKY, 10: colors.BLUE, 100: colors.GREEN, 0: colors.BLACK}
"""By how many steps lie between two synchronizations; 0 for one network on all data."""

Part = tuple[np.ndarray, np.ndarray]


def steps(options: Options) -> int:
    """How many steps to train for."""
    return options.choose(20, 200, 600)


@functools.cache
def load(options: Options, split: int) -> tuple[list[Part], Part]:
    """The samples of each replica, in the order in which they are trained on, and what to test on."""
    generator = options.generator(split)
    images, digits = load_digits(return_X_y=True)
    images, order = (images / 16).astype("float32"), generator.permutation(len(digits))
    test, train = np.split(order, [len(order) // 4])
    count = steps(options) * BATCH
    parts = []
    for own in np.array_split(generator.permutation(10), REPLICAS):
        mine = train[np.isin(digits[train], own)]
        chosen = np.where(generator.random(count) < OWN, generator.choice(mine, count), generator.choice(train, count))
        parts.append((images[chosen], digits[chosen]))
    return parts, (images[test], digits[test])


def network() -> keras.Model:
    """From an image to the logits of the digits."""
    return keras.Sequential([keras.Input((64,)), layers.Dense(HIDDEN, activation="relu"), layers.Dense(10)])


def times(options: Options, every: int) -> list[int]:
    """The steps after which to measure, about equally far apart on a logarithmic axis."""
    last = steps(options) // every
    return sorted({round(n) * every for n in np.geomspace(1, last, options.choose(2, 8, 16))})


class Accuracy(keras.callbacks.Callback):
    """Measures a network after some of the steps.

    Attributes:
        measured: The step and the accuracy, in per cent, each time.
    """

    def __init__(self, network: keras.Model, when: Sequence[int], part: Part):
        super().__init__()
        self._network, self._when, self._part = network, when, part
        self.measured: list[tuple[int, float]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch + 1 in self._when:
            if keras.backend.backend() == "jax" and self.model is not None:
                self.model.jax_state_sync()
            x, y = self._part
            guess = ops.convert_to_numpy(self._network(ops.convert_to_tensor(x))).argmax(axis=-1)
            self.measured.append((batch + 1, float(100 * np.mean(guess == y))))


def train(options: Options, case: Case, split: int) -> list[tuple[int, float]]:
    """The accuracy over the steps."""
    parts, test = load(options, split)
    every, together = case["every"], not case["every"]
    keras.utils.set_random_seed(options.seed_of(split))
    networks = [network() for _ in range(1 if together else REPLICAS)]
    inputs = [keras.Input((64,)) for _ in networks]
    model = keras.Model(inputs, [each(x) for each, x in zip(networks, inputs, strict=True)])
    accuracy = Accuracy(networks[0], times(options, every or 1), test)
    callbacks: list[keras.callbacks.Callback] = [accuracy]
    if together:
        pairs = [np.stack(sides, axis=1) for sides in zip(*parts, strict=True)]  # a step has samples of all
        parts = [tuple(side.reshape(-1, *side.shape[2:]) for side in pairs)]
    else:
        registry = equalize.GroupRegistry()
        registry.tie("replicas", networks, None)
        registry.sync("first", "replicas")
        outer = keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True) if case["outer"] else None
        callbacks.insert(0, equalize.callbacks.PeriodicSync(registry, every=every, outer_optimizer=outer))
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(LEARNING_RATE), [entropy] * len(parts))
    batch = BATCH * (REPLICAS if together else 1)
    model.fit(
        [x for x, _ in parts], [y for _, y in parts], batch_size=batch, shuffle=False, verbose=0, callbacks=callbacks
    )
    return accuracy.measured


def label(every: int, outer: bool) -> str:
    """What tables and pictures call a way to agree."""
    if not every:
        return "one network on all data"
    return f"every {'step' if every == 1 else f'{every} steps'}{', outer momentum' if outer else ''}"


class Replicas(Task):
    """Accuracy of replicas on different digits that agree now and then."""

    title = "Four replicas on different digits: accuracy of what they agree on"
    timed = False
    main = False
    size = (8.5, 4.5)

    def cases(self, options: Options) -> Sequence[Case]:
        periods = options.choose((10,), (1, 10, 100), (1, 10, 100))
        ways = [(every, outer) for every in periods for outer in (False, True)]
        return [{"every": every, "outer": outer} for every, outer in [(0, False), *ways]]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        for split in range(options.choose(1, 1, 8)):
            for step, accuracy in train(options, case, split):
                yield {"split": split, "step": step, "accuracy": accuracy}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for every, outer, part in by_way(records):
            last = max(record["step"] for record in part)
            figures = plus_minus([record["accuracy"] for record in where(part, step=last)], " %")
            lines.append(Row(f"{label(every, outer)}, {last // every if every else last:,} times", figures))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        for every, outer, part in by_way(records):
            at = distinct(sorted(part, key=lambda record: record["step"]), "step")
            values = [mean_and_error([record["accuracy"] for record in where(part, step=step)]) for step in at]
            means, errors = zip(*values, strict=True)
            style = {"color": COLORS[every], "linestyle": "--" if outer else "-", "marker": "s" if outer else "o"}
            if not every:  # the same as every step but for rounding, so it lies on that line
                style |= {"linestyle": ":", "marker": "", "zorder": 3}
            times = [n / (every or 1) for n in at]
            axes.errorbar(times, means, errors, markersize=4, capsize=2, label=label(every, outer), **style)
        axes.set(xscale="log", xlabel="communications (of one network: steps)")
        axes.set(ylabel="accuracy on held-out digits (%)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(frameon=False, loc="lower right")
        explain(axes)


def by_way(records: Sequence[Record]) -> list[tuple[int, bool, list[Record]]]:
    """The records of each way to agree."""
    keys = dict.fromkeys((record["every"], record["outer"]) for record in records)
    return [(every, outer, where(records, every=every, outer=outer)) for every, outer in keys]
