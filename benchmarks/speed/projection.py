"""How long the hard projection itself takes, beside the time to read the members once.

n kernels that differ, each in a buffer of its own, as an optimizer's step leaves them; then one projection, or one sum
of each kernel's entries, which reads them all and writes nothing. A mean of the members has to read each of them, and
so cannot be quicker than what reading takes where memory is the limit. The stacked mean that people write stands
beside it. With TensorFlow each runs as one compiled graph, with the other backends eagerly.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

import equalize
from benchmarks import colors, curves, timing
from benchmarks.task import Case, Options, Record, Row, Task, where

GOALS = {("tensorflow", "hard", 16, 1024): 1.5}
LABELS = {"read": "reading the members once", "hard": "hard: Equal", "stack": "hand-written: stacked mean, once"}
COLORS = {"read": colors.BLACK, "hard": colors.VERMILLION, "stack": colors.PINK}


def functions(variables: Sequence[keras.Variable]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    registry = equalize.GroupRegistry()
    registry.tie("kernels", list(variables), equalize.constraints.Equal())

    def read() -> Any:
        return [ops.sum(variable.value) for variable in variables]

    def stack() -> None:
        mean = ops.mean(ops.stack([variable.value for variable in variables]), axis=0)
        for variable in variables:
            variable.assign(mean)

    found = {"read": read, "hard": registry.project, "stack": stack}
    if keras.backend.backend() != "tensorflow":
        return found
    import tensorflow as tf

    return {name: tf.function(function, autograph=False) for name, function in found.items()}


def seconds(function: Callable[[], Any], variables: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> float:
    """How long a function takes after each variable was written."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    wait([variable.value for variable in variables])
    started = time.perf_counter()
    result = function()
    wait([result, [variable.value for variable in variables]])
    return time.perf_counter() - started


def wait(values: Any) -> None:
    """Until the values are there: JAX returns before they are."""
    if keras.backend.backend() == "jax":
        import jax

        jax.block_until_ready(values)


class Projection(Task):
    """Time of one hard projection."""

    title = "Hard projection: time beside that of reading"
    size = (9.5, 4.2)

    def cases(self, options: Options) -> Sequence[Case]:
        full = [(n, 1024) for n in (2, 4, 8, 16, 32)] + [(16, width) for width in (64, 128, 256, 512, 2048)]
        shapes = options.choose([(2, 64)], [(2, 1024), (4, 1024), (8, 1024), (16, 1024)], full)
        return [{"count": n, "width": width} for n, width in shapes]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        generator = options.generator()
        shape = (case["count"], case["width"], case["width"])
        values = list(generator.standard_normal(shape, dtype="float32"))
        variables = [keras.Variable(value) for value in values]
        timed = functions(variables)
        for function in timed.values():
            function()
        for round_ in range(options.choose(2, 15, 40)):
            found = {str(name): seconds(timed[name], variables, values) for name in generator.permutation(list(timed))}
            yield {"round": round_, "seconds": found}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for n, width in dict.fromkeys((record["count"], record["width"]) for record in records):
            rounds = [record["seconds"] for record in where(records, count=n, width=width)]
            heading = f"n = {n}, {width}×{width}"
            median = timing.quartiles([seconds["read"] for seconds in rounds])[1]
            lines.append(Row(LABELS["read"], f"{1000 * median:.2f} ms", heading=heading))
            for name in ("hard", "stack"):
                ratio = timing.quartiles([seconds[name] / seconds["read"] for seconds in rounds])
                goal = GOALS.get((keras.backend.backend(), name, n, width))
                lines.append(timing.goal_row(f"{LABELS[name]} / reading", ratio, goal, heading))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        widths = where(records, count=16)
        panels = [("count", where(records, width=1024) or records, "members n, of 1024×1024")]
        if len({record["width"] for record in widths}) > 1:
            panels.append(("width", widths, "width of 16 square kernels"))
        for axes, (key, part, what) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            sizes = sorted({record[key] for record in part})
            ends = []
            for name, text in LABELS.items():
                found = [timing.quartiles([1000 * r["seconds"][name] for r in where(part, **{key: s})]) for s in sizes]
                lower, median, upper = zip(*found, strict=True)
                style = "--" if name == "read" else "o-"
                axes.plot(sizes, median, style, color=COLORS[name], markersize=4)
                axes.fill_between(sizes, lower, upper, color=COLORS[name], alpha=0.15, linewidth=0)
                ends.append((sizes[-1], median[-1], text, COLORS[name]))
            axes.set(xscale="log", yscale="log", xlabel=what, ylabel="time (ms; median, quartiles)")
            axes.minorticks_off()
            axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axes.margins(x=0.05)
            axes.yaxis.set_major_formatter("{x:g}")
            curves.name_ends(axes, ends)
