"""Constraints: what an optimizer step is followed by.

`Equal` ties the variables of a group, fully or in part; `ProximalPairwiseNorm` and `ProximalPairwiseL1` move them
together until some are equal; `Follow` has some move towards another; `Invariant` keeps one variable symmetric. All
are Keras constraints, for the arguments `kernel_constraint`, `bias_constraint` and so on of layers. Subclass
`GroupConstraint` for a projection of your own.
"""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._inputs import arguments
from equalize._inputs.arguments import received
from equalize._math import means, proximal, symmetry
from equalize._ties import effects, rules
from equalize.errors import EqualizeError
from equalize.views import View

__all__ = ["Equal", "Follow", "GroupConstraint", "Invariant", "ProximalPairwiseL1", "ProximalPairwiseNorm"]


class GroupConstraint(rules.Rule, keras.constraints.Constraint):
    """Base of the constraints that tie: write `project`, and the rest comes with it.

    Keras calls the constraint of one variable at a time. Here the first call of a step projects all members at once.
    Linking, views, saving, `TieMonitor` and distribution work as for `Equal`, which is written on this class.
    `GroupRegistry.check` compares the members with their own projection, up to rounding, so a projection must leave
    what it has projected as it is. For members that become one value, or are pulled towards one, subclass `Equal`.

    A subclass with its own arguments passes `group`, `view` and `inner` on, and adds the others to `get_config`.
    Register it with Keras to save and load it. `same_shape = False` in the class admits members of unlike shapes. They
    are projected once when they are tied, and `initial` has no meaning for them.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras constraint for each projected value, as an object, a config or a name.

    Attributes:
        weights: While `project` runs: the weight of each member, times the square of what its view stretches by.
        fixed: While `project` runs: whether each member is an anchor. What `project` returns for it is not used.

    Raises:
        EqualizeError: `group` is empty, or `inner` is no constraint; in training: `project` returns something else
            than a value for each member.
        TypeError: An argument is of the wrong type.
        NotLinkedError: Training starts and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> @keras.saving.register_keras_serializable()
    ... class SumToZero(equalize.constraints.GroupConstraint):
    ...     def project(self, values):
    ...         mean = sum(values) / len(values)
    ...         return [value - mean for value in values]
    >>> heads = [keras.layers.Dense(2, kernel_initializer="ones") for _ in range(3)]
    >>> built = [head.build((None, 4)) for head in heads]
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("heads", [head.kernel for head in heads], SumToZero())
    >>> registry.project()  # what every optimizer step does
    >>> float(keras.ops.convert_to_numpy(keras.ops.sum(heads[0].kernel)))
    0.0
    """

    slot = "constraint"

    def __init__(self, group: str | None = None, *, view: View | None = None, inner: Any = None):
        self.group = rules.checked_group(group, self)
        self.view = rules.checked_view(view)
        self.inner = rules.checked_inner(keras.constraints.get, inner, keras.constraints.Constraint)

    @property
    def enforced(self) -> bool:
        return True

    @abc.abstractmethod
    def project(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """What an optimizer step is followed by.

        Args:
            values: One tensor a member, as its view pulls it back, in the dtype of the variables.

        Returns:
            One tensor a member, of the same shape. A tensor that is returned for several members is computed once, so
            that they are bitwise equal.
        """

    def _settings(self) -> dict[str, Any]:
        inner = {} if self.inner is None else {"inner": effects.name_of(self.inner)}
        return super()._settings() | inner

    def get_config(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "view": rules.view_config(self.view),
            "inner": keras.constraints.serialize(self.inner) if self.inner is not None else None,
        }


@keras.saving.register_keras_serializable(package="equalize")
class Equal(GroupConstraint):
    """Keeps the variables of a group equal: after every optimizer step each becomes the group's mean.

    A subclass that writes `common_value` has another value than the mean.

    Averaging is not sharing. Every member takes its own optimizer step, with its own slots, and then all become the
    mean: the orthogonal projection argmin over p of Σ weight_i · ‖w_i − p‖². With SGD that is one shared variable at
    the learning rate divided by the number of members. With Adam it is something else, since each member has its own
    moments. `equalize.optimizers.TiedOptimizer` gives such a group the numbers of sharing.

    A constraint knows only its own variable, so call `equalize.GroupRegistry().link(model)` before training to find the
    members. A member that is not trainable is an anchor: it stays, and the others take its value.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        rate: How far each member moves to the mean after a step, in (0, 1]. At 1 the members are bitwise equal
            after every step. Below 1 they become `(1 − rate)·w_i + rate·mean`, the proximal operator of
            `(λ/2)·Σ‖w_i − mean‖²` with `rate = λ/(1+λ)`: the spread shrinks by `1 − rate`, the mean stays. At a
            learning rate η that is the proximal step of `equalize.regularizers.MeanL2(factor=λ/(2·η))`, and no
            optimizer rescales it.
        weight: The member's positive weight in the mean.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras constraint for the common value, as an object, a config or a name. If it is convex, the result
            is the exact projection onto "all equal and each satisfies `inner`". Otherwise, as for `UnitNorm`, the
            result is just `inner` of the mean. It can also be another rule, for another part of the variable: rules
            with views that do not overlap go one inside the other.

    Raises:
        EqualizeError: `group` is empty, `rate` or `weight` is out of range, or `inner` is no constraint.
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

    setting = "rate"
    one_value: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True

    def __init__(
        self,
        group: str | None = None,
        *,
        rate: float = 1.0,
        weight: float = 1.0,
        view: View | None = None,
        inner: Any = None,
    ):
        super().__init__(group, view=view, inner=inner)
        self.rate = self.checked_strength(rate)
        self.weight = arguments.number("weight", weight, low=0.0, low_open=True)

    @property
    def hard(self) -> bool:
        """Whether the members are bitwise equal after every step."""
        return isinstance(self.rate, float) and self.rate == 1.0

    @property
    def enforced(self) -> bool:
        return self.hard

    def checked_strength(self, strength: Any) -> float:
        return arguments.number("rate", strength, low=0.0, high=1.0, low_open=True)

    def project(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        if any(self.fixed):
            target = values[self.fixed.index(True)]
        else:
            target = self.common_value(values)
            target = target if self.inner is None else ops.cast(self.inner(target), target.dtype)
        if self.hard:
            return [target] * len(values)
        target = backend.computed_once(target)
        return means.relax(values, target, self.rate)

    def common_value(self, values: Sequence[Tensor]) -> Tensor:
        """The value that members become, or are pulled towards: their weighted mean.

        Args:
            values: One tensor a member, as its view pulls it back, in the dtype of the variables.

        Returns:
            A tensor of the same shape; where all values are equal, that value.
        """
        return means.mean(values, self.weights)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"rate": self.rate, "weight": self.weight}


@keras.saving.register_keras_serializable(package="equalize")
class Follow(GroupConstraint):
    """Makes the first variable of a group lead and the others follow: `w ← w + rate·(leader − w)`.

    After every optimizer step the others move towards the leader, which never changes. So they become its exponential
    moving average: the teacher of a mean teacher, the target of BYOL, the momentum encoder of MoCo, the target network
    of Q-learning. `Equal` pulls both ways, so it does something else: with `teacher.trainable = False` it pulls the
    student to the teacher, and the teacher stays.

    A follower need not be trainable, get gradients or be in the model that you train. Leave it out of the training:
    `teacher.trainable = False`. It starts where it is; `registry.sync("first", name)` makes it a copy of the leader.
    Under gradient accumulation, followers move when the optimizer updates. A step that loss scaling skips does not
    count. If the leader is also in a hard group, its followers follow the value that the group gives it.

    On JAX an optimizer changes only what it trains, so followers that are not trainable need
    `equalize.callbacks.PeriodicSync(registry, every=1)` in `fit`.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        rate: How far each member moves towards the leader, in [0, 1]: 1 copies it, 0 leaves the members where they
            are. With the decay τ of an average it is 1 − τ. `equalize.callbacks.FactorSchedule` changes it.
        every: Members follow at every n-th step only. With `rate=1.0` this is the hard update of a target network.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".

    Raises:
        EqualizeError: `group` is empty, or `rate` or `every` is out of range; in training on JAX: the optimizer does
            not train a follower.
        TypeError: An argument is of the wrong type.
        NotLinkedError: Training starts and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> student, teacher = keras.Sequential([keras.layers.Dense(2)]), keras.Sequential([keras.layers.Dense(2)])
    >>> student.build((None, 4)), teacher.build((None, 4))
    (None, None)
    >>> teacher.trainable = False
    >>> registry = equalize.GroupRegistry()
    >>> groups = registry.tie("teacher", [student, teacher], equalize.constraints.Follow(rate=0.01))
    >>> registry.sync("first", "teacher")  # the teacher starts as a copy
    >>> registry.spread()
    {'teacher/dense/kernel': 0.0, 'teacher/dense/bias': 0.0}

    Reference:
        Tarvainen and Valpola, Mean teachers are better role models (2017), equation 2; Lillicrap et al., Continuous
        control with deep reinforcement learning (2016), for target networks.
    """

    setting = "rate"
    one_value: ClassVar[bool] = True
    directed: ClassVar[bool] = True
    weighted: ClassVar[bool] = False

    def __init__(self, group: str | None = None, *, rate: float = 1.0, every: int = 1, view: View | None = None):
        super().__init__(group, view=view)
        self.rate = self.checked_strength(rate)
        self.every = arguments.integer("every", every, low=1)

    @property
    def enforced(self) -> bool:
        return False

    @property
    def fresh(self) -> bool:
        """Whether `project` returns a new tensor for each member that follows, which no variable holds."""
        return isinstance(self.rate, float) and self.rate < 1.0

    def checked_strength(self, strength: Any) -> float:
        return arguments.number("rate", strength, low=0.0, high=1.0)

    def project(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        place = self.fixed.index(True)
        leader = values[place]
        if isinstance(self.rate, float) and self.rate == 1.0:
            return [leader] * len(values)
        others = [*values[:place], *values[place + 1 :]]
        moved = means.approach(others, [leader] * len(others), self.rate)
        return [*moved[:place], leader, *moved[place:]]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {key: config[key] for key in ("group", "view")} | {"rate": self.rate, "every": self.every}


class _Proximal(rules.Factored, GroupConstraint):
    """Proximal steps: after an optimizer's step, the minimizer of a penalty and of how far members are moved."""

    weighted: ClassVar[bool] = False

    def __init__(self, group: str | None = None, factor: Any = 0.01, *, view: View | None = None, inner: Any = None):
        GroupConstraint.__init__(self, group, view=view, inner=inner)
        self.factor = self.checked_factor(factor)

    @property
    def enforced(self) -> bool:
        return False

    def get_config(self) -> dict[str, Any]:
        return GroupConstraint.get_config(self) | rules.Factored.get_config(self)


@keras.saving.register_keras_serializable(package="equalize")
class ProximalPairwiseL1(_Proximal):
    """Moves the variables of a group together, weight by weight, until some are equal.

    The proximal step of `PairwiseL1`, argmin over p of ½·Σ_i ‖w_i − p_i‖² + factor·Σ_{i<j} ‖p_i − p_j‖₁, after every
    optimizer step. In each coordinate every member is pulled towards each other one by `factor`, and members that meet
    are equal from then on, bit for bit, as long as the optimizer drives them apart by less. The penalty
    `equalize.regularizers.PairwiseL1` has the same minimizer, but under a plain optimizer its members oscillate around
    it. `GroupRegistry.split` makes hard groups of members that are equal.

    With SGD at the learning rate η and `factor` η·λ this is proximal gradient descent on a loss plus
    `PairwiseL1(factor=λ)`. It costs n² operations for each coordinate, and the memory of a few groups.

    An anchor stays, and the others move as if it moved too. Under gradient accumulation every micro-step counts as a
    step. `registry.spread()` tells how far apart the members are.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: How far a member is pulled towards each of the others in one step, not negative.
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras constraint for each value, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, or `inner` is no constraint.
        TypeError: An argument is of the wrong type.
        NotLinkedError: Training starts and no registry has linked the model.

    Example:
    >>> import keras, equalize
    >>> heads = [keras.layers.Dense(1) for _ in range(3)]
    >>> for head, value in zip(heads, (1.0, 1.2, 5.0)):
    ...     head.build((None, 1))
    ...     _ = head.kernel.assign([[value]])
    >>> registry = equalize.GroupRegistry()
    >>> rule = equalize.constraints.ProximalPairwiseL1(factor=0.1)
    >>> group = registry.tie("heads", [head.kernel for head in heads], rule)
    >>> registry.project()  # what every optimizer step does
    >>> equalize.relation(heads[0].kernel, heads[1].kernel), equalize.relation(heads[0].kernel, heads[2].kernel)
    ('equal', 'different')

    Reference:
        Petry, Flexeder and Tutz, Pairwise fused lasso (2011), for the penalty; Barlow and Brunk, The isotonic
        regression problem and its dual (1972), for the projection onto ordered values.
    """

    def project(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        return proximal.pairwise_l1(values, self.factor)


@keras.saving.register_keras_serializable(package="equalize")
class ProximalPairwiseNorm(_Proximal):
    """Moves the variables of a group together until some are equal, each as a whole: convex clustering.

    The proximal step of `PairwiseNorm`, argmin over p of ½·Σ_i ‖w_i − p_i‖² + factor·Σ_{i<j} ‖p_i − p_j‖, after every
    optimizer step. Every member is pulled towards each other one by `factor`, whatever their distance, so members meet
    after finitely many steps, and are equal from then on, bit for bit, as long as the optimizer drives them apart by
    less. Under `ProximalPairwiseL1` single weights meet; here all weights of a member do at once. The penalty
    `equalize.regularizers.PairwiseNorm` has the same minimizer, and under a plain optimizer its members hop about it.
    `GroupRegistry.split` makes hard groups of what is equal.

    With SGD at the learning rate η and `factor` η·λ this is proximal gradient descent on a loss plus
    `PairwiseNorm(factor=λ)`. With a matrix as `factor` every pair has its own: clusters are found in far more noise
    where only near neighbors pull each other, for instance by the distances of the weights that a soft tie has learned.
    Each variable is in a group by itself, so the kernels of two layers may meet before their biases do. The minimizer
    is found by iteration, up to 200 turns on an n×n matrix: members that come within a thousandth of the distance that
    they had have met. It costs n²·d operations for variables of d entries, and the memory of a few groups.

    A member that does not move stays, and the others move as if it did too. Steps of gradient accumulation that do not
    update count as steps. `registry.spread()` is how far members are apart.

    Args:
        group: Name of the group. None where `GroupRegistry.tie` gives it.
        factor: How far a member is pulled towards each of the others in one step, not negative; or a symmetric matrix
            of that for each pair (nested lists or an array).
        view: How the member shows the common value, one of `equalize.views`; None for "as it is".
        inner: A Keras constraint for each value, as an object, a config or a name.

    Raises:
        EqualizeError: `group` is empty, `factor` is negative or not finite, its matrix is not symmetric, or `inner` is
            no constraint.
        TypeError: An argument is of the wrong type.
        NotLinkedError: Training starts and no registry has linked the model.
        GroupMismatchError: When tied: the matrix is not of the size of the group.

    Example:
    >>> import keras, equalize
    >>> heads = [keras.layers.Dense(1) for _ in range(3)]
    >>> for head, value in zip(heads, ([0.0, 1.0], [0.1, 1.1], [5.0, 5.0])):
    ...     head.build((None, 2))
    ...     _ = head.kernel.assign([[each] for each in value])
    >>> registry = equalize.GroupRegistry()
    >>> rule = equalize.constraints.ProximalPairwiseNorm(factor=0.1)
    >>> group = registry.tie("heads", [head.kernel for head in heads], rule)
    >>> registry.project()  # what every optimizer step does
    >>> equalize.relation(heads[0].kernel, heads[1].kernel), equalize.relation(heads[0].kernel, heads[2].kernel)
    ('equal', 'different')

    Reference:
        Hocking, Joulin, Bach and Vert, Clusterpath (2011), equation 2, for the problem; Chi and Lange, Splitting
        methods for convex clustering (2015), for weights of pairs; Hunter and Li, Variable
        selection using MM algorithms (2005), for the iteration.
    """

    pairwise: ClassVar[bool] = True

    def project(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        matrix = self._matrix
        return proximal.pairwise_norm(values, self.factor if matrix is None else matrix)


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
        inner: A Keras constraint for the invariant value, as an object, a config or a name. It must treat the entries
            alike, as `MaxNorm` over the turned axes does. Otherwise the result is not invariant.

    Raises:
        EqualizeError: No view is given; or, when the constraint meets its variable, the views do not form a finite
            group, change its shape or do not fit it.
        TypeError: An entry of `views` is not a view.

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
        self.inner = rules.checked_inner(keras.constraints.get, inner, keras.constraints.Constraint, tying=False)

    def __call__(self, w: Tensor) -> Tensor:
        value = symmetry.average(self.views, backend.tensor(w))
        return value if self.inner is None else self.inner(value)

    def get_config(self) -> dict[str, Any]:
        return {
            "views": [rules.view_config(view) for view in self.views],
            "inner": keras.constraints.serialize(self.inner) if self.inner is not None else None,
        }
