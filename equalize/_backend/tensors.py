"""Types for annotations, and arithmetic that several backends need."""

from collections.abc import Callable
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
