"""Timing in interleaved rounds: each round runs every way once, so that what slows the machine slows all of them.

A ratio is taken within a round, and what is reported is the median of the rounds' ratios with its quartiles: on a
shared machine single times vary by tens of per cent, the median of their ratios by a few.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from benchmarks import colors, ways
from benchmarks.task import Record, Row

Step = Callable[[], None]

CONTROL = "untied_again"
"""The untied step, timed a second time in each round. On a machine without noise its ratio would be 1."""


def training_step(
    build: Callable[[ways.Way], tuple[keras.Model, ways.Groups]], name: str, x: Any, y: Any, factor: float
) -> Step:
    """One training step, as `fit` does it, of a model that `build` makes and that is tied in the way of that name."""
    way = ways.WAYS[name]
    model, groups = build(way)
    callbacks = way.attach(groups, factor)
    model.compile(keras.optimizers.Adam(1e-4), "mse", jit_compile=False)
    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)

    def step() -> None:
        model.train_on_batch(x, y)
        for callback in callbacks:
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
        generator: Draws the order of the ways anew in each round.
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
    """For each way the quartiles (lower, median, upper) of its rounds' ratios to the way `to`."""
    rounds = [record["step_seconds"] for record in records if "step_seconds" in record]
    names = [CONTROL, *(record["way"] for record in records if "way" in record and record["way"] != to)]
    return {name: quartiles([seconds[name] / seconds[to] for seconds in rounds]) for name in names}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def label(name: str) -> str:
    """What tables and pictures call a way or the control."""
    return "untied again (noise)" if name == CONTROL else ways.WAYS[name].label


def rows(prefix: str, records: Sequence[Record], goals: Mapping[str, float]) -> list[Row]:
    """The lines of the table for one set of rounds, with the ratios to reach."""
    base = [record["step_seconds"]["untied"] for record in records if "step_seconds" in record]
    lines = [Row(f"{prefix}untied", f"{1000 * quartiles(base)[1]:.1f} ms")]
    for name, (lower, median, upper) in ratios(records).items():
        goal = goals.get(name)
        measured = f"{median:.2f} [{lower:.2f}, {upper:.2f}]"
        if goal is None:
            lines.append(Row(prefix + label(name), measured))
        else:
            lines.append(Row(prefix + label(name), measured, f"<= {goal}", median <= goal))
    return lines


def draw(axes: Any, parts: Mapping[str, tuple[Sequence[Record], Mapping[str, float]]]) -> None:
    """Draws the ratios of one or more sets of rounds with their quartiles, and a bar where each goal is."""
    measured = {part: ratios(records) for part, (records, _) in parts.items()}
    names = list(dict.fromkeys(name for of in measured.values() for name in of))
    for index, (part, of) in enumerate(measured.items()):
        shift = 0.36 * (index - (len(parts) - 1) / 2)
        for place, (name, (lower, median, upper)) in enumerate((name, of[name]) for name in reversed(names)):
            color = colors.OF[name]
            axes.plot([lower, upper], [place - shift] * 2, color=color, linewidth=1.5)
            axes.plot(median, place - shift, "os"[index], color=color, markersize=5)
            goal = parts[part][1].get(name)
            if goal is not None:
                axes.plot(goal, place - shift, "|", color="black", markersize=11)
            place_of_text = max(upper, goal or 0.0), place - shift
            axes.annotate(f"{median:.2f}", place_of_text, (5, 0), textcoords="offset points", va="center", fontsize=7)
        axes.plot([], [], "os"[index], color="#666666", label=part)
    axes.plot([], [], "|", color="black", markersize=11, label="goal")
    axes.axvline(1.0, color="#999999", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), [label(name) for name in reversed(names)])
    axes.set(xscale="log", xlabel="step time / untied step time (median and quartiles)")
    low, high = axes.get_xlim()
    ticks = (0.4, 0.6, 1, 1.5, 2, 3, 4, 6, 8) if high > 1.5 * low else (0.8, 0.9, 1, 1.1, 1.2, 1.3)
    ticks = [tick for tick in ticks if low < tick < high]
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.margins(x=0.15)
    axes.set_ylim(-0.5, len(names) - 0.5)
    axes.legend(frameon=False)
