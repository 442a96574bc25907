"""Do two images show the same digit? Verification of pairs with two towers, over the number of training pairs.

The setting of Koch, Zemel and Salakhutdinov, Siamese neural networks for one-shot image recognition (2015): two
convolutional towers with sigmoid features, the absolute difference of the features, and one logistic unit. The images
are `scikit-learn`'s 1,797 handwritten digits of 8×8 pixels; a quarter of them is held out and makes the test pairs.
A fifth of the training pairs only chooses strengths. The number of steps is the same for each number of pairs. Does
tying save data? Where the curve of untied towers reaches with all pairs, tied ones may be with fewer.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

from benchmarks import curves, ways
from benchmarks.comparing import Compared, Problem, epochs
from benchmarks.task import Case, Options, Record, Row, distinct, mean_and_error, plus_minus, where

BATCH = 50

Pairs = tuple[tuple[np.ndarray, np.ndarray], np.ndarray]


def draw_pairs(images: np.ndarray, digits: np.ndarray, count: int, generator: np.random.Generator) -> Pairs:
    """Pairs of images, and 1 for every second pair, which shows one digit twice, 0 for the others."""
    left = generator.integers(len(images), size=count)
    same = np.arange(count) % 2 == 0
    right = [
        generator.choice(np.flatnonzero((digits == digits[i]) == alike)) for i, alike in zip(left, same, strict=True)
    ]
    return (images[left], images[right]), same[:, None].astype("float32")


@functools.cache
def load(options: Options, split: int) -> tuple[Pairs, Pairs]:
    """Pairs to train and to test on, of images that the two do not share."""
    generator = options.generator(split)
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
    order = generator.permutation(len(images))
    test, train = np.split(order, [len(order) // 4])
    return (
        draw_pairs(images[train], digits[train], 3200, generator),
        draw_pairs(images[test], digits[test], 2000, generator),
    )


def tower() -> keras.layers.Layer:
    """From an image of shape `(8, 8, 1)` to 32 features."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(32, activation="sigmoid"),
        ]
    )


def build() -> keras.Model:
    """Two towers and what compares them."""
    towers = tower(), tower()
    inputs = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    left, right = (tower(image) for tower, image in zip(towers, inputs, strict=True))
    return keras.Model(inputs, layers.Dense(1)(ops.abs(left - right)))


def members(model: keras.Model) -> ways.Groups:
    """The towers."""
    return {"towers": [layer for layer in model.layers if isinstance(layer, keras.Sequential)]}


def compile_(model: keras.Model) -> None:
    """Adam; the score is the pair accuracy."""
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=[keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)])
    model.optimizer.learning_rate = 1e-2


class Digits(Compared):
    """Accuracy of telling whether two images show the same digit."""

    title = "Two towers on digits: pair accuracy"
    size = (7.5, 4.5)

    def splits(self, options: Options) -> int:
        return options.choose(1, 1, 8)

    def parts(self, options: Options) -> Sequence[Case]:
        return [{"pairs": n} for n in options.choose((50, 100), (200, 3200), (200, 800, 3200))]

    def problem(self, options: Options, case: Case) -> Problem:
        (images, same), test = load(options, case["split"])
        steps, n = options.choose(10, 200, 300), case["pairs"]
        settings: Mapping[str, Any] = {
            "make_model": build,
            "members": members,
            "x": tuple(side[:n] for side in images),
            "y": same[:n],
            "validation_data": test,
            "compile": compile_,
            "fit": {"batch_size": BATCH, "epochs": epochs(steps, n, BATCH)},
            "metric": "accuracy",
        }
        return Problem(settings, scale=100)

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for pairs in distinct(records, "pairs"):
            part = where(records, pairs=pairs)
            for name in curves.measured(part):
                accuracy = plus_minus(curves.chosen(part, name), " %")
                lines.append(Row(self.known[name].label, accuracy, heading=f"{pairs:,} training pairs"))
        return [*lines, self.spread(records)]

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        counts = distinct(records, "pairs")
        lines = {}
        for name in curves.measured(records):
            points = [mean_and_error(curves.chosen(where(records, pairs=n), name)) for n in counts]
            lines[name] = (counts, [mean for mean, _ in points], [error for _, error in points])
        axes.set(xscale="log", xlabel="training pairs", ylabel="pair accuracy (%)")
        curves.labelled_lines(axes, lines)
        axes.set_xticks(counts, [f"{n:,}" for n in counts])
        axes.minorticks_off()
        curves.explain(axes)
