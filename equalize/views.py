"""Linear views, `View`: how a member of a group shows the group's common value.

`Transpose` permutes axes, `Flip` reverses them, `Rotate90` turns, `Scale` multiplies, `Slice` is a part, `Pattern`
repeats entries, and `Chain` is several views in a row.

A view V maps the common value c to what the member shows, w = V(c): a transposed copy, a flipped one, a multiple, a
part. Vᵀ·V is diagonal: each entry of the common value has a `multiplicity`, which is `scale²` unless a `Pattern` shows
it several times. So the best common value seen from one member alone is `least_squares(w) = Vᵀ(w) / multiplicity`. That
of a group, argmin over c of Σ weight_i · ‖w_i − V_i(c)‖², is the mean of these with the weights
`weight_i · multiplicity_i`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._inputs import arguments, configs
from equalize._inputs.arguments import received
from equalize._math import means
from equalize.errors import EqualizeError, GroupMismatchError

__all__ = ["Chain", "Flip", "Pattern", "Rotate90", "Scale", "Slice", "Transpose", "View"]

Shape = tuple[int, ...]


class View:
    """Base of the views. Equal views have equal configs.

    It is what annotations and `isinstance` name. Each view is linear: every entry of a member shows one entry of the
    common value, times `scale` or minus that.

    Example:
    >>> from equalize import views
    >>> views.Flip(0) == views.Flip([0]), views.Flip(0) == views.Flip(1)
    (True, False)
    >>> views.Slice((0, 0), (4, 3)).common_shape((4, 8))
    (4, 3)
    """

    scale: float = 1.0
    """The factor by which the view stretches each entry that it shows, without its sign."""

    repeats: bool = False
    """Whether several entries of a member show one entry of the common value."""

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
        """The common value seen from the member alone: argmin over c of ‖w − V(c)‖, Vᵀ(w) / multiplicity."""
        return self.adjoint(w)

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Between which values the entries of a member between `low` and `high` see each entry of the common value."""
        return self.least_squares(low), self.least_squares(high)

    def multiplicity(self, shape: Sequence[int]) -> float | np.ndarray:
        """Vᵀ·V for a member of this shape: one number, or one for each entry of the common value."""
        return self.scale**2

    def covers(self, shape: Sequence[int]) -> bool:
        """Whether all entries of a member of this shape show the common value, so that none is free."""
        return True

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

    def covers(self, shape: Sequence[int]) -> bool:
        return tuple(shape) == self.shape

    def get_config(self) -> dict[str, Any]:
        return {"start_indices": list(self.start_indices), "shape": list(self.shape)}


@keras.saving.register_keras_serializable(package="equalize")
class Pattern(View):
    """Entries of the common value, each shown as often as one likes: entry k of the member is entry `indices[k]`.

    It makes weights repeat inside one variable: circulant and Toeplitz matrices, a convolution that is written as a
    `Dense`, layers that treat their inputs alike, hashed weights. A group may have one such member alone. Where entries
    only change places, `Transpose`, `Flip` and `Rotate90` are faster.

    It needs a rule that makes the repeats equal, as `equalize.constraints.Equal()`: a partial or a soft one would leave
    them apart. Under `equalize.optimizers.TiedOptimizer` what an optimizer does entry by entry has the numbers of the
    few weights; norms, as clipping takes them, are those of all entries.

    The gradient of the common value is the sum over the entries that show it, and each of these becomes their mean.
    Both are computed pair by pair in one order, so a result is the same on every run, and entries that agree stay as
    they are.

    Args:
        indices: Which entry of the flattened common value each entry of the member shows: integers, in the shape of the
            member.
        shape: The shape of the common value, of which every entry must be shown.

    Raises:
        EqualizeError: An index is out of range, or an entry of the common value is never shown.
        TypeError: The arguments are not integers.

    Example:
    >>> import keras, numpy as np, equalize
    >>> layer = keras.layers.Dense(4)
    >>> layer.build((None, 4))
    >>> circulant = (np.arange(4) - np.arange(4)[:, None]) % 4
    >>> view = equalize.views.Pattern(circulant, (4,))
    >>> group = equalize.GroupRegistry().tie("conv", [(layer.kernel, view)], equalize.constraints.Equal())
    >>> kernel = keras.ops.convert_to_numpy(layer.kernel)
    >>> bool((kernel[1:, 1:] == kernel[:-1, :-1]).all())
    True

    Reference:
        Chen, Wilson, Tyree, Weinberger and Chen, Compressing neural networks with the hashing trick (2015), for
        weights that are shown at many places.
    """

    repeats = True

    def __init__(self, indices: Any, shape: Sequence[int]):
        self.shape = arguments.integers("shape", shape)
        self.indices = arguments.integer_array("indices", indices)
        size = math.prod(self.shape)
        if min((*self.shape, 1)) < 1 or self.indices.size == 0:
            raise EqualizeError(
                "`shape` must be positive and `indices` must not be empty. Received: "
                f"indices={received(indices)}, shape={received(shape)}."
            )
        if self.indices.min() < 0 or self.indices.max() >= size:
            raise EqualizeError(
                f"`indices` must be from 0 to {size - 1}, the entries of a common value of shape {self.shape}. "
                f"Received: indices from {self.indices.min()} to {self.indices.max()}."
            )
        self._counts = np.bincount(self.indices.reshape(-1), minlength=size)
        if not self._counts.all():
            raise EqualizeError(
                f"`indices` must name every entry of the common value. Received: no {int(np.argmin(self._counts))}. "
                "Number those that are used: `used, indices = numpy.unique(indices, return_inverse=True)`."
            )
        self.indices.flags.writeable = False

    def forward(self, common: Tensor, like: Tensor | None = None) -> Tensor:
        return ops.reshape(_taken(ops.reshape(common, (-1,)), self.indices.reshape(-1)), self.indices.shape)

    def adjoint(self, w: Tensor) -> Tensor:
        def add(left: Tensor, right: Tensor, pairs: _Pairs) -> Tensor:
            return left + ops.where(ops.convert_to_tensor(pairs.whole), right, ops.zeros_like(right))

        return ops.cast(self._joined(means.widen(w), add), backend.dtype(w))

    def least_squares(self, w: Tensor) -> Tensor:
        @ops.custom_gradient
        def differentiable(w: Tensor) -> Any:
            def gradient(*args: Any, upstream: Tensor | None = None) -> Tensor:
                upstream = args[0] if upstream is None else upstream
                counts = ops.convert_to_tensor(self._counts.reshape(self.shape), backend.dtype(upstream))
                return self.forward(upstream / counts)

            return ops.cast(self._joined(means.widen(w), _mixed), backend.dtype(w)), gradient

        return differentiable(w)

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        least = self._joined(low, lambda left, right, pairs: ops.minimum(left, right))
        return least, self._joined(high, lambda left, right, pairs: ops.maximum(left, right))

    def multiplicity(self, shape: Sequence[int]) -> float | np.ndarray:
        counts = self._counts.astype("float64")
        return float(counts[0]) if (counts == counts[0]).all() else counts.reshape(self.shape)

    def common_shape(self, shape: Sequence[int]) -> Shape:
        if tuple(shape) != self.indices.shape:
            raise self._misfit(shape, f"the shape of its indices, {self.indices.shape}")
        return self.shape

    def get_config(self) -> dict[str, Any]:
        return {"indices": self.indices.tolist(), "shape": list(self.shape)}

    def __repr__(self) -> str:
        return f"Pattern(<indices of shape {self.indices.shape}>, shape={list(self.shape)})"

    def _joined(self, w: Tensor, join: "Callable[[Tensor, Tensor, _Pairs], Tensor]") -> Tensor:
        """For each entry of the common value, the entries that show it, joined two by two."""
        values = _taken(ops.reshape(w, (-1,)), self._order)
        for pairs in self._rounds:
            values = join(_taken(values, pairs.left), _taken(values, pairs.right), pairs)
        return ops.reshape(values, self.shape)

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """The entries of the member, those that show one entry of the common value side by side."""
        return np.argsort(self.indices.reshape(-1), kind="stable")

    @functools.cached_property
    def _rounds(self) -> "list[_Pairs]":
        """Which values to join in each round until one is left for each entry of the common value."""
        rounds, counts, weights = [], self._counts, np.ones(self.indices.size)
        while counts.max() > 1:
            halves = (counts + 1) // 2
            entry = np.repeat(np.arange(counts.size), halves)
            place = 2 * (np.arange(entry.size) - (np.cumsum(halves) - halves)[entry])
            left = (np.cumsum(counts) - counts)[entry] + place
            whole = place + 1 < counts[entry]
            right = np.where(whole, left + 1, left)
            sums = weights[left] + np.where(whole, weights[right], 0.0)
            rounds.append(_Pairs(left, right, whole, np.where(whole, weights[right] / sums, 0.0)))
            counts, weights = halves, sums
        return rounds


@dataclass(frozen=True)
class _Pairs:
    """One round of joining values two by two, with arrays of one entry a pair.

    Attributes:
        left: The place of a value.
        right: That of the value it is joined with, or its own where it is the odd one out.
        whole: Whether there are two values.
        share: The part of the right one in their mean.
    """

    left: np.ndarray
    right: np.ndarray
    whole: np.ndarray
    share: np.ndarray


@keras.saving.register_keras_serializable(package="equalize")
class Chain(View):
    """Several views in a row: `Chain(a, b)` applies `a` to the common value, then `b`.

    The factors of all `Scale`s are multiplied once, when the chain is made, and applied to the common value first: a
    multiple commutes with moving entries about. So each entry is rounded once, by every compiler alike, and entries
    that a `Slice` leaves free are only ever moved.

    Args:
        *views: The views, the one next to the common value first.

    Raises:
        EqualizeError: No view is given, a `Pattern` comes after a `Slice`, or the product of the factors is out of
            range.
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
        self.repeats = any(part.repeats for part in self.moves)
        kinds = [type(part) for part in self.moves]
        if Slice in kinds and Pattern in kinds[kinds.index(Slice) :]:
            raise EqualizeError(
                "A `Pattern` must not repeat what a `Slice` leaves free. Expected: the `Pattern` first. Received: "
                f"{self!r}."
            )
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

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        for view in reversed(self.moves):
            low, high = view.bounds(low, high)
        return (low, high) if self.factor == 1.0 else (low / self.factor, high / self.factor)

    def multiplicity(self, shape: Sequence[int]) -> float | np.ndarray:
        found: float | np.ndarray = 1.0
        for view in reversed(self.moves):
            if isinstance(found, float):
                found = view.multiplicity(shape)
            else:
                with backend.eagerly():  # integers, which no backend rounds
                    found = ops.convert_to_numpy(view.adjoint(ops.convert_to_tensor(found, "float32"))).astype(float)
            shape = view.common_shape(shape)
        return found * self.factor**2

    def covers(self, shape: Sequence[int]) -> bool:
        for view in reversed(self.moves):
            if not view.covers(shape):
                return False
            shape = view.common_shape(shape)
        return True

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


def _taken(values: Tensor, places: np.ndarray) -> Tensor:
    return ops.take(values, ops.convert_to_tensor(places, "int32"))


def _mixed(left: Tensor, right: Tensor, pairs: _Pairs) -> Tensor:
    return backend.mix(left, right, ops.convert_to_tensor(pairs.share, backend.dtype(left)))


def _flipped(x: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:  # one by one, since Keras 3.5 takes no several axes on TensorFlow
        x = ops.flip(x, axis)
    return x


def _checked_scale(scale: float, problem: str) -> float:
    """The factor by which a view stretches: its square, by which gradients are divided, must be a float32 number."""
    if not np.finfo("float32").tiny <= scale * scale <= np.finfo("float32").max:
        raise EqualizeError(f"{problem} Expected a factor between 1.1e-19 and 1.8e19 in size.")
    return scale
