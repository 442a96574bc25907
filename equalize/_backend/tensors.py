"""Types for annotations, and arithmetic that several backends need."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

Tensor: TypeAlias = Any
"""A native tensor of the active backend, for which Keras has no type; its shape and dtype are known."""

WriteTracker: TypeAlias = Callable[[keras.Variable], "Tensor | None"]
"""Given the variable that it tracks, returns its value if it is unwritten, else None."""


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
