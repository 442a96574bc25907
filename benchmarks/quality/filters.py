"""MNIST-1D with local filters: one `Piece`, a small dense layer, for each position. Tied they are a convolution.

MNIST-1D (Greydanus and Kobak, Scaling down deep learning with MNIST-1D (2024)) are ten shapes of 40 points, shifted,
sheared and noisy; the package `mnist1d` generates them. Two layers of pieces look at neighbouring positions, and one
dense layer classifies the mean over the positions. Where a shape may be anywhere, tied pieces learn from all positions
what untied ones learn from one. The negative control: with the positions shuffled, by one permutation for all samples,
neighbours have nothing in common any more, and tying must hurt.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from mnist1d.data import get_dataset_args, make_dataset

from benchmarks import curves, ways
from benchmarks.task import Case, Options, Record, Row, Task, plus_minus, where
from benchmarks.training import Trainer

GRIDS = {"factor": (0.001, 0.01, 0.1), "rate": (0.003, 0.03, 0.3)}
ORDERS = ("ordered", "shuffled")
LENGTH = 40
WIDTH, STRIDE, CHANNELS = 5, 2, 24
BATCH = 100

Part = tuple[np.ndarray, np.ndarray]


def splits(options: Options) -> int:
    """How many data sets to generate."""
    return options.choose(1, 2, 3)


def steps(options: Options) -> int:
    """How many steps to train for."""
    return options.choose(10, 160, 320)


@functools.cache
def generate(options: Options, split: int) -> dict[str, np.ndarray]:
    """The shapes of one split, in order."""
    settings = get_dataset_args()
    settings.num_samples = options.choose(300, 4000, 6000)
    settings.train_split = 0.75
    settings.seed = options.seed_of(split)
    return make_dataset(settings)


def load(options: Options, split: int, order: str) -> tuple[Part, Part, Part]:
    """Samples to train on, to choose the strength on, and to test on."""
    data = generate(options, split)
    places = np.arange(LENGTH) if order == "ordered" else options.generator(split, 2).permutation(LENGTH)
    x, test_x = (data[key][:, places].astype("float32") for key in ("x", "x_test"))
    train = len(x) * 2 // 3
    return (x[:train], data["y"][:train]), (x[train:], data["y"][train:]), (test_x, data["y_test"])


class Piece(keras.layers.Layer):
    """The kernel of a `Dense` layer without bias, for one position."""

    def __init__(self, units: int, **settings: Any):
        super().__init__(**settings)
        self.units = units

    def build(self, shape: Sequence[int]) -> None:
        self.kernel = self.add_weight((shape[-1], self.units), initializer="he_normal", name="kernel")


class LocalFilters(keras.layers.Layer):
    """From `(samples, length, channels)` to `(samples, positions, units)`: a piece of its own for each position."""

    def __init__(self, way: ways.Way, width: int, stride: int, units: int):
        super().__init__()
        self._way, self._width, self._stride, self._units = way, width, stride, units

    def build(self, shape: Sequence[int]) -> None:
        starts = np.arange(0, shape[1] - self._width + 1, self._stride)
        self._places = (starts[:, None] + np.arange(self._width)).ravel()
        self.pieces = self._way.layers(lambda: Piece(self._units), len(starts))
        for piece in dict.fromkeys(self.pieces):
            piece.build((None, self._width * shape[2]))
        self.bias = self.add_weight((self._units,), initializer="zeros", name="bias")

    def call(self, x: Any) -> Any:
        patches = ops.reshape(ops.take(x, self._places, axis=1), (-1, len(self.pieces), self.pieces[0].kernel.shape[0]))
        kernels = ops.stack([piece.kernel.value for piece in self.pieces])
        return ops.relu(ops.einsum("spi,piu->spu", patches, kernels) + self.bias)


def build(way: ways.Way) -> tuple[keras.Model, ways.Groups]:
    """Two layers of local filters."""
    first = LocalFilters(way, WIDTH, STRIDE, CHANNELS)
    second = LocalFilters(way, WIDTH, STRIDE, CHANNELS)
    inputs = keras.Input((LENGTH,))
    positions = second(first(keras.layers.Reshape((LENGTH, 1))(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling1D()(positions)))
    return model, {"first": first.pieces, "second": second.pieces}


def accuracy(model: keras.Model, part: Part) -> float:
    """Samples that are classified rightly, in per cent."""
    x, y = part
    return float(100 * np.mean(ops.convert_to_numpy(model(ops.convert_to_tensor(x))).argmax(axis=1) == y))


class Filters(Task):
    """Accuracy of local filters, on shapes in order and shuffled."""

    title = "Local filters on MNIST-1D: shapes classified rightly"
    timed = False
    size = (9.0, 4.0)

    def cases(self, options: Options) -> Sequence[Case]:
        return ways.configurations(GRIDS, options)

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        trainer = Trainer(build, case, lambda: keras.optimizers.Adam(1e-2), loss)
        for split in range(splits(options)):
            for order in ORDERS:
                (x, y), validation, test = load(options, split, order)
                seed = options.seed_of(split)
                model = trainer.fit(seed, x, y, batch=BATCH, steps=steps(options))
                yield {
                    "order": order,
                    "split": split,
                    "seed": seed,
                    "validation": accuracy(model, validation),
                    "test": accuracy(model, test),
                    "free_weights": trainer.free_weights(),
                    "spread": ways.spread(trainer.groups),
                }

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines, results = [], {}
        for order in ORDERS:
            for name in curves.measured(records):
                results[order, name] = curves.chosen(where(records, order=order), name)
                lines.append(Row(f"{order}, {ways.WAYS[name].label}", plus_minus(results[order, name], " %")))
        for order, goal, sign in (("ordered", "> 0", 1), ("shuffled", "< 0", -1)):
            gain = np.subtract(results[order, "exact"], results[order, "untied"])
            what = f"{order}, {ways.WAYS['exact'].label} less untied"
            lines.append(Row(what, plus_minus(gain, " %", sign="+"), goal, bool(sign * gain.mean() > 0)))
        spread = max(record["spread"] for record in records if ways.WAYS[record["way"]].hard)
        lines.append(Row("spread of the hard ways", f"{spread:g}", "0", spread == 0.0))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        panels = figure.subplots(1, len(ORDERS), sharex=True, sharey=True)
        titles = {"ordered": "positions in order", "shuffled": "positions shuffled (control)"}
        for axes, order in zip(panels, ORDERS, strict=True):
            part = where(records, order=order)
            curves.dots(axes, {name: curves.chosen(part, name) for name in curves.measured(part)})
            axes.set(title=titles[order], xlabel="test shapes classified rightly (%)")
