"""Compiled models that must look again at their variables and rules."""

import gc
import itertools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from equalize import _backend as backend
from equalize._backend import keras_private

_SEEN: dict[type, tuple[list[weakref.ref[Any]], tuple[int, ...]]] = {}
"""For each class that was looked for: the objects found, and how often the collector had moved objects until then."""


def objects_of(kind: type) -> list[Any]:
    """All objects of a class and its subclasses, such as `keras.Model`, that the garbage collector knows.

    Keras variables do not know their layers, nor layers their models, and several may hold one. The collector knows
    about a million objects with TensorFlow. It keeps new ones apart until it moves them to the old ones, so only the
    first look, and the first after a move, goes through all. What `gc.freeze()` puts away before is not found.
    """
    seen, then = _SEEN.get(kind, ([], ()))
    now = _moves()
    young = (gc.get_objects(0), gc.get_objects(1)) if now == then else ()
    known = list(itertools.chain(*young)) if now == then == _moves() else gc.get_objects()
    kinds = {kind, *_subclasses(kind)}
    new = itertools.compress(known, map(kinds.__contains__, map(type, known)))  # no Python runs for each
    old = (reference() for reference in seen)
    found = list({id(item): item for item in (*old, *new) if item is not None}.values())
    _SEEN[kind] = [weakref.ref(item) for item in found], now
    return [item for item in found if not isinstance(item, keras.Layer) or keras_private.is_initialized(item)]


def _moves() -> tuple[int, ...]:
    """How often the collector has moved objects to the old ones, and has gone through those."""
    return tuple(generation["collections"] for generation in gc.get_stats()[1:])


def models_holding(variables: Iterable[keras.Variable]) -> list[keras.Model]:
    """The living models that hold one of the variables."""
    wanted = list(variables)
    return holding(objects_of(keras.Model), wanted) if wanted else []


def holding(layers: Iterable[keras.Layer], variables: Iterable[keras.Variable]) -> list[Any]:
    """Those of some layers or models that hold one of the variables."""
    wanted = {id(variable) for variable in variables}
    return [layer for layer in layers if any(id(variable) in wanted for variable in layer.variables)]


def retrace(variables: Iterable[keras.Variable]) -> None:
    """Makes the models that hold one of the variables retrace their functions, also while they train.

    Those that were traced before silently keep the variables, rules and numbers of that time.

    Args:
        variables: Variables that have changed their rule or their layers.
    """
    for model in models_holding(backend.perhaps_traced(variables)):
        retrace_model(model)


def retrace_model(model: keras.Model) -> None:
    """Makes a model retrace its functions, also while it trains."""
    for kind in ("train", "test", "predict"):
        if getattr(model, f"{kind}_function", None) is not None:
            backend.forget_traces(getattr(model, f"{kind}_step"))
            getattr(model, f"make_{kind}_function")(force=True)


def _subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
