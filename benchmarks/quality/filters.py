"""MNIST-1D with local filters: one `Piece`, a small dense layer, for each position. Tied they are a convolution.

MNIST-1D (Greydanus and Kobak, Scaling down deep learning with MNIST-1D (2024)) are ten shapes of 40 points, shifted,
sheared and noisy; the package `mnist1d` generates them. The model is the authors' convolution, three layers of 25
channels with kernels of 5, 3 and 3 and stride 2, trained by Adam at 0.01 in batches of 100 as theirs. In 6,000 steps
they reach an accuracy of 94 %, of 56 % with the positions shuffled, and of 68 % with dense layers. A full run here
takes 1,500, and a fifth of the 4,000 training samples only chooses strengths. Where a shape may be anywhere, tied
pieces learn from all positions what untied ones learn from one. The negative control: with the positions shuffled, by
one permutation for all samples, neighbours have nothing in common any more.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from mnist1d.data import get_dataset_args, make_dataset

from benchmarks import curves, ways
from benchmarks.comparing import Compared, Problem, epochs, stretch
from benchmarks.task import Case, Options, Record, Row, plus_minus, where

ORDERS = ("ordered", "shuffled")
LENGTH = 40
WIDTHS, STRIDE, CHANNELS = (5, 3, 3), 2, 25
BATCH = 100

Part = tuple[np.ndarray, np.ndarray]


@functools.cache
def generate(options: Options, split: int) -> dict[str, np.ndarray]:
    """The shapes of one split, in order: four fifths to train on, and the others to test on."""
    settings = get_dataset_args()
    settings.num_samples = options.choose(500, 5000, 5000)
    settings.seed = options.seed_of(split)
    return make_dataset(settings)


def load(options: Options, split: int, order: str) -> tuple[Part, Part]:
    """Samples to train on, and to test on."""
    data = generate(options, split)
    places = np.arange(LENGTH) if order == "ordered" else options.generator(split, 2).permutation(LENGTH)
    x, test_x = (data[key][:, places].astype("float32") for key in ("x", "x_test"))
    return (x, data["y"]), (test_x, data["y_test"])


class Piece(keras.layers.Layer):
    """The kernel of a `Dense` layer without bias, for one position."""

    def __init__(self, units: int, **settings: Any):
        super().__init__(**settings)
        self.units = units

    def build(self, shape: Sequence[int]) -> None:
        self.kernel = self.add_weight((shape[-1], self.units), initializer="he_uniform", name="kernel")


class LocalFilters(keras.layers.Layer):
    """From `(samples, length, channels)` to `(samples, positions, units)`: a piece of its own for each position."""

    def __init__(self, width: int, stride: int, units: int):
        super().__init__()
        self._width, self._stride, self._units = width, stride, units

    def build(self, shape: Sequence[int]) -> None:
        starts = np.arange(0, shape[1] + 2 - self._width + 1, self._stride)
        self._places = (starts[:, None] + np.arange(self._width)).ravel()
        self.pieces = [Piece(self._units) for _ in starts]
        for piece in self.pieces:
            piece.build((None, self._width * shape[2]))
        self.bias = self.add_weight((self._units,), initializer="zeros", name="bias")

    def call(self, x: Any) -> Any:
        padded = ops.pad(x, [(0, 0), (1, 1), (0, 0)])
        seen = ops.take(padded, self._places, axis=1)
        patches = ops.reshape(seen, (-1, len(self.pieces), self.pieces[0].kernel.shape[0]))
        kernels = ops.stack([piece.kernel.value for piece in self.pieces])
        return ops.relu(ops.einsum("spi,piu->spu", patches, kernels) + self.bias)


def build() -> keras.Model:
    """Three layers of local filters, and a dense one."""
    filters = [LocalFilters(width, STRIDE, CHANNELS) for width in WIDTHS]
    return keras.Sequential(
        [keras.Input((LENGTH,)), layers.Reshape((LENGTH, 1)), *filters, layers.Flatten(), layers.Dense(10)]
    )


def members(model: keras.Model) -> ways.Groups:
    """The pieces of each layer: 19, 10 and 5."""
    filters = [layer for layer in model.layers if isinstance(layer, LocalFilters)]
    return {f"layer {number}": layer.pieces for number, layer in enumerate(filters, start=1)}


class Filters(Compared):
    """Accuracy of local filters, on shapes in order and shuffled."""

    title = "Local filters on MNIST-1D: accuracy"
    size = (9.0, 4.0)

    def splits(self, options: Options) -> int:
        return options.choose(1, 1, 8)

    def parts(self, options: Options) -> Sequence[Case]:
        return [{"order": order} for order in ORDERS]

    def problem(self, options: Options, case: Case) -> Problem:
        (x, y), test = load(options, case["split"], case["order"])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def compile_(model: keras.Model) -> None:
            model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"], **stretch(16))

        settings: Mapping[str, Any] = {
            "make_model": build,
            "members": members,
            "x": x,
            "y": y,
            "validation_data": test,
            "compile": compile_,
            "fit": {"batch_size": BATCH, "epochs": epochs(options.choose(10, 160, 1500), len(x), BATCH)},
            "metric": "accuracy",
        }
        return Problem(settings, scale=100)

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines, results = [], {}
        for order in ORDERS:
            part = where(records, order=order)
            for name in curves.measured(part):
                results[order, name] = curves.chosen(part, name)
                accuracy = plus_minus(results[order, name], " %")
                lines.append(Row(self.known[name].label, accuracy, heading=f"positions {order}"))
            gain = np.subtract(results[order, "exact"], results[order, "untied"])
            goal = ("> 0", bool(gain.mean() > 0)) if order == "ordered" else ("", None)
            less = f"{self.known['exact'].label} less untied"
            lines.append(Row(less, plus_minus(gain, " %", sign="+"), *goal, heading=f"positions {order}"))
        return [*lines, self.spread(records)]

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        panels = figure.subplots(1, len(ORDERS), sharex=True, sharey=True)
        titles = {"ordered": "positions in order", "shuffled": "positions shuffled (control)"}
        for axes, order in zip(panels, ORDERS, strict=True):
            part = where(records, order=order)
            curves.dots(axes, {name: curves.chosen(part, name) for name in curves.measured(part)})
            axes.set(title=titles[order], xlabel="test accuracy (%)")
        curves.explain(panels[-1], "dots: splits; bars: standard error")
