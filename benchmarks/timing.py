"""Timing in interleaved rounds: each round runs every way once, so that what slows the machine slows all of them.

A ratio is taken within a round, and what is reported is the median of the rounds' ratios with its quartiles: on a
shared machine single times vary by tens of per cent, the median of their ratios by a few.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from benchmarks import curves, ways
from benchmarks.task import Options, Record, Row, distinct

Step = Callable[[], None]

Build = Callable[[], tuple[keras.Model, ways.Groups]]
"""Makes a model, and says which parts are tied."""

CONTROL = "untied_again"
"""The untied step, timed a second time in each round. On a machine without noise its ratio would be 1."""


def modes(options: Options) -> tuple[str, ...]:
    """How the backend can run a step; a quick run takes only the way it usually does."""
    of_backend = {"tensorflow": ("graph", "xla"), "jax": ("xla",), "torch": ("eager",)}[keras.backend.backend()]
    return options.choose(of_backend[:1], of_backend[:1], of_backend)


def training_step(build: Build, name: str, x: Any, y: Any, mode: str) -> Step:
    """One training step, as `fit` does it, of a model that `build` makes and that is tied in the way of that name."""
    way = ways.WAYS[name]
    model, groups = build()
    tied = way.attach(groups, ways.strength(way), keras.optimizers.Adam(1e-4))
    how = {"run_eagerly": True} if mode == "eager" else {"jit_compile": mode == "xla"}
    model.compile(tied.optimizer, "mse", **how)
    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    for callback in tied.callbacks:
        callback.set_model(model)

    def step() -> None:
        model.train_on_batch(x, y)
        for callback in tied.callbacks:
            callback.on_train_batch_end(0)

    return step


def interleave(
    make_steps: Mapping[str, Callable[[], Step]], rounds: int, steps: int, generator: np.random.Generator
) -> Iterator[Record]:
    """Times steps in rounds. Yields one record for each way's first step, with its tracing, and one for each round.

    Args:
        make_steps: For each way, what makes its training step; "untied" is among them.
        rounds: How many rounds to time.
        steps: How many steps of a way to time at a stretch within a round.
        generator: Draws a new order of the ways for each round.
    """
    made = {}
    for name, make_step in make_steps.items():
        started = time.perf_counter()
        made[name] = make_step()
        made[name]()
        yield {"way": name, "first_step_seconds": time.perf_counter() - started}
        made[name]()
    made[CONTROL] = made["untied"]
    for round_ in range(rounds):
        seconds = {}
        for name in generator.permutation(list(made)):
            started = time.perf_counter()
            for _ in range(steps):
                made[name]()
            seconds[str(name)] = (time.perf_counter() - started) / steps
        yield {"round": round_, "step_seconds": seconds}


def ratios(records: Sequence[Record], to: str = "untied") -> dict[str, tuple[float, float, float]]:
    """For each way the quartiles (lower, median, upper) of its rounds' ratios to the way `to`, and the control's."""
    rounds = [record["step_seconds"] for record in records if "step_seconds" in record]
    names = [CONTROL, *(name for name in distinct(records, "way") if name != to)]
    return {name: quartiles([seconds[name] / seconds[to] for seconds in rounds]) for name in names}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def as_text(ratio: tuple[float, float, float]) -> str:
    """A ratio's median and, in brackets, its quartiles."""
    lower, median, upper = ratio
    return f"{median:.2f} [{lower:.2f}, {upper:.2f}]"


def label(name: str) -> str:
    """What tables and pictures call a way or the control."""
    return "untied again (noise)" if name == CONTROL else ways.WAYS[name].label


def color(name: str) -> str:
    """The colour of a way or the control."""
    return "#999999" if name == CONTROL else ways.WAYS[name].color


def marker(name: str) -> str:
    """The marker of a way or the control."""
    return "x" if name == CONTROL else ways.WAYS[name].marker


def ticks(axis: Any, candidates: Sequence[float]) -> None:
    """Labels a logarithmic axis at 1 and at those of the candidates that have room."""
    low, high = axis.get_view_interval()
    shown: list[float] = []
    for tick in (1.0, *candidates):
        if low < tick < high and all(abs(math.log(tick / other)) > 0.08 * math.log(high / low) for other in shown):
            shown.append(tick)
    axis.set_ticks(shown, [f"{tick:g}" for tick in shown])


def goal_row(what: str, ratio: tuple[float, float, float], goal: float | None, heading: str = "") -> Row:
    """The line of the table for a ratio, with the one to reach, where there is one."""
    reached = ("", None) if goal is None else (f"<= {goal:.2f}", round(ratio[1], 2) <= goal)
    return Row(what, as_text(ratio), *reached, heading)


def rows(heading: str, records: Sequence[Record], goals: Mapping[str, float]) -> list[Row]:
    """The lines of the table for one set of rounds, with the ratios to reach."""
    base = [record["step_seconds"]["untied"] for record in records if "step_seconds" in record]
    lines = [Row("untied", f"{1000 * quartiles(base)[1]:.1f} ms", heading=heading)]
    return lines + [goal_row(label(name), r, goals.get(name), heading) for name, r in ratios(records).items()]


def draw(axes: Any, records: Sequence[Record], goals: Mapping[str, float]) -> None:
    """Draws the ratios of one set of rounds with their quartiles, and a bar where each goal is."""
    found = ratios(records)
    for place, name in enumerate(reversed(found)):
        lower, median, upper = found[name]
        axes.plot([lower, upper], [place] * 2, color=color(name), linewidth=2)
        axes.plot(median, place, marker(name), color=color(name), markersize=6)
        goal = goals.get(name)
        if goal is not None:
            axes.plot(goal, place, "|", color="black", markersize=13)
        right = max(upper, goal or 0.0)
        axes.annotate(f"{median:.2f}", (right, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    if any(name in goals for name in found):
        axes.plot([], [], "|", color="black", markersize=11, label="goal")
        axes.legend(frameon=False, loc="upper right")
    axes.axvline(1.0, color="#999999", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(found)), [label(name) for name in reversed(found)])
    axes.set(xscale="log", xlabel="step time / untied (median, quartiles)")
    axes.margins(x=0.15)
    axes.minorticks_off()
    ticks(axes.xaxis, (2, 3, 4, 6, 8, 0.3, 0.4, 0.6, 0.8, 1.5, 1.25, 0.9, 1.1, 1.2, 1.3))
    axes.set_ylim(-0.5, len(found) - 0.5)


def draw_over(axes: Any, over: Mapping[float, Sequence[Record]], names: Sequence[str]) -> None:
    """Draws the median ratios of ways over the size of a model, each named at its right end."""
    found = {size: ratios(records) for size, records in over.items()}
    sizes = sorted(found)
    ends = []
    for name in names:
        lower, median, upper = zip(*(found[size][name] for size in sizes), strict=True)
        axes.plot(sizes, median, f"{marker(name)}-", color=color(name), markersize=4)
        axes.fill_between(sizes, lower, upper, color=color(name), alpha=0.15, linewidth=0)
        ends.append((sizes[-1], median[-1], label(name), color(name)))
    axes.axhline(1.0, color="black", linewidth=0.8, zorder=0)
    axes.set(xscale="log", yscale="log", ylabel="step time / untied (median, quartiles)")
    axes.minorticks_off()
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    ticks(axes.yaxis, (0.3, 0.5, 0.7, 1.5, 2, 3, 5, 8, 13))
    curves.name_ends(axes, ends)
