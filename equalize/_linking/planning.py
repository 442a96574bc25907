"""Groups that may be made: everything is checked in the plan, and nothing changes before it is carried out."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import living, wrapping
from equalize._linking import config, discovery, places, validation
from equalize._linking.inner import common_inner, inner_for
from equalize._ties import bound, effects
from equalize._ties.member import Member, listing
from equalize._ties.rules import Rule
from equalize._ties.spread import pulled_arrays, spread_between
from equalize._ties.tied_group import TiedGroup, require_anchors_agree
from equalize.errors import EqualizeError, GroupMismatchError


@dataclass
class Plan:
    """A group to be made.

    Attributes:
        group: The group.
        inner: What the rule carries inside, for each member.
    """

    group: TiedGroup
    inner: list[Any]

    def establish(self, initial: str) -> TiedGroup:
        """Binds the members, and makes a hard group equal."""
        if not self.group.of_statistics:
            _attach(self.group, zip(self.group.members, self.inner, strict=True))
        if self.group.hard:
            self.group.sync(initial)
        elif not self.group.tying.same_shape:
            self.group.project()
        return self.group


def plan_declared(name: str, entries: discovery.Entries, names: Iterable[str], initial: str) -> Plan:
    """A group that layers declare, from their variables and rules."""
    members = [Member(variable, view=rule.view, weight=rule.weight) for variable, rule, _ in entries]
    rules = [rule for _, rule, _ in entries]
    validation.require_several(name, members, names)
    validation.require_fit(name, members, rules, declared=True)
    inner = bound.own(rules[0]) if rules[0].slot == "constraint" else None
    group = TiedGroup(name, members, rules[0], inner=inner, declared=True)
    _require_start(group, initial)
    return Plan(group, [rule.inner for rule in rules])


def plan(
    groups: Mapping[str, TiedGroup],
    name: str,
    members: list[Member],
    rule: Rule,
    initial: str,
    tie: str | None = None,
    *,
    of_statistics: bool = False,
    besides: TiedGroup | None = None,
) -> Plan:
    """A group of members that a user named, beside the existing groups, alone or as a part of a tie of layers."""
    if name in groups:
        raise GroupMismatchError(
            f"There is a group '{name}' already: {groups[name]!r}. Expected: a new name. Call `untie({name!r})` "
            "first, or choose another name."
        )
    _require_mates(name, members, rule, groups)
    if rule.slot == "constraint":
        validation.require_no_other_hard_group(name, members, rule, besides)
        validation.require_no_inner(name, members, rule, besides)
    if of_statistics:
        validation.require_no_other_statistics(name, members, groups.values())
    inner = inner_for(name, rule, members)
    common = common_inner(rule, members, inner)
    group = TiedGroup(name, members, rule, inner=common, tie=tie, of_statistics=of_statistics)
    _require_start(group, initial)
    return Plan(group, inner)


def plan_replacement(group: TiedGroup, rule: Rule | None) -> Callable[[], None]:
    """A group's change to another rule; its members, their views and weights, and the values stay.

    Returns:
        A function that makes the change, which has been checked.
    """
    rule = discovery.required_rule(group.name, rule)
    if rule.view is not None or rule.weight != 1.0:
        raise EqualizeError(
            f"The new rule of group '{group.name}' has the view {rule.view!r} and the weight {rule.weight:g}, and the "
            f"members have theirs already. Expected: a rule without, {rule.describe()}."
        )
    members = group.members
    validation.require_several(group.name, members, ())
    mixed = (rule.hard or rule.slot is None) and group.mixed
    validation.require_fit(group.name, members, [rule] * len(members), mixed=mixed)
    if rule.slot == "constraint":
        validation.require_no_other_hard_group(group.name, members, rule, besides=group)
        validation.require_no_inner(group.name, members, rule, besides=group)
    inner = inner_for(group.name, rule, members)
    common = common_inner(rule, members, inner)
    if rule.slot == "constraint":
        _require_projectable(group.name, members, rule, common)

    def apply() -> None:
        bound.detach(group)
        group.adopt(rule, members, common)
        if not group.of_statistics:
            _attach(group, zip(group.members, inner, strict=True))

    return apply


def plan_extension(group: TiedGroup, added: Sequence[Member], groups: Mapping[str, TiedGroup]) -> Callable[[], None]:
    """Members that join a group, and take its value.

    Returns:
        A function that makes the change, which has been checked.
    """
    members, rule = [*group.members, *added], group.tying
    _require_mates(group.name, members, rule, groups)
    if rule.slot == "constraint":
        validation.require_no_other_hard_group(group.name, added, rule, joining=True)
        validation.require_no_inner(group.name, added, rule)
    if group.of_statistics:
        validation.require_no_other_statistics(group.name, added, groups.values())
    inner = inner_for(group.name, rule, members)
    if rule.slot == "constraint":
        _require_projectable(group.name, members, rule, None)
    old, new = group.members, list(zip(added, inner[len(group.members) :], strict=True))

    def apply() -> None:
        value = group.value if rule.same_shape else None
        group.adopt(rule, members, group.inner)
        if not group.of_statistics:
            _attach(group, new)
        for member in added if value is not None else ():
            if not (member.anchor or member.constant or _is_held(member, group)):
                member.variable.assign(backend.own_copy(member.apply(ops.cast(value, _common_dtype(old)))))
        if group.hard:
            group.sync("first")
        elif value is None:
            group.project()

    return apply


def plan_split(
    name: str, groups: Sequence[TiedGroup], atol: float, rule: Rule, known: Mapping[str, TiedGroup]
) -> list[Plan]:
    """The groups of a hard rule into which groups fall, all of which have the same members or layers side by side."""
    for group in groups:
        apart = not group.projects or not (group.tying.enforced or group.tying.one_value)
        if not group.of_statistics and not (apart and group.tying.same_shape):
            raise GroupMismatchError(
                f"Group '{group.name}' cannot be split: its rule is {group.describe()}. Expected: a soft, a proximal "
                f"or a free group, whose members may lie apart.{listing(group.members)}"
            )
    others = {key: group for key, group in known.items() if group not in groups}
    weights = [group for group in groups if not group.of_statistics]
    values = [[value.astype("float64") for value in pulled_arrays(group.members)] for group in weights]
    if len({len(of_group) for of_group in values}) != 1:
        raise GroupMismatchError(
            f"The groups of '{name}' cannot be split: some have lost members. Expected: one number of members in each; "
            f"received {[len(of_group) for of_group in values]}. Split them one by one."
        )
    planned = []
    for number, near in enumerate(_clusters(values, atol)):
        for group in groups:
            suffix = group.name.removeprefix(name)
            members = [group.members[place].copy() for place in near]
            tie = None if group.tie is None else f"{name}/{number}"
            own = f"{name}/{number}{suffix}"
            made = plan(others, own, members, rule, "mean", tie, of_statistics=group.of_statistics, besides=group)
            planned.append(made)
    return planned


def _clusters(values: Sequence[Sequence[np.ndarray]], atol: float) -> list[list[int]]:
    """The places of members, or layers, that lie within `atol` of each other in all groups, by single linkage."""
    count = len(values[0])
    cluster = list(range(count))
    for i in range(count):
        for j in range(i):
            if all(spread_between(members[i], members[j]) <= atol for members in values):
                kept, gone = sorted((cluster[i], cluster[j]))
                cluster = [kept if each == gone else each for each in cluster]
    found = {each: [place for place in range(count) if cluster[place] == each] for each in sorted(set(cluster))}
    return [places for places in found.values() if len(places) > 1]


def _is_held(member: Member, group: TiedGroup) -> bool:
    """Whether another group that is hard decides about entries of a member."""
    others = [tie for tie in bound.projections(member.variable) if tie.group is not group]
    return any(tie.group.hard and member.overlaps(tie.member) for tie in others)


def _common_dtype(members: Sequence[Member]) -> str:
    return members[0].common_dtype or backend.dtype(members[0].variable)


def _attach(group: TiedGroup, inner: Iterable[tuple[Member, Any]]) -> None:
    for member, kept in inner:
        if not member.constant and group.tying.slot is not None:
            bound.attach(group, member, kept)
    group.hold_anchors()


def _require_mates(name: str, members: Sequence[Member], rule: Rule, groups: Mapping[str, TiedGroup]) -> None:
    """Raises `GroupMismatchError` unless members can be a group of a rule."""
    validation.require_several(name, members, groups)
    optimizers = getattr(groups, "optimizers", ())
    mixed = rule.slot is None or (rule.hard and bool(optimizers))
    validation.require_fit(name, members, [rule] * len(members), mixed=mixed)


def restore(
    groups: Mapping[str, TiedGroup], pending: Sequence[dict[str, Any]], models: Sequence[Any], initial: str
) -> list[Plan]:
    """The groups of a registry's config, for models."""
    if not pending:
        return []
    for model in models:
        discovery.weights_of(model)
    weights = [places.weights_by_place(model) for model in models]
    owners = discovery.owners(models)
    return [
        plan(
            groups,
            entry["name"],
            config.members_of(entry, weights, owners),
            config.rule_of(entry),
            initial,
            entry.get("tie"),
            of_statistics="statistics" in entry,
        )
        for entry in pending
    ]


def require_apart(plans: Sequence[Plan]) -> None:
    """Raises where two groups that are made at once get in each other's way: each was checked against older ones only.

    Raises:
        GroupMismatchError: Two have one name, or project one variable.
    """
    seen: set[str] = set()
    projected: dict[int, list[tuple[str, Member]]] = {}
    pulled: set[int] = set()
    for plan in plans:
        name = plan.group.name
        if name in seen:
            raise GroupMismatchError(
                f"Two groups that are made together have the name '{name}'. Expected: a name for each. Rename one, in "
                "the layers or in the config of the registry."
            )
        seen.add(name)
        if plan.group.penalizes:
            shared = [member for member in plan.group.members if id(member.variable) in pulled]
            if shared and plan.group.tying.inner is not None and not plan.group.declared:
                raise GroupMismatchError(
                    f"Cannot tie '{shared[0].path}' into group '{name}': another group that is made with it has the "
                    f"variable, and the rule brings {effects.name_of(plan.group.tying.inner)} as `inner`. Expected: "
                    f"one of the two. Leave `inner` out.{listing(plan.group.members)}"
                )
            pulled |= {id(member.variable) for member in plan.group.members}
        for member in plan.group.members if plan.group.projects else ():
            if plan.group.tying.directed and member.leads:
                continue
            others = projected.setdefault(id(member.variable), [])
            for other, part in others:
                if other != name and member.overlaps(part):
                    raise GroupMismatchError(
                        f"Cannot tie '{member.path}' into group '{name}': group '{other}' has it as well. Expected: "
                        "one group that projects an entry. Name all members in one group, give parts that do not "
                        "overlap, as equalize.views.Slice, or give layers that do not hold each other's weights."
                        f"{listing(plan.group.members)}"
                    )
            others.append((name, member))


def warn_of_overwriting(plans: Sequence[Plan], initial: str, *, stacklevel: int) -> None:
    """Warns where members that have been trained are about to take the value of the first."""
    groups = [plan.group for plan in plans if plan.group.hard and initial == "first"]
    apart = [group for group in groups if not any(m.anchor for m in group.members) and group.spread() != 0.0]
    later = [member.variable for group in apart for member in group.members[1:]]
    trained = {
        id(v) for model in living.models_holding(later) if _has_trained(model) for v in model.trainable_variables
    }
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


def warn_of_statistics(name: str, layers: Sequence[Any], *, stacklevel: int) -> None:
    """Warns where tied layers, or one of them, have moving statistics that are not tied."""
    statistics = next((list(found) for layer in layers if (found := discovery.statistics_of(name, [layer]))), [])
    if not statistics:
        return
    warnings.warn(
        f"The layers of '{name}' have moving statistics that this does not tie ({statistics[0]!r}"
        f"{f' and {len(statistics) - 1} more' if statistics[1:] else ''}), so they will give different results in "
        "inference. Expected: `tie(..., statistics=True)`, which keeps them equal; or statistics that are meant to be "
        "each layer's own.",
        UserWarning,
        stacklevel=stacklevel,
    )


def _has_trained(model: Any) -> bool:
    """Whether an optimizer of the model has taken a step."""
    optimizers = wrapping.everything(getattr(model, "optimizer", None))
    with backend.eagerly():
        return any(int(ops.convert_to_numpy(optimizer.iterations)) > 0 for optimizer in optimizers)


def _require_start(group: TiedGroup, initial: str) -> None:
    """What must hold of the values before a group is made."""
    if group.projects:
        _require_projectable(group.name, group.members, group.tying, group.inner)
    if group.hard and initial == "strict":
        validation.require_equal(group)


def _require_projectable(name: str, members: Sequence[Member], rule: Rule, inner: Any) -> None:
    """Raises `GroupMismatchError` unless members can be projected: anchors agree, and the constraint inside applies."""
    if rule.one_value and not rule.directed:
        require_anchors_agree(name, [member for member in members if member.stays])  # whoever leads now
    if inner is None:
        return
    common = members[0].least_squares(backend.read(members[0].variable))
    problem = None
    try:
        shape = tuple(inner(common).shape)
    except Exception as error:  # whatever a user's own constraint raises
        shape, problem = None, error
    if shape != tuple(common.shape):
        raise GroupMismatchError(
            f"Cannot tie group '{name}': its rule has the `inner` {effects.name_of(inner)}, which cannot be "
            f"applied to the common value. Expected: a constraint that returns a tensor of shape {tuple(common.shape)}"
            f". Received: {f'a tensor of shape {shape}' if problem is None else repr(problem)}. Take another, or none."
            f"{listing(members)}"
        ) from problem
