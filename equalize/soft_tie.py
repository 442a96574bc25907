"""What the regularizers that tie have in common."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from equalize import arguments, backend, penalties, rules, strengths
from equalize.penalties import Share
from equalize.projections import Tensor
from equalize.views import View


class SoftTie(rules.Rule, keras.regularizers.Regularizer):
    """Base of the regularizers that tie.

    Called by Keras for one member, a soft tie returns that member's share of the group's penalty. Subclasses say
    what the shares of a group are, for the factor 1.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ, or where `pairwise` a symmetric matrix of them.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that goes on being added, as an object, a config or a name.
    """

    slot = "regularizer"
    setting = "factor"
    own_keys: ClassVar[frozenset[str]] = frozenset({"group", "view", "inner"})

    pairwise: ClassVar[bool] = False
    """Whether `factor` may be a matrix, with an entry for each pair of members."""

    def __init__(self, group: str | None = None, factor: Any = 0.01, *, view: View | None = None, inner: Any = None):
        self.group = rules.checked_group(group, type(self))
        self.factor = strengths.checked_factor(factor) if self.pairwise else self.checked_strength(factor)
        self.view = rules.checked_view(view)
        self.inner = rules.checked_inner(keras.regularizers.get, inner, keras.regularizers.Regularizer)

    def checked_strength(self, strength: Any) -> float:
        return arguments.number("factor", strength, low=0.0)

    def __call__(self, x: Tensor) -> Tensor:
        group, member = self._require_binding(f"on '{getattr(x, 'path', 'a tensor')}'")
        share = group.share(member, backend.tensor(x))
        return share if self.inner is None else share + ops.cast(self.inner(x), share.dtype)

    def shares(self, values: Sequence[Tensor]) -> list[Share]:
        """For each member, what its share is as a function of its value, given the values of all."""
        if isinstance(self.factor, tuple):
            return self._shares(values, np.array(self.factor))
        return penalties.scaled(self._shares(values), self.dialled)

    def _shares(self, values: Sequence[Tensor], *matrix: np.ndarray) -> list[Share]:
        """The shares for the factor 1, or for a matrix of factors."""
        raise NotImplementedError

    @property
    def count(self) -> int | None:
        """How many members the rule is for; None where any number will do."""
        return len(self.factor) if isinstance(self.factor, tuple) else None

    def among(self, places: Sequence[int]) -> "SoftTie":
        """The rule for some of the members that it was given for, by their places in the group."""
        if not isinstance(self.factor, tuple) or len(places) == len(self.factor):
            return self
        rule = copy.copy(self)
        rule.factor = strengths.among(self.factor, places)
        return rule

    def _settings(self) -> dict[str, Any]:
        return {"factor": strengths.Short(self.factor) if isinstance(self.factor, tuple) else self.factor}

    def get_config(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "factor": [list(row) for row in self.factor] if isinstance(self.factor, tuple) else self.factor,
            "view": rules.view_config(self.view),
            "inner": keras.regularizers.serialize(self.inner) if self.inner is not None else None,
        }
