"""Means of tied tensors, as pure functions of tensors.

The orthogonal projection of `(w_1, ..., w_n)` onto "all equal" is their mean: argmin over p of
Σ weight_i · ‖w_i − p‖². Written as a plain sum divided by n it is not idempotent in floating point, overflows near
the largest numbers and, on backends that flush denormals, moves them to zero. Here it is a balanced tree of convex
combinations, each of which returns an entry that its two sides agree on untouched.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor

# Up to this many entries an operation takes as long on a hundred tensors, the rows of a stack, as on one.
SMALL = 2**14


Weights: TypeAlias = Sequence[float | np.ndarray]
"""A positive number for each tensor, or one for each of its entries."""


def mean(values: Sequence[Tensor], weights: Weights | None = None) -> Tensor:
    """Weighted mean of tensors of one shape and dtype, which leaves entries that agree already bit for bit as they are.

    Half precision is accumulated in float32 and rounded once. No intermediate value exceeds the largest member, so
    the mean of large numbers does not overflow.

    Args:
        values: Tensors of one shape and floating dtype.
        weights: A positive number for each tensor, or one for each of its entries; equal weights by default.

    Returns:
        A tensor of the same shape and dtype.
    """
    weights = (1.0,) * len(values) if weights is None else tuple(weights)
    if any(isinstance(weight, np.ndarray) for weight in weights):
        return _mean_of_entries(values, weights)
    return (_mean_of_rows if are_small(values) else _mean_one_by_one)(values, weights)


def relax(values: Sequence[Tensor], target: Tensor, rate: float | Tensor) -> list[Tensor]:
    """Moves each value the fraction `rate` of the way to `target`: `(1 − rate)·value + rate·target`.

    With `rate = λ/(1+λ)` this is the proximal operator of `(λ/2)·‖value − target‖²`
    (Parikh and Boyd, Proximal Algorithms (2014), section 6.1.1). A value that is the target already stays.
    """
    dtype, target = backend.dtype(target), widen(target)
    rate = rate if isinstance(rate, float) else ops.cast(rate, target.dtype)
    if are_better_stacked(values):
        return ops.unstack(ops.cast(backend.mix(widen(backend.stack(values)), target, rate), dtype), len(values))
    return [ops.cast(backend.mix(widen(value), target, rate), dtype) for value in values]


def approach(values: Sequence[Tensor], targets: Sequence[Tensor], rate: float | Tensor) -> list[Tensor]:
    """Moves each value the fraction `rate` of the way to its target: `value + rate·(target − value)`.

    As `relax`, with less rounding where the rate is small: an average over many steps adds up what each rounds.
    """
    if not isinstance(rate, float) or rate > 0.5:
        return [relax([value], target, rate)[0] for value, target in zip(values, targets, strict=True)]
    dtype = backend.dtype(values[0])
    moved = backend.approach(list(map(widen, values)), list(map(widen, targets)), rate)
    return [value if backend.dtype(value) == dtype else ops.cast(value, dtype) for value in moved]


def are_small(values: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape are better computed with as the rows of a stack."""
    return len(values) > 2 and math.prod(values[0].shape) <= SMALL


def are_better_stacked(values: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape are better rows of a stack, too, where each is to become a tensor again.

    XLA compiles what is computed of many tensors in one way once, but a kernel that cuts out a row has its place in it,
    and takes longer to compile than all else.
    """
    return are_small(values) and not backend.compiled_by_xla(values[0])


def widen(value: Tensor) -> Tensor:
    """Float32 for half precision, in which sums soon round or overflow; anything else as it is."""
    dtype = keras.backend.standardize_dtype(value.dtype)
    return ops.cast(value, "float32") if dtype in ("float16", "bfloat16") else value


def _mean_of_entries(
    values: Sequence[Tensor], weights: Weights, *, mix: Callable[[Tensor, Tensor, Any], Tensor] = backend.mix
) -> Tensor:
    nodes = [(widen(value), weight) for value, weight in zip(values, weights, strict=True)]
    while len(nodes) > 1:
        odd = nodes[len(nodes) - len(nodes) % 2 :]
        nodes = [_join(mix, *nodes[i], *nodes[i + 1]) for i in range(0, len(nodes) - 1, 2)] + odd
    return ops.cast(nodes[0][0], backend.dtype(values[0]))


_mean_one_by_one = backend.tree_of_mixes(_mean_of_entries)


def _join(
    mix: Callable[[Tensor, Tensor, Any], Tensor], left: Tensor, left_weight: Any, right: Tensor, right_weight: Any
) -> tuple[Tensor, Any]:
    """Two nodes of the tree as one."""
    weight = left_weight + right_weight
    share = right_weight / weight
    share = ops.convert_to_tensor(share, backend.dtype(left)) if isinstance(share, np.ndarray) else share
    return mix(left, right, share), weight


def _mean_of_rows(values: Sequence[Tensor], weights: Sequence[Any]) -> Tensor:
    """The same tree, all nodes of a level at once."""
    rows = widen(backend.stack(values))
    while len(weights) > 1:
        paired = len(weights) - len(weights) % 2
        sums = [left + right for left, right in zip(weights[:paired:2], weights[1:paired:2], strict=True)]
        shares = [right / weight for right, weight in zip(weights[1:paired:2], sums, strict=True)]
        share = shares[0] if len(set(shares)) == 1 else _column(shares, rows)
        mixed = backend.mix(rows[:paired:2], rows[1:paired:2], share)
        rows = ops.concatenate([mixed, rows[paired:]]) if paired < len(weights) else mixed
        weights = (*sums, *weights[paired:])
    return ops.cast(rows[0], backend.dtype(values[0]))


def _column(numbers: Sequence[float], rows: Tensor) -> Tensor:
    """A number for each row of a stack."""
    return ops.reshape(ops.convert_to_tensor(numbers, rows.dtype), (-1,) + (1,) * (len(rows.shape) - 1))
