"""Groups: who is tied, what the common value is, and how far apart the members are."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from equalize import arguments, backend, freshness, projections
from equalize.arguments import received
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.evaluation import Evaluation
from equalize.members import Member
from equalize.projections import Tensor
from equalize.rules import Rule

_mean = backend.fused(projections.mean)


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

    def __init__(self, name: str, members: Sequence[Member], rule: Any, *, declared: bool = False):
        self.name = arguments.text("name", name, "the name of the group")
        if not isinstance(members, (list, tuple)) or not all(isinstance(member, Member) for member in members):
            raise TypeError(f"`members` must be a list of `equalize.Member`s. Received: {received(members)}.")
        if not isinstance(rule, Rule):
            raise TypeError(
                "`rule` must be a constraint or regularizer of equalize, for instance `equalize.constraints.Equal()`. "
                f"Received: {received(rule)}."
            )
        self._rule = rule
        self.declared = declared
        self._members = tuple(members)
        self._watches: dict[Member, freshness.Watch] = {}
        self._uncalled: set[Member] = set()
        self._evaluation: Evaluation | None = None
        self._led = 0
        self._held: list[int] = []  # the anchors that the others keep alive, by their ids

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
        """The rule, for instance `equalize.constraints.Equal()`.

        It can be replaced, to go from a soft tie to a hard one, for instance:
        `registry["towers"].rule = equalize.constraints.Equal()`. Members, views and weights stay as they are, and so
        do values: what is made hard becomes equal, to its mean, in the next step. The next step of `fit` follows the
        new rule, also inside a callback; a step that was compiled by hand must be compiled anew. Layers that declare
        a rule keep that one in their configs.

        Raises:
            TypeError: The new rule is no rule.
            EqualizeError: It names another group, a view or a weight; or the group was untied.
            GroupMismatchError: The members do not fit it, or it would be the second hard rule of a variable.
        """
        return self._rule

    @rule.setter
    def rule(self, rule: Any) -> None:
        from equalize import planning  # which makes groups, and so imports this module

        planning.replace(self, rule)

    def adopt(self, rule: Any, members: Sequence[Member]) -> None:
        """Takes a rule that is bound to the members, and forgets what was computed under the one before."""
        self._rule = rule
        self._members = tuple(members)
        self._evaluation = None
        self._watches.clear()
        self._uncalled = set()

    def hold_anchors(self) -> None:
        """Has the members that may move keep the others alive: a pull must not end because its anchor is forgotten.

        The rules on the variables hold them, and not the group, since a registry keeps no model alive.
        """
        members = [member for member in self._members if member.alive]
        anchors = tuple(member.variable for member in members if member.anchor)
        self._held = [id(anchor) for anchor in anchors]
        for member in members:
            for rule in (member.variable.constraint, member.variable.regularizer):
                while isinstance(rule, Rule):
                    if rule.bound_group is self:
                        rule.anchors = () if member.anchor else anchors
                    rule = rule.inner

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
        """The common value: that of the anchors where there are any, else the mean of the members."""
        return self._common_value(self.members)

    @property
    def present_rule(self) -> Any:
        """The rule for the members whose variables still exist: a matrix of factors loses the rows of the others."""
        return self.rule.among([place for place, member in enumerate(self._members) if member.alive])

    def spread(self) -> float:
        """The largest entry of max − min over the members as their views pull them back.

        Returns:
            0.0 where the members are equal: where each shows, bit for bit, what one common value would give it.
            Infinite where one member alone is not a number.
        """
        members = self.members
        self._require_values(members)
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
        if not all(member.exact for member in members):
            (base,) = pulled_arrays([members[_gentlest(members)]])
            for guess in (base, np.nextafter(base, base + 1), np.nextafter(base, base - 1)):
                alike |= backend.array(_show(members, ops.convert_to_tensor(guess)))
        with np.errstate(invalid="ignore"):
            apart = np.asarray(np.subtract(high, low, dtype="float64"))
        apart[alike] = 0.0
        return float(np.max(np.nan_to_num(apart, copy=False, nan=np.inf, posinf=np.inf)))

    def project(self, caller: Member | None = None) -> Tensor | None:
        """Writes the common value to the members that may move; returns what `caller` becomes, for Keras to write.

        Keras calls every member's constraint, so the first call of a step works for all. Another member's first call
        after that returns what is there, if no member can have been written since but by Keras with that value.

        Raises:
            GroupMismatchError: Two anchors differ.
            EqualizeError: The step cannot reach a member, which happens on JAX.
        """
        if caller is not None and self._led:
            return self._constrained(caller)
        if caller is not None and caller in self._uncalled:
            value = self._unwritten(caller)
            if value is not None:
                return value
        members = self.members
        self._require_reach(members)
        target = backend.computed_once(self._common_value(members))
        result = None
        self._watches.clear()
        for member in members:
            if member.anchor:
                continue
            value = member.show(target)
            if not self.hard:
                value = projections.relax(backend.read(member.variable), value, self.rule.dialled)
            if member is caller:
                result = value
            else:
                value = backend.own_copy(value)
                member.variable.assign(value)
            if caller is not None:
                self._watches[member] = freshness.watch(member.variable, value, awaited=member is caller)
        self._uncalled = self._watches.keys() - {caller}
        return backend.read(caller.variable) if caller and result is None else result

    @contextlib.contextmanager
    def led(self) -> Iterator[None]:
        """While an optimizer updates one member in place of all: a call of its constraint projects nothing.

        A count, not a flag: the replicas of `tf.distribute.MirroredStrategy` trace a step side by side.
        """
        self._led += 1
        try:
            yield
        finally:
            self._led -= 1

    def follow(self, leader: Member) -> None:
        """Writes the common value that one member shows to all others that may move.

        Raises:
            EqualizeError: The step cannot reach a member, which happens on JAX.
        """
        members = self.members
        self._require_reach(members)
        written = backend.read(leader.variable)
        value = backend.computed_once(leader.pull(written))
        for member in members:
            if not member.anchor and (member is not leader or value is not written):
                member.variable.assign(backend.own_copy(member.show(value)))

    def _constrained(self, member: Member) -> Tensor:
        """A member's value, with the common value that it shows as the inner constraint wants it."""
        value = backend.read(member.variable)
        if self.rule.inner is None:
            return value
        common = member.pull(value)
        return member.show(ops.cast(self.rule.inner(common), common.dtype))

    def _unwritten(self, caller: Member) -> Tensor | None:
        """The value of a member that is called for the first time since the projection, if all is as that left it."""
        self._uncalled.discard(caller)
        values = {member: watch(member.variable) for member, watch in self._watches.items() if member.alive}
        if any(value is None for value in values.values()):
            return None
        self._watches[caller] = freshness.watch(caller.variable, values[caller], awaited=True)
        if not self._uncalled:
            self._watches.clear()
        return values[caller]

    def share(self, member: Member, x: Tensor) -> Tensor:
        """The share of a member, whose value is `x`, in the group's penalty. Where no member may move there is none.

        What anchors contribute is spread over the shares of the others, since Keras asks only trainable variables.
        """
        if backend.in_symbolic_scope():  # Keras infers shapes, and on PyTorch gives a new tensor for each read
            return projections.widen(ops.zeros((), x.dtype))
        members = self.members
        evaluation = self._evaluation
        if evaluation is None or not evaluation.serves(self.rule, member, members):
            self._require_reach(members)
            evaluation = self._evaluation = self._evaluate(members)
        share = evaluation.share(member, projections.widen(member.pull(x)))
        if evaluation.spent:
            self._evaluation = None
        return share

    def penalty(self) -> Tensor:
        """The whole penalty, differentiable in every member that may move."""
        members = self.members
        self._require_values(members)
        moving = [member for member in members if not member.anchor]
        if not moving:
            return self._evaluate(members).anchored
        shares = [self.share(member, backend.tensor(member.variable)) for member in moving]
        return sum(shares[1:], start=shares[0])

    def _evaluate(self, members: Sequence[Member]) -> Evaluation:
        return Evaluation(self.rule, members, self.present_rule.shares)

    def sync(self, method: str) -> None:
        """Makes the members equal: to the anchors, else to the first of them or to their mean.

        What is equal stays as it is: an inner constraint such as `MaxNorm` changes its own result in the last bit.
        """
        members = self.members
        self._require_values(members)
        if all(backend.concrete(member.variable) is not None for member in members) and self.spread() == 0.0:
            return
        if method == "first" and not any(member.anchor for member in members):
            self.follow(members[0])
            return
        value = self._common_value(members)
        for member in members:
            if not member.anchor:
                member.variable.assign(backend.own_copy(member.show(value)))

    def require_anchors_agree(self) -> None:
        """Raises `GroupMismatchError` where two anchors differ, as far as their values can be had."""
        anchors = [(member, backend.concrete(member.variable)) for member in self.members if member.anchor]
        if len(anchors) < 2:
            return
        known = [(member, _pulled_array(member, value)) for member, value in anchors if value is not None]
        for member, value in known[1:]:
            if not np.array_equal(value, known[0][1], equal_nan=True):
                raise GroupMismatchError(
                    f"Group '{self.name}' cannot be made equal: {known[0][0]} and {member} do not move (they are not "
                    f"trainable, or constants) and differ by up to {np.max(np.abs(value - known[0][1])):g}. "
                    "Expected: at most one value among the members that do not move. "
                    "Set the two to one value, or make one of them trainable."
                )

    def _common_value(self, members: Sequence[Member]) -> Tensor:
        self._require_values(members)
        anchors = [member for member in members if member.anchor]
        if anchors:
            self.require_anchors_agree()
            return anchors[0].pull(self._anchored_value(anchors[0]))
        stored = [backend.read(member.variable) for member in members]
        pulled = [member.pull(value) for member, value in zip(members, stored, strict=True)]
        mean = _mean(pulled, tuple(member.weight * member.gain**2 for member in members))
        if not all(member.exact for member in members):
            base = pulled[_gentlest(members)]
            mean = ops.where(_show(members, base), base, mean)
        inner = self.rule.inner if self.projects else None
        return mean if inner is None else ops.cast(inner(mean), mean.dtype)

    def _anchored_value(self, anchor: Member) -> Tensor:
        """The value of an anchor. An optimizer on JAX does not carry it, and its variable may hold an outdated one."""
        if anchor.constant or backend.visible(anchor.variable):
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
            if not member.anchor and not backend.visible(member.variable):
                seen = ", ".join(str(m) for m in members if backend.visible(m.variable))
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
            if backend.current_scope() is None and backend.purged(member.variable):
                raise EqualizeError(
                    f"Group '{self.name}' cannot read its member {member}: while `fit` runs on JAX its value is in the "
                    "compiled step. Expected: a model that has taken its values back. Call `model.jax_state_sync()` "
                    "first, as `equalize.callbacks.TieMonitor` does."
                )

    def __repr__(self) -> str:
        return f"<Group {self.name!r}: {self.rule.describe()}, {arguments.counted(len(self.members), 'member')}>"


def _gentlest(members: Sequence[Member]) -> int:
    """The index of the member whose view stretches least, by the size of its exponent."""
    return min(range(len(members)), key=lambda i: abs(math.log2(members[i].gain)))


def _show(members: Sequence[Member], common: Tensor) -> Tensor:
    """Where every member shows just what the common value gives it; the gain of a view may have rounded it."""
    same = []
    for member in members:
        value = backend.read(member.variable)
        shown = ops.cast(member.show(common) == value, "float32")
        same.append(member.pull(shown) != 0.0)
    return ops.all(ops.stack(same), axis=0)


def pulled_arrays(members: Iterable[Member]) -> Iterator[np.ndarray]:
    """What each member says of the common value, one after the other, in the dtypes of their variables."""
    return (_pulled_array(member, backend.array(member.variable.value)) for member in members)


def _pulled_array(member: Member, value: np.ndarray) -> np.ndarray:
    """What a member that holds a value says of the common value, in the value's dtype."""
    if member.view is None:
        return value
    with backend.eagerly():  # widened, since TensorFlow cannot give a scalar in half precision back
        return ops.convert_to_numpy(projections.widen(member.pull(ops.convert_to_tensor(value)))).astype(value.dtype)
