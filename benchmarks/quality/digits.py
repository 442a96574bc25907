"""Do two images show the same digit? Verification of pairs with two towers, over the number of training pairs.

The setting of Koch, Zemel and Salakhutdinov, Siamese neural networks for one-shot image recognition (2015): two
convolutional towers with sigmoid features, the absolute difference of the features, and one logistic unit. The images
are `scikit-learn`'s 1,797 handwritten digits of 8×8 pixels; a quarter of them is held out and makes the test pairs.
The strength of each way is chosen, for each split and number of pairs, on pairs of images that are neither trained nor
tested on. The number of steps is the same for each number of pairs. Does tying save data? Where the curve of untied
towers reaches with all pairs, tied ones may be with fewer.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

from benchmarks import curves, ways
from benchmarks.task import Case, Options, Record, Row, Task, distinct, mean_and_error, plus_minus, where
from benchmarks.training import Trainer

GRIDS = {"factor": (0.001, 0.01, 0.1), "rate": (0.003, 0.03, 0.3)}
BATCH = 50

Pairs = tuple[tuple[np.ndarray, np.ndarray], np.ndarray]


def sizes(options: Options) -> tuple[int, ...]:
    """Numbers of pairs to train on."""
    return options.choose((50, 100), (200, 800, 3200), (200, 400, 800, 1600, 3200))


def splits(options: Options) -> int:
    """How many random splits of the images."""
    return options.choose(1, 2, 3)


def steps(options: Options) -> int:
    """How many steps to train for."""
    return options.choose(10, 200, 300)


def draw_pairs(images: np.ndarray, digits: np.ndarray, count: int, generator: np.random.Generator) -> Pairs:
    """Pairs of images, and 1 for every second pair, which shows one digit twice, 0 for the others."""
    left = generator.integers(len(images), size=count)
    same = np.arange(count) % 2 == 0
    right = [
        generator.choice(np.flatnonzero((digits == digits[i]) == alike)) for i, alike in zip(left, same, strict=True)
    ]
    return (images[left], images[right]), same[:, None].astype("float32")


@functools.cache
def load(options: Options, split: int) -> tuple[Pairs, Pairs, Pairs]:
    """Pairs to train on, to choose the strength on, and to test on: of images that the three do not share."""
    generator = options.generator(split)
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
    order = generator.permutation(len(images))
    test, validation, train = np.split(order, [len(order) // 4, len(order) // 4 + len(order) * 3 // 16])
    parts = ((train, max(sizes(options))), (validation, 2000), (test, 2000))
    train, validation, test = (draw_pairs(images[part], digits[part], n, generator) for part, n in parts)
    return train, validation, test


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


def build(way: ways.Way) -> tuple[keras.Model, ways.Groups]:
    """Two towers and what compares them."""
    towers = way.layers(tower, 2)
    inputs = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    left, right = (tower(image) for tower, image in zip(towers, inputs, strict=True))
    return keras.Model(inputs, layers.Dense(1)(ops.abs(left - right))), {"towers": towers}


def accuracy(model: keras.Model, pairs: Pairs) -> float:
    """Pairs that the model judges rightly, in per cent."""
    images, same = pairs
    logits = ops.convert_to_numpy(model(tuple(map(ops.convert_to_tensor, images))))
    return float(100 * np.mean((logits > 0) == (same > 0.5)))


class Digits(Task):
    """Accuracy of telling whether two images show the same digit."""

    title = "Two towers on digits: pairs judged rightly"
    timed = False
    size = (7.5, 4.5)

    def cases(self, options: Options) -> Sequence[Case]:
        return ways.configurations(GRIDS, options)

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        trainer = Trainer(
            build, case, lambda: keras.optimizers.Adam(1e-2), keras.losses.BinaryCrossentropy(from_logits=True)
        )
        for split in range(splits(options)):
            (images, same), validation, test = load(options, split)
            seed = options.seed_of(split)
            for pairs in sizes(options):
                training = tuple(side[:pairs] for side in images), same[:pairs]
                model = trainer.fit(seed, *training, batch=BATCH, steps=steps(options))
                yield {
                    "pairs": pairs,
                    "split": split,
                    "seed": seed,
                    "validation": accuracy(model, validation),
                    "test": accuracy(model, test),
                    "spread": ways.spread(trainer.groups),
                }

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        counts = distinct(records, "pairs")
        for name in curves.measured(records):
            figures = [plus_minus(curves.chosen(where(records, pairs=n), name)) for n in counts]
            what = f"{ways.WAYS[name].label}, with {', '.join(map(str, counts))} pairs"
            lines.append(Row(what, ", ".join(figures) + " %"))
        spread = max(record["spread"] for record in records if ways.WAYS[record["way"]].hard)
        lines.append(Row("spread of the hard ways", f"{spread:g}", "0", spread == 0.0))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        counts = distinct(records, "pairs")
        lines = {}
        for name in curves.measured(records):
            points = [mean_and_error(curves.chosen(where(records, pairs=n), name)) for n in counts]
            lines[name] = (counts, [mean for mean, _ in points], [error for _, error in points])
        axes.set(xscale="log", xlabel="training pairs", ylabel="held-out pairs judged rightly (%)")
        curves.labelled_lines(axes, lines)
        axes.set_xticks(counts, [f"{n:,}" for n in counts])
        axes.minorticks_off()
