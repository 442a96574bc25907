"""A hard group is one weight, so its members' own regularizers count as their mean: equal ones count once."""

from typing import Any

import keras
from keras import ops

from equalize import backend
from equalize.projections import Tensor
from equalize.rules import Rule


class Averaged(Rule, keras.regularizers.Regularizer):
    """A member's own regularizer, divided by the number of members that may move, while its group is hard."""

    ties = False
    slot = "regularizer"
    own_keys = frozenset()

    def __init__(self) -> None:
        self.group = None
        self.inner: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._binding is None or not self._binding[0].hard:
            return self.inner(x)
        group, member = self._binding
        n = sum(not other.anchor for other in group.members)
        if member.view is None or member.whole or n < 2:
            return self.inner(x) / max(n, 1)
        # What the view leaves free is no part of the group: it keeps its gradient, and the rest has a part of it.
        x = backend.tensor(x)
        fixed = ops.stop_gradient(x)
        covered = member.view.forward(ops.ones(member.common_shape), ops.zeros(x.shape)) != 0.0
        return self.inner(ops.where(covered, fixed + (x - fixed) / n, x))

    def get_config(self) -> dict[str, Any]:
        return {}

    def _settings(self) -> dict[str, Any]:
        return {}
