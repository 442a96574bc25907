"""What tying adds to a training step at every size: few large members, many tiny ones, many groups, all pairs.

Chains of `Dense` with tanh; batch 32, Adam. Ratios are to the untied step, in the way that the backend usually runs it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from benchmarks import timing, ways
from benchmarks.task import Case, Options, Record, Row, Task, distinct, where

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Groups of members of one size.

    Attributes:
        groups: How many groups.
        members: How many members each has.
        width: Inputs and units of the layers whose kernels are tied.
        biases: Whether biases are tied in place of kernels.
        ways: The ways to time.
        mode: The way to run a step, where it is not the usual one.
        goals: The ratios to the untied step to reach, on each backend.
        first: The ratios of the first step, with tracing and compiling, to the untied one to reach.
        shared: The ratio of the exact way to one shared variable to reach.
    """

    groups: int
    members: int
    width: int
    biases: bool = False
    ways: Sequence[str] = ("hard", "partial", "soft")
    mode: str = ""
    goals: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    first: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, float] = dataclasses.field(default_factory=dict)


BACKENDS = ("tensorflow", "jax", "torch")
PAIRS = ("PairwiseNorm", "PairwiseL1")

MODELS = {
    "16 kernels of 1024×1024": Sizes(
        1,
        16,
        1024,
        ways=("shared", "exact", "hard", "partial", "soft", "ChainL2", *PAIRS, "TraceNorm", "stacked_mean"),
        goals={
            "tensorflow": {"hard": 1.03, "partial": 1.15, "soft": 1.15, "ChainL2": 1.15},
            "jax": {
                "partial": 1.25,
                "soft": 1.25,
                "ChainL2": 1.25,
                "PairwiseNorm": 2.0,
                "PairwiseL1": 2.0,
                "TraceNorm": 2.0,
            },
            "torch": {"hard": 1.12, "partial": 1.25, "soft": 1.15, "PairwiseNorm": 1.8},
        },
        shared={"tensorflow": 1.02, "torch": 1.25},
    ),
    "4 kernels of 1024×1024": Sizes(1, 4, 1024, ways=("shared", "exact"), shared={"torch": 1.15}),
    "32 kernels of 512×512": Sizes(
        1,
        32,
        512,
        ways=(*PAIRS, "all_pairs"),
        goals={key: dict.fromkeys(PAIRS, 2.5) for key in BACKENDS},
    ),
    "200 biases of 8": Sizes(
        1,
        200,
        8,
        biases=True,
        goals={"torch": {"hard": 1.3, "soft": 1.3}},
        first={"jax": {"partial": 1.5, "soft": 1.5}, "torch": {"soft": 2.0}},
    ),
    "40 groups of ten kernels of 16×16": Sizes(
        40,
        10,
        16,
        ways=("hard", "partial", "soft", "stacked_mean"),
        goals={key: {"hard": 1.10, "partial": 1.15, "soft": 1.25} for key in BACKENDS},
    ),
    "200 groups of ten kernels of 4×4": Sizes(200, 10, 4, ways=("hard",), first={"tensorflow": {"hard": 1.3}}),
    "65 kernels of 16×16, eager": Sizes(
        1, 65, 16, ways=("hard", "soft"), mode="eager", goals={"tensorflow": {"hard": 1.5, "soft": 1.5}}
    ),
}
SMOKE = {"2 groups of three kernels of 4×4": Sizes(2, 3, 4, ways=("shared", "exact", "hard", "soft"))}
QUICK = {"4 groups of ten kernels of 16×16": Sizes(4, 10, 16, ways=("hard", "soft"))}
ALL = {**SMOKE, **QUICK, **MODELS}


class Chain(keras.Model):
    """Layers one after the other, as many as one likes."""

    def __init__(self, layers: Sequence[keras.layers.Layer]):
        super().__init__()
        self.chain = list(layers)

    def build(self, input_shape: Any) -> None:
        for layer in self.chain:
            layer.build(input_shape)

    def call(self, x: Any) -> Any:
        for layer in self.chain:
            x = layer(x)
        return x


def build(sizes: Sizes) -> tuple[keras.Model, ways.Groups]:
    """A chain of all layers, and what to tie."""
    dense = functools.partial(keras.layers.Dense, sizes.width, activation="tanh", use_bias=sizes.biases)
    groups = {f"group_{i}": [dense() for _ in range(sizes.members)] for i in range(sizes.groups)}
    model = Chain(list(itertools.chain.from_iterable(groups.values())))
    model.build((None, sizes.width))
    if sizes.biases:
        return model, {name: [layer.bias for layer in layers] for name, layers in groups.items()}
    return model, groups


def firsts(records: Sequence[Record]) -> dict[str, float]:
    """For each way the ratio of its first step to the untied one."""
    seconds = {record["way"]: record["first_step_seconds"] for record in records if "first_step_seconds" in record}
    return {way: first / seconds["untied"] for way, first in seconds.items() if way != "untied"}


class EverySize(Task):
    """Step times at every size."""

    title = "Members of every size: step time"
    size = (9.0, 9.0)

    def cases(self, options: Options) -> Sequence[Case]:
        usual, *_ = timing.modes(options)
        chosen = options.choose(SMOKE, QUICK, MODELS)
        eager_is_usual = keras.backend.backend() != "tensorflow"
        return [
            {"model": name, "mode": sizes.mode or usual}
            for name, sizes in chosen.items()
            if not (sizes.mode and eager_is_usual)
        ]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        sizes, generator = ALL[case["model"]], options.generator()
        x, y = generator.standard_normal((2, BATCH, sizes.width)).astype("float32")
        chain = functools.partial(build, sizes)
        names = ("untied", *sizes.ways)
        makers = {name: functools.partial(timing.training_step, chain, name, x, y, case["mode"]) for name in names}
        return timing.interleave(makers, options.choose(2, 20, 12), 3 if sizes.width < 512 else 1, generator)

    def rows(self, records: Sequence[Record]) -> list[Row]:
        backend, lines = keras.backend.backend(), []
        for name in distinct(records, "model"):
            part, sizes = where(records, model=name), ALL[name]
            lines += timing.rows(name, part, sizes.goals.get(backend, {}))
            if {"exact", "shared"} <= set(sizes.ways):
                exact = timing.ratios(part, "shared")["exact"]
                lines.append(timing.goal_row("exact / one shared variable", exact, sizes.shared.get(backend), name))
            for way, goal in sizes.first.get(backend, {}).items():
                first = firsts(part)[way]
                what = f"first step, {timing.label(way)}"
                lines.append(Row(what, f"{first:.2f}", f"<= {goal:.2f}", first <= goal, name))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        names, backend = distinct(records, "model"), keras.backend.backend()
        rows = (len(names) + 1) // 2
        panels = figure.subplots(rows, min(len(names), 2), squeeze=False).flat
        for name in names:
            axes = next(panels)
            timing.draw(axes, where(records, model=name), ALL[name].goals.get(backend, {}))
            axes.set_title(name)
        for axes in panels:
            axes.set_axis_off()
