"""Proximal operators of fusion penalties, as pure functions of tensors: they make members exactly equal."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._math import means, scans

# Neighbours in order that differ by no more units in the last place of the largest have been rounded apart.
_ROUNDING = 16


def pairwise_l1(values: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Argmin over p of ½·Σ_i ‖w_i − p_i‖² + factor·Σ_{i<j} ‖p_i − p_j‖₁.

    In each coordinate by itself. The minimizer has the order of the values, and in that order the penalty is linear: it
    pulls the k-th smallest of n up by factor·(n + 1 − 2k). So the values are sorted, shifted by that, and projected
    onto the ascending sequences, which makes those equal that have met.

    Args:
        values: Tensors of one shape and floating dtype.
        factor: A number that is not negative.

    Returns:
        As many tensors. Entries that are equal in the minimizer are equal bit for bit: they are read from one place.
    """
    n, dtype = len(values), backend.dtype(values[0])
    if n == 1:
        return list(values)
    rows = backend.stack([ops.reshape(means.widen(value), (-1,)) for value in values])
    order = ops.argsort(rows, axis=0)
    pull = ops.reshape(ops.cast(np.arange(n - 1, -n, -2), rows.dtype), (-1, 1)) * ops.cast(factor, rows.dtype)
    fitted = _ascending(ops.take_along_axis(rows, order, axis=0) + pull)
    size = ops.max(ops.abs(rows), axis=0, keepdims=True) + ops.max(ops.abs(pull))
    apart = fitted[1:] - fitted[:-1] > _ROUNDING * float(np.finfo(backend.dtype(rows)).eps) * size
    starts = ops.concatenate([ops.ones_like(apart[:1]), apart])
    place = ops.where(starts, ops.reshape(ops.arange(n, dtype="int32"), (-1, 1)), 0)
    joined = ops.take_along_axis(fitted, scans.running(ops.maximum, place), axis=0)
    moved = ops.take_along_axis(joined, ops.argsort(order, axis=0), axis=0)
    # Where nothing is pulled, and where all agree already, no bit changes.
    still = ops.logical_or(ops.min(rows, axis=0) == ops.max(rows, axis=0), ops.cast(factor, rows.dtype) == 0.0)
    moved = ops.where(still, rows, moved)
    return [ops.cast(ops.reshape(row, values[0].shape), dtype) for row in ops.unstack(moved, n)]


def _ascending(rows: Tensor) -> Tensor:
    """The projection of each column onto the ascending sequences: max over a ≤ k of min over b ≥ k of mean(a..b).

    Robertson, Wright and Dykstra, Order restricted statistical inference (1988), theorem 1.4.4.
    """
    n = rows.shape[0]
    base = rows[:1]
    sums = ops.cumsum(rows - base, axis=0)  # of differences, so that equal columns are exact
    counts = ops.reshape(ops.cast(np.arange(1, n + 1), rows.dtype), (-1, 1))
    fitted = scans.running_from_last(ops.minimum, sums / counts)
    for a in range(1, n):
        least = scans.running_from_last(ops.minimum, (sums[a:] - sums[a - 1 : a]) / counts[: n - a])
        fitted = ops.concatenate([fitted[:a], ops.maximum(fitted[a:], least)])
    return fitted + base
