"""What each backend does in its own way, behind one function each."""

import functools
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


def visible(variable: keras.Variable) -> bool:
    """Whether the variable can be read here, and written without loss.

    Inside a `StatelessScope`, which is how JAX trains, only the variables that the scope was given have a state
    that comes back. Everywhere else all variables have.
    """
    scope = current_scope()
    return scope is None or scope.get_current_value(variable) is not None


def purged(variable: keras.Variable) -> bool:
    """Whether Keras took the value away: while `fit` runs on JAX only the compiled step holds it (Keras 3.15)."""
    return variable._value is None


def is_variable(x: Any) -> bool:
    """Whether something is a Keras variable; those of layers are no `keras.Variable` in Keras 3.5."""
    from keras.src.backend import Variable

    return isinstance(x, Variable)


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


def concrete(variable: keras.Variable) -> np.ndarray | None:
    """The variable's value as an array, also while a step is traced; None where it cannot be had."""
    value = variable._value
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.init_scope():
            return None if tf.distribute.has_strategy() else value.numpy()
    if value is None or _traced(value):
        return None
    return ops.convert_to_numpy(value)


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
    if _BACKEND == "jax" and not _traced(value):
        import jax.numpy as jnp

        return jnp.array(value, copy=True)
    return value


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


def _traced(value: Tensor) -> bool:
    """Whether the value is a placeholder of a JAX trace."""
    if _BACKEND != "jax":
        return False
    from jax.core import Tracer

    return isinstance(value, Tracer)
