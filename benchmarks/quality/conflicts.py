"""Three tasks on one trunk, whose gradients conflict: the quality of each task under each reduction.

Each image shows two of `scikit-learn`'s handwritten digits, one shifted to the right and down so that they overlap (as
MultiMNIST in Sener and Koltun, Multi-task learning as multi-objective optimization (2018)). Two tasks classify one
digit each; the third reconstructs the image, and its loss, a sum over pixels, is many times larger. A shared trunk sees
only the sum of the three gradients. Here each task has a trunk of its own, and the three are tied, so a reduction sees
three gradients. There are two controls: untied trunks, with three times as many weights; and the sum with the third
loss as a mean over pixels, for which somebody must notice that the losses differ in scale. The learning rate of each
way is chosen, for each split, on the mean of the three figures over validation images, whose digits are in neither
the training nor the test images. All ways train with Adam, which does not see whether gradients are summed or averaged.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

import equalize
from benchmarks import colors, curves, ways
from benchmarks.comparing import stretch
from benchmarks.task import Case, Options, Record, Row, Task, plus_minus
from benchmarks.text import in_order
from equalize.callbacks import TieMonitor
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from equalize.reductions import MGDA, PCGrad, Reduction, UPGrad

RATES = (1e-3, 3e-3)
BATCH = 64
SIDE, SHIFT = 12, 4
WIDTH = 16
TASKS = {
    "left": "accuracy on the left digit (%)",
    "right": "accuracy on the right digit (%)",
    "image": "variance reconstructed (%)",
}

Part = tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]


def _reduced(reduction: str | Reduction) -> ways.Attach:
    def attach(groups: ways.Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> ways.Tied:
        registry = equalize.GroupRegistry()
        for name, members in groups.items():
            registry.tie(name, list(members), Equal())
        monitor = TieMonitor(registry, gradients=True)
        return ways.Tied(TiedOptimizer(optimizer, registry, reduction=reduction), [monitor])

    return attach


WAYS = {
    "untied": ways.WAYS["untied"],
    "sum": ways.Way("sum", colors.ORANGE, _reduced("sum"), hard=True),
    "scaled": ways.Way("sum, scaled losses", colors.SKY, _reduced("sum"), hard=True),
    "mean": ways.Way("mean", colors.VERMILLION, _reduced("mean"), hard=True),
    "pcgrad": ways.Way("PCGrad", colors.GREEN, _reduced(PCGrad(seed=0)), hard=True),
    "mgda": ways.Way("MGDA", colors.BLUE, _reduced(MGDA()), hard=True),
    "upgrad": ways.Way("UPGrad", colors.PINK, _reduced(UPGrad()), hard=True),
}


def splits(options: Options) -> int:
    """How many random splits of the digits."""
    return options.choose(1, 1, 8)


def steps(options: Options) -> int:
    """How many steps to train for."""
    return options.choose(16, 200, 1200)


def overlay(images: np.ndarray, digits: np.ndarray, count: int, generator: np.random.Generator) -> Part:
    """Images of two digits, of shape `(count, SIDE²)`, and the targets of the tasks."""
    left, right = generator.integers(len(images), size=(2, count))
    canvas = np.zeros((2, count, SIDE, SIDE), "float32")
    canvas[0, :, :-SHIFT, :-SHIFT] = images[left]
    canvas[1, :, SHIFT:, SHIFT:] = images[right]
    pixels = canvas.max(axis=0).reshape(count, -1)
    return pixels, (digits[left], digits[right], pixels)


@functools.cache
def load(options: Options, split: int) -> tuple[Part, Part, Part]:
    """Images to train on, to choose the rate on, and to test on; no digit is in two of the three."""
    generator = options.generator(split)
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8).astype("float32")
    order = generator.permutation(len(images))
    test, validation, train = np.split(order, [len(order) // 4, len(order) // 2])
    parts = ((train, options.choose(500, 10_000, 10_000)), (validation, 2000), (test, 2000))
    train, validation, test = (overlay(images[part], digits[part], n, generator) for part, n in parts)
    return train, validation, test


def trunk() -> keras.layers.Layer:
    """From an image to the features of all tasks."""
    return keras.Sequential(
        [keras.Input((SIDE**2,)), layers.Dense(64, activation="relu"), layers.Dense(WIDTH, activation="relu")]
    )


def build() -> tuple[keras.Model, ways.Groups]:
    """A trunk and a head for each task."""
    inputs = keras.Input((SIDE**2,))
    trunks = [trunk() for _ in TASKS]
    heads = [layers.Dense(10), layers.Dense(10), layers.Dense(SIDE**2)]
    outputs = [head(trunk(inputs)) for head, trunk in zip(heads, trunks, strict=True)]
    return keras.Model(inputs, outputs), {"trunk": trunks}


def losses(way: str) -> list[Any]:
    """The losses of the tasks: two cross-entropies, and the squared error of an image, summed over its pixels."""
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    reduce = ops.mean if way == "scaled" else ops.sum
    return [entropy, entropy, lambda y, answer: reduce(ops.square(y - answer), axis=-1)]


def quality(model: keras.Model, part: Part) -> dict[str, float]:
    """How well each task does, in per cent."""
    pixels, (left, right, _) = part
    *logits, image = map(ops.convert_to_numpy, model(ops.convert_to_tensor(pixels)))
    accuracies = [np.mean(of.argmax(axis=1) == digits) for of, digits in zip(logits, (left, right), strict=True)]
    missed = np.square(image - pixels).sum() / np.square(pixels - pixels.mean(axis=0)).sum()
    return {task: float(100 * share) for task, share in zip(TASKS, [*accuracies, 1 - missed], strict=True)}


class Conflicts(Task):
    """Quality of tasks on one trunk, under each reduction of their gradients."""

    title = "Three tasks on one trunk: reductions of conflicting gradients"
    timed = False
    main = False
    size = (9.0, 3.8)

    def cases(self, options: Options) -> Sequence[Case]:
        rates = options.choose(RATES[:1], RATES[:1], RATES)
        return [{"way": name, "strength": rate} for name in WAYS for rate in rates]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        for split in range(splits(options)):
            (x, y), validation, test = load(options, split)
            seed = options.seed_of(split)
            keras.utils.set_random_seed(seed)
            model, groups = build()
            tied = WAYS[case["way"]].attach(groups, 0.0, keras.optimizers.Adam(case["strength"]))
            model.compile(tied.optimizer, losses(case["way"]), **stretch(16))
            order = in_order(seed, len(x), steps(options) * BATCH)
            targets = tuple(part[order] for part in y)
            model.fit(x[order], targets, batch_size=BATCH, shuffle=False, verbose=0, callbacks=list(tied.callbacks))
            conflicts = [monitor.conflicts["trunk"][-1]["cosine"] for monitor in tied.callbacks]
            yield {
                "split": split,
                "seed": seed,
                "validation": float(np.mean(list(quality(model, validation).values()))),
                **quality(model, test),
                "cosine": conflicts[0] if conflicts else None,
                "spread": ways.spread(groups),
            }

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines, names = [], curves.measured(records)
        results = {name: {task: curves.chosen(records, name, task) for task in TASKS} for name in names}
        for name in names:
            figures = ", ".join(plus_minus(results[name][task]) for task in TASKS)
            lines.append(Row(f"{WAYS[name].label}: {', '.join(TASKS)}", f"{figures} %"))
        means = {name: np.mean(list(of_tasks.values()), axis=0) for name, of_tasks in results.items()}
        for name in names:
            if name != "sum":
                less = plus_minus(means[name] - means["sum"], " %", sign="+")
                lines.append(Row(f"{WAYS[name].label} less sum, mean of the tasks", less))
        for name in names:
            if WAYS[name].hard:
                cosines = plus_minus(curves.chosen(records, name, "cosine"), digits=2)
                lines.append(Row(f"{WAYS[name].label}: mean smallest cosine", cosines))
        spread = max(record["spread"] for record in records if WAYS[record["way"]].hard)
        lines.append(Row("spread of the tied trunks", f"{spread:g}", "0", spread == 0.0))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        panels = figure.subplots(1, len(TASKS), sharey=True)
        panels[1].sharex(panels[0])  # the two accuracies
        for axes, (task, what) in zip(panels, TASKS.items(), strict=True):
            results = {name: curves.chosen(records, name, task) for name in curves.measured(records)}
            curves.dots(axes, results, known=WAYS)
            axes.set_xlabel(what)
        curves.explain(panels[-1], "dots: splits; bars: standard error")
