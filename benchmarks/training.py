"""A compiled model that trains from one start after another: retracing it each time would take longer."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from benchmarks import ways

Build = Callable[[ways.Way], tuple[keras.Model, ways.Groups]]
"""Makes a model, and says which parts are tied."""

STRETCH = 16
"""Steps that run in TensorFlow without a return to Python. A way that has callbacks returns after each."""


class Trainer:
    """Trains one model, tied in one way, from the random weights of any seed.

    Args:
        build: Makes the model.
        case: The name of the way, and its strength.
        optimizer: Makes the optimizer.
        loss: What Keras's `compile` takes.
    """

    def __init__(self, build: Build, case: dict[str, Any], optimizer: Callable[[], Any], loss: Any):
        self._build = build
        self._way = ways.WAYS[case["way"]]
        self._strength = case["strength"]
        self._optimizer = optimizer
        self.model, self.groups, tied = self._tied()
        self._callbacks = list(tied.callbacks)
        compiled = keras.backend.backend() == "jax"
        stretch = STRETCH if keras.backend.backend() == "tensorflow" and not self._callbacks else 1
        self.model.compile(tied.optimizer, loss, jit_compile=compiled, steps_per_execution=stretch)
        tied.optimizer.build(self.model.trainable_variables)
        self._slots = [ops.convert_to_numpy(variable).copy() for variable in tied.optimizer.variables]

    def _tied(self) -> tuple[keras.Model, ways.Groups, ways.Tied]:
        model, groups = self._build(self._way)
        return model, groups, self._way.attach(groups, self._strength, self._optimizer())

    def fit(self, seed: int, x: Any, y: np.ndarray, *, batch: int, steps: int) -> keras.Model:
        """Trains from the weights, tied, that the seed gives, for whole epochs in a new order each. Returns the model.

        Args:
            seed: Gives the weights and the order of the samples.
            x: The model's input, or a tuple of them.
            y: What it is to answer.
            batch: Samples in a step.
            steps: How many steps.
        """
        keras.utils.set_random_seed(seed)
        start, *_ = self._tied()
        self.model.set_weights(start.get_weights())
        for variable, value in zip(self.model.optimizer.variables, self._slots, strict=True):
            variable.assign(value)
        generator = np.random.default_rng(seed)
        epochs = -(-steps * batch // len(y))
        order = np.concatenate([generator.permutation(len(y)) for _ in range(epochs)])[: steps * batch]
        x = tuple(part[order] for part in x) if isinstance(x, tuple) else x[order]
        self.model.fit(x, y[order], batch_size=batch, shuffle=False, verbose=0, callbacks=self._callbacks)
        return self.model

    def free_weights(self) -> int:
        """How many numbers are trained; those of the members of a hard group count once."""
        return ways.free_weights(self.model, self.groups, self._way)
