"""One evaluation of a penalty: Keras asks member by member, and what all shares need is computed once."""

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from equalize import freshness, projections
from equalize.backend import read
from equalize.members import Member
from equalize.penalties import Share
from equalize.projections import Tensor


class Evaluation:
    """What the shares of one evaluation of a penalty have in common, computed once for all of them.

    Args:
        rule: The rule of the group.
        members: The members.
        shares: From the values of all members, what each one's share is as a function of its value.
    """

    def __init__(self, rule: Any, members: Sequence[Member], shares: Callable[[Sequence[Tensor]], Sequence[Share]]):
        stored = [read(member.variable) for member in members]
        pulled = [member.pull(member.read()) for member in members]
        values = [ops.stop_gradient(projections.widen(value)) for value in pulled]
        self._shares = dict(zip(members, shares(values), strict=True))
        self._open = {member for member in members if not member.anchor}
        anchored = [
            self._shares[member](value)
            for member, value in zip(members, values, strict=True)
            if member not in self._open
        ]
        self.anchored = sum(anchored[1:], start=anchored[0]) / max(len(self._open), 1) if anchored else None
        self._rule, self._strength = rule, rule.strength
        self._watches = {m: freshness.watch(m.variable, value) for m, value in zip(members, stored, strict=True)}

    def serves(self, rule: Any, member: Member, members: Sequence[Member]) -> bool:
        """Whether the member's share may use this: the first time, and while nothing has changed."""
        return (
            member in self._open
            and rule is self._rule
            and rule.strength == self._strength
            and len(members) == len(self._watches)
            and all(self._watches[m](m.variable) is not None for m in members)
        )

    def share(self, member: Member, x: Tensor) -> Tensor:
        """The member's share, with its part of what the anchors contribute."""
        self._open.discard(member)
        share = self._shares[member](x)
        return share if self.anchored is None else share + self.anchored

    @property
    def spent(self) -> bool:
        """Whether every member that may move has had its share."""
        return not self._open
