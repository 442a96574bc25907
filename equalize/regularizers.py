"""Regularizers that tie: penalties on the distance between the members of a group."""

from typing import Any, ClassVar

import keras
from keras import ops

from equalize import backend, penalties, projections, rules
from equalize.projections import Tensor
from equalize.views import View

_mean = backend.fused(projections.mean)


class SoftTie(rules.Rule, keras.regularizers.Regularizer):
    """Base of the regularizers that tie.

    Called by Keras for one member, a soft tie returns that member's share of the group's penalty. Subclasses say
    what the whole group contributes to a share (`statistic`) and what the share is (`share`).

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that goes on being added, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, or `inner` is no regularizer.
        TypeError: An argument is of the wrong type.
        NotLinkedError: The loss is computed and no registry has linked the model.
    """

    slot = "regularizer"
    own_keys: ClassVar[frozenset[str]] = frozenset({"group", "view", "inner"})

    def __init__(self, group: str | None = None, factor: float = 0.01, *, view: View | None = None, inner: Any = None):
        self.group = rules.checked_group(group)
        self.factor = rules.checked_number("factor", factor, low=0.0, high=float("inf"), low_open=False)
        self.view = rules.checked_view(view)
        self.inner = rules.checked_inner(keras.regularizers.get, inner, "regularizer")

    def __call__(self, x: Tensor) -> Tensor:
        group, member = self._require_binding(f"on '{getattr(x, 'path', 'a tensor')}'")
        share = group.share(member, backend.tensor(x))
        return share if self.inner is None else share + ops.cast(self.inner(x), share.dtype)

    def statistic(self, values: list[Tensor]) -> Tensor:
        """What a share needs to know of the group, from the values of all its members."""
        raise NotImplementedError

    def share(self, x: Tensor, statistic: Tensor, count: int) -> Tensor:
        """The share of a member with value `x` in a group of `count` members, a scalar."""
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def get_config(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "factor": self.factor,
            "view": rules.view_config(self.view),
            "inner": keras.regularizers.serialize(self.inner) if self.inner is not None else None,
        }


@keras.saving.register_keras_serializable(package="equalize")
class MeanL2(SoftTie):
    """Pulls the variables of a group to their mean: factor · Σ_i ‖w_i − mean‖².

    The penalty of mean-regularised multi-task learning: with one model per task, the common mean is what the tasks
    share and the distance to it is what a task pays for being special.

    It costs O(n) for a group of n: each member returns its share ‖w_i − mean‖², whose gradient 2·factor·(w_i − mean)
    is already the full derivative of the penalty. `GroupRegistry.penalty()` is the whole penalty, for a loss written
    by hand.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that goes on being added, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, or `inner` is no regularizer.
        TypeError: An argument is of the wrong type.
        NotLinkedError: The loss is computed and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> inputs = keras.Input((3,))
    >>> heads = [
    ...     keras.layers.Dense(1, kernel_regularizer=equalize.regularizers.MeanL2("schools", 0.1))
    ...     for _ in range(4)
    ... ]
    >>> model = keras.Model(inputs, [head(inputs) for head in heads])
    >>> registry = equalize.GroupRegistry().link(model)
    >>> len(registry["schools"].members)
    4
    >>> shares = sum(keras.ops.convert_to_numpy(loss) for loss in model.losses)
    >>> bool(abs(shares - keras.ops.convert_to_numpy(registry.penalty())) < 1e-6)
    True

    Reference:
        Evgeniou and Pontil, Regularized multi-task learning (2004), equation 8.
    """

    def statistic(self, values: list[Tensor]) -> Tensor:
        return _mean(values)

    def share(self, x: Tensor, statistic: Tensor, count: int) -> Tensor:
        return self.factor * penalties.squared_distance(x, statistic)


@keras.saving.register_keras_serializable(package="equalize")
class PairwiseL2(MeanL2):
    """Pulls the variables of a group to each other: factor · Σ_{i<j} ‖w_i − w_j‖².

    All pairs, without forming one: the sum equals n · Σ_i ‖w_i − mean‖² for a group of n, so it is `n · MeanL2` and
    costs O(n) as well.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ, for each pair.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that goes on being added, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, or `inner` is no regularizer.
        TypeError: An argument is of the wrong type.
        NotLinkedError: The loss is computed and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> left, right = keras.layers.Dense(2), keras.layers.Dense(2)
    >>> left.build((None, 3)), right.build((None, 3))
    (None, None)
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("pair", [left.kernel, right.kernel], equalize.regularizers.PairwiseL2(factor=0.5))
    >>> penalty = 0.5 * keras.ops.sum((left.kernel - right.kernel) ** 2)
    >>> bool(keras.ops.abs(registry.penalty() - penalty) < 1e-6)
    True

    Reference:
        Duong, Cohn, Bird and Cook, Low resource dependency parsing (2015), equation 1, for two members.
    """

    def share(self, x: Tensor, statistic: Tensor, count: int) -> Tensor:
        return count * super().share(x, statistic, count)
