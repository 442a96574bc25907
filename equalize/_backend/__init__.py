"""What each backend does in its own way: the same functions in `tensorflow`, `jax` and `torch`, described here once.

`keras_private` holds every private name of Keras that equalize relies on; `attributes`, `models` and `optimizers` find
their way through Keras's objects.
"""

import keras

from equalize._backend.common import (
    current_scope,
    dtype,
    in_symbolic_scope,
    is_purged,
    is_variable,
    is_visible,
    widest_dtype,
)
from equalize._backend.keras_private import applying
from equalize._backend.tensors import Columns, Tensor, WriteTracker

if keras.backend.backend() == "tensorflow":
    from equalize._backend import tensorflow as _native
elif keras.backend.backend() == "jax":
    from equalize._backend import jax as _native
elif keras.backend.backend() == "torch":
    from equalize._backend import torch as _native
else:
    raise ImportError(
        "equalize needs a backend of Keras that trains: expected 'tensorflow', 'jax' or 'torch'; received "
        f"{keras.backend.backend()!r}. Set the environment variable KERAS_BACKEND before Keras is imported."
    )

__all__ = ["Columns", "Tensor", "WriteTracker"]
__all__ += ["applying", "current_scope", "dtype", "in_symbolic_scope", "is_purged", "is_variable", "is_visible"]
__all__ += ["widest_dtype"]

# ---- values of variables

is_raw_variable = _native.is_raw_variable
"""Whether something is a `tf.Variable`, where that is the backend's."""

tensor = _native.tensor
"""A variable's value, or a tensor as it is, as a native tensor that gradients flow through."""

read = _native.read
"""A variable's value in its own dtype, as a native tensor that carries no gradient."""

read_live = _native.read_live
"""What a variable holds whenever the step runs that is traced here, and that does not carry it."""

concrete = _native.concrete
"""A variable's value as an array, also while a step is traced; None where it is not available."""

array = _native.array
"""A tensor as an array; these calls gather collectively what is spread over several processes."""

own_copy = _native.own_copy
"""A value in a buffer of its own, where two variables must not hold one."""

write = _native.write
"""Assigns values to variables; returns what each of them holds then, without a copy of its own."""

track_writes = _native.track_writes
"""Tracks whether a variable can have been written from now on; what cannot be known counts as written.

Keras calls the constraint of every member in one step, so the first call does the work and the others should do none.
That is right only where no member can have changed in between. Keeps neither variable nor graph alive. `value` is what
the variable holds or is about to hold, and `awaited` says that Keras has yet to write it.
"""

track_all = _native.track_all
"""Tracks whether any of some variables can have been written, or is gone, from now on: True while none has."""

# ---- when and where computations run

is_tracing = _native.is_tracing
"""Whether what is computed here becomes part of a step that JAX compiles."""

is_traced = _native.is_traced
"""Whether a value is a placeholder of a JAX trace."""

computes_later = _native.computes_later
"""Whether what is computed here only has a shape, or becomes part of a step that is run later."""

perhaps_traced = _native.perhaps_traced
"""Those of some variables that a compiled function may hold, or what they were constrained and regularized by."""

forget_traces = _native.forget_traces
"""Has a function traced anew, whoever holds what was traced of it. JAX knows a bound method by its object."""

eagerly = _native.eagerly
"""A scope in which arrays are computed with at once, also while a step is traced."""

after = _native.after
"""A scope whose operations begin when some tensors are there, so that less memory is used at once."""

adjustable = _native.adjustable
"""A variable that compiled steps read a number from; None where they cannot, and the number is compiled in."""

scope_of = _native.scope_of
"""The scope for new variables that a step writes beside another: that of its distribution strategy."""

compiled_by_xla = _native.compiled_by_xla
"""Whether a value is a placeholder of a program that XLA will compile, in whole or in clusters."""

computed_once = _native.computed_once
"""A value, computed in one place for all that is made of it.

XLA is free to compute a tensor in each kernel that reads it, and rounds it there as suits that kernel, so two members
could be given two values. It removes `optimization_barrier` before it fuses on CPUs, but never computes the result of
a conditional twice. The condition depends on data, and both branches give the same numbers.
"""

fused = _native.fused
"""A function of tensors and options, in one pass over memory where the backend does not fuse by itself."""

tree_of_mixes = _native.tree_of_mixes
"""A function of tensors of one shape and options that mixes them, entry by entry, by an argument `mix`; likewise."""

# ---- gradients

gradients = _native.gradients
"""The gradients of `function()`, a scalar, by variables, computed at once; None where there is none."""

value_and_gradients = _native.value_and_gradients
"""`function(tensors)`, a scalar, and its gradients by the tensors, as numbers: neither carries any further."""

with_gradients = _native.with_gradients
"""A scalar, with given gradients by some tensors in place of those that it has."""

add_gradients = _native.add_gradients
"""The sum of gradients of one shape; of sparse ones as TensorFlow sums those of one variable that is used often."""

scale_gradient = _native.scale_gradient
"""A multiple of a gradient; of a sparse one sparse."""

weighted_gradients = _native.weighted_gradients
"""The sum of gradients of one shape, each times a weight: a scalar tensor in its dtype; of sparse ones sparse."""

inner_products = _native.inner_products
"""The inner products of tensors of one shape, `(n, n)`."""

dense_gradients = _native.dense_gradients
"""Dense tensors of one shape with the inner products of some gradients: of sparse ones the rows that they have."""

over_replicas = _native.over_replicas
"""The sums of gradients over the replicas of a distribution that trace a step side by side, and how many there are."""

sum_of_squares = _native.sum_of_squares
"""Σ x² over the entries of all tensors, which have one shape: a scalar."""

# ---- arithmetic

columns = _native.columns
"""The `Columns` of some tensors of one shape: in parts where the backend reads memory again for each result."""

product = _native.product
"""The product of two matrices, in all digits of their dtype."""

stack = _native.stack
"""Tensors of one shape and dtype as the rows of one, without the time that Keras takes for each."""

join = _native.join
"""The entries of some tensors of one dtype, one after the other, as a vector."""

split = _native.split
"""A vector as tensors of given shapes: the inverse of `join`."""

mix = _native.mix
"""`(1 − share)·left + share·right`, and exactly `left` wherever both are the same number; nothing overflows."""

stateless_uniform = _native.stateless_uniform
"""Random numbers in [0, 1), the same for one seed and step: where a step is traced there is no state to draw from."""

approach = _native.approach
"""`value + rate·(target − value)` for tensors and their targets, in as few passes and calls as the backend can."""

# ---- layers

replace_parameter = _native.replace_parameter
"""Lists a variable in the place of another among the parameters that PyTorch knows of a layer."""
