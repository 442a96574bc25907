"""Which weight of one layer corresponds to which of another: by its place inside the layer."""

import re
from collections.abc import Iterator, Sequence

import keras

from equalize.errors import GroupMismatchError, NotLinkedError


def paired_weights(
    task: str, layers: Sequence[keras.Layer], *, trainable: bool = True
) -> dict[str, list[keras.Variable]]:
    """The weights of layers of one structure, side by side.

    Args:
        task: What they are wanted for, as messages begin: "Cannot tie layers into group 'blocks'".
        layers: Layers or models.
        trainable: Whether only weights that were made trainable are meant.

    Returns:
        The weights of all layers by their common place inside the layer, for instance
        `{"query/kernel": [of the first, of the second]}`.

    Raises:
        NotLinkedError: A layer has no weights yet.
        GroupMismatchError: The layers have different places.
    """
    by_layer = []
    for layer in layers:
        places = dict(_places(layer, trainable))
        if not places:
            raise NotLinkedError(
                f"{task}: layer '{layer.name}' has no weights"
                f"{'' if layer.built else ', since it is not built'}. Expected: a built layer with weights. "
                "Build it, or call it once, before."
            )
        by_layer.append(places)
    for layer, places in zip(layers[1:], by_layer[1:], strict=True):
        if list(places) != list(by_layer[0]):
            raise GroupMismatchError(
                f"{task}: their structures differ.\n"
                f"Expected, set by {_outline(layers[0], by_layer[0])}\n"
                f"Received {_outline(layer, places)}\n"
                "Take layers of one structure, or their variables one by one."
            )
    return {place: [places[place] for places in by_layer] for place in by_layer[0]}


def _places(
    layer: keras.Layer, trainable: bool, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, keras.Variable]]:
    """The weights, frozen or not, with their places in the tree of layers.

    Keras numbers layers in the order of their making, so siblings are told apart by their order among those of one
    base name: `dense_7` and `dense_8` are `dense` and `dense_1` in every layer.
    """
    seen = set() if seen is None else seen
    taken: dict[str, int] = {}
    for variable in layer._trainable_variables + ([] if trainable else layer._non_trainable_variables):
        if id(variable) not in seen:
            seen.add(id(variable))
            yield prefix + _numbered(variable.name, taken), variable
    for child in layer._layers:
        if id(child) not in seen:
            seen.add(id(child))
            below = f"{prefix}{_numbered(re.sub(r'_[0-9]+$', '', child.name), taken)}/"
            yield from _places(child, trainable, below, seen)


def _numbered(base: str, taken: dict[str, int]) -> str:
    taken[base] = taken.get(base, -1) + 1
    return base if taken[base] == 0 else f"{base}_{taken[base]}"


def _outline(layer: keras.Layer, places: dict[str, keras.Variable]) -> str:
    lines = "".join(f"\n    {place} {tuple(variable.shape)}" for place, variable in places.items())
    return f"'{layer.name}' ({type(layer).__name__}):{lines}"
