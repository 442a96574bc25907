"""Cross-layer tying of a small transformer that reads text: loss against free weights, ALBERT's trade.

The next character of Python's own language reference (see `benchmarks.text`). Three blocks of causal attention and two
dense layers; tied, all blocks have the same weights (Lan et al., ALBERT: A lite BERT (2020), section 3.1). Each split
chooses the strength of each way on validation data.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from benchmarks import curves, ways
from benchmarks.task import Case, Options, Record, Row, Task, plus_minus, where
from benchmarks.text import BATCH, build, load, loss
from benchmarks.training import Trainer

GRIDS = {"factor": (1e-4, 1e-3, 1e-2), "rate": (0.003, 0.03, 0.3)}
BLOCKS = 3


def splits(options: Options) -> int:
    """How many random splits of the text."""
    return options.choose(1, 2, 3)


def steps(options: Options) -> int:
    """How many steps to train for."""
    return options.choose(4, 80, 160)


class Transformer(Task):
    """Loss of a small transformer whose blocks are tied."""

    title = "Three transformer blocks on text: bits a character"
    timed = False
    size = (7.5, 4.5)

    def cases(self, options: Options) -> Sequence[Case]:
        return ways.configurations(GRIDS, options)

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        characters = load(options, 0)[3]
        entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        trainer = Trainer(
            functools.partial(build, characters, BLOCKS), case, lambda: keras.optimizers.Adam(5e-3), entropy
        )
        for split in range(splits(options)):
            (x, y), validation, test, _ = load(options, split)
            seed = options.seed_of(split)
            model = trainer.fit(seed, x, y, batch=BATCH, steps=steps(options))
            yield {
                "split": split,
                "seed": seed,
                "validation": loss(model, validation),
                "test": loss(model, test),
                "free_weights": trainer.free_weights(),
                "spread": ways.spread(trainer.groups),
            }

    def rows(self, records: Sequence[Record]) -> list[Row]:
        lines = []
        for name in curves.measured(records):
            weights = where(records, way=name)[0]["free_weights"]
            results = plus_minus(curves.chosen(records, name, least=True), " bits", digits=3)
            lines.append(Row(f"{ways.WAYS[name].label}, {weights:,} weights", results))
        spread = max(record["spread"] for record in records if ways.WAYS[record["way"]].hard)
        lines.append(Row("spread of the hard ways", f"{spread:g}", "0", spread == 0.0))
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        curves.trade(
            figure, [{"blocks": BLOCKS, **record} for record in records], "blocks", "bits a character", digits=2
        )
