"""Autoencoders on digits whose decoder is the encoder transposed: reconstruction error against weights stored.

Two dense layers, the first with tanh, squeeze `scikit-learn`'s 1,797 handwritten digits (64 pixels) into a code of 16,
8 or 4 numbers, and two layers undo it. Tied, each kernel of the decoder is that of the encoder transposed, which halves
what is stored (Vincent et al., Stacked denoising autoencoders (2010), section 3). A third of the images trains, so that
there is something to learn about the others; the strength of each way is chosen on images that are neither trained nor
tested on.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

from benchmarks import curves, ways
from benchmarks.task import Case, Options, Record, Row, Task, distinct, plus_minus, where
from benchmarks.training import Trainer
from equalize.views import Transpose

GRIDS = {"factor": (1e-5, 1e-4, 1e-3), "rate": (0.003, 0.03, 0.3)}
PIXELS, HIDDEN = 64, 48
BATCH = 50


def codes(options: Options) -> tuple[int, ...]:
    """Lengths of the code."""
    return options.choose((8,), (8,), (4, 8, 16))


def splits(options: Options) -> int:
    """How many random splits of the images."""
    return options.choose(1, 2, 3)


def steps(options: Options) -> int:
    """How many steps to train for."""
    return options.choose(10, 600, 600)


@functools.cache
def load(options: Options, split: int) -> list[np.ndarray]:
    """Images to train on, to choose the strength on, and to test on."""
    images = (load_digits().data / 16).astype("float32")
    return np.array_split(options.generator(split).permutation(images), 3)


class Mirrored(layers.Layer):
    """A decoder's layer by reference: it multiplies by the transposed kernel of an encoder's layer."""

    def __init__(self, source: layers.Dense, activation: str | None):
        super().__init__()
        self._source = source
        self._activation = keras.activations.get(activation)

    def build(self, shape: Sequence[int]) -> None:
        self.bias = self.add_weight((self._source.kernel.shape[0],), initializer="zeros", name="bias")

    def call(self, x: Any) -> Any:
        return self._activation(ops.matmul(x, ops.transpose(self._source.kernel.value)) + self.bias)


def build(code: int, way: ways.Way) -> tuple[keras.Model, ways.Groups]:
    """The autoencoder; its kernels are tied in twos."""
    inputs = keras.Input((PIXELS,))
    outer, inner = layers.Dense(HIDDEN, activation="tanh"), layers.Dense(code)
    encoded = inner(outer(inputs))
    if way.shared:
        model = keras.Model(inputs, Mirrored(outer, None)(Mirrored(inner, "tanh")(encoded)))
        return model, {"outer": [outer.kernel], "inner": [inner.kernel]}
    unfold, decode = layers.Dense(HIDDEN, activation="tanh"), layers.Dense(PIXELS)
    model = keras.Model(inputs, decode(unfold(encoded)))
    pairs = {"outer": (outer, decode), "inner": (inner, unfold)}
    return model, {name: [into.kernel, (out.kernel, Transpose())] for name, (into, out) in pairs.items()}


def error(model: keras.Model, images: np.ndarray) -> float:
    """Squared error per pixel, in per cent of the pixels' variance."""
    apart = ops.convert_to_numpy(model(ops.convert_to_tensor(images))) - images
    return float(100 * np.square(apart).mean() / np.square(images - images.mean(axis=0)).mean())


class Autoencoder(Task):
    """Reconstruction error of tied and untied autoencoders."""

    title = "Transposed autoencoder on digits: variance not reconstructed"
    timed = False
    size = (7.5, 4.5)

    def cases(self, options: Options) -> Sequence[Case]:
        return [{"code": code, **case} for code in codes(options) for case in ways.configurations(GRIDS, options)]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        trainer = Trainer(functools.partial(build, case["code"]), case, lambda: keras.optimizers.Adam(3e-3), "mse")
        for split in range(splits(options)):
            train, validation, test = load(options, split)
            seed = options.seed_of(split)
            model = trainer.fit(seed, train, train, batch=BATCH, steps=steps(options))
            yield {
                "split": split,
                "seed": seed,
                "validation": error(model, validation),
                "test": error(model, test),
                "free_weights": trainer.free_weights(),
                "spread": ways.spread(trainer.groups),
            }

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for code in distinct(records, "code"):
            for name in curves.measured(records):
                part = where(records, code=code, way=name)
                results = plus_minus(curves.chosen(part, name, least=True), " %")
                what = f"code of {code}, {ways.WAYS[name].label}, {part[0]['free_weights']:,} weights"
                lines.append(Row(what, results))
        spread = max(record["spread"] for record in records if ways.WAYS[record["way"]].hard)
        lines.append(Row("spread of the hard ways", f"{spread:g}", "0", spread == 0.0))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        curves.trade(figure, records, "code", "variance not reconstructed (%)", digits=1)
