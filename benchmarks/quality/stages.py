"""From soft to exact, stage by stage: schools that form clusters of their own, and are then trained as one.

One linear model of a pupil's score on the intake score for each school of the `Exam` data (see `schools`), on the same
splits; a quick run takes the first 24 of the 65 schools. Each stage starts where the last one ended: free; soft
(`MeanL2`); proximal (`ProximalPairwiseL1`, under which members meet); then `GroupRegistry.split` makes a hard group of
each cluster, and `TiedOptimizer` trains each as one model. Validation data choose the factors: that of the soft stage
by the explained variance of its weights, that of the proximal stage by the explained variance of one model for each
cluster, since a pull between all pairs shrinks the differences. Beside them stands one model for all schools.

Nothing says that schools come in clusters. If they do not, the last stage has fewer models and explains less.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

import equalize
from benchmarks import colors, curves, ways
from benchmarks.quality.clusters import met
from benchmarks.quality.schools import (
    MOMENTUM,
    Heads,
    closed_form,
    explained_variance,
    learning_rate,
    load,
    seat,
    splits,
    squared_error,
)
from benchmarks.task import Case, Options, Record, Row, Task, distinct, mean_and_error, plus_minus, where

FEATURES = 2  # level and slope on the intake score
NEAR = 1e-3
SOFT = (0.0, 4.0, 16.0, 64.0)
PROXIMAL = (0.0, 0.15, 0.22, 0.3, 0.4, 0.55)  # for 65 schools; a pull of each on each, so the more the fewer

LABELS = {
    "pooled": "one model for all",
    "free": "free",
    "soft": "soft: MeanL2",
    "proximal": "proximal: ProximalPairwiseL1",
    "split": "split: means of clusters",
    "exact": "exact: TiedOptimizer",
}


def pooled(x: np.ndarray, y: np.ndarray, school: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The weights of each school, `(schools, features)`, from least squares over the pupils of its cluster."""
    weights = np.zeros((labels.size, FEATURES))
    for label in set(labels.tolist()):
        pupils = labels[school] == label
        weights[labels == label] = np.linalg.lstsq(x[pupils], y[pupils])[0]
    return weights


class Schools:
    """The models of all schools, trained on some pupils.

    Args:
        x: Features of the pupils.
        y: Their scores.
        school: The number of each one's school.
        chosen: Which of them to train on.
        steps: How many steps at each factor.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, school: np.ndarray, chosen: np.ndarray, steps: int):
        self._steps = steps
        self.model = Heads(school.max() + 1, FEATURES, 1)
        mask = chosen[:, None].astype("float32")
        self._data = [np.tile(part, (steps, 1, 1)) for part in (seat(x, school), seat(mask, school))]
        self._targets = np.tile(seat(y[:, None] * mask, school), (steps, 1, 1))
        self.model([part[:1] for part in self._data])
        self.rate = float(learning_rate(ways.WAYS["soft"], x[chosen], school[chosen]))

    @property
    def kernels(self) -> list[keras.Variable]:
        """The weights of each school, of shape `(features, 1)`."""
        return [head.kernel for head in self.model.heads]

    @property
    def weights(self) -> np.ndarray:
        """The weights, of shape `(schools, features)`; assign them to start from there."""
        return np.stack([ops.convert_to_numpy(kernel.value)[:, 0] for kernel in self.kernels])

    @weights.setter
    def weights(self, values: np.ndarray) -> None:
        for kernel, value in zip(self.kernels, values, strict=True):
            kernel.assign(value[:, None])

    def compile(self, optimizer: Any) -> None:
        """Has the models train with an optimizer."""
        tensorflow = keras.backend.backend() == "tensorflow"
        self.model.compile(optimizer, squared_error, steps_per_execution=self._steps if tensorflow else 1)

    def fit(self, *callbacks: keras.callbacks.Callback, epochs: int = 1) -> list[np.ndarray]:
        """Trains, and returns the weights after each epoch."""
        path: list[np.ndarray] = []

        def note(epoch: int, logs: Any) -> None:
            if keras.backend.backend() == "jax":
                self.model.jax_state_sync()
            path.append(self.weights)

        told = [*callbacks, keras.callbacks.LambdaCallback(on_epoch_end=note)]
        seats = len(self._targets) // self._steps
        self.model.fit(
            self._data, self._targets, batch_size=seats, epochs=epochs, shuffle=False, verbose=0, callbacks=told
        )
        return path


class Stages(Task):
    """Explained variance from stage to stage."""

    title = "Schools from soft to exact: explained variance of their models, on pupils held out"
    timed = False
    main = False
    size = (8.5, 4.0)

    def cases(self, options: Options) -> Sequence[Case]:
        return [{"split": split} for split in range(options.choose(1, 1, 8))]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        x, y, school = load()
        few = school < options.choose(8, 24, 65)
        x, y, school = x[few, :FEATURES].astype("float32"), y[few], school[few]
        fit, validation, test = splits(school, options)[case["split"]]

        def explained(weights: np.ndarray, pupils: np.ndarray) -> float:
            return explained_variance(weights, x, y, school, pupils)

        schools = Schools(x, y, school, fit, options.choose(4, 60, 200))
        registry = equalize.GroupRegistry()
        registry.tie("schools", schools.kernels, equalize.regularizers.MeanL2(factor=0.0))
        schools.compile(keras.optimizers.SGD(schools.rate, momentum=MOMENTUM, nesterov=True))
        result = {"pooled": closed_form(x[fit], y[fit], school[fit], ways.WAYS["hard"], 0.0)}

        def path(factors: Sequence[float]) -> list[np.ndarray]:
            rise = equalize.callbacks.FactorSchedule(registry, "schools", lambda epoch: factors[epoch])
            return schools.fit(rise, epochs=len(factors))

        soft = path(SOFT)
        result |= {"free": soft[0], "soft": best(soft, lambda weights: explained(weights, validation))}

        schools.weights = result["soft"]
        registry.replace("schools", equalize.constraints.ProximalPairwiseL1(factor=0.0))
        # With momentum the steps add up to this learning rate, and the factor of a proximal rule has it in it.
        rate = schools.rate / (1 - MOMENTUM)
        proximal = path([rate * factor * 65 / len(schools.kernels) for factor in PROXIMAL])
        trained = x[fit], y[fit], school[fit]
        result["proximal"] = best(proximal, lambda weights: explained(pooled(*trained, met(weights, NEAR)), validation))

        schools.weights = result["proximal"]
        groups = registry.split("schools", atol=NEAR)
        result["split"] = schools.weights
        adam = keras.optimizers.Adam(0.01)
        schools.compile(equalize.optimizers.TiedOptimizer(adam, registry) if groups else adam)
        result["exact"] = schools.fit(epochs=2)[-1]
        registry.check()
        for stage, weights in result.items():
            models = len(np.unique(weights, axis=0))
            yield {"stage": stage, "test": explained(weights, test), "models": models}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for stage in distinct(records, "stage"):
            part = where(records, stage=stage)
            models = np.mean([record["models"] for record in part])
            what = f"{LABELS[stage]}, {models:.0f} {'model' if models == 1 else 'models'}"
            lines.append(Row(what, plus_minus([record["test"] for record in part], " %")))
        free = np.array([record["test"] for record in where(records, stage="free")])
        for stage in ("soft", "exact"):
            gain = [record["test"] for record in where(records, stage=stage)] - free
            lines.append(Row(f"{LABELS[stage]} less free", plus_minus(gain, " %", sign="+")))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        stages = distinct(records, "stage")
        for place, stage in enumerate(stages):
            values = [record["test"] for record in where(records, stage=stage)]
            mean, error = mean_and_error(values)
            color = colors.BLACK if stage in ("pooled", "free") else colors.BLUE
            axes.errorbar(place, mean, error, color=color, marker="D", markersize=6, capsize=4)
            axes.annotate(f"{mean:.1f}", (place, mean), (10, 0), textcoords="offset points", va="center")
        for split in distinct(records, "split"):
            values = [where(records, split=split, stage=stage)[0]["test"] for stage in stages[1:]]
            axes.plot(range(1, len(stages)), values, color=colors.GREY, linewidth=0.6, zorder=0)
        counts = [np.mean([record["models"] for record in where(records, stage=stage)]) for stage in stages]
        names = [f"{LABELS[s].replace(': ', chr(10))}\n({n:.0f})" for s, n in zip(stages, counts, strict=True)]
        axes.set_xticks(range(len(stages)), names, fontsize=8)
        axes.set(ylabel="explained variance on held-out pupils (%)", xlabel="stage (and how many models differ)")
        curves.explain(axes, "bars: standard error; grey: each split")


def best(path: Sequence[np.ndarray], score: Callable[[np.ndarray], float]) -> np.ndarray:
    """The weights with the highest score."""
    return path[int(np.argmax([score(weights) for weights in path]))]
