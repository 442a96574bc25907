"""Compiled models that must look again at their variables and rules."""

import gc
from collections.abc import Iterable
from typing import Any

import keras


def living_layers() -> list[Any]:
    """All layers and models there are. Keras variables do not know their layers, and several may hold one."""
    return [item for item in gc.get_objects() if issubclass(type(item), keras.Layer) and hasattr(item, "_tracker")]


def retrace(variables: Iterable[keras.Variable], layers: Iterable[Any] | None = None) -> None:
    """Makes the models that hold one of the variables trace their functions anew, also while they train.

    Args:
        variables: Variables that have changed their rule or their layers.
        layers: What `living_layers` has found, if it was asked already.
    """
    changed = {id(variable) for variable in variables}
    for model in living_layers() if layers is None else layers:
        if isinstance(model, keras.Model) and any(id(variable) in changed for variable in model.variables):
            renew(model)


def renew(model: keras.Model) -> None:
    """Makes a model trace its functions anew at the next step.

    Those that were traced before go on with the variables, rules and numbers of that time, without a word.
    """
    for kind in ("train", "test", "predict"):
        if getattr(model, f"{kind}_function", None) is not None:
            getattr(model, f"make_{kind}_function")(force=True)
