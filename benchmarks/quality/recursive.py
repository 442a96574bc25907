"""Relaxed recursive transformers: tied blocks, each with a low-rank part of its own; loss against free weights.

Between blocks with weights of their own and blocks that all have one set of weights (`transformer`) lie those of Bae
et al., Relaxed recursive transformers: Effective parameter sharing with layer-wise LoRA (2024): each linear map of a
block is that of all blocks plus a product of two thin matrices, which only this block has. Here all are trained from
scratch on the text of `benchmarks.text`, the tied part as one variable (`TiedOptimizer`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks import colors, curves, ways
from benchmarks.comparing import Compared, Problem
from benchmarks.task import Case, Options, Record, Row, distinct, mean_and_error, plus_minus, where
from benchmarks.text import CONTEXT, HEADS, WIDTH, Embedding, problem

BLOCKS = 3


class LowRank(layers.Layer):
    """A linear map of low rank, which starts as zero."""

    def __init__(self, units: int, rank: int):
        super().__init__()
        self.units, self.rank = units, rank

    def build(self, shape: Sequence[int]) -> None:
        self.a = self.add_weight((shape[-1], self.rank), name="a")
        self.b = self.add_weight((self.rank, self.units), initializer="zeros", name="b")

    def call(self, x: Any) -> Any:
        return ops.matmul(ops.matmul(x, self.a.value), self.b.value)


class Linear(layers.Layer):
    """A dense layer that can be tied, plus a map of low rank that is the block's own."""

    def __init__(self, units: int, rank: int):
        super().__init__()
        self.tied = layers.Dense(units)
        self.own = LowRank(units, rank) if rank else None

    def build(self, shape: Sequence[int]) -> None:
        for part in filter(None, (self.tied, self.own)):
            part.build(shape)

    def call(self, x: Any) -> Any:
        return self.tied(x) if self.own is None else self.tied(x) + self.own(x)


class Block(layers.Layer):
    """One block: causal attention and two dense layers, each after a normalization and inside a residual connection."""

    def __init__(self, rank: int):
        super().__init__()
        self.norms = [layers.LayerNormalization() for _ in range(2)]
        self.query, self.key, self.read, self.merge = (Linear(WIDTH, rank) for _ in range(4))
        self.widen, self.narrow = Linear(2 * WIDTH, rank), Linear(WIDTH, rank)

    @property
    def tied(self) -> list[keras.Variable]:
        """The weights that blocks may have in common."""
        linear = (self.query, self.key, self.read, self.merge, self.widen, self.narrow)
        return [weight for part in (*self.norms, *(each.tied for each in linear)) for weight in part.weights]

    def build(self, shape: Sequence[int]) -> None:
        for part in (*self.norms, self.query, self.key, self.read, self.merge, self.widen):
            part.build(shape)
        self.narrow.build((*shape[:-1], 2 * WIDTH))

    def call(self, x: Any) -> Any:
        seen = self.norms[0](x)
        query, key, value = (
            ops.reshape(part(seen), (-1, CONTEXT, HEADS, WIDTH // HEADS)) for part in (self.query, self.key, self.read)
        )
        heads = ops.nn.dot_product_attention(query, key, value, is_causal=True, flash_attention=False)
        x = x + self.merge(ops.reshape(heads, (-1, CONTEXT, WIDTH)))
        return x + self.narrow(ops.relu(self.widen(self.norms[1](x))))


def build(characters: int, rank: int) -> keras.Model:
    """The transformer."""
    inputs = keras.Input((CONTEXT,), dtype="int32")
    x = Embedding(characters)(inputs)
    for _ in range(BLOCKS):
        x = Block(rank)(x)
    return keras.Model(inputs, layers.Dense(characters)(layers.LayerNormalization()(x)))


def members(model: keras.Model) -> ways.Groups:
    """The weights that blocks may have in common."""
    blocks = [layer.tied for layer in model.layers if isinstance(layer, Block)]
    return {f"blocks/{number}": list(weights) for number, weights in enumerate(zip(*blocks, strict=True))}


class Recursive(Compared):
    """Loss of a small transformer whose tied blocks have low-rank parts of their own."""

    title = "Tied transformer blocks with low-rank parts of their own: bits per character"
    main = False
    size = (7.5, 4.0)
    known: Mapping[str, ways.Way] = {name: ways.WAYS[name] for name in ("untied", "exact")}

    def splits(self, options: Options) -> int:
        return options.choose(1, 1, 8)

    def parts(self, options: Options) -> Sequence[Case]:
        return [{"rank": rank} for rank in options.choose((0, 2), (0, 4), (0, 1, 4))]

    def ways(self, options: Options, case: Case) -> Sequence[Any]:
        return ["exact"] if case["rank"] else ["untied", "exact"]

    def problem(self, options: Options, case: Case) -> Problem:
        return problem(
            options,
            case,
            lambda characters: build(characters, case["rank"]),
            members,
            batches=options.choose(4, 64, 10_000),
            epochs=options.choose(1, 1, 2),
        )

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for name, part in parts(records).items():
            bits = plus_minus([record["test"] for record in part], " bits", digits=3)
            lines.append(Row(f"{name}, {part[0]['free_weights']:,} weights", bits))
        bits = {name: np.array([record["test"] for record in part]) for name, part in parts(records).items()}
        for name in (list(bits)[-1], "untied"):
            lines.append(Row(f"{name} less tied", plus_minus(bits[name] - bits["tied"], " bits", digits=3, sign="+")))
        return [*lines, self.spread(records)]

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        axes = figure.subplots()
        for name, part in parts(records).items():
            color = colors.BLACK if part[0]["way"] == "untied" else colors.ORANGE
            mean, error = mean_and_error([record["test"] for record in part])
            weights = part[0]["free_weights"]
            axes.errorbar(weights, mean, error, color=color, marker="o", markersize=5, capsize=3)
            text = name.removeprefix("tied, own ")
            axes.annotate(
                text, (weights, mean + error), (0, 5), textcoords="offset points", ha="center", color=color, fontsize=8
            )
        axes.set(xlabel="weights to store, tied ones once (rank: of the parts that each block has of its own)")
        axes.set(ylabel="bits per character")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.margins(x=0.15, y=0.2)
        curves.explain(axes)


def parts(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each model, by what tables and pictures call it."""
    named = {}
    for rank in distinct(records, "rank"):
        for way in distinct(where(records, rank=rank), "way"):
            name = "untied" if way == "untied" else f"tied, own rank {rank}" if rank else "tied"
            named[name] = where(records, rank=rank, way=way)
    return named
