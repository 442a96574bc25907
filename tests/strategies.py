"""Hypothesis strategies for tied tensors."""

import os

import hypothesis
import keras
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

# As float32 has them, since NumPy 1 tells a number from what it becomes.
TINY = [float(np.float32(1e-40)), float(np.float32(-1e-45))]

# JAX compiles each operation for each shape that it meets, which takes longer than all the rest: it meets few.
FEW = keras.backend.backend() == "jax" and os.environ.get("HYPOTHESIS_PROFILE") != "long"

# NumPy cannot read a scalar bfloat16 of TensorFlow, so scalars have a test of their own.
shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4)
if FEW:
    shapes = st.sampled_from([(4,), (2, 3), (3, 3), (2, 1, 3)])


def arrays(shape, dtype="float32", bound=None, specials=False):
    """Arrays of a shape: ordinary numbers by default, every bit pattern with `specials`."""
    limit = 2.0**15 if dtype == "float16" else 2.0**127
    limit = limit if bound is None else bound
    width = 16 if dtype == "float16" else 32
    numbers = st.floats(-limit, limit, width=width, allow_subnormal=True)
    if specials:
        numbers = numbers | st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 0.0, *TINY, limit, -limit])
    return hnp.arrays(np.float32, shape, elements=numbers).map(lambda array: array.astype(DTYPES[dtype]))


def groups(dtype="float32", max_members=9, bound=1e6):
    """Lists of arrays of one shape."""
    sizes = st.sampled_from(sorted({2, max_members})) if FEW else st.integers(2, max_members)
    return st.tuples(shapes, sizes).flatmap(
        lambda chosen: st.tuples(*[arrays(chosen[0], dtype, bound)] * chosen[1]).map(list)
    )


def stacks(min_members=1, max_members=20, min_dims=0):
    """Arrays of shape `(n, ...)` for n members, in eighths so that many entries are equal and no difference is tiny."""
    numbers = st.integers(-2, 2) | st.integers(-80, 80).map(lambda eighths: eighths / 8)
    dims = hnp.array_shapes(min_dims=min_dims, max_dims=2, max_side=3)
    sizes = st.tuples(st.integers(min_members, max_members), dims)
    if FEW:
        few = [(1, (3,)), (2, ()), (3, (2,)), (4, (2, 3)), (18, (3,))]
        sizes = st.sampled_from(
            [(n, shape) for n, shape in few if min_members <= n <= max_members and len(shape) >= min_dims]
        )
    return sizes.flatmap(lambda size: hnp.arrays(np.float64, (size[0], *size[1]), elements=numbers))


def attacks(examples):
    """The settings of a run of so many attacks: a short one is the same each time, a long one looks further."""
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 1000,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
