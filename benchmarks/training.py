"""A compiled model that trains from one start after another: retracing it each time would take longer."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from benchmarks import ways

Build = Callable[[ways.Way], tuple[keras.Model, ways.Groups]]
"""Makes a model, and says which parts are tied."""

STRETCH = 16
"""Steps that run in TensorFlow without a return to Python. A way whose callbacks act on batches returns after each."""


class Trainer:
    """Trains one model, tied in one way, from the random weights of any seed.

    Args:
        build: Makes the model.
        case: The name of the way, and its strength.
        optimizer: Makes the optimizer.
        loss: What Keras's `compile` takes.
        known: The ways by their names.

    Attributes:
        model: The model.
        groups: The parts of it that are tied.
        callbacks: What the way has `fit` call.
    """

    def __init__(
        self,
        build: Build,
        case: dict[str, Any],
        optimizer: Callable[[], Any],
        loss: Any,
        *,
        known: Mapping[str, ways.Way] = ways.WAYS,
    ):
        self._build = build
        self._way = known[case["way"]]
        self._strength = case["strength"]
        self._optimizer = optimizer
        self.model, self.groups, tied = self._tied()
        self.callbacks = list(tied.callbacks)
        compiled = keras.backend.backend() == "jax"
        alone = keras.backend.backend() == "tensorflow" and not any(map(_acts_on_batches, self.callbacks))
        stretch = STRETCH if alone else 1
        self.model.compile(tied.optimizer, loss, jit_compile=compiled, steps_per_execution=stretch)
        tied.optimizer.build(self.model.trainable_variables)
        self._slots = [(variable, ops.convert_to_numpy(variable).copy()) for variable in tied.optimizer.variables]

    def _tied(self) -> tuple[keras.Model, ways.Groups, ways.Tied]:
        model, groups = self._build(self._way)
        return model, groups, self._way.attach(groups, self._strength, self._optimizer())

    def fit(self, seed: int, x: Any, y: Any, *, batch: int, steps: int) -> keras.Model:
        """Trains from the weights, tied, that the seed gives, for whole epochs in a new order each. Returns the model.

        Args:
            seed: Gives the weights and the order of the samples.
            x: The model's input, or a tuple of them.
            y: What it is to answer, or a tuple of them.
            batch: Samples in a step.
            steps: How many steps.
        """
        keras.utils.set_random_seed(seed)
        start, *_ = self._tied()
        self.model.set_weights(start.get_weights())
        for variable, value in self._slots:
            variable.assign(value)
        samples = len(y[0]) if isinstance(y, tuple) else len(y)
        order = in_order(seed, samples, steps * batch)
        x, y = (tuple(p[order] for p in side) if isinstance(side, tuple) else side[order] for side in (x, y))
        self.model.fit(x, y, batch_size=batch, shuffle=False, verbose=0, callbacks=self.callbacks)
        return self.model

    def free_weights(self) -> int:
        """How many numbers are trained; those of the members of a hard group count once."""
        return ways.free_weights(self.model, self.groups, self._way)


def in_order(seed: int, samples: int, count: int) -> np.ndarray:
    """Which samples to take one after the other: all of them in a random order, again and again, up to the count."""
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.permutation(samples) for _ in range(-(-count // samples))])[:count]


def _acts_on_batches(callback: keras.callbacks.Callback) -> bool:
    methods = ("on_train_batch_begin", "on_train_batch_end")
    return any(getattr(type(callback), name) is not getattr(keras.callbacks.Callback, name) for name in methods)
