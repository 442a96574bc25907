"""Whether the members of a group fit together, checked before anything is changed."""

import difflib
from collections.abc import Iterable, Sequence

import keras
import numpy as np

from equalize import _backend as backend
from equalize._inputs.arguments import counted
from equalize._ties import effects
from equalize._ties.bound import Bound, group_of, own, projections, rule_of, ties_on
from equalize._ties.member import Member, listing
from equalize._ties.rules import Rule
from equalize._ties.spread import pulled_arrays, spread_of
from equalize._ties.tied_group import TiedGroup
from equalize.errors import GroupMismatchError, TieBrokenError


def require_fit(
    name: str,
    members: Sequence[Member],
    member_rules: Sequence[Rule],
    *,
    declared: bool = False,
    mixed: bool = False,
) -> None:
    """Raises `GroupMismatchError` unless the members can be one group: enough, distinct, of one shape, dtype, rule.

    Args:
        name: Name of the group.
        members: The members.
        member_rules: The rule of each.
        declared: Whether layers declare the rules.
        mixed: Whether floating dtypes may differ, if one of them holds the numbers of all.
    """
    for member in members:
        _require_view_fits(name, member)
    _require_distinct(name, members)
    first = members[0]
    for member, rule in zip(members[1:], member_rules[1:], strict=True):
        for what, expected, received in (
            ("shape", first.common_shape, member.common_shape),
            ("dtype", backend.dtype(first.variable), backend.dtype(member.variable)),
        ):
            if what == "dtype" and mixed and _holds_all(members):
                continue
            if expected != received and (what == "dtype" or rule.same_shape):
                fix = f"Tie variables of one {what}."
                if what == "dtype" and rule.hard and _holds_all(members):
                    fix = (
                        f"The mean would be rounded at every step, so {rule.describe()} alone takes one dtype. Make "
                        "an `equalize.optimizers.TiedOptimizer` with this registry before you tie: it updates the "
                        "widest and rounds it for the others."
                    )
                if declared and sum(each is rule for each in member_rules) > 1:
                    fix = (
                        "One rule was given to several weights, as a `MultiHeadAttention` hands its constraint to all "
                        f"its projections. Leave {rule.describe()} out of the layer, and tie the weights that you "
                        f"mean: `registry.tie({name!r}, [...], {rule.describe()})`."
                    )
                elif what == "shape" and expected == received[::-1]:
                    fix = "Give it a view, for instance equalize.views.Transpose()."
                raise GroupMismatchError(
                    f"Cannot tie '{member.path}' into group '{name}': expected {what} {expected}, set by "
                    f"'{first.path}'; received {received}. {fix}{listing(members)}"
                )
        if not _of_one_kind(member_rules[0], rule, first):
            raise GroupMismatchError(
                f"The rules of group '{name}' disagree: expected {_written(member_rules[0])}, set by '{first.path}'; "
                f"received {_written(rule)} from '{member.path}'. Give all members the same rule, or another "
                f"group name.{listing(members)}"
            )
    _require_weights(name, members)
    rule = member_rules[0]
    if rule.directed and any(member.constant for member in members[1:]):
        raise GroupMismatchError(
            f"Cannot tie group '{name}': a constant cannot follow. Expected: variables after the first member, which "
            f"leads; received an array. Name the array first, or leave it out.{listing(members)}"
        )
    if any(member.repeats for member in members) and not _takes_repeats(rule, len(members)):
        raise GroupMismatchError(
            f"Cannot tie group '{name}': it has a member whose view repeats entries, and {rule.describe()} leaves "
            "these apart. Expected: a rule that makes them equal, as equalize.constraints.Equal() does. Take that, or "
            f"leave the view out.{listing(members)}"
        )
    weighted = rule.weighted and rule.count is None  # with a strength for each pair there is no mean
    if len({member.weight for member in members}) > 1 and not weighted:
        raise GroupMismatchError(
            f"Cannot tie group '{name}': {rule.describe()} has no mean in which members could count "
            f"differently. Expected: no weights; received {[member.weight for member in members]}. Leave them out, or "
            f"take a rule with a mean, as equalize.regularizers.MeanL2.{listing(members)}"
        )
    if rule.count is not None and rule.count != len(members):
        raise GroupMismatchError(
            f"Cannot tie group '{name}': expected {counted(rule.count, 'member')}, as {rule.describe()} has; "
            f"received {len(members)}. Give `factor` a row and a column for each member, in this order."
            f"{listing(members)}"
        )
    dtype = backend.dtype(first.variable)
    if not keras.backend.is_float_dtype(dtype):
        raise GroupMismatchError(
            f"Cannot tie group '{name}': expected variables of a floating dtype; received {dtype}. A mean of such "
            f"values is no such value. Tie trainable weights.{listing(members)}"
        )
    if all(member.constant for member in members):
        raise GroupMismatchError(
            f"Cannot tie group '{name}': expected at least one variable; received only constants.{listing(members)}"
        )


def require_several(name: str, members: Sequence[Member], others: Iterable[str]) -> None:
    """Raises `GroupMismatchError` for a group of one, which is how a misspelt name shows."""
    if len(members) > 1:
        return
    _require_view_fits(name, members[0])
    if members[0].repeats:  # it ties entries of one variable
        return
    near = difflib.get_close_matches(name, [other for other in others if other != name], n=1, cutoff=0.0)
    hint = (
        f"The nearest other group is '{near[0]}': is one of the two misspelt?" if near else "There is no other group."
    )
    raise GroupMismatchError(
        f"Group '{name}' has one member: {members[0]}. Expected: at least two. {hint} "
        "Give another variable the same group name, or take the rule away."
    )


def require_no_other_hard_group(
    name: str, members: Sequence[Member], rule: Rule, besides: TiedGroup | None = None, *, joining: bool = False
) -> None:
    """Raises `GroupMismatchError` where entries of a member are projected by another group, leaving out `besides`.

    A member that leads is not projected by its group; of those that are `joining` a group, none leads.
    """
    leader = members[0] if rule.directed and not joining and members[0].leads is not False else None
    for member in members:
        if rule.directed:
            _require_no_chain(name, member, member is leader, members)
        if member is leader:
            continue
        for tie in ties_on(member.variable):
            other, group = rule_of(tie), group_of(tie)
            if other.slot != "constraint" or (besides is not None and group is besides):
                continue
            if isinstance(tie, Bound) and (tie.member.leads or not member.overlaps(tie.member)):
                continue
            raise GroupMismatchError(
                f"Cannot tie '{member.path}' into group '{name}': it belongs to group '{other.group}' already "
                f"({other.describe()}), and an entry can be projected by one group only. Name all members in one "
                f"group, give parts that do not overlap, as equalize.views.Slice, or call `untie({other.group!r})` "
                f"first.{listing(members)}"
            )


def _require_no_chain(name: str, member: Member, leads: bool, members: Sequence[Member]) -> None:
    """Raises `GroupMismatchError` where what follows in one group would lead another."""
    for tie in ties_on(member.variable):
        chained = isinstance(tie, Bound) and tie.member.leads is (not leads) and member.overlaps(tie.member)
        if chained:
            raise GroupMismatchError(
                f"Cannot tie '{member.path}' into group '{name}': it is in group '{group_of(tie).name}' as well "
                f"({rule_of(tie).describe()}), and what follows cannot lead. Expected: one leader for all. Name the "
                f"one that is followed in both groups.{listing(members)}"
            )


def require_no_inner(name: str, members: Sequence[Member], rule: Rule, besides: TiedGroup | None = None) -> None:
    """Raises `GroupMismatchError` where a rule brings a constraint for a variable of which other groups have parts."""
    for member in members if rule.inner is not None else ():
        if any(tie.group is not besides for tie in projections(member.variable)):
            raise GroupMismatchError(
                f"Cannot tie '{member.path}' into group '{name}': another group has a part of the variable, and the "
                f"rule brings {effects.name_of(rule.inner)} as `inner`. Expected: a rule without. Give the layer the "
                f"constraint, for all of its variable.{listing(members)}"
            )


def require_no_other_statistics(name: str, members: Sequence[Member], groups: Iterable[TiedGroup]) -> None:
    """Raises `GroupMismatchError` where a moving statistic is kept equal to others already."""
    ids = {id(member.variable) for member in members}
    for group in groups:
        if group.of_statistics and any(id(member.variable) in ids for member in group.members):
            raise GroupMismatchError(
                f"Cannot tie the moving statistics '{name}': some belong to '{group.name}' already. Expected: one tie "
                f"of layers with `statistics=True`. Name all layers in one tie, or call "
                f"`untie({group.tie!r})` first.{listing(members)}"
            )


def require_equal(group: TiedGroup) -> None:
    """Raises `TieBrokenError` unless the members are equal, saying which differ and by how much."""
    if group.spread() == 0.0:
        return
    members = group.members
    distances = "".join(
        f"\n    {member}: differs from the first by up to {spread_of([members[0], member]):g}" for member in members[1:]
    )
    raise TieBrokenError(
        f"The members of group '{group.name}' are not equal: expected a spread of 0, received {group.spread():g}.\n"
        f"    {members[0]}: the first{distances}\n"
        'Link with initial="first" or initial="mean" to make them equal, call `registry.sync()`, or load weights that '
        "are."
    )


def require_equal_if_known(group: TiedGroup) -> None:
    """Raises as `require_equal`, where the values are available; while a step is traced they may not be."""
    if all(backend.concrete(member.variable) is not None for member in group.members):
        with backend.eagerly():
            require_equal(group)


def _takes_repeats(rule: Rule, count: int) -> bool:
    """Whether a rule makes the entries equal that a view repeats: it decides about all of the member."""
    if rule.directed:
        return count > 1 and rule.strength == 1.0
    return rule.hard or rule.slot is None or (rule.slot == "constraint" and not rule.one_value)


def _holds_all(members: Sequence[Member]) -> bool:
    """Whether the dtypes of members are floating, and one of them holds the numbers of all."""
    dtypes = [backend.dtype(member.variable) for member in members]
    floating = all(keras.backend.is_float_dtype(dtype) for dtype in dtypes)
    return floating and backend.widest_dtype(dtypes) is not None


def _require_distinct(name: str, members: Sequence[Member]) -> None:
    seen: dict[int, list[Member]] = {}
    for member in members:
        others = seen.setdefault(id(member.variable), [])
        if any(member.overlaps(other) for other in others):
            raise GroupMismatchError(
                f"Cannot tie group '{name}': {member} was given more than once. Expected: separate variables, or parts "
                "of one that do not overlap; one variable in two layers is equal to itself without a tie."
                f"{listing(members)}"
            )
        others.append(member)


def _require_weights(name: str, members: Sequence[Member]) -> None:
    """Raises unless the weights, each times the square of what its view stretches by, make a mean in float64."""
    weights = [np.asarray(member.weight * member.multiplicity) for member in members]
    with np.errstate(over="ignore"):
        total = sum(weights[1:], start=weights[0])
    if not np.isfinite(total).all() or min(weight.min() for weight in weights) == 0.0:
        raise GroupMismatchError(
            f"Cannot tie group '{name}': expected weights of the members whose mean can be computed; received "
            f"{[member.weight for member in members]}. Give weights nearer to 1.{listing(members)}"
        )


def _require_view_fits(name: str, member: Member) -> None:
    try:
        _ = member.common_shape
    except GroupMismatchError as error:
        raise GroupMismatchError(f"Cannot tie '{member.path}' into group '{name}': {error}") from error


def _of_one_kind(one: Rule, other: Rule, member: Member) -> bool:
    """Whether two rules ask the same of a group; what a constraint inside them does counts, not its config."""
    if one is other:
        return True
    if type(one) is not type(other) or one.common_config() != other.common_config():
        return False
    if one.slot != "constraint":
        return True
    inner = [effects.Effect(own(rule)) for rule in (one, other)]
    return effects.same(inner[0], inner[1], list(pulled_arrays([member])))


def _written(rule: Rule) -> str:
    settings = [f"{key}={value!r}" for key, value in rule.common_config().items()]
    inner = [f"inner={effects.described(rule.inner)}"] if rule.slot == "constraint" else []
    return f"{type(rule).__name__}({', '.join(settings + inner)})"
