"""One optimizer step of one group: Keras asks member by member, and what all need is computed once.

`Projection` serves the constraints that Keras calls after an update, `Penalty` the regularizers that it calls in a
loss. Each lives from the first call of a step to the last, or until a member is written by something else.
"""

from collections.abc import Mapping, Sequence

from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor, WriteTracker
from equalize._math import means
from equalize._ties.member import Member
from equalize._ties.rules import Rule


class Projection:
    """What the members of a group have become, for the calls after the first, which has written it.

    While an optimizer applies gradients, Keras calls one constraint after the other, and nothing else is written. Who
    calls constraints by hand may write in between, and then every write is tracked.

    Args:
        values: What each member that may move has become.
        caller: The member whose constraint was called, which is about to be written.
        by_hand: Whether no optimizer calls.
    """

    def __init__(self, values: Mapping[Member, Tensor], caller: Member, by_hand: bool):
        self._values = {member: value for member, value in values.items() if member is not caller}
        self._unwritten: dict[Member, WriteTracker] = {}
        if by_hand:  # there may be no later call, so no value is kept
            self._values = dict.fromkeys(self._values)
            self._unwritten = {
                member: backend.track_writes(member.variable, value, awaited=member is caller)
                for member, value in values.items()
            }

    @property
    def spent(self) -> bool:
        """Whether every member that may move has been served."""
        return not self._values

    def serve(self, caller: Member) -> Tensor | None:
        """A member's value, the first time that it is asked for and while no member has been written; else None."""
        if caller not in self._values:
            return None
        value = self._values.pop(caller)
        if self._unwritten:
            values = {m: unwritten(m.variable) for m, unwritten in self._unwritten.items() if m.alive}
            if any(value is None for value in values.values()):
                return None
            value = values[caller]
            self._unwritten[caller] = backend.track_writes(caller.variable, value, awaited=True)
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
    return penalty * (factor if isinstance(factor, (int, float)) else ops.cast(factor, penalty.dtype))
