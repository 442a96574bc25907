"""What tying adds to a training step of a chain of large layers.

A chain of n `Dense(width, use_bias=False)` with tanh, all kernels in one group; batch 32, Adam. Ratios are to the
untied step, which an Adam update of all n kernels dominates. `TiedOptimizer` is also set beside the one shared variable
whose numbers it gives.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from benchmarks import timing, ways
from benchmarks.task import Case, Options, Record, Row, Task, where

BATCH = 32

# The ratios to the untied step to reach, for each length, at width 1024 in graph mode.
GOALS = {
    ("hard", 4): 1.06,
    ("hard", 16): 1.08,
    ("soft", 4): 1.22,
    ("soft", 16): 1.22,
    ("PairwiseL2", 4): 1.22,
    ("PairwiseL2", 16): 1.22,
    ("ChainL2", 4): 1.3,
    ("ChainL2", 16): 1.3,
    ("PairwiseNorm", 4): 1.6,
    ("PairwiseL1", 4): 1.6,
    ("TraceNorm", 16): 2.0,
}

# The ratio of the exact way to the shared variable to reach, for each mode, at width 1024.
EXACT_GOALS = {"graph": 1.05, "xla": 1.2}


def shapes(options: Options, usual: bool) -> list[tuple[int, int]]:
    """Lengths and widths of the chains: a single one in a mode that is not the usual, since XLA compiles for long."""
    full = [(n, 1024) for n in (2, 4, 8, 16, 32)] + [(4, width) for width in (64, 256, 2048)]
    return options.choose([(2, 64)], [(4, 1024), (16, 1024)], full if usual else [(4, 1024)])


def names(options: Options) -> list[str]:
    """The ways to time."""
    return [name for name, way in ways.WAYS.items() if way.in_run(options)]


def build(length: int, width: int) -> tuple[keras.Model, ways.Groups]:
    """The chain, and its layers to tie."""
    layers = [keras.layers.Dense(width, activation="tanh", use_bias=False) for _ in range(length)]
    return keras.Sequential([keras.Input((width,)), *layers]), {"chain": layers}


def goals(case: Case) -> dict[str, float]:
    """The ratios to reach for one chain."""
    if (case["mode"], case["width"]) != ("graph", 1024):
        return {}
    return {way: goal for (way, n), goal in GOALS.items() if n == case["length"]}


def by_case(records: Sequence[Record]) -> list[tuple[Case, list[Record]]]:
    """The records of each chain."""
    keys = ("length", "width", "mode")
    cases = [
        dict(zip(keys, case, strict=True)) for case in dict.fromkeys(tuple(r[key] for key in keys) for r in records)
    ]
    return [(case, where(records, **case)) for case in cases]


class Chain(Task):
    """Step times of chains of large layers."""

    title = "Chain of n Dense layers: step time"
    size = (10.0, 4.5)

    def cases(self, options: Options) -> Sequence[Case]:
        usual, *others = timing.modes(options)
        return [
            {"length": n, "width": width, "mode": mode}
            for mode in (usual, *others)
            for n, width in shapes(options, mode == usual)
        ]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        length, width, mode = case["length"], case["width"], case["mode"]
        rounds = options.choose(2, 12 if length <= 4 else 6, 20 if length <= 8 else 10)
        generator = options.generator()
        x, y = generator.standard_normal((2, BATCH, width)).astype("float32")
        chain = functools.partial(build, length, width)
        makers = {name: functools.partial(timing.training_step, chain, name, x, y, mode) for name in names(options)}
        return timing.interleave(makers, rounds, 1 if width >= 512 else 10, generator)

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for case, part in by_case(records):
            heading = f"n = {case['length']}, width {case['width']}, {case['mode']}"
            lines += timing.rows(heading, part, goals(case))
            exact = timing.ratios(part, "shared")["exact"]
            goal = EXACT_GOALS.get(case["mode"]) if case["width"] == 1024 and case["length"] in (4, 16) else None
            lines.append(timing.goal_row("exact / one shared variable", exact, goal, heading))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        mode = records[0]["mode"]
        chains = [(case, part) for case, part in by_case(records) if case["mode"] == mode]
        lengths = {case["length"]: part for case, part in chains if case["width"] == 1024}
        widths = {case["width"]: part for case, part in chains if case["length"] == 4}
        if min(len(lengths), len(widths)) > 2:
            shown = [name for name in timing.ratios(records) if name != "PairwiseL2"]
            for axes, over, what in zip(figure.subplots(1, 2), (lengths, widths), ("layers n", "width"), strict=True):
                timing.draw_over(axes, over, shown)
                rest = "width 1024" if over is lengths else "n = 4"
                axes.set(xlabel=f"{what} ({rest}, {mode})")
            return
        panels = figure.subplots(1, len(chains), sharey=True, squeeze=False)[0]
        for axes, (case, part) in zip(panels, chains, strict=True):
            timing.draw(axes, part, goals(case))
            axes.set_title(f"n = {case['length']}, width {case['width']}, {mode}")
