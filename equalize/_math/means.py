"""Means of tied tensors, as pure functions of tensors.

The orthogonal projection of `(w_1, ..., w_n)` onto "all equal" is their mean: argmin over p of
Σ weight_i · ‖w_i − p‖². Written as a plain sum divided by n it is not idempotent in floating point, overflows near
the largest numbers and, on backends that flush denormals, moves them to zero. Here it is a balanced tree of convex
combinations, each of which returns an entry that its two sides agree on untouched.
"""

from collections.abc import Sequence

import keras
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor


@backend.fused
def mean(values: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean of tensors of one shape and dtype, which leaves entries that agree already bit for bit as they are.

    Half precision is accumulated in float32 and rounded once. No intermediate value exceeds the largest member, so
    the mean of large numbers does not overflow.

    Args:
        values: Tensors of one shape and floating dtype.
        weights: A positive number for each tensor; equal weights by default.

    Returns:
        A tensor of the same shape and dtype.
    """
    dtype = keras.backend.standardize_dtype(values[0].dtype)
    weights = [1.0] * len(values) if weights is None else list(weights)
    nodes = [(widen(value), weight) for value, weight in zip(values, weights, strict=True)]
    while len(nodes) > 1:
        odd = nodes[len(nodes) - len(nodes) % 2 :]
        nodes = [_join(*nodes[i], *nodes[i + 1]) for i in range(0, len(nodes) - 1, 2)] + odd
    return ops.cast(nodes[0][0], dtype)


def relax(value: Tensor, target: Tensor, rate: float | Tensor) -> Tensor:
    """Moves `value` the fraction `rate` of the way to `target`: `(1 − rate)·value + rate·target`.

    With `rate = λ/(1+λ)` this is the proximal operator of `(λ/2)·‖value − target‖²`
    (Parikh and Boyd, Proximal Algorithms (2014), section 6.1.1). A `value` that is the target already stays.
    """
    dtype = keras.backend.standardize_dtype(value.dtype)
    value, target = widen(value), widen(target)
    rate = rate if isinstance(rate, float) else ops.cast(rate, value.dtype)
    return ops.cast(backend.mix(value, target, rate), dtype)


def widen(value: Tensor) -> Tensor:
    """Float32 for half precision, in which sums soon round or overflow; anything else as it is."""
    dtype = keras.backend.standardize_dtype(value.dtype)
    return ops.cast(value, "float32") if dtype in ("float16", "bfloat16") else ops.convert_to_tensor(value)


def _join(left: Tensor, left_weight: float, right: Tensor, right_weight: float) -> tuple[Tensor, float]:
    """Two nodes of the tree as one."""
    weight = left_weight + right_weight
    return backend.mix(left, right, right_weight / weight), weight
