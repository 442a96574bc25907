"""Cross-layer tying of a small transformer that reads text: loss against free weights, ALBERT's trade.

The next character of Python's own language reference, half a million characters that ship with Python
(`pydoc_data.topics`). Three blocks of causal attention and two dense layers; tied, all blocks have the same
weights (Lan et al., ALBERT: A lite BERT (2020), section 3.1). The text is cut into pieces, and each split trains on
random four fifths of them, chooses the strength of each way on a tenth and is tested on a tenth.
"""

import functools
from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks import curves, ways
from benchmarks.task import Case, Options, Record, Row, Task, plus_minus, where
from benchmarks.training import Trainer

GRIDS = {"factor": (1e-4, 1e-3, 1e-2), "rate": (0.003, 0.03, 0.3)}
BLOCKS, WIDTH, HEADS = 3, 32, 2
CONTEXT, BATCH, PIECE = 32, 16, 1024

Part = tuple[np.ndarray, np.ndarray]


def splits(options: Options) -> int:
    """How many random splits of the text."""
    return options.choose(1, 2, 3)


def steps(options: Options) -> int:
    """How many steps to train for."""
    return options.choose(4, 80, 160)


@functools.cache
def load(options: Options, split: int) -> tuple[Part, Part, Part, int]:
    """Windows of characters and the next ones, to train on, to choose on, and to test on; how many characters."""
    text = "\n".join(topics[name] for name in sorted(topics))
    characters = {character: number for number, character in enumerate(sorted(set(text)))}
    codes = np.array([characters[character] for character in text], "int32")
    pieces = codes[: len(codes) // PIECE * PIECE].reshape(-1, PIECE)
    pieces = options.generator(split).permutation(pieces)
    tenth = len(pieces) // 10
    windows = pieces[:, : PIECE // (CONTEXT + 1) * (CONTEXT + 1)].reshape(len(pieces), -1, CONTEXT + 1)
    test, validation, train = (
        part.reshape(-1, CONTEXT + 1) for part in (windows[:tenth], windows[tenth : 2 * tenth], windows[2 * tenth :])
    )
    train, validation, test = ((part[:, :-1], part[:, 1:]) for part in (train, validation[:1000], test[:1000]))
    return train, validation, test, len(characters)


class Block(layers.Layer):
    """One block: causal attention and two dense layers, each after a normalization and around a detour."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.LayerNormalization(), layers.LayerNormalization()
        self.attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, flash_attention=False)
        self.widen, self.narrow = layers.Dense(2 * WIDTH, activation="relu"), layers.Dense(WIDTH)

    def build(self, shape: Sequence[int]) -> None:
        for part in (self.first, self.second, self.widen):
            part.build(shape)
        self.attention.build(shape, shape)
        self.narrow.build((*shape[:-1], 2 * WIDTH))

    def call(self, x: Any) -> Any:
        seen = self.first(x)
        x = x + self.attention(seen, seen, use_causal_mask=True)
        return x + self.narrow(self.widen(self.second(x)))


class Embedding(layers.Layer):
    """What a character is and where it stands."""

    def __init__(self, characters: int):
        super().__init__()
        self.characters, self.places = layers.Embedding(characters, WIDTH), layers.Embedding(CONTEXT, WIDTH)

    def call(self, x: Any) -> Any:
        return self.characters(x) + self.places(ops.arange(CONTEXT))


def build(characters: int, way: ways.Way) -> tuple[keras.Model, ways.Groups]:
    """The transformer; its blocks are tied."""
    inputs = keras.Input((CONTEXT,), dtype="int32")
    x = Embedding(characters)(inputs)
    blocks = way.layers(Block, BLOCKS)
    for block in blocks:
        x = block(x)
    return keras.Model(inputs, layers.Dense(characters)(layers.LayerNormalization()(x))), {"blocks": blocks}


def loss(model: keras.Model, part: Part) -> float:
    """Cross-entropy of the next character, in bits."""
    x, y = part
    logits = ops.concatenate([model(ops.convert_to_tensor(batch)) for batch in np.array_split(x, 4)])
    nats = keras.losses.sparse_categorical_crossentropy(ops.convert_to_tensor(y), logits, from_logits=True)
    return float(ops.mean(nats)) / float(np.log(2))


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
        trainer = Trainer(functools.partial(build, characters), case, lambda: keras.optimizers.Adam(5e-3), entropy)
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
