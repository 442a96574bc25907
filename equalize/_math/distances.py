"""The sum of the distances of many pairs of tensors, and its gradient, by products of matrices.

‖v_i − v_j‖² = ‖v_i‖² + ‖v_j‖² − 2⟨v_i, v_j⟩ takes one product of an n×D matrix with itself in place of n² differences
of D entries, but loses what is small beside ‖v_i‖² + ‖v_j‖². So the rows are seen from one of them, those that are
close to each other once more from one among them, and where even that is too coarse all is computed by differences.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._math import definite

Sum: TypeAlias = tuple[Tensor, list[Tensor]]
"""A sum of distances, and its gradients by the tensors."""

# ‖v_i − v_j‖² must be this part of ‖v_i‖² + ‖v_j‖² at least: rounding, of 1e-6 or so, is then 1e-5 of it.
_CLOSE = 0.1


def weighted_sum(values: Sequence[Tensor], factors: np.ndarray, by_differences: Callable[[], Sum]) -> Sum:
    """Σ_{i<j} f_ij · ‖v_i − v_j‖ and its gradients.

    Args:
        values: n tensors of one shape.
        factors: The factors, `(n, n)`, symmetric.
        by_differences: What computes the same from the differences of the tensors, right at every magnitude.
    """
    n, dtype = len(factors), backend.dtype(values[0])
    factor = ops.convert_to_tensor(factors * (1 - np.eye(n)), dtype=dtype)
    matters = ops.convert_to_tensor((factors != 0) & ~np.eye(n, dtype=bool))
    rows = backend.columns(values).map(backend.stack)
    seen = rows.map(lambda rows: rows - rows[:1])
    squares, good, close = _squared_distances(seen, dtype)
    total, slopes = _pulled(factor, squares, good, seen)

    def once_more() -> Sum:
        nearest = ops.argmax(ops.cast(close, "int32"), axis=1)  # the first that is close, at the latest the row itself
        again = rows.map(lambda rows: rows - ops.take(rows, nearest, axis=0))
        finer, good_now, _ = _squared_distances(again, dtype)
        among = close & good_now & (ops.expand_dims(nearest, 0) == ops.expand_dims(nearest, 1))
        more, further = _pulled(factor, finer, among, again)
        missing = ops.any(matters & ~(good | among))
        both = [slope + another for slope, another in zip(slopes, further, strict=True)]
        return ops.cond(missing, by_differences, lambda: (total + more, both))

    return ops.cond(ops.any(matters & ~good), once_more, lambda: (total, slopes))


def _squared_distances(seen: backend.Columns, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """The squared distances of all pairs, which of them are right, and which rows are too close to each other."""
    gram = definite.gramian(seen)
    own = ops.diagonal(gram)
    sums = ops.expand_dims(own, 0) + ops.expand_dims(own, 1)
    squares = sums - 2.0 * gram
    info = np.finfo(dtype)
    far = squares >= _CLOSE * sums
    # Where squares were lost below the smallest number, or would be above the largest, differences are scaled.
    safe = (sums > float(info.tiny) * 2.0**40) & (sums < float(info.max) / 2.0)
    return squares, far & safe, ops.logical_not(far)


def _pulled(factor: Tensor, squares: Tensor, good: Tensor, seen: backend.Columns) -> Sum:
    """The sum over the pairs that are right, and its gradients: Σ_j f_ij · (v_i − v_j) / ‖v_i − v_j‖ for row i."""
    norms = ops.sqrt(ops.where(good, squares, 1.0))
    pulls = ops.where(good, factor / norms, 0.0)
    laplacian = ops.diag(ops.sum(pulls, axis=1)) - pulls
    total = 0.5 * ops.sum(ops.where(good, factor * norms, 0.0))
    _, slopes = seen.compute(lambda rows: (ops.zeros(()), backend.product(laplacian, rows)))
    return total, slopes
