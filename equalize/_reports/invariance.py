"""Whether values are as the `Invariant` in a constraint keeps them, wherever in it that stands."""

from typing import Any

from keras import ops

from equalize._backend import Tensor
from equalize._math import symmetry
from equalize._ties import effects
from equalize._ties.bound import Bound
from equalize.constraints import Invariant


def has_invariant(constraint: Any) -> bool:
    """Whether a constraint is an `Invariant`, or carries one inside; a tie that its group's rule brings, too."""
    if constraint is None or isinstance(constraint, Invariant):
        return constraint is not None
    brought = constraint.group.inner if isinstance(constraint, Bound) else None
    return has_invariant(brought) or has_invariant(getattr(constraint, "inner", None))


def asymmetry(constraint: Any, w: Tensor) -> float:
    """How far a value is from what the `Invariant` in a constraint keeps: the largest change of an entry by it."""
    if isinstance(constraint, Invariant):
        apart = ops.abs(ops.cast(symmetry.average(constraint.views, w) - w, "float32"))
        return float(ops.convert_to_numpy(ops.max(apart, initial=0.0)))
    if isinstance(constraint, effects.Through):
        w = constraint.view.forward(w)
    inner = getattr(constraint, "inner", None)
    return 0.0 if inner is None else asymmetry(inner, w)
