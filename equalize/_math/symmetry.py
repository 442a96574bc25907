"""Averages over a finite group of views of one tensor."""

import functools
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._math import means
from equalize.errors import EqualizeError

View: TypeAlias = Any
"""A view of `equalize.views`, of which `forward` and `common_shape` are used."""


def average(views: tuple[View, ...], w: Tensor) -> Tensor:
    """The mean of a tensor over the group that the views form, bitwise unchanged by each of them.

    Entries that a view takes to each other are averaged in different orders and so round differently. One entry of
    each orbit is computed and stands, with its sign, for all.

    Args:
        views: Views that form a finite group, with or without the identity.
        w: A tensor.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        EqualizeError: The views do not form a finite group of transformations of this shape.
    """
    leaders, signs = _orbits(views, tuple(w.shape))
    images = [view.forward(w) for view in _without_identity(views, tuple(w.shape))]
    mean = backend.computed_once(means.mean([w, *images]))
    dtype = keras.backend.standardize_dtype(w.dtype)
    led = ops.take(ops.reshape(mean, (-1,)), ops.convert_to_tensor(leaders, "int32"))
    return ops.reshape(led * ops.cast(ops.convert_to_tensor(signs), dtype), w.shape)


@functools.lru_cache(maxsize=256)
def _orbits(views: tuple[View, ...], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each entry of a flat tensor the first entry of its orbit, and the sign with which it shows it.

    An entry that some view maps to minus itself is 0 in every invariant tensor, and so is its sign.
    """
    maps = _signed_permutations(views, shape)
    size = int(np.prod(shape, dtype=int))
    leaders, signs = np.arange(size), np.ones(size)
    for source, sign in maps:
        closer = source < leaders
        leaders, signs = np.where(closer, source, leaders), np.where(closer, sign, signs)
    for source, sign in maps:
        signs = np.where((source == np.arange(size)) & (sign < 0), 0.0, signs)
    return leaders, signs.astype("float32")


def _without_identity(views: tuple[View, ...], shape: tuple[int, ...]) -> list[View]:
    maps = zip(views, _signed_permutations(views, shape)[1:], strict=True)
    return [view for view, (source, sign) in maps if np.any(source != np.arange(source.size)) or np.any(sign < 0)]


@functools.lru_cache(maxsize=256)
def _signed_permutations(views: tuple[View, ...], shape: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the identity and each view do to a flat tensor: which entry goes where, and with what sign."""
    size = int(np.prod(shape, dtype=int))
    probe = np.arange(1, size + 1, dtype="float32")
    if size >= 2**24:
        raise EqualizeError(
            f"A symmetry of a variable of shape {shape} is too large: expected fewer than 2**24 entries, received "
            f"{size}. Constrain a smaller variable."
        )
    found = {probe.tobytes(): (np.arange(size), np.ones(size))}
    maps = [(np.arange(size), np.ones(size))]
    for view in views:
        if view.common_shape(shape) != shape:
            raise EqualizeError(
                f"The view {view!r} takes a variable of shape {shape} to another shape, so it is not a symmetry of it. "
                "Expected: views that keep the shape."
            )
        with backend.eagerly():  # the first to ask may be a step that is being traced
            image = ops.convert_to_numpy(view.forward(ops.convert_to_tensor(probe.reshape(shape)))).reshape(-1)
        source = np.abs(image).astype("int64") - 1
        if not np.array_equal(np.sort(source), np.arange(size)):
            raise EqualizeError(
                f"The view {view!r} changes more than the order and signs of entries, so no finite group has it. "
                "Expected: `Transpose`, `Flip`, `Rotate90`, `Scale(-1)`, or a `Chain` of them."
            )
        maps.append((source, np.sign(image)))
        found[image.tobytes()] = maps[-1]
    for first, (source, sign) in zip(views, maps[1:], strict=True):
        for second, (other, other_sign) in zip(views, maps[1:], strict=True):
            product = (probe[source] * sign)[other] * other_sign
            if product.astype("float32").tobytes() not in found:
                raise EqualizeError(
                    f"The views {list(views)} do not form a group: {first!r} followed by {second!r} is not one of "
                    "them. Expected: with any two views also the one that they make together. Add it."
                )
    return maps
