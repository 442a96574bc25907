"""Proximal operators of fusion penalties, as pure functions of tensors: they make members exactly equal."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._math import definite, means, scans

# Neighbours in order that differ by no more units in the last place of the largest have been rounded apart.
_ROUNDING = 16

# Members that the solver of the norm brings this close, of the distance that they had, have met.
_MET = 1e-3

# What pulls them is bounded by so many times what holds them: then they come within a tenth of `_MET`.
_STIFF = 4096.0

# The solver stops when no distance changes by more than this part of what it was, or after so many turns.
_STEADY, _TURNS = 1e-5, 200


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


class _Solution(NamedTuple):
    """An iterate of the solver for the norm, with a row for each of n members; distances are `(n, n)`.

    Attributes:
        turn: How many turns it took.
        weights: The members as weighted means of the values, `(n, n)`.
        distances: How far members are apart.
        change: The largest change of a distance in the last turn, as a part of what it was among the values.
    """

    turn: Tensor
    weights: Tensor
    distances: Tensor
    change: Tensor


def pairwise_norm(values: Sequence[Tensor], factor: float | Tensor | np.ndarray) -> list[Tensor]:
    """Argmin over p of ½·Σ_i ‖w_i − p_i‖² + Σ_{i<j} factor_ij·‖p_i − p_j‖, the clustering problem of sums of norms.

    Each p_i is a weighted mean of the values, and the weights depend on the distances of these alone. So the values are
    seen in at most n coordinates, by a QR decomposition. There each turn has ‖p_i − p_j‖² / (2·d_ij) + d_ij / 2 in
    place of the norms, which is never below them, with the distances d_ij of the turn before. Members that come within
    a thousandth of the distance that they had are one from then on.

    Args:
        values: Tensors of one shape and floating dtype.
        factor: A number that is not negative, or a symmetric matrix of them, `(n, n)`.

    Returns:
        As many tensors. Those of members that have met are equal bit for bit: they are read from one place.
    """
    n, dtype = len(values), backend.dtype(values[0])
    if n == 1:
        return list(values)
    rows = backend.stack([ops.reshape(means.widen(value), (-1,)) for value in values])
    seen = rows - rows[:1]  # so that members that are equal stay as they are
    size = ops.max(ops.abs(seen))
    size = ops.where(size > 0.0, size, 1.0)
    points = seen / size
    if points.shape[1] > n:
        points = ops.transpose(ops.qr(ops.transpose(points))[1])
    factors = ops.cast(factor, rows.dtype)
    strength = factors / size
    among_values = _distances(points)
    pulls = _pulls(strength, among_values)
    if not strength.shape:
        pulls = ops.where(_certain(among_values, strength), _STIFF, pulls)
    solution = _solved(points, strength, pulls)
    # A member is rounded as far as it is from the first, from which it is seen.
    noise = _ROUNDING * float(np.finfo(backend.dtype(rows)).eps) * (among_values[:1] + among_values[:, :1])
    met = ops.cast(solution.distances <= ops.maximum(_MET * among_values, noise), rows.dtype)
    for _ in range(math.ceil(math.log2(n))):  # who met one of those that one has met
        met = ops.cast(backend.product(met, met) > 0.0, rows.dtype)
    means_of_clusters = met / ops.sum(met, axis=1, keepdims=True)
    # Stiff pulls cost digits, so those that have met are from now on as many points in one place, without any.
    points = backend.product(means_of_clusters, points)
    of_pairs = backend.product(means_of_clusters, ops.broadcast_to(strength, met.shape))
    strength = (1.0 - met) * backend.product(of_pairs, ops.transpose(means_of_clusters))
    weights = _solved(points, strength, _pulls(strength, solution.distances)).weights
    moved = rows[:1] + backend.product(backend.product(weights, means_of_clusters), seen)
    moved = ops.where(ops.max(factors) == 0.0, rows, moved)
    moved = ops.take(backend.computed_once(moved), ops.argmax(met, axis=1), axis=0)
    return [ops.cast(ops.reshape(row, values[0].shape), dtype) for row in ops.unstack(moved, n)]


def _solved(points: Tensor, strength: Tensor, pulls: Tensor) -> _Solution:
    """The minimizer for n points, `(n, m)`, the factor of the penalty, and the pulls of the first turn, `(n, n)`."""
    among_values = _distances(points)

    def solved(pulls: Tensor, turn: Tensor, before: Tensor) -> _Solution:
        weights = _pulled_together(pulls)
        distances = _distances(backend.product(weights, points))
        change = ops.abs(distances - before) / ops.where(among_values > 0.0, among_values, 1.0)
        return _Solution(turn + 1, weights, distances, ops.max(change))

    def again(*solution: Tensor) -> _Solution:
        turn, _, distances, _ = solution
        return solved(_pulls(strength, distances), turn, distances)

    first = solved(pulls, ops.cast(0, "int32"), among_values)
    last = ops.while_loop(lambda *solution: solution[3] > _STEADY, again, tuple(first), maximum_iterations=_TURNS)
    return _Solution(*last)


def _pulls(strength: Tensor, distances: Tensor) -> Tensor:
    """How strong a spring is that pulls with a given strength at a distance, at most as stiff as the solver takes."""
    return strength / ops.where(strength > 0.0, ops.maximum(distances, strength / _STIFF), 1.0)


def _certain(distances: Tensor, strength: Tensor) -> Tensor:
    """Pairs that are one in the minimizer for certain: of k members no two of which are further apart than k·strength.

    Panahi, Dubhashi, Johansson and Bhattacharyya, Clustering by sum of norms: stochastic incremental algorithm,
    convergence and cluster recovery (2017), theorem 1. Here the k members nearest to one, within k·strength / 2 of it.
    """
    n = distances.shape[0]
    counts = ops.cast(np.arange(1, n + 1), distances.dtype)
    within = ops.where(ops.sort(distances, axis=1) <= 0.5 * strength * counts, counts, 0.0)
    radius = 0.5 * strength * ops.max(within, axis=1, keepdims=True)
    near = distances <= radius
    return ops.logical_or(near, ops.transpose(near))


def _pulled_together(pulls: Tensor) -> Tensor:
    """(I + L)⁻¹ for the Laplacian L of a graph with these weights: where springs of that strength bring points to."""
    n = pulls.shape[0]
    identity = ops.eye(n, dtype=pulls.dtype)
    # A solver of some backends raises on what is not finite; that shows in the values all the same.
    pulls = ops.where(ops.isfinite(pulls), pulls, 0.0) * (1.0 - identity)
    return definite.inverse(ops.diag(1.0 + ops.sum(pulls, axis=1)) - pulls)


def _distances(points: Tensor) -> Tensor:
    """The distances of n points, `(n, m)`, by differences: products of matrices lose those of points that are close."""
    n, m = points.shape
    some = max(1, 2**22 // n**2)
    squares = ops.zeros((n, n), points.dtype)
    for start in range(0, m, some):
        part = points[:, start : start + some]
        squares = squares + ops.sum(ops.square(ops.expand_dims(part, 0) - ops.expand_dims(part, 1)), axis=2)
    return ops.sqrt(squares)
