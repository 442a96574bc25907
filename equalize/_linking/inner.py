"""What variables are constrained and regularized by besides ties, and whether that fits a group."""

from collections.abc import Sequence
from typing import Any

from equalize._ties import bound, effects
from equalize._ties.effects import described
from equalize._ties.member import Member
from equalize._ties.rules import Rule
from equalize._ties.spread import pulled_arrays
from equalize.errors import GroupMismatchError


def inner_for(name: str, rule: Rule, members: Sequence[Member]) -> list[Any]:
    """What a new rule finds on the variables and keeps as its `inner`, one entry a member.

    Args:
        name: Name of the group that the rule is for.
        rule: The rule.
        members: The members.

    Raises:
        GroupMismatchError: The rule and a variable each bring one, or the members of a projection bring different
            ones: there is one common value, so there can be one constraint.
    """
    if rule.slot is None:
        return [None] * len(members)
    found = [bound.own(getattr(member.variable, rule.slot)) for member in members]
    if rule.directed:
        return found  # no value is common to what leads and what follows
    given = effects.Effect(rule.inner)
    for member, existing in zip(members, found, strict=True):
        if rule.inner is not None and existing is not None and not _same(given, _effect(existing, member), member):
            raise GroupMismatchError(
                f"Cannot tie '{member.path}' into group '{name}': it has the {rule.slot} {described(existing)} "
                f"already, and the rule brings {described(rule.inner)} as `inner`. Expected: one of the two. Leave "
                f"`inner` out to keep what the variable has, or set `variable.{rule.slot} = None` first."
            )
    kept = [rule.inner if existing is None else existing for existing in found]
    if rule.slot == "constraint":
        moving = [(m, inner, given if e is None else _effect(e, m)) for m, inner, e in _zip(members, kept, found)]
        for member, inner, effect in moving[1:]:
            if not _same(moving[0][2], effect, moving[0][0], member):
                lines = "".join(f"\n    {m}: {described(i)}" for m, i in zip(members, kept, strict=True))
                raise GroupMismatchError(
                    f"Cannot tie '{member.path}' into group '{name}': expected a constraint that does what "
                    f"{described(moving[0][1])} of the first member does; received {described(inner)}, which does "
                    "something else to the common value. One common value can obey one constraint: give all members "
                    f"the same, as their views show it, or none.\nMembers:{lines}"
                )
    return kept


def common_inner(rule: Rule, members: Sequence[Member], inner: Sequence[Any]) -> Any:
    """What goes on inside the rule of a group: for a projection the members' one constraint, of the common value."""
    if rule.slot != "constraint" or rule.inner is not None or rule.directed:
        return rule.inner
    member, kept = next((m, i) for m, i in zip(members, inner, strict=True) if not m.constant)
    effect = _effect(kept, member)
    return kept if kept is None or effect.view is None else effects.Through(kept, effect.view)


def _zip(members: Sequence[Member], *columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [row for row in zip(members, *columns, strict=True) if not row[0].constant]


def _effect(function: Any, member: Member) -> effects.Effect:
    """What a member's own constraint or regularizer does; what is free in a slice is no part of the common value."""
    return effects.Effect(function, member.view if member.whole else None)


def _same(one: effects.Effect, other: effects.Effect, *members: Member) -> bool:
    return effects.same(one, other, list(pulled_arrays(members)))
