"""A small transformer that reads text: the next character of Python's own language reference.

Half a million characters that ship with Python (`pydoc_data.topics`). The text is cut into pieces: each split trains on
a random nine tenths of them, and is tested on a tenth.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pydoc_data.topics import topics
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks import ways
from benchmarks.comparing import Problem, stretch
from benchmarks.task import Case, Options

WIDTH, HEADS = 32, 2
CONTEXT, BATCH, PIECE = 32, 16, 1024

Part = tuple[np.ndarray, np.ndarray]


@functools.cache
def load(options: Options, split: int) -> tuple[Part, Part, int]:
    """Windows of characters and the next ones, to train on, and to test on; how many characters there are."""
    text = "\n".join(topics[name] for name in sorted(topics))
    characters = {character: number for number, character in enumerate(sorted(set(text)))}
    codes = np.array([characters[character] for character in text], "int32")
    pieces = codes[: len(codes) // PIECE * PIECE].reshape(-1, PIECE)
    pieces = options.generator(split).permutation(pieces)
    tenth = len(pieces) // 10
    windows = pieces[:, : PIECE // (CONTEXT + 1) * (CONTEXT + 1)].reshape(len(pieces), -1, CONTEXT + 1)
    test, train = (part.reshape(-1, CONTEXT + 1) for part in (windows[:tenth], windows[tenth:]))
    return (train[:, :-1], train[:, 1:]), (test[:1000, :-1], test[:1000, 1:]), len(characters)


def in_order(seed: int, samples: int, count: int) -> np.ndarray:
    """Which samples to take one after the other: all of them in a random order, again and again, up to the count."""
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.permutation(samples) for _ in range(-(-count // samples))])[:count]


def problem(
    options: Options,
    case: Case,
    make_model: Callable[[int], keras.Model],
    members: Callable[[keras.Model], ways.Groups],
    *,
    batches: int,
    epochs: int,
) -> Problem:
    """What `equalize.compare` takes for a model of so many characters, trained on the first batches of a split."""
    train, test, characters = load(options, case["split"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def compile_(model: keras.Model) -> None:
        model.compile(keras.optimizers.Adam(5e-3), loss, **stretch(16))

    x, y = (side[: BATCH * batches] for side in train)
    settings: Mapping[str, Any] = {
        "make_model": functools.partial(make_model, characters),
        "members": members,
        "x": x,
        "y": y,
        "validation_data": test,
        "compile": compile_,
        "fit": {"batch_size": BATCH, "epochs": epochs},
    }
    return Problem(settings, scale=1 / float(np.log(2)))


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


def build(characters: int, blocks: int) -> keras.Model:
    """The transformer."""
    inputs = keras.Input((CONTEXT,), dtype="int32")
    x = Embedding(characters)(inputs)
    for _ in range(blocks):
        x = Block()(x)
    return keras.Model(inputs, layers.Dense(characters)(layers.LayerNormalization()(x)))


def loss(model: keras.Model, part: Part) -> float:
    """Cross-entropy of the next character, in bits."""
    x, y = part
    logits = ops.concatenate([model(ops.convert_to_tensor(batch)) for batch in np.array_split(x, 4)])
    nats = keras.losses.sparse_categorical_crossentropy(ops.convert_to_tensor(y), logits, from_logits=True)
    return float(ops.convert_to_numpy(ops.mean(nats))) / float(np.log(2))
