"""Whether two constraints or regularizers do the same, whatever their configs say.

A config may be empty: that of a function, or of a class without `get_config`. So two are one if they are one object, or
if they give the same on the members' values and on random probes, each seen through its member's view.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize.views import View


class Through(keras.constraints.Constraint):
    """A constraint of one member, as a constraint of the common value that the member shows through its view."""

    def __init__(self, inner: Any, view: View):
        self.inner = inner
        self.view = view
        self.__name__ = name_of(inner)

    def __call__(self, common: Tensor) -> Tensor:
        return self.view.least_squares(self.inner(self.view.forward(common)))


@dataclass(frozen=True)
class Effect:
    """What a constraint or regularizer does to the common value of a group.

    Attributes:
        function: The constraint or regularizer, or None.
        view: The view of its member; None where it acts on the common value itself.
    """

    function: Any
    view: View | None = None

    def of(self, common: np.ndarray) -> Any:
        """The result for a common value, as an array; for what cannot be applied the error."""
        with backend.eagerly():
            value = ops.convert_to_tensor(common)
            value = value if self.view is None else self.view.forward(value)
            try:
                result = self.function(value)
                if self.view is not None and tuple(result.shape) == tuple(value.shape):
                    result = self.view.least_squares(result)
                return ops.convert_to_numpy(ops.cast(result, "float32"))
            except Exception as error:  # whatever a user's own function raises
                return repr(error)

    @property
    def _plain(self) -> Any:
        """Class, config and view, if it is one of Keras's own, whose configs say all."""
        own = type(self.function).__module__.startswith("keras.")
        return (type(self.function), repr(self.function.get_config()), self.view) if own else None


def same(one: Effect, other: Effect, values: Sequence[np.ndarray]) -> bool:
    """Whether two effects are the same on given values and on random ones of their shape.

    Args:
        one: An effect.
        other: Another.
        values: Common values, arrays of one shape and dtype.
    """
    if one.function is None or other.function is None:
        return one.function is other.function
    if one.function is other.function and one.view == other.view:
        return True
    if one._plain is not None and one._plain == other._plain:
        return True
    random = np.random.default_rng(0)
    probes = [(scale * random.normal(size=values[0].shape)).astype(values[0].dtype) for scale in (1e-2, 1.0, 1e2)]
    return all(_close(one.of(probe), other.of(probe)) for probe in [*values, *probes])


def described(function: Any) -> str:
    """A constraint or regularizer with its config, for messages."""
    try:
        config = function.get_config()
    except Exception:  # a function has none, and a class may raise
        config = {}
    listed = ", ".join(f"{key}={value!r}" for key, value in config.items())
    return f"{name_of(function)}({listed})" if listed else name_of(function)


def name_of(function: Any) -> str:
    """What a constraint or regularizer is called in messages: the name of its class, or of the function that it is."""
    return "none" if function is None else getattr(function, "__name__", type(function).__name__)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str)
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-5, atol=1e-7, equal_nan=True))
