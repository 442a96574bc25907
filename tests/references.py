"""The penalties by brute force in NumPy's float64: for each its value, and its gradient with 0 where it has none.

`values` is an array of shape `(n, ...)`, and so is a gradient. `strengths` is None or an n×n matrix.
"""

import itertools

import numpy as np


def _over_pairs(values, strengths, term, pairs=None):
    """A sum of terms of pairs, each a function from a difference to a value and a gradient."""
    total, gradient = 0.0, np.zeros_like(values)
    for i, j in itertools.combinations(range(len(values)), 2) if pairs is None else pairs:
        strength = 1.0 if strengths is None else strengths[i][j]
        value, slope = term(values[i] - values[j])
        total += strength * value
        gradient[i] += strength * slope
        gradient[j] -= strength * slope
    return total, gradient


def _squared(difference):
    return np.sum(difference**2), 2 * difference


def _norm(difference):
    norm = np.sqrt(np.sum(difference**2))
    return norm, difference / norm if norm else np.zeros_like(difference)


def _absolute(difference):
    return np.sum(np.abs(difference)), np.sign(difference)


def mean_l2(values, strengths=None):
    distance = values - np.mean(values, axis=0)
    return np.sum(distance**2), 2 * distance


def pairwise_l2(values, strengths=None):
    return _over_pairs(values, strengths, _squared)


def pairwise_norm(values, strengths=None):
    return _over_pairs(values, strengths, _norm)


def pairwise_l1(values, strengths=None):
    return _over_pairs(values, strengths, _absolute)


def chain_l2(values, strengths=None):
    return _over_pairs(values, strengths, _squared, [(i, i + 1) for i in range(len(values) - 1)])


def trace_norm(values, strengths=None):
    left, singular, right = np.linalg.svd(np.reshape(values, (len(values), -1)), full_matrices=False)
    kept = singular > 1e-9 * max(singular.max(), 1e-300)
    return np.sum(singular), np.reshape((left * kept) @ right, np.shape(values))


def well_conditioned(values):
    """Whether float32 can tell the singular values that are zero from the others."""
    singular = np.linalg.svd(np.reshape(values, (len(values), -1)), compute_uv=False)
    return not np.any((singular > 1e-9) & (singular < 0.02 * singular.max()))
