"""Groups that may be made: everything is checked in the plan, and nothing changes before it is carried out."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops

from equalize import backend, binding, discovery, effects, matching, nesting, persistence, places, retracing
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.groups import Group
from equalize.members import Member
from equalize.rules import Rule


@dataclass
class Plan:
    """A group to be made.

    Attributes:
        group: The group.
        rules: The rule of each member.
        inner: What goes on inside the rule, for each member.
    """

    group: Group
    rules: list[Rule]
    inner: list[Any]

    def establish(self, initial: str) -> Group:
        """Binds the members, and makes a hard group equal."""
        kept = self.inner
        if not self.group.declared and not self.group.projects:  # a group made since the plan may be on a variable, too
            kept = binding.inner_for(self.group.name, self.rules[0], self.group.members)
        for member, rule, inner in zip(self.group.members, self.rules, kept, strict=True):
            if not member.constant:
                binding.attach(rule, self.group, member, inner)
        self.group.hold_anchors()
        if self.group.hard:
            self.group.sync(initial)
        return self.group


def plan_declared(name: str, entries: discovery.Entries, names: Iterable[str], initial: str) -> Plan:
    """A group that layers declare, from their variables and rules."""
    members = [Member(variable, view=rule.view, weight=rule.weight) for variable, rule in entries]
    rules = [rule for _, rule in entries]
    matching.require_company(name, members, names)
    matching.require_fit(name, members, rules, declared=True)
    group = Group(name, members, rules[0].template(rules[0].inner), declared=True)
    _require_start(group, initial)
    return Plan(group, rules, [rule.inner for rule in rules])


def plan(groups: Mapping[str, Group], name: str, members: list[Member], rule: Rule, initial: str) -> Plan:
    """A group of members that a user named, beside the groups that there are."""
    if name in groups:
        raise GroupMismatchError(
            f"There is a group '{name}' already: {groups[name]!r}. Expected: a new name. Call `untie({name!r})` "
            "first, or choose another name."
        )
    matching.require_company(name, members, groups)
    rules = [rule] * len(members)
    matching.require_fit(name, members, rules)
    if rule.slot == "constraint":
        matching.require_no_other_hard_group(name, members)
    inner = binding.inner_for(name, rule, members)
    group = Group(name, members, _for_group(rule, members, inner))
    _require_start(group, initial)
    return Plan(group, rules, inner)


def replace(group: Group, rule: Rule) -> None:
    """Gives a group another rule; its members, their views and weights, and the values stay."""
    discovery.require_rule(group.name, rule)
    if rule.view is not None or rule.weight != 1.0:
        raise EqualizeError(
            f"The new rule of group '{group.name}' has the view {rule.view!r} and the weight {rule.weight:g}, and the "
            f"members have theirs already. Expected: a rule without, {rule.describe()}."
        )
    members = group.members
    if not any(each.bound_group is group for member in members for each in binding.rules_on(member.variable)):
        raise EqualizeError(
            f"Group '{group.name}' ties nothing any more: it was untied, or its model has been deleted. Expected: a "
            "group of a registry. Tie the variables anew with `registry.tie`."
        )
    matching.require_company(group.name, members, ())
    matching.require_fit(group.name, members, [rule] * len(members))
    if rule.slot == "constraint":
        matching.require_no_other_hard_group(group.name, members, besides=group)
        group.require_anchors_agree()
    inner = binding.inner_for(group.name, rule, members, besides=group)
    given = group.rule.given if rule.slot == group.rule.slot else None  # it stays on the variables, so in the config
    binding.detach(group)
    for member, kept in zip(members, inner, strict=True):
        if not member.constant:
            binding.attach(rule, group, member, kept)
    group.adopt(_for_group(rule, members, inner, given), members)
    group.hold_anchors()
    retracing.retrace([member.variable for member in members])


def _for_group(rule: Rule, members: Sequence[Member], inner: Sequence[Any], given: Any = None) -> Rule:
    """The rule of a whole group, with the members' common inner constraint where it is a projection."""
    template = rule.template(binding.common_inner(rule, members, inner))
    template.given = given if rule.inner is None else rule.inner
    return template


def restore(
    groups: Mapping[str, Group], pending: Sequence[dict[str, Any]], models: Sequence[Any], initial: str
) -> list[Plan]:
    """The groups of a registry's config, for models."""
    if not pending:
        return []
    for model in models:
        discovery.weights_of(model)
    weights = [places.weights_by_place(model) for model in models]
    return [
        plan(groups, entry["name"], persistence.members_of(entry, weights), persistence.rule_of(entry), initial)
        for entry in pending
    ]


def require_apart(plans: Sequence[Plan]) -> None:
    """Raises where two groups that are made at once get in each other's way: each was checked against older ones only.

    Raises:
        GroupMismatchError: Two have one name, or project one variable.
    """
    seen: set[str] = set()
    projected: dict[int, str] = {}
    pulled: set[int] = set()
    for plan in plans:
        name = plan.group.name
        if name in seen:
            raise GroupMismatchError(
                f"Two groups that are made together have the name '{name}'. Expected: a name for each. Rename one, in "
                "the layers or in the config of the registry."
            )
        seen.add(name)
        if not plan.group.projects:
            shared = [member for member in plan.group.members if id(member.variable) in pulled]
            if shared and plan.rules[0].inner is not None and not plan.group.declared:
                raise GroupMismatchError(
                    f"Cannot tie '{shared[0].path}' into group '{name}': another group that is made with it has the "
                    f"variable, and the rule brings {effects.name_of(plan.rules[0].inner)} as `inner`. Expected: one "
                    f"of the two. Leave `inner` out.{matching.listing(plan.group.members)}"
                )
            pulled |= {id(member.variable) for member in plan.group.members}
        for member in plan.group.members if plan.group.projects else ():
            other = projected.setdefault(id(member.variable), name)
            if other != name:
                raise GroupMismatchError(
                    f"Cannot tie '{member.path}' into group '{name}': group '{other}' has it as well. Expected: one "
                    "group that projects a variable. Name all members in one group, or give layers that do not "
                    f"hold each other's weights.{matching.listing(plan.group.members)}"
                )


def warn_of_overwriting(plans: Sequence[Plan], initial: str, *, stacklevel: int) -> None:
    """Warns where members that have been trained are about to take the value of the first."""
    groups = [plan.group for plan in plans if plan.group.hard and initial == "first"]
    apart = [group for group in groups if not any(m.anchor for m in group.members) and group.spread() != 0.0]
    later = [member.variable for group in apart for member in group.members[1:]]
    trained = {id(v) for model in retracing.holding(later) if _has_trained(model) for v in model.trainable_variables}
    lost = [group for group in apart if any(id(member.variable) in trained for member in group.members[1:])]
    if lost:
        warnings.warn(
            f"Group '{lost[0].name}'{f' and {len(lost) - 1} more' if lost[1:] else ''}: all members take the value of "
            "the first, and others, which differ from it, have been trained. Expected: others that are new; or "
            '`initial="mean"`, which keeps something of each. Members that were trained from different initial values '
            "are better tied softly at first, for instance by `equalize.regularizers.MeanL2`.",
            UserWarning,
            stacklevel=stacklevel,
        )


def _has_trained(model: Any) -> bool:
    """Whether an optimizer of the model has taken a step."""
    optimizers = nesting.everything(getattr(model, "optimizer", None))
    with backend.eagerly():
        return any(int(ops.convert_to_numpy(optimizer.iterations)) > 0 for optimizer in optimizers)


def _require_start(group: Group, initial: str) -> None:
    """What must hold of the values before a group is made."""
    if group.projects:
        group.require_anchors_agree()
        _require_inner(group)
    if group.hard and initial == "strict":
        matching.require_equal(group)


def _require_inner(group: Group) -> None:
    """Raises `GroupMismatchError` unless the inner constraint of a projection can be applied to the common value."""
    inner, first = group.rule.inner, group.members[0]
    if inner is None:
        return
    common = first.pull(backend.read(first.variable))
    problem = None
    try:
        shape = tuple(inner(common).shape)
    except Exception as error:  # whatever a user's own constraint raises
        shape, problem = None, error
    if shape != tuple(common.shape):
        raise GroupMismatchError(
            f"Cannot tie group '{group.name}': its rule has the `inner` {effects.name_of(inner)}, which cannot be "
            f"applied to the common value. Expected: a constraint that returns a tensor of shape {tuple(common.shape)}"
            f". Received: {f'a tensor of shape {shape}' if problem is None else repr(problem)}. Take another, or none."
            f"{matching.listing(group.members)}"
        ) from problem
