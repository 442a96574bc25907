"""Where weights live in the tree of layers: attribute or index at every level.

Keras's names and paths are neither unique nor stable: two calls of one function that names its layers give two
variables of one path, and layers without a name are numbered in the order of their making. Places are what Keras's own
`.weights.h5` files go by, for instance `layers/Dense_1/vars/0`: the first weight of the second `Dense` of a model.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from equalize import _backend as backend
from equalize._backend import keras_private, living

# Attributes in which Keras, PyTorch and TensorFlow keep layers besides those that a class assigns (Keras 3.15).
_BOOKKEEPING = re.compile("_self_.*|_obj_reference.*|_layers|_functional|_modules|_nodes.*|_operations.*")


def weights_by_place(root: keras.Layer) -> dict[str, keras.Variable]:
    """The weights of a layer or model, each by its first place in the tree of layers."""
    found: dict[str, keras.Variable] = {}
    _visit(root, "", found, set())
    return found


def digest(weights: Mapping[str, keras.Variable]) -> str:
    """A short name for a structure: the same for the same places, shapes and dtypes, in every process."""
    outline = [(place, tuple(weight.shape), backend.dtype(weight)) for place, weight in weights.items()]
    return hashlib.sha256(repr(outline).encode()).hexdigest()[:16]


Places = list[tuple[str, int, str]]
"""The places of one variable: the digest of a model, which of the models with that digest, and the place in it."""


def places_of(variables: Sequence[keras.Variable]) -> list[Places]:
    """The places of variables in the living models that hold them; for those in no model, in the layers that do."""
    found: list[Places] = [[] for _ in variables]
    layers = living.objects_of(keras.Layer) if variables else []
    for models in (True, False):
        indices = {id(variable): index for index, variable in enumerate(variables) if not found[index]}
        roots = []
        for root in layers if indices else ():
            held = isinstance(root, keras.Model) == models and {id(weight) for weight in root.weights} & indices.keys()
            if held:
                weights = weights_by_place(root)
                roots.append((sorted(indices[key] for key in held), digest(weights), weights))
        numbers: dict[str, list[list[int]]] = {}
        # In the order of the variables that they hold; that in which objects are found is none.
        for _, key, weights in sorted(roots, key=lambda root: root[:2]):
            same = numbers.setdefault(key, [])  # a `Sequential` and the `Functional` that it has inside are one model
            ids = list(map(id, weights.values()))
            if ids not in same:
                same.append(ids)
                for place, weight in weights.items():
                    if id(weight) in indices:
                        found[indices[id(weight)]].append((key, len(same) - 1, place))
    return found


def weights_at(places: Places, models: Sequence[Mapping[str, keras.Variable]]) -> tuple[list[keras.Variable], bool]:
    """The weights at any of the places in models, and whether a model of the same structure says so.

    Args:
        places: Places of one variable, as `places_of` gives them.
        models: The weights of models, by place.
    """
    by_digest: dict[str, list[Mapping[str, keras.Variable]]] = {}
    for weights in models:
        by_digest.setdefault(digest(weights), []).append(weights)
    alike = [
        (by_digest[key][number if number < len(by_digest[key]) else 0], place)
        for key, number, place in places
        if key in by_digest
    ]
    anywhere = [(weights, place) for _, _, place in places for weights in models]
    found = {id(w[place]): w[place] for w, place in alike or anywhere if place in w}
    return list(found.values()), bool(alike)


def _visit(layer: keras.Layer, place: str, found: dict[str, keras.Variable], seen: set[int]) -> None:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    for index, weight in enumerate(variable for store in keras_private.own_variables(layer) for variable in store):
        if id(weight) not in seen:
            seen.add(id(weight))
            found[f"{place}vars/{index}"] = weight
    for name, value in _attributes(layer):
        for below, child in _layers_in(value, f"{place}{name}"):
            _visit(child, f"{below}/", found, seen)


def _attributes(layer: keras.Layer) -> Iterator[tuple[str, Any]]:
    """What may hold layers: the list of a model that has one, attributes, and whatever else Keras tracks."""
    if isinstance(layer, keras.Sequential) or hasattr(layer, "_operations"):
        yield "layers", layer.layers
    attributes = {**vars(layer), **vars(layer).get("_modules", {})}  # where PyTorch keeps those that are layers
    for name in sorted(attributes):
        if not _BOOKKEEPING.fullmatch(name):
            yield name, attributes[name]
    yield "tracked", keras_private.sublayers(layer)


def _layers_in(value: Any, place: str) -> Iterator[tuple[str, keras.Layer]]:
    """The layers in an attribute's value, which may be a container of others, with their places."""
    if isinstance(value, keras.Layer):
        yield place, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _layers_in(part, f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        counts: dict[str, int] = {}
        for part in value:
            if isinstance(part, (keras.Layer, list, tuple, dict)):
                kind = type(part).__name__ if isinstance(part, keras.Layer) else "container"
                counts[kind] = counts.get(kind, -1) + 1
                yield from _layers_in(part, f"{place}/{kind}_{counts[kind]}" if counts[kind] else f"{place}/{kind}")
