"""Every message that equalize raises, provoked and pinned: a module for what users do, and here what all of them need.

Each function below a `message` does what a user may do wrong. What it raises is pinned above it, wrapped at 100
columns. `tests/test_messages.py` compares, and finds places in equalize that raise and that none of them reaches.
"""

import copy
import textwrap
from typing import Any

import keras
import numpy as np
from keras import ops

import equalize
from equalize.constraints import Equal, GroupConstraint
from equalize.regularizers import GroupRegularizer
from tests.conftest import BACKEND

CASES = {}


def message(pinned, *, on=BACKEND):
    """Registers a provocation with the message that is expected of it; `on` names the backend that it takes."""

    def register(provoke):
        assert provoke.__name__ not in CASES
        CASES[provoke.__name__] = (provoke, textwrap.dedent(pinned).strip("\n"), on)
        return provoke

    return register


class OneForAll(GroupConstraint):
    """A custom rule that returns one tensor in the place of one a member."""

    def project(self, values):
        return [values[0][0], values[1]]


class OfUnlikeShapes(GroupConstraint):
    """A custom rule for a kernel and its bias."""

    same_shape = False

    def project(self, values):
        return values


class Nothing(GroupConstraint):
    """Another, which returns nothing."""

    def project(self, values) -> Any:
        return "nothing"


class Columns(GroupRegularizer):
    """A custom penalty for each column, in the place of one for all."""

    def penalty(self, values):
        return ops.sum(ops.square(values[0] - values[1]), axis=0)


def dense(*names, units=3, inputs=4, **arguments):
    """Built layers."""
    layers = [keras.layers.Dense(units, name=name, **arguments) for name in names]
    for layer in layers:
        layer.build((None, inputs))
    return layers


def kernels(*names, **arguments):
    return [layer.kernel for layer in dense(*names, **arguments)]


def variable(shape, name, dtype="float32", trainable=True, value=0.0):
    return keras.Variable(np.full(shape, value), name=name, dtype=dtype, trainable=trainable)


def tied(rule=None, **arguments):
    """A registry with a group of two kernels, and what holds them."""
    layers = dense("left", "right", **arguments)
    registry = equalize.GroupRegistry()
    registry.tie("pair", [layer.kernel for layer in layers], Equal() if rule is None else rule)
    return registry, layers


def model_of(*layers):
    inputs = keras.Input((4,), name="inputs")
    return keras.Model(inputs, [layer(inputs) for layer in layers], name="model")


def compiled(rule=None):
    layers = [keras.layers.Dense(3, name=name) for name in ("left", "right")]
    model = model_of(*layers)
    registry = equalize.GroupRegistry()
    registry.tie("pair", [layer.kernel for layer in layers], Equal() if rule is None else rule)
    model.compile("sgd", ["mse", "mse"])
    return registry, model


def damaged(change):
    registry, _layers = tied()
    config = copy.deepcopy(registry.get_config())
    changed = change(config)
    return equalize.GroupRegistry.from_config(config if changed is None else changed)


def refusing(value):
    raise RuntimeError("no")
