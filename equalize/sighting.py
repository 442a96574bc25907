"""How a step on JAX learns the value of a frozen member.

The optimizer on JAX carries trainable variables only, and Keras takes the values of all others away while `fit` runs
(3.15), so a projection cannot read an anchor. The loss of the same step can: it runs over all variables of the model
and asks every trainable one for its regularizer. This one adds nothing to the loss and remembers what it saw. What the
variable itself holds is no substitute: a loop written by hand may have given the step another value.
"""

from typing import Any

import keras
from keras import ops

from equalize import backend
from equalize.projections import Tensor
from equalize.rules import Rule


class Sighting(Rule, keras.regularizers.Regularizer):
    """Lets a group see its anchors from the loss of a step."""

    ties = False
    slot = "regularizer"
    own_keys = frozenset()

    def __init__(self) -> None:
        self.group = None
        self.inner: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        # A loss that nobody differentiates or compiles is no training step's.
        if self._binding is not None and backend.traced(x):
            for member in self._binding[0].members:
                if member.anchor:
                    member.sight()
        nothing = ops.zeros((), dtype="float32")
        return nothing if self.inner is None else nothing + self.inner(x)

    def get_config(self) -> dict[str, Any]:
        return {}

    def _settings(self) -> dict[str, Any]:
        return {}
