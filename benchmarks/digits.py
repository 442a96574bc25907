"""Do two images show the same digit? Verification of pairs with two towers.

The setting of Koch, Zemel and Salakhutdinov, Siamese neural networks for one-shot image recognition (2015): two
convolutional towers with sigmoid features, the absolute difference of the features, and one logistic unit. The images
are `scikit-learn`'s 1,797 handwritten digits of 8×8 pixels; a quarter of them is held out and makes the test pairs.
The towers start from different random weights. λ is chosen, for each split, on pairs of images that are neither
trained nor tested on. The learning rate of 0.01 served every way better than 0.003.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

from benchmarks import colors, ways
from benchmarks.task import Options, Record, Row, Task, chosen, mean_and_error, plus_minus

FACTORS = (0.001, 0.01, 0.1)
WAYS = ("untied", "reference", "hard", "mean_l2")
PAIRS = 2000
EPOCHS = 15
BATCH = 100

Pairs = tuple[tuple[np.ndarray, np.ndarray], np.ndarray]


def draw_pairs(images: np.ndarray, digits: np.ndarray, generator: np.random.Generator) -> Pairs:
    """`PAIRS` pairs of images, and 1 for every second pair, which shows one digit twice, 0 for the others."""
    left = generator.integers(len(images), size=PAIRS)
    same = np.arange(PAIRS) % 2 == 0
    right = [
        generator.choice(np.flatnonzero((digits == digits[i]) == alike)) for i, alike in zip(left, same, strict=True)
    ]
    return (images[left], images[right]), same[:, None].astype("float32")


def load(generator: np.random.Generator) -> tuple[Pairs, Pairs, Pairs]:
    """Pairs to train on, to choose λ on, and to test on: of images that the three do not share."""
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
    order = generator.permutation(len(images))
    test, validation, train = np.split(order, [len(order) // 4, len(order) // 4 + len(order) * 3 // 16])
    train, validation, test = (draw_pairs(images[part], digits[part], generator) for part in (train, validation, test))
    return train, validation, test


def tower() -> keras.layers.Layer:
    """From an image of shape `(8, 8, 1)` to 32 features."""
    return keras.Sequential(
        [
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(32, activation="sigmoid"),
        ]
    )


def train(name: str, factor: float, seed: int, pairs: Pairs) -> tuple[keras.Model, float]:
    """The trained model and the spread of its towers."""
    keras.utils.set_random_seed(seed)
    way = ways.WAYS[name]
    towers = way.layers(tower, 2)
    inputs = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    left, right = (tower(image) for tower, image in zip(towers, inputs, strict=True))
    model = keras.Model(inputs, layers.Dense(1)(ops.abs(left - right)))
    callbacks = way.attach({"towers": towers}, factor)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=False)
    model.fit(*pairs, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    return model, ways.spread(towers)


def accuracy(model: keras.Model, pairs: Pairs) -> float:
    """Pairs that the model judges rightly, in per cent."""
    images, same = pairs
    logits = ops.convert_to_numpy(model(tuple(map(ops.convert_to_tensor, images))))
    return float(100 * np.mean((logits > 0) == (same > 0.5)))


class Digits(Task):
    """Accuracy of telling whether two images show the same digit."""

    title = "Digits: pairs judged rightly"
    part = "quality"

    def count(self, options: Options) -> int:
        return len(ways.configurations(WAYS, FACTORS, options)) * options.choose(1, 4, 20)

    def measure(self, options: Options) -> Iterator[Record]:
        for split in range(options.choose(1, 4, 20)):
            training, validation, test = load(options.generator(split))
            seed = int(options.generator(split, 1).integers(2**31))
            for name, factor in ways.configurations(WAYS, FACTORS, options):
                model, spread = train(name, factor, seed, training)
                yield {
                    "way": name,
                    "factor": factor,
                    "split": split,
                    "seed": seed,
                    "validation": accuracy(model, validation),
                    "test": accuracy(model, test),
                    "spread": spread,
                }

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for name in WAYS:
            lines.append(Row(ways.WAYS[name].label, plus_minus(chosen(records, name), " %")))
        spread = max(record["spread"] for record in records if record["way"] == "hard")
        lines.append(Row("spread of hard", f"{spread:g}", "0", spread == 0.0))
        return lines

    def draw(self, axes: Any, records: Sequence[Record]) -> None:
        for place, name in enumerate(reversed(WAYS)):
            values = chosen(records, name)
            mean, error = mean_and_error(values)
            axes.plot(values, [place] * len(values), "o", color=colors.OF[name], alpha=0.3, markersize=5)
            axes.errorbar(mean, place, xerr=error, color=colors.OF[name], marker="D", markersize=7, capsize=4)
            axes.annotate(f"{mean:.1f}", (mean, place), (0, 9), textcoords="offset points", ha="center")
        axes.set_yticks(range(len(WAYS)), [ways.WAYS[name].label for name in reversed(WAYS)])
        axes.set(xlabel="held-out pairs judged rightly (%)", ylim=(-0.5, len(WAYS) - 0.4))
