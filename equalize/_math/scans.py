"""What a matrix has so far, row by row."""

from collections.abc import Callable

from keras import ops

from equalize._backend import Tensor


def running(extreme: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
    """The largest row so far, or the smallest, at each row.

    Keras's `associative_scan` does not compile on TensorFlow (3.15).
    """
    step = 1
    while step < rows.shape[0]:
        rows = ops.concatenate([rows[:step], extreme(rows[step:], rows[:-step])])
        step *= 2
    return rows


def running_from_last(extreme: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
    """The same, from the last row to the first."""
    return ops.flip(running(extreme, ops.flip(rows, 0)), 0)
