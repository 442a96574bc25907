"""Cross-layer tying of a small transformer that reads text: bits per character against free weights, ALBERT's trade.

The next character of Python's own language reference (see `benchmarks.text`). Three blocks of causal attention and two
dense layers. Tied are all weights of the blocks, their attention only, or their dense layers only (Lan et al., ALBERT:
A lite BERT (2020), table 4). The yardstick is a model without training: the counts of three characters in a row,
smoothed by those of two and one (Jelinek and Mercer, Interpolated estimation of Markov source parameters (1980)).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

import equalize
from benchmarks import colors, curves, ways
from benchmarks.comparing import Compared, Problem
from benchmarks.task import Case, Options, Record, Row, plus_minus, where
from benchmarks.text import Block, Part, build, load, problem
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer

BLOCKS = 3


def _tie(registry: equalize.GroupRegistry, parts: Mapping[str, Sequence[keras.layers.Layer]]) -> Any:
    for name, layers in parts.items():
        registry.tie(name, layers, Equal())
    return lambda optimizer: TiedOptimizer(optimizer, registry)


def attention_only(model: keras.Model, registry: equalize.GroupRegistry, members: ways.Groups) -> Any:
    """Ties the attention of all blocks."""
    blocks = members["blocks"]
    return _tie(registry, {"attention": [b.attention for b in blocks], "norm": [b.first for b in blocks]})


def dense_only(model: keras.Model, registry: equalize.GroupRegistry, members: ways.Groups) -> Any:
    """Ties the dense layers of all blocks."""
    parts = {name: [getattr(block, name) for block in members["blocks"]] for name in ("second", "widen", "narrow")}
    return _tie(registry, parts)


def members(model: keras.Model) -> ways.Groups:
    """The blocks."""
    return {"blocks": [layer for layer in model.layers if isinstance(layer, Block)]}


def trigram_bits(train: Part, test: Part, characters: int) -> float:
    """Bits per character of three characters in a row, smoothed; counted within windows, as the transformer reads."""

    def windows(part: Part) -> np.ndarray:
        x, y = part
        return np.concatenate([x, y[:, -1:]], axis=1)

    seen, asked = windows(train), windows(test)
    likely = np.full((asked.shape[0], asked.shape[1] - 1), 1 / characters)
    for order in range(3):
        base = characters ** np.arange(order + 1)[::-1]
        grams = [sum(w[:, i : w.shape[1] - order + i] * base[i] for i in range(order + 1)) for w in (seen, asked)]
        counts = np.bincount(grams[0].ravel(), minlength=characters ** (order + 1))
        before = counts.reshape(-1, characters)
        total, kinds = before.sum(axis=1), (before > 0).sum(axis=1)
        context = grams[1] // characters
        # Witten and Bell's weight: as likely as a new character was after this context.
        weight = kinds[context] / np.maximum(total[context] + kinds[context], 1)
        weight = np.where(total[context] > 0, weight, 1.0)
        share = counts[grams[1]] / np.maximum(total[context], 1)
        if order == 0:  # the first character of a window is not asked for
            share, weight = share[:, 1:], weight[:, 1:]
        known = likely[:, -share.shape[1] :]
        known[:] = (1 - weight) * share + weight * known
    return float(-np.log2(likely).mean())


class Transformer(Compared):
    """Loss of a small transformer whose blocks are tied."""

    title = "Three transformer blocks on text: bits per character"
    size = (7.5, 4.5)
    known: Mapping[str, ways.Way] = {
        **{name: ways.WAYS[name] for name in ("untied", "shared", "exact", "hard")},
        "attention_only": ways.Way("exact: attention only", colors.ORANGE, tie=attention_only, marker="^", hard=True),
        "dense_only": ways.Way("exact: dense layers only", colors.ORANGE, tie=dense_only, marker="v", hard=True),
    }

    def splits(self, options: Options) -> int:
        return options.choose(1, 1, 8)

    def problem(self, options: Options, case: Case) -> Problem:
        return problem(
            options,
            case,
            lambda characters: build(characters, BLOCKS),
            members,
            batches=options.choose(4, 96, 10_000),
            epochs=options.choose(1, 1, 3),
        )

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for name in curves.measured(records):
            weights = where(records, way=name)[0]["free_weights"]
            bits = plus_minus(curves.chosen(records, name, least=True), " bits", digits=3)
            lines.append(Row(f"{self.known[name].label}, {weights:,} weights", bits))
        yardstick = plus_minus([record["trigrams"] for record in where(records, way="untied")], " bits", digits=3)
        lines.append(Row("three characters in a row, counted", yardstick))
        return [*lines, self.spread(records)]

    def measure(self, options: Options, case: Case) -> Any:
        train, test, characters = load(options, case["split"])
        bits = trigram_bits(train, test, characters)
        for record in super().measure(options, case):
            yield {**record, "trigrams": bits}

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        curves.trade(
            figure,
            [{"blocks": BLOCKS, **r} for r in records],
            "blocks",
            "bits per character",
            digits=2,
            known=self.known,
        )
