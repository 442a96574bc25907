"""Regularizers that tie: penalties on the distance between the members of a group.

`MeanL2` pulls to the mean, `PairwiseL2`, `PairwiseNorm` and `PairwiseL1` each member to each other, `ChainL2` each to
the next one, and `TraceNorm` all into few dimensions. All are Keras regularizers, for the arguments
`kernel_regularizer`, `bias_regularizer` and so on of layers. Subclass `GroupRegularizer` for a penalty of your own.
"""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import keras

from equalize._backend import Tensor
from equalize._math import penalties
from equalize._ties import rules
from equalize.views import View

__all__ = ["ChainL2", "GroupRegularizer", "MeanL2", "PairwiseL1", "PairwiseL2", "PairwiseNorm", "TraceNorm"]


class GroupRegularizer(rules.Factored, keras.regularizers.Regularizer):
    """Base of the regularizers that tie: write `penalty`, and the rest comes with it.

    Keras asks the regularizer of one variable at a time. Here each member of the group returns an equal share of the
    penalty, whose gradient is the full derivative of the penalty by that member, so `model.losses` adds up to the
    penalty and every member is pulled as by the whole. Linking, views, anchors, saving, `TieMonitor` and distribution
    work as for the rules that come with equalize, which are written on this class.

    A subclass with arguments of its own passes `group`, `factor`, `view` and `inner` on, and adds the others to
    `get_config`. Register it with Keras to save and load it.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The non-negative number that `penalty` is multiplied by.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that is still added, as an object, a config or a name.

    Attributes:
        weights: While `penalty` runs: the weight of each member, as `GroupRegistry.tie` was given it.
        fixed: While `penalty` runs: whether each member is an anchor, which does not move.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, or `inner` is not a regularizer.
        TypeError: An argument is of the wrong type.
        NotLinkedError: The loss is computed and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> @keras.saving.register_keras_serializable()
    ... class SumToZero(equalize.regularizers.GroupRegularizer):
    ...     def penalty(self, values):
    ...         return keras.ops.sum(keras.ops.square(sum(values)))
    >>> heads = [keras.layers.Dense(2, kernel_initializer="ones") for _ in range(3)]
    >>> built = [head.build((None, 4)) for head in heads]
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("heads", [head.kernel for head in heads], SumToZero(factor=0.5))
    >>> float(keras.ops.convert_to_numpy(registry.penalty()))  # 0.5 · 3² · 8 entries
    36.0
    """

    slot = "regularizer"

    def __init__(self, group: str | None = None, factor: Any = 1.0, *, view: View | None = None, inner: Any = None):
        self.group = rules.checked_group(group, self)
        self.factor = self.checked_factor(factor)
        self.view = rules.checked_view(view)
        self.inner = rules.checked_inner(keras.regularizers.get, inner, keras.regularizers.Regularizer)

    @abc.abstractmethod
    def penalty(self, values: Sequence[Tensor]) -> Tensor:
        """The penalty for the factor 1.

        Args:
            values: One tensor a member, as its view pulls it back, in at least float32.

        Returns:
            A scalar, made of the values with operations that the backend differentiates.
        """

    @property
    def _relative_weights(self) -> tuple[float, ...] | None:
        """While `penalty` runs: the weights of the members, whose mean is 1; None where all are the same."""
        weights = self.weights or ()
        return None if len(set(weights)) < 2 else tuple(weight * len(weights) / sum(weights) for weight in weights)

    def get_config(self) -> dict[str, Any]:
        return {
            "group": self.group,
            **super().get_config(),
            "view": rules.view_config(self.view),
            "inner": keras.regularizers.serialize(self.inner) if self.inner is not None else None,
        }


class _Shipped(GroupRegularizer):
    """The regularizers below, whose factor has a default that suits kernels and is always shown."""

    weighted: ClassVar[bool] = False

    def __init__(self, group: str | None = None, factor: Any = 0.01, *, view: View | None = None, inner: Any = None):
        super().__init__(group, factor, view=view, inner=inner)

    def _settings(self) -> dict[str, Any]:
        return {"factor": rules.Short(self.get_config()["factor"])}


@keras.saving.register_keras_serializable(package="equalize")
class MeanL2(_Shipped):
    """Pulls the variables of a group to their mean: factor · Σ_i ‖w_i − mean‖².

    The penalty of mean-regularised multi-task learning: with one model per task, the common mean is what the tasks
    share and the distance to it is what a task pays for being special.

    It costs O(n) for a group of n. Each member returns its share of the penalty, with the full derivative
    2·factor·(w_i − mean). `GroupRegistry.penalty()` is the whole penalty, for a loss written by hand.

    `equalize.constraints.Equal(rate=r)` after each step is the same pull as a proximal step, taken exactly:
    `r = 2·η·factor / (1 + 2·η·factor)` for the learning rate η. Use it with Adam and other optimizers that rescale
    gradients, which would rescale this penalty with them. It decouples the pull, as AdamW decouples weight decay
    (Loshchilov and Hutter 2019). Use `MeanL2` if you want the minimizer of a loss with a penalty.

    A constant counts in the mean like any other member. So one variable tied to one array w₀, or to one frozen
    variable, has the mean (w + w₀) / 2 and the penalty ½ · factor · ‖w − w₀‖². With w₀ the pretrained weights that is
    L2-SP, and `factor` is its α (Li, Grandvalet and Davoine 2018, equation 2).

    With weights that `GroupRegistry.tie` is given it is factor · Σ_i a_i · ‖w_i − mean‖², with the mean by the same
    weights: a_i is the weight of a member, divided by the mean of all weights.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that is still added, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, or `inner` is not a regularizer.
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
        Evgeniou and Pontil, Regularized multi-task learning (2004), equation 8. With one member a worker and the mean
        in the place of its center variable, it is the penalty of Zhang, Choromanska and LeCun, Deep learning with
        elastic averaging SGD (2015), equation 2.
    """

    weighted: ClassVar[bool] = True

    def penalty(self, values: Sequence[Tensor]) -> Tensor:
        return penalties.mean_l2(values, self._relative_weights)


@keras.saving.register_keras_serializable(package="equalize")
class PairwiseL2(_Shipped):
    """Pulls the variables of a group to each other: factor · Σ_{i<j} ‖w_i − w_j‖².

    All pairs, without forming one: the sum equals n · Σ_i ‖w_i − mean‖² for a group of n, so it is `n · MeanL2` and
    costs O(n) as well.

    With a matrix as `factor` every pair has its own, Σ_{i<j} factor_ij · ‖w_i − w_j‖²: the graph Laplacian of the
    members, for tasks with known relations. That costs as many differences as the matrix has pairs.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ, for each pair; or a symmetric matrix of them (nested lists or an
            array) with a row and a column for each member, in the order of `registry[name].members`. The diagonal
            does not matter.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that is still added, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, its matrix is not symmetric, or `inner` is
            not a regularizer.
        TypeError: An argument is of the wrong type.
        NotLinkedError: The loss is computed and no registry has linked the model.
        GroupMismatchError: When tied: the matrix is not of the size of the group.

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
        Duong, Cohn, Bird and Cook, Low resource dependency parsing (2015), equation 1, for two members; Evgeniou,
        Micchelli and Pontil, Learning multiple tasks with kernel methods (2005), section 3.1.3, for a matrix.
    """

    pairwise = True
    weighted: ClassVar[bool] = True

    def penalty(self, values: Sequence[Tensor]) -> Tensor:
        return penalties.pairwise_l2(values, self._matrix, self._relative_weights)


@keras.saving.register_keras_serializable(package="equalize")
class PairwiseNorm(_Shipped):
    """Pulls the variables of a group to each other, some to exact equality: factor · Σ_{i<j} ‖w_i − w_j‖₂.

    The norm is not squared, so the pull of a pair does not fade as the two come near: at a finite factor the
    minimizer has clusters of members that are equal. It is the group lasso of the differences, and with a matrix as
    `factor` the network lasso. Each member is a point that is pulled as a whole; for single weights that agree see
    `PairwiseL1`.

    If two members are equal, the pair pulls neither of them (the subgradient 0), so nothing is divided by zero. In
    float32 a difference below 1e-29 of the largest entry of the group counts as zero. Steps along a subgradient come
    near to equality and then oscillate around it, by about learning rate times factor. Let the learning rate fall, and
    compare `registry.spread()` with a tolerance.

    It costs O(n²) time for a group of n, since every pair has a distance of its own, and O(n) memory.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ, for each pair; or a symmetric matrix of them (nested lists or an
            array) with a row and a column for each member, in the order of `registry[name].members`. The diagonal
            does not matter.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that is still added, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, its matrix is not symmetric, or `inner` is
            not a regularizer.
        TypeError: An argument is of the wrong type.
        NotLinkedError: The loss is computed and no registry has linked the model.
        GroupMismatchError: When tied: the matrix is not of the size of the group.

    Example:
    >>> import keras, equalize
    >>> heads = [keras.layers.Dense(1) for _ in range(3)]
    >>> built = [head.build((None, 4)) for head in heads]
    >>> rule = equalize.regularizers.PairwiseNorm(factor=[[0, 1, 0], [1, 0, 2], [0, 2, 0]])
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("heads", [head.kernel for head in heads], rule)
    >>> first, second, third = (keras.ops.convert_to_numpy(head.kernel.value) for head in heads)
    >>> penalty = ((first - second) ** 2).sum() ** 0.5 + 2 * ((second - third) ** 2).sum() ** 0.5
    >>> bool(abs(keras.ops.convert_to_numpy(registry.penalty()) - penalty) < 1e-5)
    True

    Reference:
        Hallac, Leskovec and Boyd, Network lasso: clustering and optimization in large graphs (2015), equation 1.
    """

    pairwise = True

    def penalty(self, values: Sequence[Tensor]) -> Tensor:
        return penalties.pairwise_norm(values, self._matrix)


@keras.saving.register_keras_serializable(package="equalize")
class PairwiseL1(_Shipped):
    """Pulls the variables of a group to each other, weight by weight: factor · Σ_{i<j} ‖w_i − w_j‖₁.

    At a finite factor, members agree exactly in some of their weights at the minimum, in each entry another set of
    members: they may differ in a few weights and share all others. For members that agree as a whole or not at all, use
    `PairwiseNorm`.

    In each entry a member is pulled by the number of members above it less the number below it. Groups of up to 64
    are compared pair by pair, in O(n²) time for a group of n; larger ones are sorted, in O(n log n). Both take O(n)
    memory. Equal entries do not pull each other (the subgradient 0). Steps along a subgradient come near to equality
    and then oscillate around it, by about learning rate times factor times n.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ, for each pair.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that is still added, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, or `inner` is not a regularizer.
        TypeError: An argument is of the wrong type.
        NotLinkedError: The loss is computed and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> layers = [keras.layers.Dense(2) for _ in range(3)]
    >>> built = [layer.build((None, 3)) for layer in layers]
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("layers", [l.kernel for l in layers], equalize.regularizers.PairwiseL1(factor=0.5))
    >>> a, b, c = (keras.ops.convert_to_numpy(layer.kernel.value) for layer in layers)
    >>> penalty = 0.5 * (abs(a - b) + abs(a - c) + abs(b - c)).sum()
    >>> bool(abs(keras.ops.convert_to_numpy(registry.penalty()) - penalty) < 1e-5)
    True

    Reference:
        Tibshirani, Saunders, Rosset, Zhu and Knight, Sparsity and smoothness via the fused lasso (2005), equation 3,
        over all pairs in place of neighbours.
    """

    def penalty(self, values: Sequence[Tensor]) -> Tensor:
        return penalties.pairwise_l1(values)


@keras.saving.register_keras_serializable(package="equalize")
class ChainL2(_Shipped):
    """Pulls each variable of a group to the next one: factor · Σ_i ‖w_(i+1) − w_i‖².

    For members with an order, such as the layers of a deep network or models of successive years: neighbours are
    alike and the ends may differ. The order is that of `registry[name].members`: as given to `tie`, or as the
    variables lie in the model. The penalty costs O(n) for a group of n.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that is still added, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, or `inner` is not a regularizer.
        TypeError: An argument is of the wrong type.
        NotLinkedError: The loss is computed and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> years = [keras.layers.Dense(1) for _ in range(3)]
    >>> built = [year.build((None, 4)) for year in years]
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("years", [y.kernel for y in years], equalize.regularizers.ChainL2(factor=0.5))
    >>> a, b, c = (keras.ops.convert_to_numpy(year.kernel.value) for year in years)
    >>> penalty = 0.5 * (((b - a) ** 2).sum() + ((c - b) ** 2).sum())
    >>> bool(abs(keras.ops.convert_to_numpy(registry.penalty()) - penalty) < 1e-5)
    True

    Reference:
        Tibshirani, Saunders, Rosset, Zhu and Knight, Sparsity and smoothness via the fused lasso (2005), whose
        penalty is the absolute value where this one is the square.
    """

    def penalty(self, values: Sequence[Tensor]) -> Tensor:
        return penalties.chain_l2(values)


@keras.saving.register_keras_serializable(package="equalize")
class TraceNorm(_Shipped):
    """Keeps the variables of a group in few dimensions: factor · (sum of the singular values of the stacked members).

    It does not make members equal. Each member, flattened, is a row of a matrix, and the penalty is that matrix's trace
    norm (nuclear norm), the convex stand-in for its rank. Members become combinations of a few shared directions, each
    with its own coefficients. It also shrinks them, so equal members have a penalty, too: √n · ‖w‖.

    The singular values come from the n×n Gram matrix, so a group of n costs O(n²) products of members and no
    decomposition of anything larger than n×n. Singular values below 3e-5 of the largest are taken for rounding and
    pull no more (the subgradient 0): in float32 the rank falls to that precision.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: The penalty's non-negative factor λ.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras regularizer of the member that is still added, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, or `inner` is not a regularizer.
        TypeError: An argument is of the wrong type.
        NotLinkedError: The loss is computed and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> tasks = [keras.layers.Dense(2) for _ in range(3)]
    >>> built = [task.build((None, 4)) for task in tasks]
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("tasks", [t.kernel for t in tasks], equalize.regularizers.TraceNorm(factor=0.5))
    >>> import numpy as np
    >>> rows = np.stack([keras.ops.convert_to_numpy(task.kernel.value).ravel() for task in tasks])
    >>> penalty = 0.5 * np.linalg.svd(rows, compute_uv=False).sum()
    >>> bool(abs(keras.ops.convert_to_numpy(registry.penalty()) - penalty) < 1e-4)
    True

    Reference:
        Yang and Hospedales, Trace norm regularised deep multi-task learning (2017), equation 1.
    """

    def penalty(self, values: Sequence[Tensor]) -> Tensor:
        return penalties.trace_norm(values)
