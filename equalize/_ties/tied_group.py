"""What the package does to a group: projections, penalties, synchronization, shared updates."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._inputs.arguments import received
from equalize._math import means
from equalize._ties import bound, following, together
from equalize._ties.group import Group
from equalize._ties.member import Member, listing
from equalize._ties.rules import Free, Rule
from equalize._ties.spread import bounds_of, change_of, gentlest, shown_by_all, spread_of
from equalize._ties.step import Penalty, Projection, parts_of, scaled
from equalize.errors import EqualizeError, GroupMismatchError

_NONE: Mapping[Member, Tensor] = {}


class TiedGroup(Group):
    """A group, with all that the rest of the package does to it.

    Attributes:
        declared: Whether layers carry the rule in their configs, so that `link` finds it again in a copy of the model.
        tie: The name of the tie of layers that made the group, with others; None where it was tied alone.
        of_statistics: Whether the members are moving statistics, which no optimizer trains.
        statistics: The groups of moving statistics that are kept equal with this group.
        mixed: Whether the members have several dtypes.
        led: The steps in which members have followed.
        drivers: The callbacks that may have the others follow, in place of the optimizer's step.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[Member],
        rule: Any,
        *,
        inner: Any = None,
        declared: bool = False,
        tie: str | None = None,
        of_statistics: bool = False,
    ):
        self.name = name
        self.declared = declared
        self.tie = tie
        self.of_statistics = of_statistics
        self.statistics: list[TiedGroup] = []
        self._unchanged: Callable[[], bool] | None = None  # since statistics were made equal
        self._held: list[int] = []  # the anchors that the others keep alive, by their ids
        self._shared_updates = 0
        self.drivers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.adopt(rule, members, inner)

    def adopt(self, rule: Rule, members: Sequence[Member], inner: Any) -> None:
        """Takes a rule and the constraint inside it, and forgets what was computed under the one before."""
        self._rule = rule
        self._inner = inner
        self._members = tuple(members)
        dtypes = [backend.dtype(member.variable) for member in members]
        widest = backend.widest_dtype(dtypes)
        for place, (member, dtype) in enumerate(zip(members, dtypes, strict=True)):
            member.leads = place == 0 if rule.directed else None
            member.common_dtype = widest if widest is not None and dtype != widest else None
        self.mixed = any(member.common_dtype is not None for member in members)
        self._strength: Any = None  # a variable that compiled steps read the rule's strength from
        self._projections: weakref.WeakKeyDictionary[Any, Projection] = weakref.WeakKeyDictionary()
        self._penalty: Penalty | None = None
        self.led: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def members(self) -> tuple[Member, ...]:
        return self.living()[0]

    def living(self) -> tuple[tuple[Member, ...], list[keras.Variable]]:
        """The members whose variables exist, and these: what is held does not go while it is worked with."""
        found = [(member, member.variable_or_none) for member in self._members]
        members = tuple(member for member, variable in found if variable is not None)
        if self._held != [id(member.variable) for member in members if member.anchor]:
            self.hold_anchors()
        return members, [variable for _, variable in found if variable is not None]

    @property
    def lost(self) -> tuple[str, ...]:
        """The paths of the members whose variables no longer exist."""
        return tuple(member.path for member in self._members if not member.alive)

    @property
    def rule(self) -> Any:
        return None if isinstance(self._rule, Free) else self._rule

    @rule.setter
    def rule(self, rule: Any) -> NoReturn:
        raise EqualizeError(
            f"The rule of group '{self.name}' cannot be assigned. Expected: `registry.replace({self.name!r}, rule)`. "
            f"Received: {received(rule)}."
        )

    @property
    def tying(self) -> Any:
        return self._rule

    @property
    def inner(self) -> Any:
        """The constraint that the common value obeys as well: the rule's `inner`, or what the variables had."""
        return self._inner

    def make_adjustable(self) -> bool:
        """Has compiled steps read the strength from a variable, where they can; tells whether that is new to them."""
        if self._strength is None:
            self._strength = backend.adjustable(self.tying.strength)
            return self._strength is not None
        return False

    def adjust(self, strength: float) -> bool:
        """Changes the rule's strength. Tells whether compiled steps know only the old one and must be retraced."""
        was, self._rule = self.tying, self.tying.having(**{self.tying.setting: strength})
        self._projections.clear()
        self._penalty = None
        if self._strength is None:
            return strength != was.strength
        self._strength.assign(strength)
        return self.hard != was.hard

    @property
    def is_driven(self) -> bool:
        """Whether a callback has the others follow, in place of the optimizer's step."""
        return any(driver.is_running for driver in self.drivers)

    def hold_anchors(self) -> None:
        """Has the members that may move keep the others alive: a pull must not end because its anchor is forgotten.

        What stands on the variables holds them, and not the group, since a registry keeps no model alive.
        """
        members = [member for member in self._members if member.alive]
        anchors = tuple(member.variable for member in members if member.anchor)
        self._held = [id(anchor) for anchor in anchors]
        for member in members:
            for tie in bound.ties_on(member.variable):
                if isinstance(tie, bound.Bound) and tie.group is self:
                    tie.anchors = () if member.anchor else anchors

    @property
    def value(self) -> Tensor:
        if not self.tying.same_shape:
            raise EqualizeError(
                f"Group '{self.name}' has no common value: its rule {self.describe()} takes members of unlike shapes. "
                "Expected: a group of members of one shape. Read them one by one, from `group.members`."
            )
        return self._common_value(self.members)

    @property
    def present_rule(self) -> Any:
        """The rule for the members whose variables still exist: a matrix of factors loses the rows of the others."""
        return self.tying.subset([place for place, member in enumerate(self._members) if member.alive])

    def computing_rule(self, members: Sequence[Member]) -> Any:
        """The rule as it computes with the members: it knows the constraint inside, their weights and the anchors."""
        known: dict[str, Any] = {
            "inner": self.inner,
            "weights": self._weights(members) if self.projects else tuple(member.weight for member in members),
            "fixed": tuple(member.anchor for member in members),
        }
        if self._strength is not None and not self.hard:
            known[self.tying.setting] = self._strength
        return self.present_rule.having(**known)

    def spread(self) -> float:
        members = self.members
        self._require_values(members)
        if not members or self.tying.one_value or not self.projects or not self.tying.enforced:
            return spread_of(members)
        moved = zip(members, self.pulled(members), self.projected(members), strict=True)
        return change_of([(value, projected) for member, value, projected in moved if not member.anchor])

    def _weights(self, members: Sequence[Member]) -> tuple[Any, ...]:
        """How much each member counts in the common value, with how much of it shows that."""
        return tuple(member.weight * member.multiplicity for member in members)

    def project(self, caller: Member | None = None, inside: Tensor | None = None) -> Tensor | None:
        """Writes what the rule makes of the members; returns what the variable of `caller` becomes, for Keras to write.

        Keras calls every member's constraint, so the first call of a step works for all, and another member's call
        returns what is there. Each call of an optimizer's `apply` is a step. By hand one ends when a member is written.

        Args:
            caller: The member whose constraint was called.
            inside: For a member that is a part of its variable: what the variable becomes without this group.

        Raises:
            GroupMismatchError: Two anchors differ.
            EqualizeError: The step cannot reach a member, which happens on JAX.
        """
        for group in self.statistics:
            group.keep()
        if caller is not None and self._shared_updates:
            return self._constrained(caller, inside)
        if caller is not None and self.tying.directed:
            return self._lead(caller, inside)
        if caller is not None and self.mixed:
            raise EqualizeError(
                f"Group '{self.name}' has members of several dtypes, and their mean would be rounded at every step: "
                f"{self.describe()} alone cannot keep it. Expected: `equalize.optimizers.TiedOptimizer`, which updates "
                f"the widest and rounds it for the others. Received: another optimizer.{listing(self.members)}"
            )
        if self.tying.directed:
            following.move([self])
            return None
        step = backend.applying() or self
        projection = self._projections.get(step)
        if projection is not None and caller is not None:
            served = projection.serve(caller, inside)
            if projection.spent:
                del self._projections[step]
            if served is not None:
                return served
        members, _held = self.living()
        self.require_reach(members)
        projected = None if step is self else together.projected(step, self)
        projected = self.projected(members) if projected is None else projected
        parts = parts_of((m, value) for m, value in zip(members, projected, strict=True) if not m.anchor)
        own = None if caller is None else id(caller.variable)
        values = {key: part.put(inside if key == own else None) for key, part in parts.items()}
        written = [key for key in parts if key != own]
        held = backend.write(
            [parts[key].variable for key in written], [backend.own_copy(values[key]) for key in written]
        )
        self._projections.pop(step, None)
        if caller is None:
            return None
        values |= zip(written, held, strict=True)
        if step is not self:
            following.move(following.led_by_projected(self, [parts[key].variable for key in written], step), step)
        projection = Projection(parts, values, caller, by_hand=step is self)
        if not projection.spent:
            self._projections[step] = projection
        unchanged = backend.read(caller.variable) if inside is None else inside
        return values.get(id(caller.variable), unchanged)

    def _lead(self, caller: Member, inside: Tensor | None) -> Tensor:
        """Has the others follow the member that leads, once a step, when Keras calls its constraint.

        Where it is not trained nobody calls that, and the first call of the step works for all.
        """
        value = backend.read(caller.variable) if inside is None else inside
        leader = next((member for member in self._members if member.leads and member.alive), None)
        step = backend.applying()
        if leader is None or self.is_driven or (leader.variable.trainable and caller is not leader):
            return value
        if step is not None and step in self.led:
            return value
        groups = [self] if step is None or caller is not leader else following.led_with(step, self)
        parts = following.move(groups, step, {leader: value} if caller is leader else {}, caller.variable)
        own = parts.get(id(caller.variable))
        return value if own is None else own.put(value)

    def projected(self, members: Sequence[Member]) -> list[Tensor]:
        """What the rule makes of the members, as their views pull them back.

        Raises:
            GroupMismatchError: Two anchors differ.
            EqualizeError: A custom rule returns something else.
        """
        self._require_values(members)
        if self.tying.one_value:
            require_anchors_agree(self.name, _anchors(members))
        rule, values = self.computing_rule(members), self.pulled(members)
        if not rule.one_value:  # what a rule returns may be a part of what it was given, which is written one by one
            values = [ops.copy(value) for value in values]
        projected = rule.project(values)
        _require_shapes(self, projected, values)
        return together.once_for_all(rule, projected)

    def pulled(self, members: Sequence[Member], given: Mapping[Member, Tensor] = _NONE) -> list[Tensor]:
        """What each member says of the common value; what views rounded is told from what differs.

        Args:
            members: The members.
            given: What variables are about to become.
        """
        first = next((member for member in members if member.anchor), None) if self.tying.one_value else None
        # The anchors of one common value agree, so the first stands for all.
        read = [member for member in members if first is None or member is first or not member.anchor]
        stored = {m: self._anchored_value(m) if m.anchor else backend.read(m.variable) for m in read if m not in given}
        stored |= given
        pulled = {member: member.least_squares(value) for member, value in stored.items()}
        if not all(member.lossless for member in members):
            base = pulled[members[gentlest(members)] if first is None else first]
            shown = shown_by_all(stored, base)
            pulled = {member: ops.where(shown, base, value) for member, value in pulled.items()}
        return [pulled[member] if first is None or not member.anchor else pulled[first] for member in members]

    @contextlib.contextmanager
    def shared_update(self) -> Iterator[None]:
        """While an optimizer updates one member in place of all: a call of its constraint projects nothing.

        A count, not a flag: the replicas of `tf.distribute.MirroredStrategy` trace a step side by side.
        """
        self._shared_updates += 1
        try:
            yield
        finally:
            self._shared_updates -= 1

    def follow(self, leader: Member) -> None:
        """Writes the common value that one member shows to all others that may move.

        Raises:
            EqualizeError: The step cannot reach a member, which happens on JAX.
        """
        for group in self.statistics:
            group.keep()
        members, _held = self.living()
        self.require_reach(members)
        shown = backend.read(leader.variable)
        value = backend.computed_once(leader.least_squares(shown))
        follow = [(m, value) for m in members if not m.anchor and (m is not leader or value is not shown)]
        parts = parts_of(follow).values()
        backend.write([part.variable for part in parts], [backend.own_copy(part.put()) for part in parts])

    def keep(self, *, in_loss: bool = False) -> None:
        """Makes moving statistics equal, where a layer has updated one since; nothing calls a constraint of theirs.

        The forward pass updates them, so the loss of a step comes after. On JAX it is also the last that can write
        them: the scope of an optimizer carries trainable variables only.

        Raises:
            EqualizeError: The loss of a step cannot reach a member, which happens on JAX.
        """
        if self.tying.directed or not self.projects:
            return  # the ones follow when the weights do, and the others are free
        members = self.members
        if in_loss:
            self.require_reach(members)
        if backend.in_symbolic_scope() or not self.can_read(members):
            return
        if self._unchanged is not None and self._unchanged():
            return
        traced = backend.computes_later() or any(backend.is_traced(backend.read(member.variable)) for member in members)
        if traced or self.spread() != 0.0:  # what backpropagation needs is not written for nothing
            self.project()
        self._unchanged = backend.track_all([member.variable for member in members])

    def _constrained(self, caller: Member, inside: Tensor | None) -> Tensor:
        """The variable of a member, with the common value that it shows as the inner constraint wants it."""
        value = backend.read(caller.variable) if inside is None else inside
        if self.inner is None:
            return value
        for member in self.members:
            if member.variable is caller.variable:
                common = member.least_squares(value)
                value = member.apply(ops.cast(self.inner(common), common.dtype), value)
        return value

    def share(self, member: Member, x: Tensor) -> Tensor:
        """The share of a member, whose value is `x`, in the group's penalty."""
        if backend.in_symbolic_scope():  # Keras infers shapes, and on PyTorch gives a new tensor for each read
            return means.widen(ops.zeros((), x.dtype))
        penalty = self._penalty
        share = None if penalty is None else penalty.serve(member, x)
        if penalty is None or share is None:
            members, _held = self.living()
            self.require_reach(members)
            penalty = Penalty(self.computing_rule(members), self._factor, members)
            share = penalty.serve(member, x)
        self._penalty = None if penalty.spent else penalty  # no tensors of a step, and no trace, outlive it
        return share

    def penalty(self) -> Tensor:
        """The whole penalty, differentiable in every member that may move."""
        members = self.members
        self._require_values(members)
        values = [member.read() if member.anchor else backend.tensor(member.variable) for member in members]
        pulled = [means.widen(member.least_squares(value)) for member, value in zip(members, values, strict=True)]
        return scaled(self.computing_rule(members), self._factor, pulled)

    @property
    def _factor(self) -> Any:
        """What the penalty is multiplied by; a rule with a factor for each pair has done that itself."""
        if self._strength is not None:
            return self._strength
        return self.tying.strength if isinstance(self.tying.strength, (int, float)) else 1.0

    def sync(self, method: str) -> None:
        """Makes the members equal: to the anchors, else to the first of them or to their mean.

        The members of a custom `GroupConstraint` are projected. What is equal stays as it is: an inner constraint
        such as `MaxNorm` changes its own result in the last bit.
        """
        members = self.members
        self._require_values(members)
        if self.projects and not self.tying.one_value:
            self.project()
            return
        if all(backend.concrete(member.variable) is not None for member in members) and self.spread() == 0.0:
            return
        if method == "first" and not any(member.anchor for member in members):
            self.follow(members[0])
            return
        self.assign(self._common_value(members))

    def assign(self, value: Tensor) -> None:
        """Gives all members that may move a common value."""
        for member in self.members:
            if not member.anchor:
                member.variable.assign(backend.own_copy(member.apply(value)))

    def require_anchors_agree(self) -> None:
        """Raises `GroupMismatchError` where two anchors differ that cannot, as far as their values are available."""
        if self.tying.one_value or not self.projects:
            require_anchors_agree(self.name, _anchors(self.members))

    def _common_value(self, members: Sequence[Member]) -> Tensor:
        """The anchors' value, else the mean, with the constraint inside a projection."""
        self._require_values(members)
        anchor = next((member for member in members if member.anchor), None)
        if anchor is not None:
            require_anchors_agree(self.name, _anchors(members))
            return anchor.least_squares(self._anchored_value(anchor))
        mean = means.mean(self.pulled(members), self._weights(members))
        inner = self.inner if self.projects else None
        return mean if inner is None else ops.cast(inner(mean), mean.dtype)

    def _anchored_value(self, anchor: Member) -> Tensor:
        """The value of an anchor. An optimizer on JAX does not carry it, and its variable may hold an outdated one."""
        if anchor.constant or backend.is_visible(anchor.variable):
            return backend.read(anchor.variable)
        value = anchor.recall()
        if value is None:
            raise EqualizeError(
                f"Group '{self.name}' cannot take the value of '{anchor.path}', which is not trainable: a stateless "
                "step sees only what it is given. Expected: a step that computes the losses of the model, as `fit` and "
                "`model.stateless_call(..., return_losses=True)` do, and then applies the optimizer; or one that runs "
                "the optimizer in a `keras.StatelessScope` over all variables of the model."
            )
        return value

    def can_read(self, members: Sequence[Member]) -> bool:
        """Whether the step can read all members, which `projected` requires with an error that names the first."""
        if backend.current_scope() is None:
            return not any(backend.is_purged(member.variable) for member in members)
        return all(backend.is_visible(member.variable) for member in members)

    def require_reach(self, members: Sequence[Member]) -> None:
        """On JAX a step sees and changes only what its scope carries; elsewhere everything."""
        if backend.in_symbolic_scope():
            return
        for member in members:
            if self.tying.directed and not member.anchor and not backend.is_visible(member.variable):
                raise EqualizeError(
                    f"Group '{self.name}' cannot move {member}, which follows: on JAX an optimizer changes only what "
                    "it trains. Expected: `fit(..., callbacks=[equalize.callbacks.PeriodicSync(registry, every=1)])`, "
                    "which has members follow after each batch; in a loop of your own, an `apply` inside one "
                    "`keras.StatelessScope` that is given the variables of all members. Received: a step of an "
                    "optimizer alone."
                )
            if not member.anchor and not backend.is_visible(member.variable):
                seen = ", ".join(str(m) for m in members if backend.is_visible(m.variable))
                raise EqualizeError(
                    f"Group '{self.name}' cannot reach its member {member} in this step. Expected: a step "
                    f"over all members; it sees: {seen}. A stateless step of an optimizer or a loss carries only the "
                    "variables that it was given, and a change of any other is lost. Train all members with one "
                    "optimizer in one model, or apply the optimizers inside one `keras.StatelessScope` that is given "
                    "the variables of all."
                )

    def _require_values(self, members: Sequence[Member]) -> None:
        """In a callback on JAX the model must take its values back from the step before anyone can read them."""
        for member in members:
            if backend.current_scope() is None and backend.is_purged(member.variable):
                raise EqualizeError(
                    f"Group '{self.name}' cannot read its member {member}: while `fit` runs on JAX its value is in the "
                    "compiled step. Expected: a model that has taken its values back. Call `model.jax_state_sync()` "
                    "first, as `equalize.callbacks.TieMonitor` does."
                )


def by_tie(groups: Sequence[TiedGroup]) -> list[list[TiedGroup]]:
    """Groups, those that one tie of layers made together, and each other one alone."""
    ties: dict[Any, list[TiedGroup]] = {}
    for group in groups:
        ties.setdefault(group if group.tie is None else group.tie, []).append(group)
    return list(ties.values())


def _require_shapes(group: TiedGroup, projected: Any, values: Sequence[Tensor]) -> None:
    """Raises unless a projection returned a value of the same shape for each member."""
    shapes = [tuple(getattr(value, "shape", ("none",))) for value in projected] if _is_list(projected) else None
    expected = [tuple(value.shape) for value in values]
    if shapes != expected:
        raise EqualizeError(
            f"`project` of {type(group.tying).__name__} must return a list of tensors, one for each of the "
            f"{len(values)} members of group '{group.name}', of shapes {expected}. Received: "
            f"{received(projected) if shapes is None else f'shapes {shapes}'}."
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _anchors(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if member.anchor]


def require_anchors_agree(name: str, fixed: Sequence[Member]) -> None:
    """Raises `GroupMismatchError` where members that do not move differ, as far as their values are available.

    One whose view repeats entries may differ from itself.
    """
    if len(fixed) < 2 and not any(member.repeats for member in fixed):
        return
    anchors = [(member, backend.concrete(member.variable)) for member in fixed]
    known = [(member, bound) for member, value in anchors if value is not None for bound in bounds_of(member, value)]
    for member, value in known[1:]:
        first, expected = known[0]
        if not np.array_equal(value, expected, equal_nan=True):
            who = f"{first} and {member} do not" if member is not first else f"entries that {member} repeats cannot"
            raise GroupMismatchError(
                f"Group '{name}' cannot be made equal: {who} move (they are not trainable, or constants) and differ "
                f"by up to {np.max(np.abs(value - expected)):g}. Expected: at most one value among what does not "
                "move. Set it to one value, or make one of the members trainable."
            )
