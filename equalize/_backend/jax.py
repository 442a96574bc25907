"""The backend's functions on JAX, which traces a step, compiles it, and carries all state through it."""

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import keras
import numpy as np
from keras import ops

from equalize._backend.common import dtype, is_variable
from equalize._backend.keras_private import held_value, in_symbolic_scope
from equalize._backend.tensors import (
    Columns,
    Computation,
    Tensor,
    WriteTracker,
    inner_products_of_rows,
    mark_nans,
    mix_in_passes,
    track_one_by_one,
    unstacked,
    write_one_by_one,
)


def is_raw_variable(x: Any) -> bool:
    return False


def tensor(x: Any) -> Tensor:
    return x.value if is_variable(x) else x


def read(variable: keras.Variable) -> Tensor:
    return tensor(variable)


def read_live(variable: keras.Variable) -> Tensor:
    # A step that is compiled would keep the value of now, so it calls back for it: a copy of the value for each step.
    if not is_tracing():
        return read(variable)
    shape = jax.ShapeDtypeStruct(tuple(variable.shape), dtype(variable))
    return jax.pure_callback(lambda: array(variable.value), shape)


def concrete(variable: keras.Variable) -> np.ndarray | None:
    value = held_value(variable)
    return None if value is None or is_traced(value) else array(value)


def array(value: Tensor) -> np.ndarray:
    # What is spread over several processes, all of them gather together.
    if not (value.is_fully_addressable or value.is_fully_replicated):
        from jax.experimental import multihost_utils

        with jax.ensure_compile_time_eval():
            value = multihost_utils.process_allgather(value, tiled=True)
    return ops.convert_to_numpy(value)


def own_copy(value: Tensor) -> Tensor:
    # JAX donates the buffers of all variables to the step and refuses one twice. A step that is compiled has none yet;
    # while JAX only differentiates, tracers have.
    return value if is_traced(value) and is_tracing() else jnp.array(value, copy=True)


def is_tracing() -> bool:
    return is_traced(ops.zeros(()))


def is_traced(value: Tensor) -> bool:
    return isinstance(value, jax.core.Tracer)


def computes_later() -> bool:
    return in_symbolic_scope() or is_tracing()


def perhaps_traced(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    return list(variables)  # compiled functions leave no sign


def forget_traces(function: Callable[..., Any]) -> None:
    jitted: Any = jax.jit(function)
    jitted.clear_cache()


def eagerly() -> AbstractContextManager[None]:
    return jax.ensure_compile_time_eval()


def after(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


def adjustable(number: float) -> Any:
    return None


def scope_of(variable: keras.Variable) -> Any:
    return nullcontext()


def compiled_by_xla(value: Tensor) -> bool:
    return is_traced(value)


def computed_once(value: Tensor) -> Tensor:
    # XLA removes barriers before it fuses on CPUs, but never computes the result of a conditional twice.
    if 0 in value.shape or not is_traced(value):
        return value
    return jax.lax.platform_dependent(value, cpu=_through_switch, default=jax.lax.optimization_barrier)


def _through_switch(value: Tensor) -> Tensor:
    """The value, out of a conditional that no compiler can decide beforehand: it asks whether an entry is a number."""
    first = jnp.reshape(jax.lax.slice(value, [0] * value.ndim, [1] * value.ndim), ())
    return jax.lax.switch((first != first).astype("int32"), [lambda x: x, mark_nans], value)


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def tree_of_mixes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def gradients(function: Callable[[], Tensor], variables: Sequence[keras.Variable]) -> list[Tensor | None]:
    def stateless(values: Sequence[Tensor]) -> Tensor:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function()

    return jax.grad(stateless)([variable.value for variable in variables])


def value_and_gradients(
    function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    return jax.value_and_grad(function)([jax.lax.stop_gradient(x) for x in tensors])


def with_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    return _with_gradients(value, tuple(gradients), tuple(tensors))


@jax.custom_jvp
def _with_gradients(value: Tensor, gradients: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    return value


@_with_gradients.defjvp
def _moved(primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """The value, and how much it changes where the tensors do."""
    value, gradients, _ = primals
    changes = [jnp.vdot(gradient, change) for gradient, change in zip(gradients, tangents[2], strict=True)]
    return value, sum(changes, start=jnp.zeros_like(value))


def add_gradients(gradients: Sequence[Tensor]) -> Tensor:
    # Backpropagation adds up the uses of one variable from the last to the first.
    return functools.reduce(ops.add, reversed(gradients))


def scale_gradient(gradient: Tensor, factor: float | Tensor) -> Tensor:
    return gradient * factor


def weighted_gradients(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return add_gradients([scale_gradient(g, weight) for g, weight in zip(gradients, weights, strict=True)])


def inner_products(tensors: Sequence[Tensor]) -> Tensor:
    return inner_products_of_rows(columns(tensors).map(stack), product)


def dense_gradients(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    return gradients


def over_replicas(gradients: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
    return gradients, 1


def stateless_uniform(shape: Sequence[int], seed: int, step: Tensor) -> Tensor:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step), tuple(shape))


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    # Entry by entry first: where it sums up a tensor that others need, XLA writes that to memory for them.
    squares = [ops.square(x) for x in tensors]
    entries = functools.reduce(ops.add, squares)
    return ops.sum(entries if len(tensors) == 1 else computed_once(entries))


def columns(tensors: Sequence[Tensor]) -> Columns:
    count = _blocks(len(tensors), math.prod(tensors[0].shape))
    traced_for_cpu = any(is_traced(x) for x in tensors) and jax.default_backend() == "cpu"
    return _Blocks(tensors, count) if count > 1 and traced_for_cpu else Columns(tensors)


def _blocks(rows: int, length: int) -> int:
    """In how many blocks of one size to see `length` columns, at best of 2**18 entries; 1 where they do not divide."""
    least = rows * length // 2**18
    return next((count for count in range(least, 8 * least + 1) if count and length % count == 0), 1)


class _Blocks(Columns):
    """A loop over blocks of columns that a CPU's caches hold: XLA reads the rows again for each that it computes."""

    def __init__(self, tensors: Sequence[Tensor], count: int, prepare: Callable[[Any], Any] = list):
        self._tensors, self._count, self._prepare = tensors, count, prepare

    def map(self, function: Callable[[Any], Any]) -> Columns:
        return _Blocks(self._tensors, self._count, lambda rows: function(self._prepare(rows)))

    def compute(self, function: Computation) -> tuple[Tensor, list[Tensor]]:
        def one(block: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
            more, rows = function(self._prepare(block))
            return more, list(unstacked(rows))

        def step(total: Tensor, block: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
            more, rows = one(block)
            return total + more, rows

        blocks = [jnp.reshape(x, (self._count, -1)) for x in self._tensors]
        total = jax.eval_shape(one, [block[0] for block in blocks])[0]
        total, rows = jax.lax.scan(step, jnp.zeros(total.shape, total.dtype), blocks)
        return total, [jnp.reshape(row, self._tensors[0].shape) for row in rows]


def replace_parameter(layer: keras.Layer, old: keras.Variable, new: keras.Variable) -> None:
    pass


def product(left: Tensor, right: Tensor) -> Tensor:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    return jnp.stack(tensors)


def join(tensors: Sequence[Tensor]) -> Tensor:
    return jnp.concatenate([jnp.reshape(x, -1) for x in tensors])


def split(joined: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(joined, ends[:-1])
    return [jnp.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def mix(left: Tensor, right: Tensor, share: float | Tensor) -> Tensor:
    return mix_in_passes(left, right, share)


def approach(values: Sequence[Tensor], targets: Sequence[Tensor], rate: float) -> list[Tensor]:
    traced = any(is_traced(x) for x in (*values, *targets))
    return (_approach if traced else _approach_at_once)(list(values), list(targets), rate)


def _approach(values: Sequence[Tensor], targets: Sequence[Tensor], rate: float) -> list[Tensor]:
    return [value + rate * (target - value) for value, target in zip(values, targets, strict=True)]


_approach_at_once = jax.jit(_approach)


def write(variables: Sequence[keras.Variable], values: Sequence[Tensor]) -> list[Tensor]:
    return write_one_by_one(variables, values)


def track_writes(variable: keras.Variable, value: Tensor, *, awaited: bool = False) -> WriteTracker:
    """Arrays and tracers never change: the same object is the same value."""
    then = weakref.ref(value)
    return lambda variable: variable.value if variable.value is then() else None


def track_all(variables: Sequence[keras.Variable]) -> Callable[[], bool]:
    return track_one_by_one(track_writes, read, variables)
