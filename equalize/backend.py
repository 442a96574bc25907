"""What each backend does in its own way, behind one function each."""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize.projections import Tensor

_BACKEND = keras.backend.backend()

# Below this many entries a launch of its own costs more than the passes over memory that fusing saves.
_WORTH_FUSING = 2**15


def current_scope() -> Any:
    """The `keras.StatelessScope` that we are in, or None. Keras 3 exports the class but not this getter."""
    from keras.src.backend.common.stateless_scope import get_stateless_scope

    return get_stateless_scope()


def in_symbolic_scope() -> bool:
    """Whether Keras only infers shapes, so that no value matters."""
    from keras.src.backend.common.symbolic_scope import in_symbolic_scope

    return in_symbolic_scope()


def computes_later() -> bool:
    """Whether what is computed here only has a shape, or becomes part of a step that is run later."""
    if in_symbolic_scope() or tracing():
        return True
    if _BACKEND != "tensorflow":
        return False
    import tensorflow as tf

    return tf.inside_function()


def visible(variable: keras.Variable) -> bool:
    """Whether the variable can be read here, and written without loss.

    Inside a `StatelessScope`, which is how JAX trains, only the variables that the scope was given have a state
    that comes back. Everywhere else all variables have.
    """
    scope = current_scope()
    return scope is None or scope.get_current_value(variable) is not None


def purged(variable: keras.Variable) -> bool:
    """Whether Keras took the value away: while `fit` runs on JAX only the step holds it (Keras 3.15)."""
    return variable._value is None


def tracing() -> bool:
    """Whether what is computed here becomes part of a step that JAX compiles."""
    return _BACKEND == "jax" and traced(ops.zeros(()))


def may_be_traced(variable: keras.Variable) -> bool:
    """Whether a compiled function may hold the variable, or what it was constrained and regularized by.

    TensorFlow's graphs hold the handles of the variables that they have captured, so nobody else's count of references
    is larger. JAX leaves no sign. PyTorch runs eagerly, and what `torch.compile` compiled looks at attributes itself.
    """
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        if isinstance(variable.value, tf.distribute.DistributedValues):
            return True
        with tf.init_scope():
            untraced = tf.Variable(tf.constant(0.0))
        return sys.getrefcount(variable.value.handle) > sys.getrefcount(untraced.handle)
    return _BACKEND == "jax"


def is_variable(x: Any) -> bool:
    """Whether something is a Keras variable; those of layers are no `keras.Variable` in Keras 3.5."""
    from keras.src.backend import Variable

    return isinstance(x, Variable)


def is_raw_variable(x: Any) -> bool:
    """Whether something is a `tf.Variable`, where that is the backend's."""
    if _BACKEND != "tensorflow":
        return False
    import tensorflow as tf

    return isinstance(x, tf.Variable)


def dtype(x: keras.Variable | Tensor) -> str:
    """The name of the dtype of a variable or a tensor, as Keras spells it."""
    return keras.backend.standardize_dtype(x.dtype)


def tensor(x: keras.Variable | Tensor) -> Tensor:
    """A variable's value, or a tensor as it is, as a native tensor that gradients flow through."""
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(x)  # `ops.convert_to_tensor` gives a `tf.Variable`, read by every operation again
    return x.value if is_variable(x) else x


def read(variable: keras.Variable) -> Tensor:
    """The variable's value in its own dtype, as a native tensor that carries no gradient."""
    value = tensor(variable)
    return value.detach() if _BACKEND == "torch" else value


def live(variable: keras.Variable) -> Tensor:
    """What the variable holds whenever the step runs that is traced here, and that does not carry it.

    A step that JAX compiles would keep the value of now, so it calls back for it: a copy of the value for each step.
    """
    if not tracing():
        return read(variable)
    import jax

    shape = jax.ShapeDtypeStruct(tuple(variable.shape), dtype(variable))
    return jax.pure_callback(lambda: array(variable.value), shape)


def concrete(variable: keras.Variable) -> np.ndarray | None:
    """The variable's value as an array, also while a step is traced; None where it cannot be had."""
    value = variable._value
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.init_scope():
            return None if tf.distribute.has_strategy() else value.numpy()
    return None if value is None or traced(value) else array(value)


def array(value: Tensor) -> np.ndarray:
    """A tensor as an array. What JAX has spread over several processes, all of them gather together."""
    if _BACKEND == "jax" and not (value.is_fully_addressable or value.is_fully_replicated):
        import jax
        from jax.experimental import multihost_utils

        with jax.ensure_compile_time_eval():
            value = multihost_utils.process_allgather(value, tiled=True)
    return ops.convert_to_numpy(value)


def hand_over(layer: keras.Layer, old: keras.Variable, new: keras.Variable) -> None:
    """Lists `new` for `old` among a layer's parameters; every layer in PyTorch lists those of the layers below it."""
    if _BACKEND == "torch" and getattr(layer, "_torch_params", {}).get(old.path) is old.value:
        layer._post_untrack_variable(old)
        layer._post_track_variable(new)


def dial(number: float) -> Any:
    """A variable that compiled steps read a number from; None where a step cannot, and the number is compiled in."""
    if _BACKEND != "tensorflow":
        return None
    import tensorflow as tf

    return tf.Variable(tf.constant(number, "float64"), trainable=False, name="strength")


def eagerly() -> AbstractContextManager[None]:
    """A scope in which arrays are computed with at once, also while a step is traced."""
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    if _BACKEND == "jax":
        import jax

        return jax.ensure_compile_time_eval()
    return nullcontext()


def own_copy(value: Tensor) -> Tensor:
    """The value in a buffer of its own, where two variables must not hold one.

    JAX donates the buffers of all variables to the compiled step and refuses to donate one twice. A trace has no
    buffers yet, and the other backends copy by themselves.
    """
    if _BACKEND == "jax" and not traced(value):
        import jax.numpy as jnp

        return jnp.array(value, copy=True)
    return value


def computed_once(value: Tensor) -> Tensor:
    """The value, computed in one place for all that is made of it.

    XLA is free to compute a tensor anew in each kernel that reads it, and rounds it there as suits that kernel, so two
    members could be given two values. It removes `optimization_barrier` before it fuses on CPUs, but never computes
    the result of a conditional twice. The condition depends on data, and both branches give the same numbers.
    """
    if 0 in value.shape:
        return value
    if traced(value):
        import jax

        return jax.lax.platform_dependent(value, cpu=_through_switch, default=jax.lax.optimization_barrier)
    return _through_switch(value) if _compiled_by_xla(value) else value


def _compiled_by_xla(value: Tensor) -> bool:
    """Whether the value is a placeholder of a TensorFlow graph that XLA will compile, in whole or in clusters."""
    if _BACKEND != "tensorflow":
        return False
    import tensorflow as tf

    if not tf.is_symbolic_tensor(value):
        return False
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    return bool(tf.config.optimizer.get_jit()) or GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _through_switch(value: Tensor) -> Tensor:
    """The value, out of a conditional that no compiler can decide beforehand: it asks whether an entry is a number."""
    first = ops.reshape(ops.slice(value, [0] * len(value.shape), [1] * len(value.shape)), ())
    index = ops.cast(first != first, "int32")
    if _BACKEND == "jax":
        import jax

        return jax.lax.switch(index, [lambda x: x, _with_plain_nans], value)
    import tensorflow as tf

    return tf.switch_case(index, [lambda: tf.identity(value), lambda: _with_plain_nans(value)])


def _with_plain_nans(value: Tensor) -> Tensor:
    return ops.where(value != value, ops.cast(float("nan"), value.dtype), value)


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function(tensors, *options)` in one pass over memory where the backend does not fuse by itself.

    TensorFlow runs a graph operation by operation unless the whole step is compiled, so for large tensors the
    function becomes an XLA cluster of its own. JAX compiles the whole step, and PyTorch runs eagerly.
    """
    if _BACKEND != "tensorflow":
        return function
    import tensorflow as tf

    compiled = tf.function(function, jit_compile=True, autograph=False)

    @functools.wraps(function)
    def dispatch(tensors: Sequence[Tensor], *options: Any) -> Tensor:
        entries = sum(tensor.shape.num_elements() for tensor in tensors)
        return (compiled if entries >= _WORTH_FUSING else function)(tensors, *options)

    return dispatch


def gradients(function: Callable[[], Tensor], variables: Sequence[keras.Variable]) -> list[Tensor | None]:
    """The gradients of `function()`, a scalar, computed at once; None where there is none."""
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = function()
        return tape.gradient(value, [variable.value for variable in variables])
    if _BACKEND == "jax":
        import jax

        def stateless(values: Sequence[Tensor]) -> Tensor:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function()

        return jax.grad(stateless)([variable.value for variable in variables])
    import torch

    values = [variable.value for variable in variables]
    return list(torch.autograd.grad(function(), values, allow_unused=True)) if values else []


def add(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of gradients of one shape; of sparse ones as TensorFlow sums those of one variable that is used often."""
    if len(gradients) == 1:
        return gradients[0]
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        if all(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
            values, indices = ([getattr(g, part) for g in gradients] for part in ("values", "indices"))
            return tf.IndexedSlices(tf.concat(values, 0), tf.concat(indices, 0), gradients[0].dense_shape)
        return tf.add_n([tf.convert_to_tensor(gradient) for gradient in gradients])
    # Backpropagation adds up the uses of one variable from the last to the first.
    return functools.reduce(ops.add, reversed(gradients))


def scale(gradient: Tensor, factor: float) -> Tensor:
    """A multiple of a gradient; of a sparse one sparse."""
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def after(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """A scope whose operations begin when the tensors are there.

    TensorFlow starts every operation of a graph as soon as it can, and so holds what it could compute one after the
    other all at once. Compilers order operations by the memory that they need, and eager code runs as written.
    """
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.control_dependencies(tensors)
    return nullcontext()


def sum_of_squares(x: Tensor) -> Tensor:
    """Σ x², a scalar. TensorFlow has one operation for it, with a gradient that reads `x` once."""
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return 2.0 * tf.nn.l2_loss(x)
    return ops.sum(ops.square(x))


def sloped(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """The scalar `value`, with the gradient `slope` with respect to `x`."""
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        # A graph is run operation by operation, so here the form below would read and write `x` four times.
        return tf.custom_gradient(lambda x: (tf.identity(value), lambda upstream: upstream * slope))(x)
    return value + ops.sum(slope * (x - ops.stop_gradient(x)))


def traced(value: Tensor) -> bool:
    """Whether the value is a placeholder of a JAX trace."""
    if _BACKEND != "jax":
        return False
    from jax.core import Tracer

    return isinstance(value, Tracer)
