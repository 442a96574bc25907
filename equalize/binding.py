"""Putting a rule on a variable and taking it off, with respect for what else is there."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from equalize import effects, references, retracing
from equalize.averaged import Averaged
from equalize.effects import described
from equalize.errors import GroupMismatchError
from equalize.groups import Group, pulled_arrays
from equalize.members import Member
from equalize.rules import Rule
from equalize.sighting import Sighting


def rules_on(variable: keras.Variable) -> Iterator[Rule]:
    """The rules on a variable: its constraint, its regularizer, and what those carry inside."""
    for rule in (variable.constraint, variable.regularizer):
        while isinstance(rule, Rule):
            if rule.ties:
                yield rule
            rule = rule.inner


def attach(rule: Rule, group: Group, member: Member, inner: Any) -> None:
    """Binds a rule to a member's variable; `inner` is what goes on inside the rule."""
    variable = member.variable
    bound = rule.bind(group, member, inner)
    if rule.slot == "constraint":
        variable.constraint = bound
        variable.regularizer = _averaged(variable.regularizer, group, member)
        if keras.backend.backend() == "jax":
            variable.regularizer = Sighting().bind(group, member, variable.regularizer)
    elif isinstance(variable.regularizer, Sighting):
        variable.regularizer.inner = bound
    else:
        variable.regularizer = bound


def _averaged(regularizer: Any, group: Group, member: Member) -> Any:
    """A variable's regularizer, of which the part that is the variable's own counts as one of the group's."""
    if regularizer is None:
        return None
    if isinstance(regularizer, Rule) and regularizer.ties:
        return regularizer.around(_averaged(regularizer.inner, group, member))
    return Averaged().bind(group, member, own(regularizer))


def own_regularizer(variable: keras.Variable) -> Any:
    """What a variable is regularized by besides ties, as its user gave it."""
    regularizer = variable.regularizer
    while isinstance(regularizer, Rule):
        regularizer = regularizer.inner
    return regularizer


def own(regularizer: Any) -> Any:
    """A regularizer as its user gave it."""
    return regularizer.inner if isinstance(regularizer, Averaged) else regularizer


def detach(group: Group) -> None:
    """Takes a group's rule off its variables and leaves what was inside."""
    for member in group.members:
        member.variable.constraint = _without(member.variable.constraint, group)
        member.variable.regularizer = _without(member.variable.regularizer, group)


def undeclare(groups: Sequence[Group]) -> None:
    """Takes the rules of groups that layers declare out of the layers, too, so that their configs are plain Keras's.

    A layer that only passes a rule on, as `MultiHeadAttention` does to the layers inside it, has it in its config, too.
    """
    declared = {group.name: {id(member.variable) for member in group.members} for group in groups if group.declared}
    for layer in retracing.living(keras.Layer) if declared else ():
        for rule in [part for value in vars(layer).values() for part in references.objects(value)]:
            if isinstance(rule, Rule):
                left = _undeclared(rule, layer, declared)
                if left is not rule:
                    references.exchange(layer, rule, left)


def _undeclared(rule: Any, layer: keras.Layer, declared: Mapping[str, set[int]]) -> Any:
    """What is left of a rule that a layer holds when groups are dissolved, each given by its variables."""
    if not isinstance(rule, Rule):
        return rule
    inner = _undeclared(rule.inner, layer, declared)
    if rule.bound_group is None and any(id(weight) in declared.get(rule.group or "", ()) for weight in layer.weights):
        return inner
    return rule if inner is rule.inner else rule.around(inner)


def inner_for(name: str, rule: Rule, members: Sequence[Member], besides: Group | None = None) -> list[Any]:
    """What a new rule finds on the variables and keeps as its `inner`, one entry a member.

    Args:
        name: Name of the group that the rule is for.
        rule: The rule.
        members: The members.
        besides: A group whose rules are about to go.

    Raises:
        GroupMismatchError: The rule and a variable each bring one, or the members of a projection bring different
            ones: there is one common value, so there can be one constraint.
    """
    found = [_existing(member.variable, rule.slot, besides) for member in members]
    given = effects.Effect(rule.inner)
    for member, existing in zip(members, found, strict=True):
        if rule.inner is not None and existing is not None and not _same(given, _effect(own(existing), member), member):
            raise GroupMismatchError(
                f"Cannot tie '{member.path}' into group '{name}': it has the {rule.slot} {described(own(existing))} "
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
    if rule.slot != "constraint" or rule.inner is not None:
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


def _existing(variable: keras.Variable, slot: str, besides: Group | None) -> Any:
    existing = _without(getattr(variable, slot), besides)
    return existing.inner if isinstance(existing, Sighting) else existing


def _without(rule: Any, group: Group | None) -> Any:
    """A rule and what it carries inside, without those of a group."""
    if not isinstance(rule, Rule) or group is None:
        return rule
    inner = _without(rule.inner, group)
    if rule.bound_group is group:
        return inner
    return rule if inner is rule.inner else rule.around(inner)
