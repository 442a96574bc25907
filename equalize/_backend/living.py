"""Compiled models that must look again at their variables and rules."""

import gc
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from equalize import _backend as backend
from equalize._backend import keras_private


def objects_of(kind: type) -> list[Any]:
    """All objects of a class and its subclasses, such as `keras.Model`, that the garbage collector knows.

    Keras variables do not know their layers, nor layers their models, and several may hold one. What `gc.freeze()` has
    put away is not found.
    """
    kinds = {kind, *_subclasses(kind)}
    known = gc.get_objects()  # about a million with TensorFlow, so no Python runs for each
    found = itertools.compress(known, map(kinds.__contains__, map(type, known)))
    return [item for item in found if not isinstance(item, keras.Layer) or keras_private.is_initialized(item)]


def models_holding(variables: Iterable[keras.Variable]) -> list[keras.Model]:
    """The living models that hold one of the variables."""
    wanted = {id(variable) for variable in variables}
    models = objects_of(keras.Model) if wanted else []
    return [model for model in models if any(id(variable) in wanted for variable in model.variables)]


def retrace(variables: Iterable[keras.Variable]) -> None:
    """Makes the models that hold one of the variables retrace their functions, also while they train.

    Those that were traced before silently keep the variables, rules and numbers of that time.

    Args:
        variables: Variables that have changed their rule or their layers.
    """
    for model in models_holding([variable for variable in variables if backend.may_be_traced(variable)]):
        for kind in ("train", "test", "predict"):
            if getattr(model, f"{kind}_function", None) is not None:
                getattr(model, f"make_{kind}_function")(force=True)


def _subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
