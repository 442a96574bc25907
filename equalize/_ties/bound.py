"""What stands on a variable that is tied: the group, the member, and what was there before."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._ties.member import Member
from equalize._ties.rules import Rule, Tying


class Bound(Tying):
    """A rule on one variable. Its copies, pickles and configs are the rule, unbound: a clone never joins a group.

    Attributes:
        group: The `equalize.Group`, whose rule may be replaced.
        member: The member that the variable is.
        inner: The constraint or regularizer that was on the variable, which remains in force.
        anchors: The variables that hold the member, which live as long as it does.
    """

    def __init__(self, group: Any, member: Member, inner: Any):
        self.group = group
        self.member = member
        self.inner = inner
        self.anchors: tuple[keras.Variable, ...] = ()

    @property
    def rule(self) -> Rule:
        """The rule of the group."""
        return self.group.tying

    def unbound(self) -> Any:
        """What a copy of the variable carries."""
        inner = self.inner.unbound() if isinstance(self.inner, Bound) else self.inner
        member = self.member
        return self.rule.having(group=self.group.name, view=member.view, weight=member.weight, inner=inner)

    def get_config(self) -> dict[str, Any]:
        return self.unbound().get_config()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unchanged, (self.unbound(),)

    def __repr__(self) -> str:
        return f"<{self.rule.describe()} of group {self.group.name!r} on '{self.member.path}'>"


class BoundConstraint(Bound, keras.constraints.Constraint):
    """The constraint of a member: the projection of its group.

    A variable that is in several groups by its parts has one inside the other, and each changes its own part of what
    those inside of it return. What no group has is as the constraint that the variable had wants it.
    """

    def unbound(self) -> Any:
        rule = super().unbound()
        return rule if rule.inner is not None else rule.having(inner=own(self.rule))

    def __call__(self, w: Tensor) -> Tensor:
        if isinstance(self.inner, BoundConstraint):
            inside = self.inner(w)
            # The first tie of a group has projected all its members on the variable.
            done = any(tie.group is self.group for tie in chain_of(self.inner) if isinstance(tie, BoundConstraint))
            return inside if done and not self.rule.directed else self.group.project(self.member, inside)
        alone = self.member.whole and not self.rule.directed
        return self.group.project(self.member, None if alone else self._free())

    def _free(self) -> Tensor:
        """The variable, as the constraint that its user gave it would have all of it."""
        w = backend.read(self.member.variable)
        return w if self.inner is None else ops.cast(self.inner(w), w.dtype)


class BoundRegularizer(Bound, keras.regularizers.Regularizer):
    """The regularizer of a member: its share of the group's penalty, and what was there before.

    Attributes:
        brings: Whether the innermost is the `inner` of the group's rule, and goes with it.
    """

    def __init__(self, group: Any, member: Member, inner: Any, *, brings: bool = False):
        super().__init__(group, member, inner)
        self.brings = brings

    def __call__(self, x: Tensor) -> Tensor:
        for statistics in self.group.statistics:
            statistics.keep(in_loss=True)
        share = self.group.share(self.member, backend.tensor(x))
        return share if self.inner is None else share + ops.cast(self.inner(x), share.dtype)


class OwnRegularizer(Bound, keras.regularizers.Regularizer):
    """A member's own regularizer, while its group is projected.

    A hard group is one weight, so the members' own regularizers count as their mean: equal ones count once.

    It also makes moving statistics equal that are tied with the group, and lets a step on JAX know the values of
    anchors. The optimizer carries trainable variables only, and Keras takes the values of all others away while `fit`
    runs (3.15), so a projection cannot read an anchor. The loss of the same step can: it runs over all variables of the
    model and asks every trainable one for its regularizer. What the variable itself holds is no substitute, since a
    loop written by hand may have given the step another value.
    """

    def unbound(self) -> Any:
        return self.inner

    def get_config(self) -> dict[str, Any]:
        return {} if self.inner is None else self.inner.get_config()

    def __call__(self, x: Tensor) -> Tensor:
        for statistics in self.group.statistics:
            statistics.keep(in_loss=True)
        if backend.is_traced(x):  # a loss that nobody differentiates or compiles is no training step's
            for member in self.group.members:
                if member.anchor:
                    member.record()
        if self.inner is None:
            return ops.zeros((), "float32")
        return self._mean(x) if self.group.hard else self.inner(x)

    def _mean(self, x: Tensor) -> Tensor:
        """The member's part of the mean over those that may move."""
        member, n = self.member, sum(not other.anchor for other in self.group.members)
        if member.view is None or member.whole or n < 2:
            return self.inner(x) / max(n, 1)
        # What the view leaves free is no part of the group: it keeps its gradient, and the rest has a part of it.
        x = backend.tensor(x)
        constant = ops.stop_gradient(x)
        covered = member.view.forward(ops.ones(member.common_shape), ops.zeros(x.shape)) != 0.0
        return self.inner(ops.where(covered, constant + (x - constant) / n, x))


def ties_on(variable: keras.Variable) -> Iterator[Tying]:
    """The ties on a variable, from the outside in: those of groups, and rules that are not linked."""
    for chain in (variable.constraint, variable.regularizer):
        yield from (each for each in chain_of(chain) if not isinstance(each, OwnRegularizer))


def projections(variable: keras.Variable) -> list[BoundConstraint]:
    """The ties that project a variable, from the outside in; those in which it leads are outside."""
    return [tie for tie in chain_of(variable.constraint) if isinstance(tie, BoundConstraint)]


def leads(variable: keras.Variable) -> bool:
    """Whether a variable leads a group."""
    return isinstance(variable.constraint, BoundConstraint) and bool(variable.constraint.member.leads)


def chain_of(outermost: Any) -> Iterator[Tying]:
    """A constraint or regularizer and what it carries inside, as far as that is ours."""
    while isinstance(outermost, Tying):
        yield outermost
        outermost = outermost.inner


def rule_of(tie: Tying) -> Rule:
    """The rule of a tie, with the name of its group, its view and its weight."""
    return tie.unbound() if isinstance(tie, Bound) else tie  # type: ignore[return-value]


def group_of(tie: Tying) -> Any:
    """The group of a tie; None for a rule that is not linked."""
    return tie.group if isinstance(tie, Bound) else None


def own(outermost: Any) -> Any:
    """What a user gave to a variable besides ties, inside of them."""
    while isinstance(outermost, Tying):
        outermost = outermost.inner
    return outermost


def attach(group: Any, member: Member, inner: Any) -> None:
    """Puts a group's rule on a member's variable, in place of the rule that a layer declared, or around what is there.

    Args:
        group: The group.
        member: The member.
        inner: What the rule is to carry inside, where the variable has nothing of its own.
    """
    variable, chain = member.variable, member.variable.regularizer
    declares = functools.partial(_declares, group, member)

    def kept(within: Any) -> Any:  # what a rule has inside is for the common value, not for what is free
        return within if member.whole or isinstance(within, Tying) else None

    if group.projects:
        constraint = variable.constraint
        if any(map(declares, chain_of(constraint))):
            variable.constraint = _changed(
                constraint, lambda tie: BoundConstraint(group, member, kept(tie.inner)) if declares(tie) else tie
            )
        else:
            variable.constraint = _around(constraint, group, member)
        if chain is not None or group.statistics or keras.backend.backend() == "jax":
            _regularize(variable, own(chain))
        return
    if any(map(declares, chain_of(chain))):
        variable.regularizer = _changed(
            chain, lambda tie: BoundRegularizer(group, member, tie.inner) if declares(tie) else tie
        )
        return
    brings = own(chain) is None and inner is not None
    if brings:
        _regularize(variable, inner)
    variable.regularizer = BoundRegularizer(group, member, variable.regularizer, brings=brings)


def _around(constraint: Any, group: Any, member: Member) -> BoundConstraint:
    """A tie around what a variable has; inside of those in which it leads, since what follows is what it becomes."""
    if isinstance(constraint, BoundConstraint) and constraint.member.leads and not member.leads:
        constraint.inner = _around(constraint.inner, group, member)
        return constraint
    return BoundConstraint(group, member, constraint)


def attach_statistics(group: Any, statistics: Any) -> None:
    """Has the loss, and the projection, of a group make statistics equal as well."""
    group.statistics.append(statistics)
    for member in group.members if group.projects else ():
        if not member.constant:
            _regularize(member.variable, own(member.variable.regularizer))


def detach(group: Any) -> None:
    """Takes a group's rule off its variables, with what it brought, and leaves what was there before."""

    def inside(tie: Tying) -> Any:
        return tie.inner if group_of(tie) is group else tie

    for member in group.members:
        variable = member.variable
        ties = [tie for tie in chain_of(variable.regularizer) if isinstance(tie, BoundRegularizer)]
        if any(tie.group is group and tie.brings for tie in ties):
            variable.regularizer = _with_own(variable.regularizer, None)
        variable.constraint = _changed(variable.constraint, inside)
        variable.regularizer = _changed(variable.regularizer, inside)


def without(outermost: Any, group: Any) -> Any:
    """What a constraint or regularizer would be without the ties of a group; nothing is changed."""
    if not isinstance(outermost, Bound):
        return outermost
    inner = without(outermost.inner, group)
    if outermost.group is group or isinstance(outermost, OwnRegularizer):
        return inner
    return outermost if inner is outermost.inner else type(outermost)(outermost.group, outermost.member, inner)


@contextlib.contextmanager
def without_penalties(model: keras.Model) -> Iterator[None]:
    """While open, no variable of the model has a regularizer: penalties are not what the data say."""
    kept = [(variable, variable.regularizer) for variable in model.weights]
    for variable, _ in kept:
        variable.regularizer = None
    try:
        yield
    finally:
        for variable, regularizer in kept:
            variable.regularizer = regularizer


def _declares(group: Any, member: Member, tie: Tying) -> bool:
    """Whether a tie on a member's variable is the rule by which a layer declares the member."""
    return isinstance(tie, Rule) and tie.group == group.name and tie.view == member.view


def _regularize(variable: keras.Variable, innermost: Any) -> None:
    """Puts what the projections of a variable do in its loss around the regularizer that its user gave."""
    for tie in reversed(projections(variable)):
        innermost = OwnRegularizer(tie.group, tie.member, innermost)
    variable.regularizer = _with_own(variable.regularizer, innermost)


def _changed(outermost: Any, change: Callable[[Any], Any]) -> Any:
    """A constraint or regularizer, with each tie in it, from the inside out, changed into what a function returns."""
    if not isinstance(outermost, Tying):
        return outermost
    inner = _changed(outermost.inner, change)
    if isinstance(outermost, Bound):
        outermost.inner = inner
    elif isinstance(outermost, Rule) and inner is not outermost.inner:
        outermost = outermost.having(inner=inner)
    return change(outermost)


def _with_own(outermost: Any, innermost: Any) -> Any:
    """A regularizer with something else in the place of what its user gave."""
    if not isinstance(outermost, Tying) or isinstance(outermost, OwnRegularizer):
        return innermost
    inner = _with_own(outermost.inner, innermost)
    if isinstance(outermost, Rule):
        return outermost.having(inner=inner)
    outermost.inner = inner
    return outermost


def _unchanged(made: Any) -> Any:
    return made
