"""What layers hold in their attributes, and in lists, tuples and dictionaries there."""

from collections.abc import Iterator
from typing import Any

import keras

from equalize._backend import keras_private


def attributes(layer: keras.Layer) -> dict[str, Any]:
    """The attributes of a layer, without Keras's own lists of its variables and TensorFlow's of what it checkpoints.

    Those of TensorFlow follow what is set; what is exchanged in only one of them stays in the other.
    """
    return {
        name: value
        for name, value in vars(layer).items()
        if not name.startswith("_self_") and not any(value is store for store in keras_private.own_variables(layer))
    }


def objects(value: Any) -> Iterator[Any]:
    """An attribute's value, or everything in it."""
    parts = list(value.values() if isinstance(value, dict) else value) if isinstance(value, (dict, list, tuple)) else []
    for part in parts:
        yield from objects(part)
    yield value


def exchange(layer: keras.Layer, old: Any, new: Any) -> None:
    """Puts `new` wherever a layer holds `old`."""
    for name, value in attributes(layer).items():
        if any(part is old for part in objects(value)):
            setattr(layer, name, _exchanged(value, old, new))


def _exchanged(value: Any, old: Any, new: Any) -> Any:
    """The value with `new` for `old`; lists and dictionaries are changed in place, since others may hold them."""
    if value is old:
        return new
    if isinstance(value, list):
        value[:] = [_exchanged(part, old, new) for part in value]
    elif isinstance(value, dict):
        for key, part in value.items():
            value[key] = _exchanged(part, old, new)
    elif isinstance(value, tuple):
        parts = [_exchanged(part, old, new) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
