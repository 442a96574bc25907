"""The backend's functions on TensorFlow, in graphs, under XLA and eagerly."""

import functools
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from equalize._backend.keras_private import held_value, in_symbolic_scope
from equalize._backend.tensors import (
    Columns,
    Tensor,
    WriteTracker,
    inner_products_of_rows,
    mark_nans,
    mix_in_passes,
    track_one_by_one,
    write_one_by_one,
)

# Below this many entries a launch of its own costs more than the passes over memory that fusing saves.
_WORTH_FUSING = 2**15


def is_raw_variable(x: Any) -> bool:
    return isinstance(x, tf.Variable)


def tensor(x: Any) -> Tensor:
    return tf.convert_to_tensor(x)  # `ops.convert_to_tensor` gives a `tf.Variable`, read by every operation again


def read(variable: keras.Variable) -> Tensor:
    return tensor(variable)


def read_live(variable: keras.Variable) -> Tensor:
    return read(variable)


def concrete(variable: keras.Variable) -> np.ndarray | None:
    with tf.init_scope():
        return None if tf.distribute.has_strategy() else held_value(variable).numpy()


def array(value: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(value)


def own_copy(value: Tensor) -> Tensor:
    return value


def is_tracing() -> bool:
    return False


def is_traced(value: Tensor) -> bool:
    return False


def computes_later() -> bool:
    return in_symbolic_scope() or tf.inside_function()


def perhaps_traced(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    # Graphs hold the handles of the variables that they have captured, so nobody else's count of references is larger.
    @functools.cache
    def untraced() -> tf.Variable:
        with tf.init_scope():
            return tf.Variable(tf.constant(0.0))

    def may_be(held: Any) -> bool:
        if isinstance(held, tf.distribute.DistributedValues):
            return True
        return sys.getrefcount(held.handle) > sys.getrefcount(untraced().handle)

    return [variable for variable in variables if may_be(variable.value)]


def forget_traces(function: Callable[..., Any]) -> None:
    pass


def eagerly() -> AbstractContextManager[None]:
    return tf.init_scope()


def after(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    # A graph starts every operation as soon as it can, and so holds what it could compute one after the other at once.
    return tf.control_dependencies(tensors)


def adjustable(number: float) -> Any:
    return tf.Variable(tf.constant(number, "float64"), trainable=False, name="strength")


def scope_of(variable: keras.Variable) -> Any:
    strategy = _strategy_of(variable.value)
    return nullcontext() if strategy is None else strategy.scope()


def _strategy_of(held: Any) -> Any:
    """The distribution strategy that copies what a Keras variable holds to several devices; None on one."""
    return getattr(held, "distribute_strategy", None)


def computed_once(value: Tensor) -> Tensor:
    if 0 in value.shape or not compiled_by_xla(value):
        return value
    first = tf.reshape(value, [-1])[0]
    index = tf.cast(first != first, "int32")
    return tf.switch_case(index, [lambda: tf.identity(value), lambda: mark_nans(value)])


def compiled_by_xla(value: Tensor) -> bool:
    if not tf.is_symbolic_tensor(value):
        return False
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    return bool(tf.config.optimizer.get_jit()) or GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A graph is run operation by operation unless the whole step is compiled, so for large tensors the function
    # becomes an XLA cluster of its own.
    compiled = tf.function(function, jit_compile=True, autograph=False)

    @functools.wraps(function)
    def dispatch(tensors: Sequence[Tensor], *options: Any) -> Tensor:
        entries = sum(tensor.shape.num_elements() for tensor in tensors)
        return (compiled if entries >= _WORTH_FUSING else function)(tensors, *options)

    return dispatch


def tree_of_mixes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return fused(function)


def gradients(function: Callable[[], Tensor], variables: Sequence[keras.Variable]) -> list[Tensor | None]:
    with tf.GradientTape() as tape:
        value = function()
    return tape.gradient(value, [variable.value for variable in variables])


def value_and_gradients(
    function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    tensors = [tf.stop_gradient(x) for x in tensors]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensors)
        value = function(tensors)
    found = tape.gradient(value, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return value, [tf.convert_to_tensor(gradient) for gradient in found]


def with_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    # A graph is run operation by operation, so the form that compilers get would read and write each tensor four times.
    def constant(*tensors: Tensor) -> Any:
        return tf.identity(value), lambda upstream: [upstream * gradient for gradient in gradients]

    return tf.custom_gradient(constant)(*tensors)


def add_gradients(gradients: Sequence[Tensor]) -> Tensor:
    if len(gradients) == 1:
        return gradients[0]
    if all(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
        values, indices = ([getattr(g, part) for g in gradients] for part in ("values", "indices"))
        return tf.IndexedSlices(tf.concat(values, 0), tf.concat(indices, 0), gradients[0].dense_shape)
    return tf.add_n([tf.convert_to_tensor(gradient) for gradient in gradients])


def scale_gradient(gradient: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def weighted_gradients(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return add_gradients([scale_gradient(g, weight) for g, weight in zip(gradients, weights, strict=True)])


def inner_products(tensors: Sequence[Tensor]) -> Tensor:
    return inner_products_of_rows(columns(tensors).map(stack), product)


def dense_gradients(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    if not any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
        return gradients
    if not all(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
        return [tf.convert_to_tensor(gradient) for gradient in gradients]
    rows, places = tf.unique(tf.concat([gradient.indices for gradient in gradients], 0))
    ends = tf.cumsum([tf.shape(gradient.indices)[0] for gradient in gradients])
    return [
        tf.math.unsorted_segment_sum(gradient.values, places[end - tf.shape(gradient.indices)[0] : end], tf.size(rows))
        for gradient, end in zip(gradients, tf.unstack(ends), strict=True)
    ]


def over_replicas(gradients: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return gradients, 1
    return context.all_reduce(tf.distribute.ReduceOp.SUM, list(gradients)), context.num_replicas_in_sync


def stateless_uniform(shape: Sequence[int], seed: int, step: Tensor) -> Tensor:
    return tf.random.stateless_uniform(tuple(shape), (seed, tf.cast(step, "int32")), alg="philox")  # XLA has another


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    # One operation each, with a gradient that reads the tensor once.
    return 2.0 * functools.reduce(operator.add, [tf.nn.l2_loss(x) for x in tensors])


def columns(tensors: Sequence[Tensor]) -> Columns:
    return Columns(tensors)


def replace_parameter(layer: keras.Layer, old: keras.Variable, new: keras.Variable) -> None:
    pass


# ---- writes


_READING_OPERATIONS = frozenset({"ReadVariableOp", "ResourceGather", "VariableShape"})


def product(left: Tensor, right: Tensor) -> Tensor:
    # On GPUs TensorFlow may round what it multiplies to ten bits.
    if tf.config.experimental.tensor_float_32_execution_enabled() and tf.config.list_physical_devices("GPU"):
        return tf.cast(tf.cast(left, "float64") @ tf.cast(right, "float64"), left.dtype)
    return left @ right


def stack(tensors: Sequence[Tensor]) -> Tensor:
    return tf.stack(tensors)


def join(tensors: Sequence[Tensor]) -> Tensor:
    return tf.concat([tf.reshape(x, [-1]) for x in tensors], 0)


def split(joined: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    parts = tf.split(joined, [math.prod(shape) for shape in shapes])
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def mix(left: Tensor, right: Tensor, share: float | Tensor) -> Tensor:
    return mix_in_passes(left, right, share)


def approach(values: Sequence[Tensor], targets: Sequence[Tensor], rate: float) -> list[Tensor]:
    return [value + rate * (target - value) for value, target in zip(values, targets, strict=True)]


def write(variables: Sequence[keras.Variable], values: Sequence[Tensor]) -> list[Tensor]:
    return write_one_by_one(variables, values)


def track_writes(variable: keras.Variable, value: Tensor, *, awaited: bool = False) -> WriteTracker:
    """In a graph: nothing but reads, and writes of the value, has been added to the handle. Eagerly: the same buffer.

    While the value is held, nothing can be written into the buffer that it shares with the variable: TensorFlow
    gives the variable another one. Where reading copies, as after a sparse update or from a GPU, bits are compared.
    """
    if not tf.inside_function():

        def eagerly(variable: keras.Variable) -> Tensor | None:
            now = None if tf.inside_function() else read(variable)
            return now if now is not None and _is(now, value, variable) else None

        return eagerly
    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        return lambda variable: None
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


def track_all(variables: Sequence[keras.Variable]) -> Callable[[], bool]:
    copied = any(_strategy_of(held_value(variable)) is not None for variable in variables)
    if copied or tf.distribute.has_strategy():  # a replica may ask for what was tracked in another one
        return track_one_by_one(track_writes, read, variables)
    return (_track_in_graph if tf.inside_function() else _track_buffers)(variables)


def _track_buffers(variables: Sequence[keras.Variable]) -> Callable[[], bool]:
    """Eagerly: the same buffers, which are held, so that nothing is written into them."""
    values = [_buffer(held_value(variable)) for variable in variables]
    tracked = list(zip(map(weakref.ref, variables), values, map(_memory, values), strict=True))

    def none_written() -> bool:
        if tf.inside_function():
            return False
        with tf.init_scope():  # no tape needs to know
            for reference, value, memory in tracked:
                variable = reference()
                if variable is None:
                    return False
                now = _buffer(held_value(variable))
                if not _is_one(_memory(now), memory) and not _is(now, value, variable):
                    return False
        return True

    return none_written


def _track_in_graph(variables: Sequence[keras.Variable]) -> Callable[[], bool]:
    """In a graph: nothing but reads has been added to it since the last look. Each member of a group asks once."""
    now = tf.compat.v1.get_default_graph()
    handles = {now.capture(variable.value.handle).name for variable in variables}
    gone: list[Any] = []
    references = [weakref.ref(variable, gone.append) for variable in variables]  # which tell as long as they live
    graph, seen = weakref.ref(now), len(_operations(now))

    def none_written() -> bool:
        nonlocal seen
        here = tf.compat.v1.get_default_graph()
        if here is not graph() or gone or not references:
            return False
        added = _operations(here)[seen:]
        others = (op for op in added if op.type not in _READING_OPERATIONS)
        if any(x.dtype == tf.resource and x.name in handles for op in others for x in op.inputs):
            return False
        seen += len(added)
        return True

    return none_written


def _operations(graph: Any) -> Sequence[Any]:
    """The operations of a graph. `get_operations` copies them all; some versions of TensorFlow have the list itself."""
    found = getattr(graph, "operations", None)
    return found if isinstance(found, list) else graph.get_operations()


def _is(now: Tensor, then: Tensor, variable: keras.Variable) -> bool:
    """Whether a value just read is the one of then: in the same buffer, or where each read is a copy, with its bits."""
    memory = _memory(now)
    if _is_one(memory, _memory(then)):
        return True
    copied = not _is_one(memory, _memory(read(variable)))
    return copied and bool(tf.reduce_all(_integers(now) == _integers(then)))


def _buffer(variable: Any) -> Tensor:
    """The value of a variable of TensorFlow, read by the operation itself: each member of a group asks for all once."""
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)


def _memory(value: Tensor) -> np.ndarray:
    """The memory that a tensor's buffer lies in. That of a GPU is copied, and the copy kept as long as the array."""
    known = value if value.dtype in (tf.float32, tf.float64) else _integers(value)
    return np.asarray(memoryview(known))


def _is_one(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays, both of which are held, begin at one address."""
    return bool(left.__array_interface__["data"][0] == right.__array_interface__["data"][0])


def _integers(value: Tensor) -> Tensor:
    """A tensor's bits; NumPy knows integers of every size, but not every float."""
    return tf.bitcast(value, {2: tf.uint16, 4: tf.uint32, 8: tf.uint64}[value.dtype.size])
