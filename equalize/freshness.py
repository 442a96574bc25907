"""Whether a variable can have been written since a moment: the one place that knows how each backend tells.

Keras calls the constraint of every variable of a group in one step, so the first call does the work and the others
should do none. Skipping is only right where the variable cannot have changed in between; what cannot be known counts
as changed. What `watch` returns keeps no variable and no graph alive.
"""

import weakref
from collections.abc import Callable
from typing import TypeAlias

import keras
import numpy as np

from equalize.backend import read
from equalize.projections import Tensor

Watch: TypeAlias = Callable[[keras.Variable], Tensor | None]
"""Given the variable that is watched, returns its value if it is unwritten, else None."""

_READING_OPERATIONS = frozenset({"ReadVariableOp", "ResourceGather", "VariableShape"})


def _tensorflow(variable: keras.Variable, value: Tensor, awaited: bool) -> Watch:
    """In a graph: nothing but reads, and writes of the value, has been added to the handle. Eagerly: the same buffer.

    While the value is held, nothing can be written into the buffer that it shares with the variable: TensorFlow
    gives the variable another one. Where reading copies, as after a sparse update or from a GPU, bits are compared.
    """
    import tensorflow as tf

    if not tf.inside_function():

        def eagerly(variable: keras.Variable) -> Tensor | None:
            now = None if tf.inside_function() else read(variable)
            return now if now is not None and _is(now, value, variable) else None

        return eagerly
    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        return _unknown
    name = value.name

    def changes(variable: keras.Variable) -> tuple[int, int]:
        handle = tf.compat.v1.get_default_graph().capture(variable.value.handle)
        touched = [op for op in handle.consumers() if op.type not in _READING_OPERATIONS]
        return id(handle), sum(op.type != "AssignVariableOp" or op.inputs[1].name != name for op in touched)

    graph, then = weakref.ref(tf.compat.v1.get_default_graph()), changes(variable)

    def in_graph(variable: keras.Variable) -> Tensor | None:
        here = tf.compat.v1.get_default_graph()
        return here.get_tensor_by_name(name) if here is graph() and changes(variable) == then else None

    return in_graph


def _jax(variable: keras.Variable, value: Tensor, awaited: bool) -> Watch:
    """Arrays and tracers never change: the same object is the same value."""
    then = weakref.ref(value)
    return lambda variable: variable.value if variable.value is then() else None


def _torch(variable: keras.Variable, value: Tensor, awaited: bool) -> Watch:
    """Every write in place counts up the tensor's version; Keras's own of an awaited value by one at most."""
    tensor, version = weakref.ref(variable.value), variable.value._version

    def versioned(variable: keras.Variable) -> Tensor | None:
        unwritten = variable.value is tensor() and 0 <= variable.value._version - version <= int(awaited)
        return read(variable) if unwritten else None

    return versioned


def _unknown(variable: keras.Variable) -> None:
    return None


def _is(now: Tensor, then: Tensor, variable: keras.Variable) -> bool:
    """Whether a value just read is the one of then: in the same buffer, or where each read is a copy, with its bits."""
    import tensorflow as tf

    if _address(now) == _address(then):
        return True
    copied = _address(read(variable)) != _address(now)
    return copied and bool(tf.reduce_all(_integers(now) == _integers(then)))


def _address(value: Tensor) -> int:
    """Where a TensorFlow tensor's buffer lies."""
    return np.asarray(memoryview(_integers(value))).ctypes.data


def _integers(value: Tensor) -> Tensor:
    """A TensorFlow tensor's bits; NumPy knows integers of every size, but not every float."""
    import tensorflow as tf

    return tf.bitcast(value, {2: tf.uint16, 4: tf.uint32, 8: tf.uint64}[value.dtype.size])


_WATCH = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.backend.backend()]


def watch(variable: keras.Variable, value: Tensor, *, awaited: bool = False) -> Watch:
    """Watches a variable from now on.

    Args:
        variable: The variable.
        value: What it holds, or is about to hold.
        awaited: Whether Keras is still going to write the value into it.
    """
    return _WATCH(variable, value, awaited)
