"""Which weight of one layer corresponds to which of another: by place and kind, whatever their names."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import keras

from equalize import _backend as backend
from equalize._backend import keras_private
from equalize.errors import GroupMismatchError, NotLinkedError

Own: TypeAlias = Callable[[keras.Layer], list[Any]]
"""Those of a layer's own variables that are meant."""


def made_trainable(layer: keras.Layer) -> list[Any]:
    """The weights that were made trainable, frozen or not."""
    return keras_private.own_variables(layer)[0]


def statistics(layer: keras.Layer) -> list[Any]:
    """What a layer updates by itself while it is trained, as the moving statistics of a `BatchNormalization`."""
    if getattr(layer, "quantization_mode", None) is not None:
        return []  # the scales of integers
    others = keras_private.own_variables(layer)[1]
    return [variable for variable in others if keras.backend.is_float_dtype(backend.dtype(variable))]


def every_weight(layer: keras.Layer) -> list[Any]:
    """All variables."""
    return [variable for store in keras_private.own_variables(layer) for variable in store]


def paired_weights(
    task: str, layers: Sequence[keras.Layer], own: Own = made_trainable
) -> dict[str, list[keras.Variable]]:
    """The weights of layers of one structure, side by side.

    Args:
        task: What they are wanted for, as messages begin: "Cannot tie layers into group 'blocks'".
        layers: Layers or models.
        own: Which weights are meant.

    Returns:
        The weights of all layers by their common place inside the layer, for instance
        `{"query/kernel": [of the first, of the second]}`.

    Raises:
        NotLinkedError: A layer has no weights yet.
        GroupMismatchError: The layers have different structures.
    """
    for layer in layers:
        if not has_weights(layer, own):
            raise NotLinkedError(
                f"{task}: layer '{layer.name}' has no weights"
                f"{'' if layer.built else ', since it is not built'}. Expected: a built layer with weights. "
                "Build it, or call it once, before."
            )
    return dict(_pairs(task, layers, own, "", [set() for _ in layers]))


def _pairs(
    task: str, layers: Sequence[keras.Layer], own: Own, prefix: str, seen: list[set[int]]
) -> Iterator[tuple[str, list[keras.Variable]]]:
    """The weights side by side, with the place that the first layer gives them.

    Names only make places readable: siblings are told apart by their order among those of one base name, so `dense_7`
    and `dense_8` are `dense` and `dense_1` in every layer.
    """
    taken: dict[str, int] = {}
    owned = [_own(layer, own, known) for layer, known in zip(layers, seen, strict=True)]
    children = [_children(layer, own, known) for layer, known in zip(layers, seen, strict=True)]
    for layer, weights, below in zip(layers[1:], owned[1:], children[1:], strict=True):
        if len(weights) != len(owned[0]) or len(below) != len(children[0]) or not _of_one_kind(layers[0], layer):
            raise GroupMismatchError(
                f"{task}: their structures differ{f' at {prefix[:-1]!r}' if prefix else ''}.\n"
                f"Expected, set by {_outline(layers[0], owned[0], children[0])}\n"
                f"Received {_outline(layer, weights, below)}\n"
                "Take layers of one structure, or their variables one by one."
            )
    for weights in zip(*owned, strict=True):
        yield prefix + _numbered(_stable(weights[0]), taken), list(weights)
    for siblings in zip(*children, strict=True):
        if all(id(child) in known for child, known in zip(siblings, seen, strict=True)):
            continue
        for child, known in zip(siblings, seen, strict=True):
            known.add(id(child))
        yield from _pairs(task, siblings, own, f"{prefix}{_numbered(_base(siblings[0].name), taken)}/", seen)


def _own(layer: keras.Layer, own: Own, seen: set[int]) -> list[keras.Variable]:
    """The weights that the layer itself holds, frozen or not, without those that were seen; they are seen now."""
    weights = {id(variable): variable for variable in own(layer)}
    new = [weight for key, weight in weights.items() if key not in seen]
    seen.update(weights)
    return new


def _children(layer: keras.Layer, own: Own, seen: set[int]) -> list[keras.Layer]:
    """The layers inside that have weights."""
    children = {id(child): child for child in keras_private.sublayers(layer)}
    return [child for key, child in children.items() if key not in seen and has_weights(child, own)]


def has_weights(layer: keras.Layer, own: Own) -> bool:
    """Whether the layer, or one inside it, has such weights."""
    return any(own(each) for each in keras_private.flattened(layer))


def _of_one_kind(first: keras.Layer, other: keras.Layer) -> bool:
    """Whether two layers do the same with their weights, as far as one can see: one class, or weights of one name."""
    names = [[_stable(weight) for weight in _own(layer, every_weight, set())] for layer in (first, other)]
    return type(first) is type(other) or names[0] == names[1]


def _base(name: str) -> str:
    """A name without the number by which Keras tells it from others."""
    return re.sub(r"_[0-9]+$", "", name)


def _stable(weight: keras.Variable) -> str:
    """A weight's name; Keras numbers those that were made without one in the order of their making."""
    return re.sub(r"^variable_[0-9]+$", "variable", weight.name)


def _numbered(base: str, taken: dict[str, int]) -> str:
    taken[base] = taken.get(base, -1) + 1
    return base if taken[base] == 0 else f"{base}_{taken[base]}"


def _outline(layer: keras.Layer, weights: Sequence[keras.Variable], children: Sequence[keras.Layer]) -> str:
    lines = [f"{weight.name} {tuple(weight.shape)}" for weight in weights]
    lines += [f"{child.name} ({type(child).__name__})" for child in children]
    return f"'{layer.name}' ({type(layer).__name__}):" + "".join(f"\n    {line}" for line in lines)
