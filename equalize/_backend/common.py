"""What is the same on every backend, or differs only in what Keras knows."""

from collections.abc import Iterable
from typing import Any

import keras

from equalize._backend import keras_private
from equalize._backend.keras_private import in_symbolic_scope, is_variable

__all__ = ["current_scope", "dtype", "in_symbolic_scope", "is_purged", "is_variable", "is_visible", "widest_dtype"]


def current_scope() -> Any:
    """The `keras.StatelessScope` that is active, or None."""
    return keras_private.stateless_scope()


def is_visible(variable: keras.Variable) -> bool:
    """Whether the variable can be read here, and written without loss.

    Inside a `StatelessScope`, which is how JAX trains, only the variables that the scope was given have a state
    that comes back. Everywhere else all variables have.
    """
    scope = current_scope()
    return scope is None or scope.get_current_value(variable) is not None


def is_purged(variable: keras.Variable) -> bool:
    """Whether Keras took the value away: while `fit` runs on JAX only the step holds it (Keras 3.15)."""
    return keras_private.held_value(variable) is None


def widest_dtype(dtypes: Iterable[str]) -> str | None:
    """The floating dtype that holds all numbers of some; None where none of them does."""
    found = set(dtypes)
    widest = [dtype for dtype in ("float64", "float32", "bfloat16", "float16") if dtype in found]
    return widest[0] if widest and not (len(found) > 1 and widest[0] == "bfloat16") else None


def dtype(x: Any) -> str:
    """The name of the dtype of a variable or a tensor, as Keras spells it."""
    return keras.backend.standardize_dtype(x.dtype)
