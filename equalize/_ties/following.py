"""What follows: members that move towards the one that leads, once a step, those of all groups together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor, keras_private
from equalize._math import means
from equalize._ties import bound
from equalize._ties.step import Part, parts_of


def led_with(step: Any, group: Any) -> list[Any]:
    """The groups whose members can follow in one go with those of a group, when its leader has been updated.

    Keras updates all variables of an optimizer before it calls the first constraint. So a leader on which nothing else
    stands is what it will be.

    Args:
        step: What stands for the call of the optimizer, as `equalize._backend.applying` gives it.
        group: The group, a `TiedGroup`, whose leader's constraint was called.
    """
    variables = filter(bound.leads, keras_private.updated_variables(step.caller))
    found = [other for variable in variables for other in _led_by(variable)]
    return list(dict.fromkeys([group, *(other for other in found if _free(other, step))]))


def led_by_projected(group: Any, variables: Sequence[Any], step: Any) -> list[Any]:
    """The groups that variables lead which a hard group has just written: Keras may call no constraint of theirs."""
    found = []
    for variable in filter(bound.leads, variables):
        ties = bound.projections(variable)
        own = [tie for tie in ties if not tie.member.leads]
        if len(own) == 1 and own[0].group is group and own[0].member.whole and own[0].inner is None:
            found += [tie.group for tie in ties if tie is not own[0]]
    return [other for other in dict.fromkeys(found) if _free(other, step)]


def follow_leaders(variables: Sequence[Any], optimizer: Any) -> None:
    """Has followers of variables move that an optimizer has changed without a call of their constraints.

    Args:
        variables: The variables, which lead.
        optimizer: The optimizer, whose step is over.
    """
    ties = [tie for variable in variables for tie in bound.projections(variable)]
    for group in dict.fromkeys(tie.group for tie in ties if tie.member.leads):
        if not group.is_driven:
            move([group], due=_due(optimizer, group.tying.every, taken=0))


def _free(group: Any, step: Any) -> bool:
    """Whether members of a group have yet to follow in a step, by the step itself."""
    return step not in group.led and not group.is_driven


def _led_by(variable: Any) -> Iterator[Any]:
    """The groups that a variable leads, if nothing changes it any more."""
    ties = bound.projections(variable)
    if ties[-1].inner is None and all(tie.member.leads for tie in ties):
        yield from (tie.group for tie in ties)


def move(
    groups: Sequence[Any],
    step: Any = None,
    given: Mapping[Any, Tensor] | None = None,
    caller: Any = None,
    *,
    due: Any = True,
) -> dict[int, Part]:
    """Writes what the members of groups become that follow, and their moving statistics that do.

    Args:
        groups: The groups.
        step: The call of the optimizer; None by hand, where members follow at every call.
        given: What leaders are about to become.
        caller: A variable that Keras is about to write, which is left alone.
        due: Whether members follow at all, where there is no step: True, or a scalar.

    Returns:
        What each variable becomes, by its id.

    Raises:
        EqualizeError: The step cannot reach a member, which happens on JAX.
    """
    groups = [*groups, *(other for group in groups for other in group.statistics if other.tying.directed)]
    held: list[keras.Variable] = []  # what is held does not go while it is worked with
    jobs = []
    for group in dict.fromkeys(groups):
        members, variables = group.living()
        held += variables
        if step is not None:
            group.led.add(step)
        if any(member.leads for member in members):
            group.require_reach(members)
            jobs.append((group, members, group.pulled(members, given or {})))
    parts: dict[int, Part] = {}
    for (group, members, pulled), moved in zip(jobs, _moved(jobs), strict=True):
        now = due if step is None else _due(step.caller, group.tying.every, taken=1)
        if now is not True:
            moved = [ops.where(now, new, old) for new, old in zip(moved, pulled, strict=True)]
        for key, part in parts_of((m, new) for m, new in zip(members, moved, strict=True) if not m.anchor).items():
            parts[key] = part if key not in parts else parts[key].with_part(part)
    fresh = all(group.tying.fresh for group, *_ in jobs)
    written = [part for part in parts.values() if part.variable is not caller]
    values = [part.put() if fresh else backend.own_copy(part.put()) for part in written]
    backend.write([part.variable for part in written], values)
    return parts


def _moved(jobs: Sequence[tuple[Any, Any, list[Tensor]]]) -> list[Sequence[Tensor]]:
    """What the rule of each group makes of its members; of those with one rate in one go."""
    rules = [group.computing_rule(members) for group, members, _ in jobs]
    dtypes = {backend.dtype(pulled[0]) for *_, pulled in jobs}
    together = all(rule.fresh for rule in rules) and len({rule.rate for rule in rules}) == len(dtypes) == 1
    if len(jobs) < 2 or not together:
        return [rule.project(pulled) for rule, (*_, pulled) in zip(rules, jobs, strict=True)]
    followers = [(value, pulled[0]) for *_, pulled in jobs for value in pulled[1:]]
    values, leaders = zip(*followers, strict=True)
    moved = iter(means.approach(values, leaders, rules[0].rate))
    return [[pulled[0], *(next(moved) for _ in pulled[1:])] for *_, pulled in jobs]


def _due(optimizer: Any, every: int, *, taken: int) -> Any:
    """Whether members follow in a step, as `every` says: True, or a scalar.

    Args:
        optimizer: The optimizer.
        every: At every n-th step.
        taken: How many steps the optimizer is behind: 1 in a step, 0 after it.
    """
    micro = optimizer.gradient_accumulation_steps or 1
    if micro == every == 1:
        return True
    return (ops.convert_to_tensor(keras_private.steps_taken(optimizer)) + taken) % (micro * every) == 0
