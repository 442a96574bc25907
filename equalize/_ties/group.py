"""Groups: who is tied, what the common value is, and how far apart the members are."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._inputs import arguments
from equalize._inputs.arguments import received
from equalize._math import means
from equalize._ties import bound
from equalize._ties.member import Member
from equalize._ties.rules import Rule
from equalize._ties.step import Penalty, Projection, scaled
from equalize.errors import EqualizeError, GroupMismatchError

# The distance of 1 to the next number.
_UNIT = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


class Group:
    """Variables that a rule ties, in the order in which they were found or given.

    Made by `GroupRegistry.link` and `GroupRegistry.tie`, and read from the registry: `registry["towers"]`.

    Attributes:
        name: The group's name.
        declared: Whether layers carry the rule in their configs, so that `link` finds it again in a copy of the model.

    Raises:
        TypeError: An argument is of the wrong type.
        EqualizeError: The name is blank.

    Example:
    >>> import keras, equalize
    >>> first, second = keras.layers.Dense(4), keras.layers.Dense(4)
    >>> model = keras.Sequential([keras.Input((4,)), first, second])
    >>> group = equalize.GroupRegistry().tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
    >>> group.name, group.hard, len(group.members), group.spread(), tuple(group.value.shape)
    ('pair', True, 2, 0.0, (4, 4))
    """

    def __init__(self, name: str, members: Sequence[Member], rule: Any, *, inner: Any = None, declared: bool = False):
        self.name = arguments.text("name", name, "the name of the group")
        if not isinstance(members, (list, tuple)) or not all(isinstance(member, Member) for member in members):
            raise TypeError(f"`members` must be a list of `equalize.Member`s. Received: {received(members)}.")
        if not isinstance(rule, Rule):
            raise TypeError(
                "`rule` must be a constraint or regularizer of equalize, for instance `equalize.constraints.Equal()`. "
                f"Received: {received(rule)}."
            )
        self.declared = declared
        self._held: list[int] = []  # the anchors that the others keep alive, by their ids
        self._shared_updates = 0
        self.adopt(rule, members, inner)

    def adopt(self, rule: Rule, members: Sequence[Member], inner: Any) -> None:
        """Takes a rule and the constraint inside it, and forgets what was computed under the one before."""
        self._rule = rule
        self._inner = inner
        self._members = tuple(members)
        self._strength: Any = None  # a variable that compiled steps read the rule's strength from
        self._projection: Projection | None = None
        self._penalty: Penalty | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        """The members whose variables still exist."""
        members = tuple(member for member in self._members if member.alive)
        if self._held != [id(member.variable) for member in members if member.anchor]:
            self.hold_anchors()
        return members

    @property
    def lost(self) -> tuple[str, ...]:
        """The paths of the members whose variables no longer exist."""
        return tuple(member.path for member in self._members if not member.alive)

    @property
    def rule(self) -> Any:
        """The rule, for instance `equalize.constraints.Equal()`; `GroupRegistry.replace` gives the group another."""
        return self._rule

    @rule.setter
    def rule(self, rule: Any) -> NoReturn:
        raise EqualizeError(
            f"The rule of group '{self.name}' cannot be assigned. Expected: `registry.replace({self.name!r}, rule)`. "
            f"Received: {received(rule)}."
        )

    @property
    def inner(self) -> Any:
        """The constraint that the common value obeys as well: the rule's `inner`, or what the variables had."""
        return self._inner

    def describe(self) -> str:
        """The rule as one would write it, with the constraint inside."""
        return self.rule.having(inner=self.inner).describe()

    def make_adjustable(self) -> bool:
        """Has compiled steps read the strength from a variable, where they can; tells whether that is new to them."""
        if self._strength is None:
            self._strength = backend.adjustable(self.rule.strength)
            return self._strength is not None
        return False

    def adjust(self, strength: float) -> bool:
        """Changes the rule's strength. Tells whether compiled steps know only the old one and must be retraced."""
        was, self._rule = self.rule, self.rule.having(**{self.rule.setting: strength})
        self._projection = self._penalty = None
        if self._strength is None:
            return strength != was.strength
        self._strength.assign(strength)
        return self.hard != was.hard

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
    def hard(self) -> bool:
        """Whether the members are bitwise equal after every optimizer step."""
        return self.rule.hard

    @property
    def projects(self) -> bool:
        """Whether the rule is a projection (hard, or partial) and not a penalty."""
        return self.rule.slot == "constraint"

    @property
    def value(self) -> Tensor:
        """The common value: that of the anchors where there are any, else the mean of the members.

        Raises:
            EqualizeError: The members are of unlike shapes, which have none.
        """
        if not self.rule.same_shape:
            raise EqualizeError(
                f"Group '{self.name}' has no common value: its rule {self.describe()} takes members of unlike shapes. "
                "Expected: a group of members of one shape. Read them one by one, from `group.members`."
            )
        return self._common_value(self.members)

    @property
    def present_rule(self) -> Any:
        """The rule for the members whose variables still exist: a matrix of factors loses the rows of the others."""
        return self.rule.subset([place for place, member in enumerate(self._members) if member.alive])

    def _computing_rule(self, members: Sequence[Member]) -> Any:
        """The rule as it computes with the members: it knows the constraint inside, their weights and the anchors."""
        known: dict[str, Any] = {
            "inner": self.inner,
            "weights": tuple(member.weight * member.scale**2 for member in members),
            "fixed": tuple(member.anchor for member in members),
        }
        if self._strength is not None and not self.hard:
            known[self.rule.setting] = self._strength
        return self.present_rule.having(**known)

    def spread(self) -> float:
        """The largest entry of max − min over the members as their views pull them back.

        For a custom `GroupConstraint`: the largest change of an entry by its projection.

        Returns:
            0.0 where the members are equal: where each shows, bit for bit, what one common value would give it; or
            where a custom projection changes no entry by more than rounding, 8 units in the last place of the
            largest. Infinite where one member alone is not a number.
        """
        members = self.members
        self._require_values(members)
        if not members or self.rule.one_value or not self.projects:
            return spread_of(members)
        pairs = zip(members, self._pulled(members), self.projected(members), strict=True)
        arrays = [(backend.array(value), backend.array(new)) for member, value, new in pairs if not member.anchor]
        largest = max(float(np.max(np.abs(value), initial=0.0)) for value, _ in arrays)
        rounding = 8 * _UNIT[backend.dtype(members[0].variable)] * largest
        change = max(spread_between(value, new) for value, new in arrays)
        return 0.0 if change <= rounding else change

    def project(self, caller: Member | None = None) -> Tensor | None:
        """Writes what the rule makes of the members; returns what `caller` becomes, for Keras to write.

        Keras calls every member's constraint, so the first call of a step works for all. Another member's first call
        after that returns what is there, if no member can have been written since but by Keras with that value.

        Raises:
            GroupMismatchError: Two anchors differ.
            EqualizeError: The step cannot reach a member, which happens on JAX.
        """
        if caller is not None and self._shared_updates:
            return self._constrained(caller)
        served = None if caller is None or self._projection is None else self._projection.serve(caller)
        if served is not None:
            return served
        members = self.members
        self._require_reach(members)
        values = {
            member: member.apply(value)
            for member, value in zip(members, self.projected(members), strict=True)
            if not member.anchor
        }
        for member in values.keys() - {caller}:
            values[member] = backend.own_copy(values[member])
        for member, value in values.items():
            if member is not caller:
                member.variable.assign(value)
        self._projection = None if caller is None else Projection(values, caller)
        if caller is None:
            return None
        return values[caller] if caller in values else backend.read(caller.variable)

    def projected(self, members: Sequence[Member]) -> list[Tensor]:
        """What the rule makes of the members, as their views pull them back.

        Raises:
            GroupMismatchError: Two anchors differ.
            EqualizeError: A custom rule returns something else.
        """
        self._require_values(members)
        if self.rule.one_value:
            require_anchors_agree(self.name, members)
        rule, values = self._computing_rule(members), self._pulled(members)
        projected = rule.project(values)
        _require_shapes(self, projected, values)
        # Computed once for all members that get it, with the constraint inside.
        inner = None if self.inner is None or rule.one_value else self.inner
        done: dict[int, Tensor] = {}
        for value in projected:
            if id(value) not in done:
                obeying = value if inner is None else ops.cast(inner(value), value.dtype)
                done[id(value)] = obeying if rule.one_value and not self.hard else backend.computed_once(obeying)
        return [done[id(value)] for value in projected]

    def _pulled(self, members: Sequence[Member]) -> list[Tensor]:
        """What each member says of the common value; what views rounded is told from what differs."""
        anchor = next((member for member in members if member.anchor), None) if self.rule.one_value else None
        held = None if anchor is None else anchor.least_squares(self._anchored_value(anchor))
        values = []
        for member in members:
            if member.anchor:
                values.append(member.least_squares(self._anchored_value(member)) if held is None else held)
            else:
                values.append(member.least_squares(backend.read(member.variable)))
        if all(member.lossless for member in members):
            return values
        base = values[_gentlest(members)] if held is None else held
        shown = _show(members, base)
        return [ops.where(shown, base, value) for value in values]

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
        members = self.members
        self._require_reach(members)
        written = backend.read(leader.variable)
        value = backend.computed_once(leader.least_squares(written))
        for member in members:
            if not member.anchor and (member is not leader or value is not written):
                member.variable.assign(backend.own_copy(member.apply(value)))

    def _constrained(self, member: Member) -> Tensor:
        """A member's value, with the common value that it shows as the inner constraint wants it."""
        value = backend.read(member.variable)
        if self.inner is None:
            return value
        common = member.least_squares(value)
        return member.apply(ops.cast(self.inner(common), common.dtype))

    def share(self, member: Member, x: Tensor) -> Tensor:
        """The share of a member, whose value is `x`, in the group's penalty."""
        if backend.in_symbolic_scope():  # Keras infers shapes, and on PyTorch gives a new tensor for each read
            return means.widen(ops.zeros((), x.dtype))
        members = self.members
        share = None if self._penalty is None else self._penalty.serve(member, x, members)
        if share is None:
            self._require_reach(members)
            self._penalty = Penalty(self._computing_rule(members), self._factor, members)
            share = self._penalty.serve(member, x, members)
        return share

    def penalty(self) -> Tensor:
        """The whole penalty, differentiable in every member that may move."""
        members = self.members
        self._require_values(members)
        values = [member.read() if member.anchor else backend.tensor(member.variable) for member in members]
        pulled = [means.widen(member.least_squares(value)) for member, value in zip(members, values, strict=True)]
        return scaled(self._computing_rule(members), self._factor, pulled)

    @property
    def _factor(self) -> Any:
        """What the penalty is multiplied by; a rule with a factor for each pair has done that itself."""
        if self._strength is not None:
            return self._strength
        return self.rule.strength if isinstance(self.rule.strength, (int, float)) else 1.0

    def sync(self, method: str) -> None:
        """Makes the members equal: to the anchors, else to the first of them or to their mean.

        The members of a custom `GroupConstraint` are projected. What is equal stays as it is: an inner constraint
        such as `MaxNorm` changes its own result in the last bit.
        """
        members = self.members
        self._require_values(members)
        if self.projects and not self.rule.one_value:
            self.project()
            return
        if all(backend.concrete(member.variable) is not None for member in members) and self.spread() == 0.0:
            return
        if method == "first" and not any(member.anchor for member in members):
            self.follow(members[0])
            return
        value = self._common_value(members)
        for member in members:
            if not member.anchor:
                member.variable.assign(backend.own_copy(member.apply(value)))

    def require_anchors_agree(self) -> None:
        """Raises `GroupMismatchError` where two anchors differ that cannot, as far as their values are available."""
        if self.rule.one_value or not self.projects:
            require_anchors_agree(self.name, self.members)

    def _common_value(self, members: Sequence[Member]) -> Tensor:
        """The anchors' value, else the mean, with the constraint inside a projection."""
        self._require_values(members)
        anchor = next((member for member in members if member.anchor), None)
        if anchor is not None:
            require_anchors_agree(self.name, members)
            return anchor.least_squares(self._anchored_value(anchor))
        mean = means.mean(self._pulled(members), tuple(member.weight * member.scale**2 for member in members))
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

    def _require_reach(self, members: Sequence[Member]) -> None:
        """On JAX a step sees and changes only what its scope carries; elsewhere everything."""
        if backend.in_symbolic_scope():
            return
        for member in members:
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

    def __repr__(self) -> str:
        return f"<Group {self.name!r}: {self.describe()}, {arguments.counted(len(self.members), 'member')}>"


def _require_shapes(group: Group, projected: Any, values: Sequence[Tensor]) -> None:
    """Raises unless a projection returned a value of the same shape for each member."""
    shapes = [tuple(getattr(value, "shape", ("none",))) for value in projected] if _is_list(projected) else None
    expected = [tuple(value.shape) for value in values]
    if shapes != expected:
        raise EqualizeError(
            f"`project` of {type(group.rule).__name__} must return a list of tensors, one for each of the "
            f"{len(values)} members of group '{group.name}', of shapes {expected}. Received: "
            f"{received(projected) if shapes is None else f'shapes {shapes}'}."
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def spread_of(members: Sequence[Member]) -> float:
    """The largest entry of max − min over members; 0.0 where each shows what one common value would give it."""
    if not members:
        return 0.0
    # One member after the other, so that a large group needs the memory of a few members, not of all.
    pulled = pulled_arrays(members)
    first = low = high = next(pulled)
    alike = np.ones(first.shape, bool)
    for value in pulled:
        alike &= (value == first) | (np.isnan(value) & np.isnan(first))
        low, high = np.minimum(low, value), np.maximum(high, value)
    if alike.all():
        return 0.0
    if not all(member.lossless for member in members):
        (base,) = pulled_arrays([members[_gentlest(members)]])
        for guess in (base, np.nextafter(base, base + 1), np.nextafter(base, base - 1)):
            alike |= backend.array(_show(members, ops.convert_to_tensor(guess)))
    return _largest(high, low, alike)


def spread_between(value: np.ndarray, other: np.ndarray) -> float:
    """The largest difference between two arrays."""
    return _largest(value, other, (value == other) | (np.isnan(value) & np.isnan(other)))


def _largest(high: np.ndarray, low: np.ndarray, alike: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        apart = np.asarray(np.abs(np.subtract(high, low, dtype="float64")))
    apart[alike] = 0.0
    return float(np.max(np.nan_to_num(apart, copy=False, nan=np.inf, posinf=np.inf), initial=0.0))


def require_anchors_agree(name: str, members: Sequence[Member]) -> None:
    """Raises `GroupMismatchError` where two anchors differ, as far as their values are available."""
    anchors = [(member, backend.concrete(member.variable)) for member in members if member.anchor]
    if len(anchors) < 2:
        return
    known = [(member, _pulled_array(member, value)) for member, value in anchors if value is not None]
    for member, value in known[1:]:
        if not np.array_equal(value, known[0][1], equal_nan=True):
            raise GroupMismatchError(
                f"Group '{name}' cannot be made equal: {known[0][0]} and {member} do not move (they are not "
                f"trainable, or constants) and differ by up to {np.max(np.abs(value - known[0][1])):g}. "
                "Expected: at most one value among the members that do not move. "
                "Set the two to one value, or make one of them trainable."
            )


def _gentlest(members: Sequence[Member]) -> int:
    """The index of the member whose view stretches least, by the size of its exponent."""
    return min(range(len(members)), key=lambda i: abs(math.log2(members[i].scale)))


def _show(members: Sequence[Member], common: Tensor) -> Tensor:
    """Where every member shows just what the common value gives it; the gain of a view may have rounded it."""
    same = []
    for member in members:
        value = backend.read(member.variable)
        shown = ops.cast(member.apply(common) == value, "float32")
        same.append(member.least_squares(shown) != 0.0)
    return ops.all(ops.stack(same), axis=0)


def pulled_arrays(members: Iterable[Member]) -> Iterator[np.ndarray]:
    """What each member says of the common value, one after the other, in the dtypes of their variables."""
    return (_pulled_array(member, backend.array(member.variable.value)) for member in members)


def _pulled_array(member: Member, value: np.ndarray) -> np.ndarray:
    """What a member that holds a value says of the common value, in the value's dtype."""
    if member.view is None:
        return value
    with backend.eagerly():  # widened, since TensorFlow cannot give a scalar in half precision back
        return ops.convert_to_numpy(means.widen(member.least_squares(ops.convert_to_tensor(value)))).astype(value.dtype)
