"""Types for annotations, and what several backends compute in one way."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

Tensor: TypeAlias = Any
"""A native tensor of the active backend, for which Keras has no type; its shape and dtype are known."""

WriteTracker: TypeAlias = Callable[[keras.Variable], "Tensor | None"]
"""Given the variable that it tracks, returns its value if it is unwritten, else None."""


Computation: TypeAlias = Callable[[Any], "tuple[Tensor, Tensor | Sequence[Tensor]]"]
"""From rows to a tensor that adds up over their columns, and to rows, as a matrix or a list."""


def mark_nans(value: Tensor) -> Tensor:
    """The value with one kind of NaN: the same numbers, which no compiler can know to be the same bits."""
    return ops.where(value != value, ops.cast(float("nan"), value.dtype), value)


def track_one_by_one(
    track_writes: Callable[[keras.Variable, Tensor], WriteTracker],
    read: Callable[[keras.Variable], Tensor],
    variables: Sequence[keras.Variable],
) -> Callable[[], bool]:
    """All writes of some variables, tracked one by one."""
    tracked = [(weakref.ref(variable), track_writes(variable, read(variable))) for variable in variables]

    def none_written() -> bool:
        found = ((reference(), unwritten) for reference, unwritten in tracked)
        return all(variable is not None and unwritten(variable) is not None for variable, unwritten in found)

    return none_written


def write_one_by_one(variables: Sequence[keras.Variable], values: Sequence[Tensor]) -> list[Tensor]:
    """Assigns values to variables; returns the values."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return list(values)


def mix_in_passes(left: Tensor, right: Tensor, share: float | Tensor) -> Tensor:
    """`(1 − share)·left + share·right`, and exactly `left` wherever both are the same number.

    Subtracting a negative multiple keeps TensorFlow's graph optimizer from factoring out a common `share`,
    which would add before it scales and so overflow (Grappler's arithmetic optimizer, TensorFlow 2.21).
    """
    return ops.where(left == right, left, left * (1.0 - share) - right * (-share))


class Columns:
    """Tensors of one shape, flattened, as the rows of a matrix whose columns do not matter to each other.

    Functions of it may be called with any part of the columns, and once for each part.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._shape = tensors[0].shape
        self._whole: Any = [ops.reshape(x, (-1,)) for x in tensors]

    def map(self, function: Callable[[Any], Any]) -> "Columns":
        """The same columns, as what `function` makes of the list of their rows."""
        mapped = object.__new__(Columns)
        mapped._shape, mapped._whole = self._shape, function(self._whole)
        return mapped

    def compute(self, function: Computation) -> tuple[Tensor, list[Tensor]]:
        """What `function` returns, with its rows in the shape of the tensors that the columns were made of."""
        total, rows = function(self._whole)
        return total, [ops.reshape(row, self._shape) for row in unstacked(rows)]


def unstacked(rows: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of a matrix, or of a list."""
    return rows if isinstance(rows, (list, tuple)) else ops.unstack(rows)


def inner_products_of_rows(columns: Columns, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The inner products of n rows, `(n, n)`; the function that maps the columns has stacked them."""
    return columns.compute(lambda rows: (product(rows, ops.transpose(rows)), []))[0]
