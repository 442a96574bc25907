"""Whether a variable can have been written since a moment: the one place that knows how each backend tells.

Keras calls the constraint of every variable of a group in one step, so the first call does the work and the others
should do none. Skipping is only right where the variable cannot have changed in between; what cannot be known counts
as changed. What `watch` returns keeps no variable and no graph alive.
"""

import weakref
from collections.abc import Callable
from typing import TypeAlias

import keras

from equalize.backend import read
from equalize.projections import Tensor

Watch: TypeAlias = Callable[[keras.Variable], Tensor | None]
"""Given the variable that is watched, returns its value if it is unwritten, else None."""

_READING_OPERATIONS = frozenset({"ReadVariableOp", "ResourceGather", "VariableShape"})


def _tensorflow(variable: keras.Variable, value: Tensor) -> Watch:
    """In a graph: nothing but reads has been added to the handle. Eagerly: the bits are the same."""
    import tensorflow as tf

    if not tf.inside_function():
        then = _bits(value)

        def eagerly(variable: keras.Variable) -> Tensor | None:
            now = None if tf.inside_function() else read(variable)
            return now if now is not None and bool(tf.reduce_all(tf.equal(_bits(now), then))) else None

        return eagerly
    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        return _unknown

    def writes(variable: keras.Variable) -> tuple[int, int]:
        handle = tf.compat.v1.get_default_graph().capture(variable.value.handle)
        return id(handle), sum(op.type not in _READING_OPERATIONS for op in handle.consumers())

    graph, name, then = weakref.ref(tf.compat.v1.get_default_graph()), value.name, writes(variable)

    def in_graph(variable: keras.Variable) -> Tensor | None:
        here = tf.compat.v1.get_default_graph()
        return here.get_tensor_by_name(name) if here is graph() and writes(variable) == then else None

    return in_graph


def _jax(variable: keras.Variable, value: Tensor) -> Watch:
    """Arrays and tracers never change: the same object is the same value."""
    then = weakref.ref(variable.value)
    return lambda variable: variable.value if variable.value is then() else None


def _torch(variable: keras.Variable, value: Tensor) -> Watch:
    """Every write in place counts up the tensor's version."""
    import torch

    if torch.compiler.is_compiling():
        return _unknown
    tensor, version = weakref.ref(variable.value), variable.value._version

    def versioned(variable: keras.Variable) -> Tensor | None:
        same = variable.value is tensor() and variable.value._version == version
        return read(variable) if same and not torch.compiler.is_compiling() else None

    return versioned


def _unknown(variable: keras.Variable) -> None:
    return None


def _bits(value: Tensor) -> Tensor:
    """The value as integers, so that 0.0 and -0.0 differ and a NaN equals itself."""
    import tensorflow as tf

    return tf.bitcast(value, {2: tf.uint16, 4: tf.uint32, 8: tf.uint64}[value.dtype.size])


watch: Callable[[keras.Variable, Tensor], Watch] = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[
    keras.backend.backend()
]
"""Watches a variable, which holds `value`, from now on."""
