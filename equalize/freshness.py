"""Whether a variable can have been written since a moment: the one place that knows how each backend tells.

Keras calls the constraint of every variable of a group in one step, so the first call does the work and the others
should do none. Skipping is only right where the variable cannot have changed in between; what cannot be known counts
as changed. What `watch` returns holds no variable and no graph.
"""

import weakref
from collections.abc import Callable
from typing import TypeAlias

import keras

from equalize.backend import read
from equalize.projections import Tensor

Unwritten: TypeAlias = Callable[[keras.Variable], bool]
"""Tells of the variable that was watched whether it is unwritten since."""

_READING_OPERATIONS = frozenset({"ReadVariableOp", "ResourceGather", "VariableShape"})


def _tensorflow(variable: keras.Variable) -> Unwritten:
    """In a graph: nothing but reads has been added to the handle. Eagerly: the bits are the same."""
    import tensorflow as tf

    if not tf.inside_function():
        then = _bits(read(variable))
        return lambda variable: not tf.inside_function() and bool(tf.reduce_all(tf.equal(_bits(read(variable)), then)))
    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        return _never

    def writes(variable: keras.Variable) -> tuple[int, int]:
        handle = tf.compat.v1.get_default_graph().capture(variable.value.handle)
        return id(handle), sum(op.type not in _READING_OPERATIONS for op in handle.consumers())

    graph, then = weakref.ref(tf.compat.v1.get_default_graph()), writes(variable)
    return lambda variable: graph() is tf.compat.v1.get_default_graph() and writes(variable) == then


def _jax(variable: keras.Variable) -> Unwritten:
    """Arrays and tracers never change: the same object is the same value."""
    then = weakref.ref(variable.value)
    return lambda variable: variable.value is then()


def _torch(variable: keras.Variable) -> Unwritten:
    """Every write in place counts up the tensor's version."""
    import torch

    if torch.compiler.is_compiling():
        return _never
    tensor, version = weakref.ref(variable.value), variable.value._version
    return lambda variable: (
        not torch.compiler.is_compiling() and variable.value is tensor() and variable.value._version == version
    )


def _never(variable: keras.Variable) -> bool:
    return False


def _bits(value: Tensor) -> Tensor:
    """The value as integers, so that 0.0 and -0.0 differ and a NaN equals itself."""
    import tensorflow as tf

    return tf.bitcast(value, {2: tf.uint16, 4: tf.uint32, 8: tf.uint64}[value.dtype.size])


watch: Callable[[keras.Variable], Unwritten] = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[
    keras.backend.backend()
]
"""Watches a variable from now on."""
