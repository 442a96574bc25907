"""Constraints: what an optimizer step is followed by.

`Equal` ties the variables of a group, fully or in part; `Invariant` keeps one variable symmetric. Both are Keras
constraints, for the arguments `kernel_constraint`, `bias_constraint` and so on of layers.
"""

from collections.abc import Sequence
from typing import Any

import keras

from equalize import arguments, backend, effects, rules, symmetry
from equalize.arguments import received
from equalize.errors import EqualizeError
from equalize.projections import Tensor
from equalize.views import View

__all__ = ["Equal", "Invariant"]


@keras.saving.register_keras_serializable(package="equalize")
class Equal(rules.Rule, keras.constraints.Constraint):
    """Keeps the variables of a group equal: after every optimizer step each becomes the group's mean.

    Averaging is not sharing. Every member is updated from its own gradient, with its own optimizer slots, and then
    all become the mean: the orthogonal projection argmin over p of Σ weight_i · ‖w_i − p‖². With SGD that is one
    shared variable at the learning rate divided by the number of members; with Adam it is something else, since
    each member has its own moments. `equalize.optimizers.TiedOptimizer` gives such a group the numbers of sharing.

    A constraint alone knows nothing of the others, so `equalize.GroupRegistry().link(model)` must find the members
    before training. A member that is not trainable is an anchor: it stays, and the others take its value.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        rate: How far each member moves to the mean after a step, in (0, 1]. At 1 the members are bitwise equal
            after every step. Below 1 they become `(1 − rate)·w_i + rate·mean`, the proximal operator of
            `(λ/2)·Σ‖w_i − mean‖²` with `rate = λ/(1+λ)`: the spread shrinks by `1 − rate`, the mean stays. At a
            learning rate η that is the proximal step of `equalize.regularizers.MeanL2(factor=λ/(2·η))`, and no
            optimizer rescales it.
        weight: The member's positive weight in the mean.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras constraint for the common value, as an object, a config or a name. For a convex one the
            result is the exact projection onto "all equal and each satisfies `inner`"; for another, such as
            `UnitNorm`, it is `inner` of the mean and no more.

    Raises:
        EqualizeError: `group` is empty, `rate` or `weight` is out of range, or `inner` ties as well.
        TypeError: An argument is of the wrong type.
        NotLinkedError: Training starts and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> inputs = keras.Input((3,))
    >>> left = keras.layers.Dense(2, kernel_constraint=equalize.constraints.Equal("towers"))
    >>> right = keras.layers.Dense(2, kernel_constraint=equalize.constraints.Equal("towers"))
    >>> model = keras.Model(inputs, [left(inputs), right(inputs)])
    >>> registry = equalize.GroupRegistry().link(model)
    >>> registry.spread()
    {'towers': 0.0}

    Reference:
        Parikh and Boyd, Proximal Algorithms (2014), section 5.2 (consensus).
    """

    slot = "constraint"
    setting = "rate"
    own_keys = frozenset({"group", "weight", "view", "inner"})

    def __init__(
        self,
        group: str | None = None,
        *,
        rate: float = 1.0,
        weight: float = 1.0,
        view: View | None = None,
        inner: Any = None,
    ):
        self.group = rules.checked_group(group, type(self))
        self.rate = self.checked_strength(rate)
        self.weight = arguments.number("weight", weight, low=0.0, low_open=True)
        self.view = rules.checked_view(view)
        self.inner = rules.checked_inner(keras.constraints.get, inner, keras.constraints.Constraint)

    @property
    def hard(self) -> bool:
        """Whether the members are bitwise equal after every step."""
        return self.rate == 1.0

    def checked_strength(self, strength: Any) -> float:
        return arguments.number("rate", strength, low=0.0, high=1.0, low_open=True)

    def __call__(self, w: Tensor) -> Tensor:
        group, member = self._require_binding(f"on '{getattr(w, 'path', 'a tensor')}'")
        return group.project(member)

    def _settings(self) -> dict[str, Any]:
        inner = {} if self.inner is None else {"inner": effects.name_of(self.inner)}
        return ({} if self.rate == 1.0 else {"rate": self.rate}) | inner

    def get_config(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "rate": self.rate,
            "weight": self.weight,
            "view": rules.view_config(self.view),
            "inner": keras.constraints.serialize(self.inner) if self.inner is not None else None,
        }


@keras.saving.register_keras_serializable(package="equalize")
class Invariant(keras.constraints.Constraint):
    """Keeps one variable unchanged by a group of views: symmetric, antisymmetric, the same under rotations.

    After every optimizer step the variable becomes the mean of all its views, the Reynolds operator
    `w ← (1/|G|) · Σ_{g in G} g(w)`, which is the orthogonal projection onto the tensors that no view in the group
    changes. It needs no registry, since all of it happens inside one variable. The result is bitwise invariant.

    Args:
        views: The views of the group, with or without the one that changes nothing. Together they must form a finite
            group: each followed by each other must be one of them. For kernels under the four rotations these are
            `[Rotate90(1), Rotate90(2), Rotate90(3)]`; for antisymmetric ones `[Chain(Flip(0), Scale(-1))]`.
        inner: A Keras constraint for the invariant value, as an object, a config or a name. It should itself treat
            the entries alike, as `MaxNorm` over the turned axes does, or the result is not invariant.

    Raises:
        EqualizeError: No view is given; or, when the constraint meets its variable, the views do not form a finite
            group, change its shape or do not fit it.
        TypeError: An entry of `views` is no view.

    Example:
    >>> import keras, equalize
    >>> from equalize.views import Flip
    >>> layer = keras.layers.Conv1D(2, 5, kernel_constraint=equalize.constraints.Invariant([Flip(0)]))
    >>> layer.build((None, 8, 3))
    >>> kernel = layer.kernel_constraint(layer.kernel)  # what every optimizer step does
    >>> bool(keras.ops.all(kernel == keras.ops.flip(kernel, 0)))
    True

    Reference:
        Cohen and Welling, Group equivariant convolutional networks (2016), for invariance under the rotations.
    """

    def __init__(self, views: Sequence[View], *, inner: Any = None):
        if not isinstance(views, (list, tuple)) or any(view is None for view in views):
            raise TypeError(f"`views` must be a list of views. Received: {received(views)}.")
        if not views:
            raise EqualizeError(f"`views` must hold at least one view. Received: {received(views)}.")
        checked = [rules.checked_view(view) for view in views]
        self.views = tuple(view for view in checked if view is not None)
        self.inner = rules.checked_inner(keras.constraints.get, inner, keras.constraints.Constraint)

    def __call__(self, w: Tensor) -> Tensor:
        value = symmetry.average(self.views, backend.tensor(w))
        return value if self.inner is None else self.inner(value)

    def get_config(self) -> dict[str, Any]:
        return {
            "views": [rules.view_config(view) for view in self.views],
            "inner": keras.constraints.serialize(self.inner) if self.inner is not None else None,
        }
