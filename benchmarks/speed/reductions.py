"""What a reduction of conflicting gradients costs: `PCGrad` from one backward pass, and with one for each task.

Four tasks, each with a trunk of four `Dense` with ReLU and a head; the trunks are tied exactly. SGD, batch 128. By
hand, a loop takes the gradient of each task's loss by the one trunk that all use, and sums what is left of each after
its conflicts with the others. The backends that have one compile the step, by hand too.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

import equalize
from benchmarks import timing
from benchmarks.task import Case, Options, Record, Row, Task, distinct, where
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from equalize.reductions import MGDA, PCGrad, UPGrad

TASKS, LAYERS, BATCH = 4, 4, 128
GOAL = 1.10
LABELS = {
    "untied": "sum (what one shared variable gets)",
    "PCGrad": "PCGrad",
    "MGDA": "MGDA",
    "UPGrad": "UPGrad",
    "hand_written": "PCGrad, a backward pass a task",
}
REDUCTIONS = {"untied": "sum", "PCGrad": PCGrad(seed=0), "MGDA": MGDA(), "UPGrad": UPGrad()}


def trunk(width: int) -> keras.Model:
    """The layers that the tasks have in common."""
    return keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(width, "relu") for _ in range(LAYERS))])


def data(width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Inputs, and targets of each task."""
    random = np.random.default_rng(0)
    x = random.standard_normal((BATCH, width)).astype("float32")
    return x, [random.standard_normal((BATCH, 1)).astype("float32") for _ in range(TASKS)]


def tied(name: str, width: int) -> timing.Step:
    """A step of trunks that are tied, with the reduction of that name."""
    inputs = keras.Input((width,))
    trunks = [trunk(width) for _ in range(TASKS)]
    model = keras.Model(inputs, [keras.layers.Dense(1)(each(inputs)) for each in trunks])
    registry = equalize.GroupRegistry()
    registry.tie("trunk", trunks, Equal())
    optimizer = TiedOptimizer(keras.optimizers.SGD(1e-4), registry, reduction=REDUCTIONS[name])
    model.compile(optimizer, ["mse"] * TASKS, jit_compile=keras.backend.backend() == "jax")
    x, y = data(width)
    return lambda: model.train_on_batch(x, y)


def by_hand(width: int) -> timing.Step:
    """A step of one trunk, with PCGrad as people write it."""
    inputs, shared = keras.Input((width,)), trunk(width)
    model = keras.Model(inputs, [keras.layers.Dense(1)(shared(inputs)) for _ in range(TASKS)])
    optimizer = keras.optimizers.SGD(1e-4)
    optimizer.build(model.trainable_variables)
    x, y = data(width)
    count = len(shared.trainable_variables)

    def projected(gradients: Sequence[Sequence[Any]]) -> list[Any]:
        def inner(left: Sequence[Any], right: Sequence[Any]) -> Any:
            return sum(ops.sum(a * b) for a, b in zip(left[:count], right[:count], strict=True))

        total: list[Any] = []
        for i, own in enumerate(gradients):
            left = list(own)
            for j in np.random.default_rng(0).permutation(TASKS):
                if j != i:
                    other = gradients[j]
                    lost = ops.minimum(inner(left, other), 0.0) / inner(other, other)
                    left[:count] = [a - lost * b for a, b in zip(left[:count], other[:count], strict=True)]
            total = left if not total else [a + b for a, b in zip(total, left, strict=True)]
        return total

    return _STEPS[keras.backend.backend()](model, optimizer, x, y, projected)


def _on_tensorflow(model: Any, optimizer: Any, x: np.ndarray, y: Sequence[np.ndarray], projected: Any) -> timing.Step:
    import tensorflow as tf

    variables = model.trainable_variables
    values = [variable.value for variable in variables]

    @tf.function(autograph=False)
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape(persistent=True) as tape:
            losses = [tf.reduce_mean((a - b) ** 2) for a, b in zip(model(x, training=True), y, strict=True)]
        found = [tape.gradient(loss, values) for loss in losses]
        given = [
            [tf.zeros(v.shape) if g is None else g for g, v in zip(each, variables, strict=True)] for each in found
        ]
        optimizer.apply(projected(given), variables)

    return lambda: step(x, y)


def _on_jax(model: Any, optimizer: Any, x: np.ndarray, y: Sequence[np.ndarray], projected: Any) -> timing.Step:
    import jax

    def losses(values: Any, x: Any, y: Any) -> list[Any]:
        outputs, _ = model.stateless_call(values, [], x, training=True)
        return [ops.mean((a - b) ** 2) for a, b in zip(outputs, y, strict=True)]

    @jax.jit
    def step(values: Any, slots: Any, x: Any, y: Any) -> Any:
        given = [jax.grad(lambda v, i=i: losses(v, x, y)[i])(values) for i in range(TASKS)]
        return optimizer.stateless_apply(slots, projected(given), values)

    state = [[v.value for v in model.trainable_variables], [v.value for v in optimizer.variables]]

    def run() -> None:
        state[:] = jax.block_until_ready(step(*state, x, y))

    return run


def _on_torch(model: Any, optimizer: Any, x: np.ndarray, y: Sequence[np.ndarray], projected: Any) -> timing.Step:
    import torch

    values = [variable.value for variable in model.trainable_variables]
    x, y = torch.from_numpy(x), [torch.from_numpy(target) for target in y]

    def step() -> None:
        losses = [torch.mean((a - b) ** 2) for a, b in zip(model(x, training=True), y, strict=True)]
        keep = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        given = [torch.autograd.grad(loss, values, **keep) for loss in losses]
        with torch.no_grad():
            optimizer.apply(projected(given), model.trainable_variables)

    return step


_STEPS = {"tensorflow": _on_tensorflow, "jax": _on_jax, "torch": _on_torch}


class Reductions(Task):
    """Time of a step with a reduction."""

    title = "Gradients that conflict: step time"
    main = False
    size = (7.5, 3.0)

    def cases(self, options: Options) -> Sequence[Case]:
        return [{"width": width} for width in options.choose((8,), (1024,), (256, 1024))]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        makers = {name: lambda name=name: tied(name, case["width"]) for name in REDUCTIONS}
        makers["hand_written"] = lambda: by_hand(case["width"])
        yield from timing.interleave(makers, options.choose(2, 7, 21), options.choose(1, 2, 3), options.generator())

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for width in distinct(records, "width"):
            found = timing.ratios(where(records, width=width))
            for name in ("PCGrad", "MGDA", "UPGrad", "hand_written"):
                goal = GOAL if name == "PCGrad" and width == 1024 else None
                lines.append(timing.goal_row(LABELS[name], found[name], goal, f"width {width}"))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        widths = distinct(records, "width")
        for width, axes in zip(widths, figure.subplots(1, len(widths), squeeze=False)[0], strict=True):
            found = timing.ratios(where(records, width=width))
            names = ["hand_written", "UPGrad", "MGDA", "PCGrad"]
            for place, name in enumerate(names):
                lower, middle, upper = found[name]
                axes.plot([lower, upper], [place] * 2, color=("#999999" if place == 0 else "#1f77b4"), linewidth=2)
                axes.plot(middle, place, "o", color=("#999999" if place == 0 else "#1f77b4"))
                axes.annotate(
                    f"{middle:.2f}", (upper, place), (5, 0), textcoords="offset points", va="center", fontsize=8
                )
            axes.axvline(1.0, color="#999999", linewidth=0.8)
            axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
            axes.set(xlabel=f"step time / sum (median, quartiles), width {width}")
            axes.margins(x=0.2, y=0.2)
