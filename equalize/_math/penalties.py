"""Penalties of a group, as pure functions of tensors.

Each takes the values of all members, tensors of one shape, and returns a scalar that the backend differentiates. Where
the gradients are known better than a backend finds them they come with the value.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._math import definite, distances, means, scans

Pair: TypeAlias = tuple[int, int, float]
"""Two members, and how strongly they pull each other."""

Term: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the difference of two members to what the pair adds to the penalty, and to that penalty's gradient."""

# One by one, so many pairs are faster than the forms that take a row or the whole group at a time. A program's size,
# and so its compilation, grows with their number: by XLA 1.3 s for 16 members, 24 s for 64.
_FEW = 16 * 15 // 2

# Up to this many members, the signs of all differences are faster than sorting.
_SORTED = 64

# From this many members on, products of matrices are faster than differences.
_MANY = 4


def mean_l2(values: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Σ_i a_i · ‖w_i − mean‖², with the mean by the same weights; without weights all a_i are 1.

    Since Σ a_i·(w_i − mean) = 0, what would flow through the mean cancels, and 2·a_i·(w_i − mean) is all of ∂P/∂w_i.
    """
    if weights is None and means.are_better_stacked(values):
        rows = backend.stack(values)
        rows = rows - ops.stop_gradient(rows[:1])  # so that members that are equal are 0, and so is their mean
        return backend.sum_of_squares([rows - ops.stop_gradient(ops.mean(rows, axis=0))])
    constants = _constants(values)
    mean = backend.computed_once(means.mean(constants, weights))
    deviations = [value - mean for value in constants]
    roots, slopes = deviations, deviations
    if weights is not None:
        roots = [a**0.5 * each for a, each in zip(weights, deviations, strict=True)]
        slopes = [a * each for a, each in zip(weights, deviations, strict=True)]
    return 2.0 * backend.with_gradients(0.5 * _sum_of_squares(roots), values, slopes)


def pairwise_l2(
    values: Sequence[Tensor], factors: np.ndarray | None = None, weights: Sequence[float] | None = None
) -> Tensor:
    """Σ_{i<j} f_ij · ‖w_i − w_j‖². Without factors it is n · Σ_i ‖w_i − mean‖², which forms no pair.

    With weights of mean 1 in place of factors f_ij is a_i · a_j, and the sum n · Σ_i a_i · ‖w_i − mean‖².
    """
    if factors is None:
        return mean_l2(values, weights) * len(values)
    columns = backend.columns(_constants(values))
    half, slopes = columns.compute(lambda rows: _over_graph(rows, factors, _half_squared, _half_squared_rows))
    return 2.0 * backend.with_gradients(half, values, slopes)


def pairwise_norm(values: Sequence[Tensor], factors: np.ndarray | None = None) -> Tensor:
    """Σ_{i<j} f_ij · ‖w_i − w_j‖, not squared. Members that are equal do not pull each other."""
    of_pairs = np.ones((len(values),) * 2) if factors is None else factors
    constants = _constants(values)

    def by_differences() -> tuple[Tensor, list[Tensor]]:
        # Room for 2**40 squares in a sum.
        power = _power(constants, np.finfo(backend.dtype(values[0])).maxexp // 2 - 20)
        total, slopes = _over_graph([value * power for value in constants], of_pairs, _norm, _norm_rows)
        return total / power, slopes

    by_products = functools.partial(distances.weighted_sum, constants, of_pairs, by_differences)
    total, slopes = (by_differences if len(values) < _MANY else by_products)()
    return backend.with_gradients(total, values, slopes)


def chain_l2(values: Sequence[Tensor]) -> Tensor:
    """Σ_i ‖w_{i+1} − w_i‖²."""
    if means.are_better_stacked(values):
        rows = backend.stack(values)
        return backend.sum_of_squares([rows[1:] - rows[:-1]])
    constants = _constants(values)
    if len(constants) == 1:
        return backend.with_gradients(ops.zeros((), constants[0].dtype), values, [ops.zeros_like(constants[0])])
    steps = [after - before for before, after in itertools.pairwise(constants)]
    half = 0.5 * _sum_of_squares(steps)
    slopes = [-steps[0], *[before - after for before, after in itertools.pairwise(steps)], steps[-1]]
    return 2.0 * backend.with_gradients(half, values, slopes)


def pairwise_l1(values: Sequence[Tensor]) -> Tensor:
    """Σ_{i<j} ‖w_i − w_j‖₁, whose gradient is, in each coordinate, the number of members below less that above."""
    by_columns = _by_signs if len(values) <= _SORTED else _by_rank
    total, slopes = backend.columns(_constants(values)).compute(by_columns)
    return backend.with_gradients(total, values, slopes)


def trace_norm(values: Sequence[Tensor]) -> Tensor:
    """The sum of the singular values of the matrix whose rows are the members.

    The left singular vectors U come from the n×n Gram matrix. The singular values are the norms of the rows of UᵀW:
    as roots of the Gram matrix's eigenvalues they would be wrong by the root of the rounding error.
    """
    constants = _constants(values)
    power = _power(constants, 0)
    columns = backend.columns(constants).map(lambda rows: backend.stack(rows) * power)
    gram = definite.gramian(columns)
    # A solver of some backends raises on what is not finite; that shows in the rotated rows all the same.
    _, vectors = ops.eigh(ops.where(ops.isfinite(gram), gram, 0.0))
    rotated = columns.map(lambda rows: backend.product(ops.transpose(vectors), rows))
    squares, _ = rotated.compute(lambda rows: (ops.sum(ops.square(rows), axis=1), []))
    singular = ops.sqrt(squares)
    noise = _RANK_CUT[backend.dtype(gram)] * ops.max(singular)
    inverse = ops.where(singular <= noise, 0.0, 1.0 / singular)
    _, slopes = rotated.compute(lambda rows: (ops.zeros(()), backend.product(vectors * inverse, rows)))
    return backend.with_gradients(ops.sum(singular) / power, values, slopes)


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    return backend.sum_of_squares([backend.stack(tensors)] if means.are_small(tensors) else tensors)


# Singular values below this part of the largest are rounding, and have the subgradient 0.
_RANK_CUT = {"float32": 3e-5, "float64": 1e-13}


def _power(values: Sequence[Tensor], exponent: int) -> Tensor:
    """A power of two that brings the largest entry to 2**exponent, or at most 2**8 below it.

    A norm is that of the values times a power of two, over that power, and both have one gradient. No bit changes, and
    no square overflows or is lost. The powers are in a table, since compilers round what they compute.
    """
    dtype = backend.dtype(values[0])
    info = np.finfo(dtype)
    bounds = np.arange(info.minexp, info.maxexp + 8, 8)
    powers = np.clip(exponent - bounds, info.minexp, -info.minexp)  # of normal numbers, and so is the inverse
    extremes = [extreme for value in values for extreme in (ops.max(value), -ops.min(value))]
    above = ops.max(ops.stack(extremes)) > ops.convert_to_tensor(np.exp2(bounds[:-1]), dtype)
    return ops.take(ops.convert_to_tensor(np.exp2(powers), dtype), ops.sum(ops.cast(above, "int32")))


def _constants(values: Sequence[Tensor]) -> list[Tensor]:
    """The values without gradients, for penalties whose gradients are computed with them."""
    return [ops.stop_gradient(value) for value in values]


def _over_graph(values: Sequence[Tensor], factors: np.ndarray, term: Term, terms: Term) -> tuple[Tensor, list[Tensor]]:
    """A penalty over the pairs that have a factor, and its gradients."""
    pairs = [(int(i), int(j), float(factors[i, j])) for i, j in np.argwhere(np.triu(factors, 1))]
    return _over_pairs(values, pairs, term) if len(pairs) <= _FEW else _over_rows(values, factors, terms)


def _over_pairs(values: Sequence[Tensor], pairs: Sequence[Pair], term: Term) -> tuple[Tensor, list[Tensor]]:
    """A penalty and its gradients, pair by pair."""
    total = ops.zeros((), values[0].dtype)
    slopes: list[Tensor | None] = [None] * len(values)
    done: list[Tensor] = []
    for i, j, factor in pairs:
        with backend.after(done):  # else all differences would be there at once
            value, slope = term(values[i] - values[j])
            value, slope = (value, slope) if factor == 1.0 else (factor * value, factor * slope)
            total = total + value
            slopes[i] = slope if slopes[i] is None else slopes[i] + slope
            slopes[j] = -slope if slopes[j] is None else slopes[j] - slope
        done = [total, slopes[i], slopes[j]]
    return total, [ops.zeros_like(values[0]) if slope is None else slope for slope in slopes]


def _over_rows(values: Sequence[Tensor], factors: np.ndarray, terms: Term) -> tuple[Tensor, list[Tensor]]:
    """The same, with all pairs of one member at a time."""
    rows = _rows(values)
    total, slopes = ops.zeros((), rows.dtype), []
    for i, row in enumerate(ops.unstack(rows)):
        with backend.after([total, *slopes[-1:]]):
            factor = ops.convert_to_tensor(factors[i : i + 1], dtype=rows.dtype)
            value, slope = terms(row - rows)
            total = total + 0.5 * ops.sum(factor * value)
            slopes.append(ops.reshape(backend.product(factor, slope), values[0].shape))
    return total, slopes


@backend.fused
def _by_signs(values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The penalty over all absolute differences and its gradients, from the sign of each difference."""
    ranks: list[Tensor | None] = [None] * len(values)
    for j in range(len(values)):
        for i in range(j):
            sign = ops.sign(values[j] - values[i])
            ranks[j] = sign if i == 0 else ranks[j] + sign
            ranks[i] = -sign if ranks[i] is None else ranks[i] - sign
    slopes = [ops.zeros_like(values[0]) if rank is None else rank for rank in ranks]
    parts = [ops.sum(slope * (value - values[0])) for slope, value in zip(slopes, values, strict=True)]
    return sum(parts[1:], start=parts[0]), slopes


def _by_rank(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The penalty over all absolute differences and its gradients, by sorting the group in each coordinate."""
    rows, n = backend.stack(values), len(values)
    order = ops.argsort(rows, axis=0)
    ascending = ops.take_along_axis(rows, order, axis=0)
    place = ops.expand_dims(ops.arange(n, dtype=rows.dtype), 1)
    steps = ascending[1:] != ascending[:-1]
    edge = ops.ones_like(steps[:1])
    first = ops.where(ops.concatenate([edge, steps]), place, 0.0)
    last = ops.where(ops.concatenate([steps, edge]), place, float(n))
    below = scans.running(ops.maximum, first)
    above = float(n - 1) - scans.running_from_last(ops.minimum, last)
    ranks = below - above
    total = ops.sum(ranks * (ascending - ascending[n // 2]))
    slopes = ops.take_along_axis(ranks, ops.argsort(order, axis=0), axis=0)
    return total, slopes


def _rows(values: Sequence[Tensor]) -> Tensor:
    """The members as the rows of a matrix."""
    return backend.stack([ops.reshape(value, (-1,)) for value in values])


def _half_squared(difference: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * backend.sum_of_squares([difference]), difference


def _half_squared_rows(differences: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * ops.sum(ops.square(differences), axis=1), differences


def _norm(difference: Tensor) -> tuple[Tensor, Tensor]:
    norm = ops.sqrt(backend.sum_of_squares([difference]))
    return norm, _reciprocal(norm) * difference


def _norm_rows(differences: Tensor) -> tuple[Tensor, Tensor]:
    norms = ops.sqrt(ops.sum(ops.square(differences), axis=1))
    return norms, ops.expand_dims(_reciprocal(norms), 1) * differences


def _reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, and 0 for 0: of the subgradients where two members are equal, the smallest."""
    return ops.where(norm == 0.0, 0.0, 1.0 / norm)
