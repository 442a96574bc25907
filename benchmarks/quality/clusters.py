"""Which tasks belong together? Clusters that ties find in data that have some, over the noise.

Twelve linear regressions with four features, whose true weights fall into three clusters, made from the seed. A tie
pulls them together, more from stage to stage (`FactorSchedule`), each stage from where the last one ended, and
`GroupRegistry.split` says which members have met. Validation data choose the stage: by the loss of one regression for
each cluster, since the pull shrinks the weights themselves (Meinshausen, Relaxed lasso (2007)). So the number of
clusters is found, too.

Three ties do that: two proximal rules, which pull all pairs alike; and the network lasso (Hallac, Leskovec and Boyd
2015), a penalty on the three nearest neighbors of each task, by the weights that tasks have on their own. Beside them
stands k-means of the weights of untied regressions, and of those under `MeanL2` at the stage with the least validation
loss. Both are told the right number of clusters, which is generous. The adjusted Rand index compares what is found with
the truth: it is 1 where they agree, and 0 on average for random clusters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import equalize
from benchmarks import colors, curves
from benchmarks.task import Case, Options, Record, Row, Task, distinct, mean_and_error, plus_minus, where

TASKS, CLUSTERS, FEATURES, SAMPLES = 12, 3, 4, 40
NEIGHBORS = 3
LEARNING_RATE = 0.15


class Neighbors(equalize.regularizers.GroupRegularizer):
    """The network lasso, factor · Σ over pairs of neighbors ‖w_i − w_j‖, with a factor that can be scheduled."""

    def __init__(self, group: str | None = None, factor: float = 1.0, *, pairs: np.ndarray):
        super().__init__(group, factor)
        self.pairs = equalize.regularizers.PairwiseNorm(factor=pairs)

    def penalty(self, values: Sequence[Any]) -> Any:
        return self.pairs.penalty(values)


class Method(NamedTuple):
    """A way to find clusters.

    Attributes:
        color: Its color in the picture.
        make_rule: The rule, given which tasks are neighbors.
        atol: How near members are that have met, for `split`; None where k-means finds the clusters.
    """

    color: str
    make_rule: Callable[[np.ndarray], Any]
    atol: float | None = None


METHODS: dict[str, Method] = {
    "ProximalPairwiseL1, split": Method(
        colors.VERMILLION, lambda pairs: equalize.constraints.ProximalPairwiseL1(factor=0.0), 1e-5
    ),
    "ProximalPairwiseNorm, split": Method(
        colors.ORANGE, lambda pairs: equalize.constraints.ProximalPairwiseNorm(factor=0.0), 1e-5
    ),
    "PairwiseNorm of neighbors, split": Method(colors.GREEN, lambda pairs: Neighbors(factor=0.0, pairs=pairs), 0.01),
    "MeanL2, k-means": Method(colors.BLUE, lambda pairs: equalize.regularizers.MeanL2(factor=0.0)),
}
ALONE = "untied, k-means"


class Sample(NamedTuple):
    """Inputs of shape `(tasks, samples, features)` and their targets, `(tasks, samples)`."""

    x: np.ndarray
    y: np.ndarray


def draw(options: Options, split: int, noise: float) -> tuple[np.ndarray, Sample, Sample]:
    """The true cluster of each task, and data to train on and to choose the stage on."""
    generator = options.generator(split)
    labels = generator.permutation(np.arange(TASKS) % CLUSTERS)
    weights = generator.normal(size=(CLUSTERS, FEATURES))[labels]
    parts = []
    for _ in range(2):
        x = generator.normal(size=(TASKS, SAMPLES, FEATURES))
        y = np.einsum("tsf,tf->ts", x, weights) + noise * generator.normal(size=(TASKS, SAMPLES))
        parts.append(Sample(x.astype("float32"), y.astype("float32")))
    return labels, *parts


def least_squares(data: Sample, labels: np.ndarray) -> np.ndarray:
    """The weights of each task, `(tasks, features)`, from one regression for each cluster."""
    weights = np.zeros((TASKS, FEATURES))
    for label in set(labels):
        x, y = (part[labels == label] for part in data)
        weights[labels == label] = np.linalg.lstsq(x.reshape(-1, FEATURES), y.ravel())[0]
    return weights


def loss(data: Sample, weights: np.ndarray) -> float:
    """Mean squared error over all tasks."""
    return float(np.square(np.einsum("tsf,tf->ts", data.x, weights) - data.y).mean())


def neighbors(weights: np.ndarray) -> np.ndarray:
    """A symmetric matrix with 1 for each task and its nearest ones."""
    apart = np.linalg.norm(weights[:, None] - weights, axis=-1)
    near = np.argsort(np.argsort(apart, axis=1), axis=1) <= NEIGHBORS
    return (near | near.T).astype("float32")


def met(weights: np.ndarray, atol: float) -> np.ndarray:
    """The cluster of each task, as `GroupRegistry.split` has it."""
    members = [keras.Variable(weight) for weight in weights]
    registry = equalize.GroupRegistry()
    registry.tie("tasks", members, None)
    places = {
        id(member.variable): number
        for number, group in enumerate(registry.split("tasks", atol=atol))
        for member in group.members
    }
    return np.array([places.get(id(member), TASKS + i) for i, member in enumerate(members)])


def k_means(weights: np.ndarray) -> np.ndarray:
    """The cluster of each task by k-means, which is told how many there are."""
    return KMeans(CLUSTERS, n_init=10, random_state=0).fit_predict(weights)


class Regressions(keras.Model):
    """A linear model for each task, applied to its samples."""

    def __init__(self):
        super().__init__()
        self.heads = [keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros") for _ in range(TASKS)]
        for head in self.heads:
            head.build((None, FEATURES))

    def call(self, x: Any) -> Any:
        kernels = ops.stack([head.kernel.value[:, 0] for head in self.heads])
        return ops.einsum("btsf,tf->bts", x, kernels)


def squared_error(y_true: Any, y_pred: Any) -> Any:
    """The mean over the samples of each task, summed over the tasks."""
    return ops.sum(ops.mean(ops.square(y_true - y_pred), axis=-1), axis=-1)


class Trainer:
    """Trains regressions under one tie, from stage to stage.

    Args:
        method: Gives the tie.
        factors: Those of the stages.
        steps: How many steps a stage has.
    """

    def __init__(self, method: Method, factors: Sequence[float], steps: int):
        self._method, self._steps = method, steps
        self._model, self._registry = Regressions(), equalize.GroupRegistry()
        rule = method.make_rule(np.ones((TASKS, TASKS)))
        proximal = self._registry.tie("tasks", [head.kernel for head in self._model.heads], rule).projects
        # A proximal rule moves members after the gradient's step, so its factor has the learning rate in it. Under a
        # penalty members hop about the minimizer, by about the learning rate, which therefore falls in each stage.
        self._factors = [LEARNING_RATE * factor if proximal else factor for factor in factors]
        falling = keras.optimizers.schedules.CosineDecayRestarts(LEARNING_RATE, steps, t_mul=1.0)
        stretch = steps if keras.backend.backend() == "tensorflow" else 1
        optimizer = keras.optimizers.SGD(LEARNING_RATE if proximal else falling)
        self._model.compile(optimizer, squared_error, steps_per_execution=stretch)

    def fit(self, data: Sample) -> list[np.ndarray]:
        """The weights at the end of each stage, of shape `(tasks, features)`."""
        for head in self._model.heads:
            head.kernel.assign(np.zeros((FEATURES, 1)))
        if isinstance(self._registry["tasks"].rule, Neighbors):
            pairs = neighbors(least_squares(data, np.arange(TASKS)))
            self._registry.replace("tasks", self._method.make_rule(pairs))
        rise = equalize.callbacks.FactorSchedule(self._registry, "tasks", lambda stage: self._factors[stage])
        path: list[np.ndarray] = []
        note = keras.callbacks.LambdaCallback(on_epoch_end=lambda stage, logs: path.append(self._weights()))
        x, y = (np.repeat(part[None], self._steps, axis=0) for part in data)
        stages = len(self._factors)
        self._model.fit(x, y, batch_size=1, epochs=stages, shuffle=False, verbose=0, callbacks=[rise, note])
        return path

    def _weights(self) -> np.ndarray:
        if keras.backend.backend() == "jax":
            self._model.jax_state_sync()
        return np.stack([head.get_weights()[0][:, 0] for head in self._model.heads])


class Clusters(Task):
    """How well clusters are found, over the noise."""

    title = "Twelve regressions in three clusters: which of them belong together"
    timed = False
    main = False
    size = (8.5, 4.0)

    def cases(self, options: Options) -> Sequence[Case]:
        return [{"method": name} for name in METHODS]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        method = METHODS[case["method"]]
        factors = np.geomspace(0.02, 1.0, options.choose(2, 7, 11))
        trainer = Trainer(method, [0.0, *map(float, factors)], options.choose(10, 60, 100))
        for noise in options.choose((1.0,), (1.0, 3.0), (0.5, 1.0, 2.0, 4.0)):
            for split in range(options.choose(1, 1, 8)):
                truth, train, validation = draw(options, split, noise)
                stages = trainer.fit(train)
                if method.atol is None:
                    best = int(np.argmin([loss(validation, weights) for weights in stages]))
                    results = {case["method"]: k_means(stages[best])}
                    results[ALONE] = k_means(least_squares(train, np.arange(TASKS)))
                else:
                    labels = [met(weights, method.atol) for weights in stages]
                    best = int(np.argmin([loss(validation, least_squares(train, each)) for each in labels]))
                    results = {case["method"]: labels[best]}
                for name, labels in results.items():
                    yield {
                        "noise": noise,
                        "split": split,
                        "finds": name,
                        "rand": float(adjusted_rand_score(truth, labels)),
                        "clusters": len(set(labels.tolist())),
                    }

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for name in distinct(records, "finds"):
            for noise in distinct(records, "noise"):
                part = where(records, finds=name, noise=noise)
                rand = plus_minus([record["rand"] for record in part], digits=2)
                count = np.mean([record["clusters"] for record in part])
                lines.append(Row(f"noise {noise:g}, {name}", f"{rand} ({count:.1f} clusters)"))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        noises = distinct(records, "noise")
        for name in distinct(records, "finds"):
            parts = [[r["rand"] for r in where(records, finds=name, noise=noise)] for noise in noises]
            means, errors = zip(*map(mean_and_error, parts), strict=True)
            color = METHODS[name].color if name in METHODS else colors.BLACK
            axes.errorbar(noises, means, errors, color=color, marker="o", markersize=4, capsize=3, label=name)
        axes.set(xscale="log", xlabel="standard deviation of the noise", ylabel="adjusted Rand index")
        axes.set_xticks(noises, [f"{noise:g}" for noise in noises])
        axes.minorticks_off()
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        curves.explain(axes)
