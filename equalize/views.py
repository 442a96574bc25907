"""Linear views, `View`: how a member of a group shows the group's common value.

`Transpose` permutes axes, `Flip` reverses them, `Rotate90` turns, `Scale` multiplies, `Slice` is a part, and `Chain` is
several views in a row.

A view V maps the common value c to what the member shows, w = V(c): a transposed copy, a flipped one, a multiple, a
part. Each is a multiple of an isometry, Vᵀ·V = scale² · identity, so the best common value seen from one member alone
is `least_squares(w) = Vᵀ(w) / scale²`. That of a group, argmin over c of Σ weight_i · ‖w_i − V_i(c)‖², is the mean of
these with the weights `weight_i · scale_i²`.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize._backend import Tensor
from equalize._inputs import arguments, configs
from equalize._inputs.arguments import received
from equalize.errors import EqualizeError, GroupMismatchError

__all__ = ["Chain", "Flip", "Rotate90", "Scale", "Slice", "Transpose", "View"]

Shape = tuple[int, ...]


class View:
    """Base of the views. Equal views have equal configs.

    It is what annotations and `isinstance` name. Each view is linear and stretches every value by one factor,
    its `scale`.

    Example:
    >>> from equalize import views
    >>> views.Flip(0) == views.Flip([0]), views.Flip(0) == views.Flip(1)
    (True, False)
    >>> views.Slice((0, 0), (4, 3)).common_shape((4, 8))
    (4, 3)
    """

    scale: float = 1.0
    """The factor by which the view stretches: ‖V(c)‖ = scale · ‖c‖."""

    def forward(self, common: Tensor, like: Tensor | None = None) -> Tensor:
        """What the member shows of the common value, V(c).

        Args:
            common: The common value.
            like: The member as it is, whose entries that the view does not cover stay. Without it they are zero,
                as far as the view can know the member's shape.

        Returns:
            The member.
        """
        raise NotImplementedError

    def adjoint(self, w: Tensor) -> Tensor:
        """The adjoint Vᵀ(w), with ⟨V(c), w⟩ = ⟨c, Vᵀ(w)⟩: what takes a gradient of the member to the common value."""
        raise NotImplementedError

    def least_squares(self, w: Tensor) -> Tensor:
        """The common value seen from the member alone, Vᵀ(w) / scale²."""
        return self.adjoint(w)

    def common_shape(self, shape: Sequence[int]) -> Shape:
        """The shape of the common value of a member of this shape.

        Raises:
            GroupMismatchError: The view does not fit the shape.
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "View":
        """The view of a config."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.get_config().items())})"

    def _misfit(self, shape: Sequence[int], expected: str) -> GroupMismatchError:
        return GroupMismatchError(
            f"The view {self!r} does not fit a variable of shape {tuple(shape)}: expected {expected}. Change the "
            "view, or give it to another variable."
        )


@keras.saving.register_keras_serializable(package="equalize")
class Transpose(View):
    """The member is the common value with its axes permuted: `keras.ops.transpose(common, axes)`.

    Args:
        axes: The permutation, as in `keras.ops.transpose`; None reverses all axes.

    Raises:
        EqualizeError: `axes` is not a permutation.
        TypeError: `axes` are not integers.

    Example:
    >>> from equalize import views
    >>> import keras
    >>> tuple(views.Transpose().forward(keras.ops.zeros((784, 64))).shape)
    (64, 784)
    """

    def __init__(self, axes: Sequence[int] | None = None):
        self.axes = None if axes is None else arguments.integers("axes", axes)
        if self.axes is not None and sorted(self.axes) != list(range(len(self.axes))):
            raise EqualizeError(f"`axes` must be a permutation of 0, 1, ..., n − 1. Received: {received(axes)}.")

    def forward(self, common: Tensor, like: Tensor | None = None) -> Tensor:
        return ops.transpose(common, self._axes(common))

    def adjoint(self, w: Tensor) -> Tensor:
        return ops.transpose(w, np.argsort(self._axes(w)).tolist())

    def common_shape(self, shape: Sequence[int]) -> Shape:
        if self.axes is not None and len(self.axes) != len(shape):
            raise self._misfit(shape, arguments.counted(len(self.axes), "axis", "axes"))
        return tuple(shape[axis] for axis in np.argsort(self.axes)) if self.axes else tuple(reversed(shape))

    def get_config(self) -> dict[str, Any]:
        return {"axes": None if self.axes is None else list(self.axes)}

    def _axes(self, x: Tensor) -> Shape:
        return tuple(reversed(range(len(x.shape)))) if self.axes is None else self.axes


@keras.saving.register_keras_serializable(package="equalize")
class Flip(View):
    """The member is the common value with the order of entries reversed along some axes.

    Args:
        axes: An axis or several.

    Raises:
        EqualizeError: An axis is named twice, or none is.
        TypeError: `axes` are not integers.

    Example:
    >>> from equalize import views
    >>> import keras
    >>> keras.ops.convert_to_numpy(views.Flip(0).forward(keras.ops.arange(3))).tolist()
    [2, 1, 0]
    """

    def __init__(self, axes: int | Sequence[int]):
        self.axes = arguments.integers("axes", axes)
        if not self.axes or len(set(self.axes)) != len(self.axes):
            raise EqualizeError(f"`axes` must name axes once each, and at least one. Received: {received(axes)}.")

    def forward(self, common: Tensor, like: Tensor | None = None) -> Tensor:
        return _flipped(common, self.axes)

    def adjoint(self, w: Tensor) -> Tensor:
        return _flipped(w, self.axes)

    def common_shape(self, shape: Sequence[int]) -> Shape:
        inside = all(-len(shape) <= axis < len(shape) for axis in self.axes)
        if not inside or len({axis % len(shape) for axis in self.axes}) != len(self.axes):
            raise self._misfit(shape, f"one with the different axes {list(self.axes)}")
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        return {"axes": list(self.axes)}


@keras.saving.register_keras_serializable(package="equalize")
class Rotate90(View):
    """The member is the common value turned by quarter turns, from the first of the axes towards the second.

    Args:
        k: Number of quarter turns, of any sign.
        axes: The plane; for a `Conv2D` kernel `(height, width, in, out)` the default is the plane of the image.

    Raises:
        EqualizeError: `axes` are not two different axes.
        TypeError: An argument is not an integer.

    Example:
    >>> from equalize import views
    >>> import keras
    >>> tuple(views.Rotate90().forward(keras.ops.zeros((3, 5, 1, 2))).shape)
    (5, 3, 1, 2)
    """

    def __init__(self, k: int = 1, axes: Sequence[int] = (0, 1)):
        self.k = arguments.integer("k", k)
        self.axes = arguments.integers("axes", axes)
        if len(self.axes) != 2 or self.axes[0] == self.axes[1]:
            raise EqualizeError(f"`axes` must be two different axes. Received: {received(axes)}.")

    def forward(self, common: Tensor, like: Tensor | None = None) -> Tensor:
        return self._turned(common, self.k)

    def adjoint(self, w: Tensor) -> Tensor:
        return self._turned(w, -self.k)

    def common_shape(self, shape: Sequence[int]) -> Shape:
        first, second = self.axes
        if not all(-len(shape) <= axis < len(shape) for axis in self.axes) or (first - second) % len(shape) == 0:
            raise self._misfit(shape, f"one with the axes {list(self.axes)}")
        common = list(shape)
        if self.k % 2:
            common[first], common[second] = common[second], common[first]
        return tuple(common)

    def get_config(self) -> dict[str, Any]:
        return {"k": self.k, "axes": list(self.axes)}

    def _turned(self, x: Tensor, k: int) -> Tensor:
        first, second = self.axes
        if k % 4 == 2:
            return _flipped(x, (first, second))
        if k % 4 == 1:
            return ops.swapaxes(ops.flip(x, second), first, second)
        return ops.flip(ops.swapaxes(x, first, second), second) if k % 4 == 3 else x


@keras.saving.register_keras_serializable(package="equalize")
class Scale(View):
    """The member is a multiple of the common value.

    A factor that is a power of two, of either sign, is exact. With any other the member is the rounded multiple, and
    the group should have a member that shows the common value itself.

    Args:
        factor: The factor, a finite number other than 0.

    Raises:
        EqualizeError: `factor` is 0 or not finite.
        TypeError: `factor` is not a number.

    Example:
    >>> from equalize import views
    >>> import keras
    >>> float(views.Scale(-2).forward(keras.ops.ones(())))
    -2.0
    """

    def __init__(self, factor: float):
        self.factor = arguments.number("factor", factor)
        self.scale = _checked_scale(
            abs(self.factor), f"`factor` must be finite and not 0. Received: {received(factor)}."
        )

    def forward(self, common: Tensor, like: Tensor | None = None) -> Tensor:
        return common * self.factor

    def adjoint(self, w: Tensor) -> Tensor:
        return w * self.factor

    def least_squares(self, w: Tensor) -> Tensor:
        return w / self.factor

    def common_shape(self, shape: Sequence[int]) -> Shape:
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        return {"factor": self.factor}


@keras.saving.register_keras_serializable(package="equalize")
class Slice(View):
    """A part of the member is the common value, and the rest of it is free.

    Args:
        start_indices: Where the part begins along each axis, as in `keras.ops.slice`.
        shape: The shape of the part, which is the shape of the common value.

    Raises:
        EqualizeError: The arguments differ in length, or are negative or empty.
        TypeError: The arguments are not integers.

    Example:
    >>> from equalize import views
    >>> import keras
    >>> tuple(views.Slice((0, 2), (4, 3)).adjoint(keras.ops.zeros((4, 8))).shape)
    (4, 3)
    """

    def __init__(self, start_indices: Sequence[int], shape: Sequence[int]):
        self.start_indices = arguments.integers("start_indices", start_indices)
        self.shape = arguments.integers("shape", shape)
        positive = min((*self.start_indices, 0)) >= 0 and min((*self.shape, 1)) >= 1
        if len(self.start_indices) != len(self.shape) or not self.shape or not positive:
            raise EqualizeError(
                "`start_indices` must be non-negative and `shape` positive, with one for each axis. "
                f"Received: start_indices={received(start_indices)}, shape={received(shape)}."
            )

    def forward(self, common: Tensor, like: Tensor | None = None) -> Tensor:
        if like is None:
            padding = [(start, 0) for start in self.start_indices]
            return ops.pad(common, padding)
        return ops.slice_update(like, self.start_indices, common)

    def adjoint(self, w: Tensor) -> Tensor:
        part = zip(self.start_indices, self.shape, strict=True)
        return w[tuple(slice(start, start + length) for start, length in part)]

    def common_shape(self, shape: Sequence[int]) -> Shape:
        ends = [start + length for start, length in zip(self.start_indices, self.shape, strict=True)]
        if len(ends) != len(shape) or any(end > size for end, size in zip(ends, shape, strict=True)):
            raise self._misfit(shape, f"a shape of at least {tuple(ends)}")
        return self.shape

    def get_config(self) -> dict[str, Any]:
        return {"start_indices": list(self.start_indices), "shape": list(self.shape)}


@keras.saving.register_keras_serializable(package="equalize")
class Chain(View):
    """Several views in a row: `Chain(a, b)` applies `a` to the common value, then `b`.

    The factors of all `Scale`s are multiplied once, when the chain is made, and applied to the common value first: a
    multiple commutes with moving entries about. So each entry is rounded once, by every compiler alike, and entries
    that a `Slice` leaves free are only ever moved.

    Args:
        *views: The views, the one next to the common value first.

    Raises:
        EqualizeError: No view is given, or the product of the factors is out of range.
        TypeError: An argument is not a view.

    Example:
    >>> from equalize import views
    >>> import keras
    >>> tuple(views.Chain(views.Transpose(), views.Slice((0, 1), (3, 2))).adjoint(keras.ops.zeros((3, 4))).shape)
    (2, 3)
    """

    def __init__(self, *views: View):
        for view in views:
            if not isinstance(view, View):
                raise TypeError(f"`views` must be views of equalize. Received: {received(view)}.")
        if not views:
            raise EqualizeError("`Chain` needs a view. Expected: one or more. Received: none.")
        self.views = views
        parts = [part for view in views for part in (view.moves if isinstance(view, Chain) else [view])]
        self.moves = [part for part in parts if not isinstance(part, Scale)]
        """The views that move entries, without those that scale them."""
        self.factor = math.prod(view.factor for view in views if isinstance(view, (Chain, Scale)))
        """The product of the factors of all `Scale`s."""
        self.scale = _checked_scale(
            math.prod(view.scale for view in self.moves) * abs(self.factor),
            f"`views` must not stretch so. Received: {views}.",
        )

    def forward(self, common: Tensor, like: Tensor | None = None) -> Tensor:
        common = self._scaled(common)
        inside = [like]
        for view in reversed(self.moves[1:]):
            inside.insert(0, None if like is None else view.least_squares(inside[0]))
        for view, current in zip(self.moves, inside, strict=False):
            common = view.forward(common, current)
        return common

    def adjoint(self, w: Tensor) -> Tensor:
        for view in reversed(self.moves):
            w = view.adjoint(w)
        return self._scaled(w)

    def least_squares(self, w: Tensor) -> Tensor:
        for view in reversed(self.moves):
            w = view.least_squares(w)
        return w if self.factor == 1.0 else w / self.factor

    def common_shape(self, shape: Sequence[int]) -> Shape:
        for view in reversed(self.views):
            shape = view.common_shape(shape)
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        return {"views": [keras.saving.serialize_keras_object(view) for view in self.views]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Chain":
        if not isinstance(config, dict) or set(config) != {"views"} or not isinstance(config["views"], (list, tuple)):
            raise EqualizeError(f"Expected the config of a `Chain`, with a list 'views'. Received: {received(config)}.")
        return cls(*(configs.restored(view, View, "a view") for view in config["views"]))

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.views))})"

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.factor == 1.0 else x * self.factor


def _flipped(x: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:  # one by one, since Keras 3.5 takes no several axes on TensorFlow
        x = ops.flip(x, axis)
    return x


def _checked_scale(scale: float, problem: str) -> float:
    """The factor by which a view stretches: its square, by which gradients are divided, must be a float32 number."""
    if not np.finfo("float32").tiny <= scale * scale <= np.finfo("float32").max:
        raise EqualizeError(f"{problem} Expected a factor between 1.1e-19 and 1.8e19 in size.")
    return scale
