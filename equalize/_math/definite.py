"""Symmetric positive definite matrices: Gram matrices, inverses, and the quadratic programs that they make."""

from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._backend.tensors import inner_products_of_rows

# What is infeasible by less is rounding, of matrices whose diagonal is about 1.
_FEASIBLE = 1e-6

# So many exchanges of all that is infeasible may fail to leave less of it before they become exchanges of one.
_PATIENCE = 3


def gramian(columns: backend.Columns) -> Tensor:
    """The inner products of n rows, `(n, n)`; the function that maps the columns has stacked them."""
    return inner_products_of_rows(columns, backend.product)


def inverse(matrix: Tensor) -> Tensor:
    """The inverses of matrices, `(..., n, n)`."""
    root = ops.cholesky(matrix)
    identity = ops.broadcast_to(ops.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    half = ops.solve_triangular(root, identity, lower=True)
    return backend.product(ops.swapaxes(half, -1, -2), half)


def nonnegative_minimum(matrix: Tensor, linear: Tensor) -> Tensor:
    """Argmin over x ≥ 0 of ½·xᵀ·matrix·x − linearᵀ·x, for each of k rows of `linear`.

    Which entries are above 0 is found by exchanging all that violate the conditions of optimality, until none does
    (block principal pivoting). Where that gets no further, one is exchanged at a time, which ends for sure.

    Júdice and Pires, A block principal pivoting algorithm for large-scale strictly monotone linear complementarity
    problems (1994).

    Args:
        matrix: `(n, n)`, with a diagonal of about 1.
        linear: `(k, n)`.

    Returns:
        `(k, n)`.
    """
    k, n = linear.shape
    identity = ops.eye(n, dtype=matrix.dtype)
    places = ops.arange(n, dtype="int32")

    def solved(free: Tensor) -> Tensor:
        both = ops.expand_dims(free, 1) * ops.expand_dims(free, 2)
        matrices = both * matrix + (1.0 - both) * identity
        inverses = inverse(matrices)
        x = _times(inverses, free * linear)
        return free * (x + _times(inverses, free * linear - _times(matrices, x)))  # digits that the inverse has lost

    def infeasible(free: Tensor) -> Tensor:
        x = solved(free)
        slack = backend.product(x, matrix) - linear
        return ops.cast(free * x + (1.0 - free) * slack < -_FEASIBLE, matrix.dtype)

    def exchange(turn: Tensor, free: Tensor, wrong: Tensor, least: Tensor, patience: Tensor) -> tuple[Tensor, ...]:
        count = ops.sum(wrong, axis=1)
        better = count < least
        all_of_them = ops.logical_or(better, patience > 0.0)
        last = ops.max(ops.where(wrong > 0.0, places, -1), axis=1, keepdims=True)
        one = ops.cast(ops.equal(places, last), matrix.dtype)
        flipped = ops.where(ops.expand_dims(all_of_them, 1), wrong, one)
        free = free + flipped - 2.0 * free * flipped
        patience = ops.where(better, float(_PATIENCE), ops.maximum(patience - 1.0, 0.0))
        return turn + 1, free, infeasible(free), ops.minimum(count, least), patience

    free = ops.ones((k, n), matrix.dtype)
    start = (ops.cast(0, "int32"), free, infeasible(free), ops.full((k,), n + 1.0, matrix.dtype))
    patience = ops.full((k,), float(_PATIENCE), matrix.dtype)
    found = ops.while_loop(
        lambda turn, free, wrong, least, patience: ops.any(wrong > 0.0),
        exchange,
        (*start, patience),
        maximum_iterations=10 * n + 20,
    )
    return ops.maximum(solved(found[1]), 0.0)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """A matrix times a vector, for each of k."""
    return ops.sum(matrices * ops.expand_dims(vectors, 1), axis=2)
