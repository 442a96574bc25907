"""Autoencoders on digits whose decoder is the encoder transposed: reconstruction error against weights stored.

Two dense layers, the first with tanh, squeeze `scikit-learn`'s 1,797 handwritten digits (64 pixels) into a code of 16
or 4 numbers (8 in a quick run), and two layers undo it. Tied, each kernel of the decoder is that of the encoder
transposed, which halves what is stored (Vincent et al., Stacked denoising autoencoders (2010), section 3). Half of the
images trains, so that there is something to learn about the others, and a fifth of these only chooses strengths. A
kernel and its transpose cannot be one variable without layers written for it, so that way is left out.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

from benchmarks import curves, ways
from benchmarks.comparing import Compared, Problem, epochs
from benchmarks.task import Case, Options, Record, Row, distinct, plus_minus, where
from equalize.views import Transpose

PIXELS, HIDDEN = 64, 48
BATCH = 50


def load(options: Options, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Images to train on, and to test on."""
    images = (load_digits().data / 16).astype("float32")
    train, test = np.array_split(options.generator(split).permutation(images), 2)
    return train, test


def build(code: int) -> keras.Model:
    """The autoencoder."""
    sizes = {"outer": HIDDEN, "inner": code, "unfold": HIDDEN, "decode": PIXELS}
    tanh = ("outer", "unfold")
    return keras.Sequential(
        [
            keras.Input((PIXELS,)),
            *(layers.Dense(n, activation="tanh" if name in tanh else None, name=name) for name, n in sizes.items()),
        ]
    )


def members(model: keras.Model) -> ways.Groups:
    """The kernels in twos."""
    outer, inner, unfold, decode = (layer.kernel for layer in model.layers)
    return {"outer": [outer, (decode, Transpose())], "inner": [inner, (unfold, Transpose())]}


class Autoencoder(Compared):
    """Reconstruction error of tied and untied autoencoders."""

    title = "Transposed autoencoder on digits: variance not reconstructed"
    size = (9.5, 4.5)
    known: Mapping[str, ways.Way] = {name: way for name, way in Compared.known.items() if name != "shared"}

    def splits(self, options: Options) -> int:
        return options.choose(1, 1, 8)

    def parts(self, options: Options) -> Sequence[Case]:
        return [{"code": code} for code in options.choose((8,), (8,), (4, 16))]

    def problem(self, options: Options, case: Case) -> Problem:
        train, test = load(options, case["split"])
        settings: Mapping[str, Any] = {
            "make_model": functools.partial(build, case["code"]),
            "members": members,
            "x": train,
            "y": train,
            "validation_data": (test, test),
            "compile": {"optimizer": keras.optimizers.Adam(3e-3), "loss": "mse"},
            "fit": {"batch_size": BATCH, "epochs": epochs(options.choose(10, 600, 600), len(train), BATCH)},
        }
        return Problem(settings, scale=100 / float(np.square(test - test.mean(axis=0)).mean()))

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for code in distinct(records, "code"):
            part = where(records, code=code)
            for name in curves.measured(part):
                weights = where(part, way=name)[0]["free_weights"]
                error = plus_minus(curves.chosen(part, name, least=True), " %")
                lines.append(Row(f"{self.known[name].label}, {weights:,} weights", error, heading=f"code of {code}"))
        return [*lines, self.spread(records)]

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        curves.trade(figure, records, "code", "variance not reconstructed (%)", digits=1)
