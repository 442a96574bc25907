"""Members: one variable of a group, and how it shows the group's common value."""

import weakref
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._inputs import arguments
from equalize._inputs.arguments import received
from equalize.errors import EqualizeError
from equalize.views import View


class Member:
    """One variable of a group.

    The variable is held weakly, since a tie keeps no model alive. A constant belongs to the group and is held.

    Attributes:
        path: Where the variable lives, as `variable.path` gives it.
        view: How the member shows the group's common value; None for "as it is".
        weight: The member's weight in the mean.
        leads: Whether the others follow the member; None where no member of the group leads.
        common_dtype: The dtype of the common value, where the member has a narrower one and shows it rounded.
        owner: For a moving statistic, the layer that updates it.

    Raises:
        TypeError: An argument is of the wrong type.
        EqualizeError: The weight is not positive, or not finite.

    Example:
    >>> import keras, equalize
    >>> encoder, decoder = keras.layers.Dense(2), keras.layers.Dense(4)
    >>> model = keras.Sequential([keras.Input((4,)), encoder, decoder])
    >>> members = [encoder.kernel, (decoder.kernel, equalize.views.Transpose())]
    >>> group = equalize.GroupRegistry().tie("pair", members, equalize.constraints.Equal())
    >>> [(member.path.endswith("kernel"), member.view, member.anchor) for member in group.members]
    [(True, None, False), (True, Transpose(axes=None), False)]
    """

    def __init__(
        self,
        variable: keras.Variable,
        *,
        view: View | None = None,
        weight: float = 1.0,
        constant: bool = False,
        owner: keras.Layer | None = None,
    ):
        if not backend.is_variable(variable):
            raise TypeError(f"`variable` must be a `keras.Variable`. Received: {received(variable)}.")
        if view is not None and not isinstance(view, View):
            raise TypeError(f"`view` must be a view of `equalize.views`, or None. Received: {received(view)}.")
        self._variable = weakref.ref(variable)
        self._constant = variable if constant else None
        self._owner = None if owner is None else weakref.ref(owner)
        self._seen: _Seen | None = None
        self.path: str = "constant" if constant else variable.path
        self.view = view
        self.weight = arguments.number("weight", weight, low=0.0, low_open=True)
        self.leads: bool | None = None
        self.common_dtype: str | None = None

    def copy(self) -> "Member":
        """A member like this one, for another group."""
        return Member(self.variable, view=self.view, weight=self.weight, constant=self.constant, owner=self.owner)

    @property
    def variable(self) -> keras.Variable:
        """The `keras.Variable`; for a constant, one that is not trainable and that nobody else has."""
        variable = self._variable()
        if variable is None:
            raise EqualizeError(
                f"The variable '{self.path}' no longer exists: its model has been deleted. Expected: a member of a "
                "model that is kept. Read the members again from the registry, `registry[name].members`: it lists "
                "those that exist."
            )
        return variable

    @property
    def alive(self) -> bool:
        """Whether the variable still exists."""
        return self._variable() is not None

    @property
    def variable_or_none(self) -> keras.Variable | None:
        """The variable, or None where it no longer exists."""
        return self._variable()

    @property
    def constant(self) -> bool:
        """Whether the member is an array that was given, not a variable of a model."""
        return self._constant is not None

    @property
    def anchor(self) -> bool:
        """Whether the member never moves: it is a constant, or not trainable; or the statistic of a frozen layer.

        Where one member leads, it is this one, and no other.
        """
        return self.stays if self.leads is None else self.leads

    @property
    def stays(self) -> bool:
        """Whether the member is a constant, or not trainable, whatever its group makes of it."""
        owner = self.owner
        return not (self.variable if owner is None else owner).trainable

    @property
    def owner(self) -> keras.Layer | None:
        """For a statistic, the layer that updates it; None for any other member, or where the layer is gone."""
        return None if self._owner is None else self._owner()

    def read(self) -> Tensor:
        """The value that a step sees; of a variable that is in no model of the step, what it holds at that time."""
        if self.constant or backend.is_visible(self.variable):
            return backend.read(self.variable)
        return backend.read_live(self.variable)

    def record(self) -> None:
        """Remembers the value that the loss of a step sees, for the scope of its optimizer, which does not carry it."""
        self._seen = _Seen(self.variable)

    def recall(self) -> Tensor | None:
        """The value that `record` saw, where that was in the step that the current scope belongs to."""
        return None if self._seen is None else self._seen.serve(self.variable)

    @property
    def common_shape(self) -> tuple[int, ...]:
        """The shape of the common value, as this member has it."""
        shape = tuple(self.variable.shape)
        return shape if self.view is None else self.view.common_shape(shape)

    @property
    def scale(self) -> float:
        """The factor by which the view stretches the common value."""
        return 1.0 if self.view is None else self.view.scale

    @property
    def multiplicity(self) -> float | np.ndarray:
        """How much of the member shows each entry of the common value: one number, or one for each."""
        return 1.0 if self.view is None else self.view.multiplicity(self.variable.shape)

    @property
    def repeats(self) -> bool:
        """Whether the view shows entries of the common value several times, which may differ in the member."""
        return self.view is not None and self.view.repeats

    @property
    def lossless(self) -> bool:
        """Whether the member loses no bit. A multiple may round, also by a power of two: the smallest numbers."""
        return self.scale == 1.0 and self.common_dtype is None

    def least_squares(self, w: Tensor) -> Tensor:
        """The common value as the member's value `w` alone shows it."""
        w = w if self.common_dtype is None else ops.cast(w, self.common_dtype)
        return w if self.view is None else self.view.least_squares(w)

    def apply(self, common: Tensor, stored: Tensor | None = None) -> Tensor:
        """What the member becomes for a common value; what its view does not cover stays as it is stored."""
        if self.view is None:
            return common if self.common_dtype is None else ops.cast(common, backend.dtype(self.variable))
        stored = backend.read(self.variable) if stored is None else stored
        if self.common_dtype is None:
            return self.view.forward(common, stored)
        return ops.cast(self.view.forward(common, ops.cast(stored, self.common_dtype)), backend.dtype(self.variable))

    @property
    def whole(self) -> bool:
        """Whether the view covers every entry of the variable, so that none of it is free."""
        return self.view is None or self.view.covers(tuple(self.variable.shape))

    @property
    def entries(self) -> int:
        """How many entries of the variable show the common value."""
        multiplicity = np.broadcast_to(self.multiplicity, self.common_shape)
        return round(float(multiplicity.sum()) / self.scale**2)

    @property
    def covered(self) -> np.ndarray:
        """Which entries of the variable show the common value."""
        shape = tuple(self.variable.shape)
        if self.view is None or self.whole:
            return np.ones(shape, bool)
        with backend.eagerly():
            shown = self.view.forward(ops.ones(self.common_shape), ops.zeros(shape))
            return ops.convert_to_numpy(shown) != 0.0

    def overlaps(self, other: "Member") -> bool:
        """Whether an entry of one variable belongs to both members."""
        if self.variable is not other.variable:
            return False
        return self.whole or other.whole or bool((self.covered & other.covered).any())

    def adjoint(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the common value, from that of the member."""
        gradient = gradient if self.common_dtype is None else ops.cast(backend.tensor(gradient), self.common_dtype)
        return gradient if self.view is None else self.view.adjoint(backend.tensor(gradient))

    def apply_gradient(self, gradient: Tensor, own: Tensor | None) -> Tensor:
        """The gradient of the member in the common value's place; what its view does not cover keeps its own."""
        if self.view is None:
            return gradient
        own = ops.zeros(self.variable.shape, gradient.dtype) if own is None else own
        return self.view.forward(gradient / self.scale**2, own)

    def __str__(self) -> str:
        variable = self.variable
        view = "" if self.view is None else f" as {self.view!r}"
        return f"'{self.path}' {tuple(variable.shape)} {backend.dtype(variable)}{view}"

    def __repr__(self) -> str:
        return f"<Member {self if self.alive else repr(self.path) + ' (deleted)'}>"


def listing(members: Iterable[Member]) -> str:
    """Every member on a line of its own, for the end of a message."""
    return "\nMembers:" + "".join(f"\n    {member}" for member in members)


class _Seen:
    """A value that the loss of a step saw. It serves one scope, that of the step's optimizer, and no later one.

    JAX itself refuses the placeholder of one trace in another. A concrete value says nothing of its step, so one
    that was seen outside a trace must not be compiled into a step, where it would stay for good. A variable that the
    loss does not carry is in no model of the step, so nobody but the variable knows its value.
    """

    def __init__(self, variable: keras.Variable):
        self._value = weakref.ref(backend.read(variable)) if backend.is_visible(variable) else None
        self._tracing = backend.is_tracing()
        self._scope: weakref.ref[Any] | None = None

    def serve(self, variable: keras.Variable) -> Tensor | None:
        """The value, if the scope that asks is the first to and may know it."""
        in_fit = backend.is_purged(variable)
        scope = backend.current_scope()
        if self._scope is None:
            self._scope = weakref.ref(scope)
        # `fit` never compiles an optimizer apart from its loss; eagerly, loss scaling still has JAX trace it.
        one_step = in_fit or self._tracing == backend.is_tracing()
        if not one_step or self._scope() is not scope:
            return None
        return backend.read_live(variable) if self._value is None else self._value()
