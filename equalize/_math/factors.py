"""A factor for each pair of members, as a symmetric matrix."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from keras import ops

from equalize._inputs import arguments
from equalize._inputs.arguments import received
from equalize.errors import EqualizeError

Factors: TypeAlias = tuple[tuple[float, ...], ...]
"""A symmetric matrix of non-negative numbers, row by row."""

_ROUNDING = 1e-6


def checked_factor(factor: Any) -> float | Factors:
    """The argument `factor` of a rule, a number or a matrix; entries that differ by rounding only become one.

    Raises:
        EqualizeError: A number is negative or not finite, or a matrix is not square or not symmetric.
        TypeError: It is neither a number nor a matrix of numbers.
    """
    if not isinstance(factor, (list, tuple, np.ndarray)) and not ops.is_tensor(factor):
        return arguments.number("factor", factor, low=0.0)
    problem = None
    try:
        matrix = np.asarray(ops.convert_to_numpy(factor) if ops.is_tensor(factor) else factor)
    except ValueError as error:  # rows of different lengths
        raise EqualizeError(f"{_EXPECTED} Received rows of different lengths: {received(factor)}.") from error
    except Exception as error:  # a backend about tensors that NumPy cannot read
        matrix, problem = np.asarray(None), error
    if matrix.dtype.kind not in "iuf":
        raise TypeError(f"{_EXPECTED} Received: {received(factor)}.") from problem
    matrix = matrix.astype("float64")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise EqualizeError(f"{_EXPECTED} Received an array of shape {matrix.shape}.")
    _require_entries(matrix, np.isfinite(matrix) & (matrix >= 0.0), "finite numbers that are not negative")
    _require_entries(matrix, np.isclose(matrix, matrix.T, rtol=_ROUNDING, atol=0.0), "what the transposed entry is")
    return as_factors(np.where(matrix == matrix.T, matrix, 0.5 * matrix + 0.5 * matrix.T))


def as_factors(matrix: np.ndarray) -> Factors:
    """A matrix as plain numbers, which compare and serialize."""
    return tuple(tuple(row) for row in matrix.tolist())


def subset(factors: Factors, places: Sequence[int]) -> Factors:
    """The rows and columns of some members."""
    return tuple(tuple(factors[i][j] for j in places) for i in places)


_EXPECTED = "`factor` must be a number, or a symmetric matrix of them with a row and a column for each member."


def _require_entries(matrix: np.ndarray, right: np.ndarray, expected: str) -> None:
    if not right.all():
        i, j = np.argwhere(~right)[0]
        raise EqualizeError(
            f"{_EXPECTED} Expected {expected}; received {matrix[i, j]:g} in row {i} and column {j}, and "
            f"{matrix[j, i]:g} in row {j} and column {i}."
        )
