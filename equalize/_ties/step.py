"""One optimizer step of one group: Keras asks member by member, and what all need is computed once.

`Projection` serves the constraints that Keras calls after an update, `Penalty` the regularizers that it calls in a
loss. Each lives from the first call of a step to the last, or until a member is written by something else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor, WriteTracker
from equalize._math import means
from equalize._ties.member import Member
from equalize._ties.rules import Rule
from equalize.errors import EqualizeError


@dataclass
class Part:
    """What a group makes of one variable.

    Attributes:
        members: The members that are the variable, or parts of it.
        values: What each of them says of the common value from now on.
    """

    members: list[Member]
    values: list[Tensor]

    @property
    def variable(self) -> keras.Variable:
        return self.members[0].variable

    @property
    def whole(self) -> bool:
        """Whether the group decides about all of the variable."""
        return self.members[0].whole

    def with_part(self, other: "Part") -> "Part":
        """This, and what another group makes of the same variable."""
        return Part([*self.members, *other.members], [*self.values, *other.values])

    def put(self, inside: Tensor | None = None) -> Tensor:
        """The variable with these values; what they leave free is as given, or as it is."""
        for member, value in zip(self.members, self.values, strict=True):
            inside = member.apply(value, inside)
        return inside


def parts_of(values: Iterable[tuple[Member, Tensor]]) -> dict[int, Part]:
    """Members and their values, by the ids of their variables."""
    parts: dict[int, Part] = {}
    for member, value in values:
        part = parts.setdefault(id(member.variable), Part([], []))
        part.members.append(member)
        part.values.append(value)
    return parts


class Projection:
    """What the members of a group have become, for the calls after the first, which has written it.

    While an optimizer applies gradients, Keras calls one constraint after the other, and nothing else is written. Who
    calls constraints by hand may write in between, and then every write is tracked.

    Args:
        parts: What the group makes of each variable, by the variable's id.
        values: What each variable has become, likewise.
        caller: The member whose constraint was called, whose variable is about to be written.
        by_hand: Whether no optimizer calls.
    """

    def __init__(self, parts: Mapping[int, Part], values: Mapping[int, Tensor], caller: Member, by_hand: bool):
        own = id(caller.variable)
        self._values: dict[int, Any] = {key: value for key, value in values.items() if key != own}
        self._parts = {key: part for key, part in parts.items() if not part.whole}
        self._unwritten: dict[int, tuple[Member, WriteTracker]] = {}
        if by_hand:  # there may be no later call, so no value is kept
            self._values = dict.fromkeys(self._values)
            self._unwritten = {
                key: (parts[key].members[0], backend.track_writes(parts[key].variable, value, awaited=key == own))
                for key, value in values.items()
            }

    @property
    def spent(self) -> bool:
        """Whether every member that may move has been served."""
        return not self._values

    def serve(self, caller: Member, inside: Tensor | None) -> Tensor | None:
        """What a member's variable becomes, the first time that it asks and while none has been written; else None."""
        key = id(caller.variable)
        if key not in self._values:
            return None
        value = self._values.pop(key)
        if self._unwritten:
            values = {key: unwritten(m.variable) for key, (m, unwritten) in self._unwritten.items() if m.alive}
            if any(value is None for value in values.values()):
                return None
            value = values[key]
        if key in self._parts:
            value = self._parts[key].put(inside)
        if self._unwritten:
            self._unwritten[key] = caller, backend.track_writes(caller.variable, value, awaited=True)
        return value


class Penalty:
    """The penalty of a group and its gradients, for the shares of the members that may move.

    Each share has the same value, so that they add up to the penalty, and the gradient of the penalty by its member.
    What anchors contribute is in all shares, since Keras asks only trainable variables.

    Args:
        rule: The rule, as it computes with these members.
        factor: What the penalty is multiplied by, a number or a scalar variable.
        members: The members.
    """

    def __init__(self, rule: Rule, factor: float | Tensor, members: Sequence[Member]):
        values = [means.widen(member.least_squares(member.read())) for member in members]
        total, gradients = backend.value_and_gradients(lambda values: scaled(rule, factor, values), values)
        self._open = {member for member in members if not member.anchor}
        self._share = total / max(len(self._open), 1)
        self._gradients = dict(zip(members, gradients, strict=True))
        self._unwritten = backend.track_all([member.variable for member in members])

    @property
    def spent(self) -> bool:
        """Whether every member that may move has been served."""
        return not self._open

    def serve(self, member: Member, x: Tensor) -> Tensor | None:
        """The share of a member with the value `x`, the first time and while nothing has changed; else None."""
        if member not in self._open or not self._unwritten():
            return None
        self._open.discard(member)
        return backend.with_gradients(self._share, [means.widen(member.least_squares(x))], [self._gradients[member]])


def scaled(rule: Rule, factor: float | Tensor, values: Sequence[Tensor]) -> Tensor:
    """The penalty of a rule, times a factor."""
    penalty = rule.penalty(values)  # type: ignore[attr-defined]
    shape = tuple(getattr(penalty, "shape", ()))
    if shape:
        raise EqualizeError(
            f"`penalty` of {rule.describe()} must return a scalar, the whole penalty of the group. Received: a tensor "
            f"of shape {shape}."
        )
    return penalty * (factor if isinstance(factor, (int, float)) else ops.cast(factor, penalty.dtype))
