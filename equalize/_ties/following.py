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
    found = [other for variable in keras_private.updated_variables(step.caller) for other in _led_by(variable)]
    return list(dict.fromkeys([group, *(other for other in found if not other.is_driven)]))


def _led_by(variable: Any) -> Iterator[Any]:
    """The groups that a variable leads, if nothing changes it any more."""
    ties = list(bound.chain_of(variable.constraint))
    if ties and ties[-1].inner is None and all(isinstance(t, bound.BoundConstraint) and t.member.leads for t in ties):
        yield from (tie.group for tie in ties)  # type: ignore[attr-defined]


def move(groups: Sequence[Any], step: Any = None, given: Mapping[Any, Tensor] | None = None) -> dict[int, Part]:
    """Writes what the members of groups become that follow, and their moving statistics that do.

    Args:
        groups: The groups.
        step: The call of the optimizer; None by hand, where members follow at every call.
        given: What leaders are about to become.

    Returns:
        What was written, by the ids of the variables.

    Raises:
        EqualizeError: The step cannot reach a member, which happens on JAX.
    """
    groups = [*groups, *(other for group in groups for other in group.statistics if other.tying.directed)]
    held: list[keras.Variable] = []  # what is held does not go while it is worked with
    jobs = []
    for group in dict.fromkeys(groups):
        members, variables = group.living()
        held += variables
        if any(member.leads for member in members):
            group.require_reach(members)
            jobs.append((group, members, group.pulled(members, given or {})))
    parts: dict[int, Part] = {}
    for (group, members, pulled), moved in zip(jobs, _moved(jobs), strict=True):
        due = True if step is None else _due(step, group.tying.every)
        if due is not True:
            moved = [ops.where(due, new, old) for new, old in zip(moved, pulled, strict=True)]
        parts |= parts_of((m, new) for m, new in zip(members, moved, strict=True) if not m.anchor)
    fresh = all(group.tying.fresh for group, *_ in jobs)
    values = [part.put() if fresh else backend.own_copy(part.put()) for part in parts.values()]
    backend.write([part.variable for part in parts.values()], values)
    return parts


def _moved(jobs: Sequence[tuple[Any, Any, list[Tensor]]]) -> list[Sequence[Tensor]]:
    """What the rule of each group makes of its members; of those with one rate in one go."""
    rules = [group.computing_rule(members) for group, members, _ in jobs]
    kinds = {
        (rule.rate, backend.dtype(pulled[0])) for rule, (*_, pulled) in zip(rules, jobs, strict=True) if rule.fresh
    }
    if len(kinds) != 1 or not all(rule.fresh for rule in rules) or len(jobs) < 2:
        return [rule.project(pulled) for rule, (*_, pulled) in zip(rules, jobs, strict=True)]
    followers = [(value, pulled[0]) for *_, pulled in jobs for value in pulled[1:]]
    values, leaders = zip(*followers, strict=True)
    moved = iter(means.approach(values, leaders, rules[0].rate))
    return [[pulled[0], *(next(moved) for _ in pulled[1:])] for *_, pulled in jobs]


def _due(step: Any, every: int) -> Any:
    """Whether members follow in a step, as `every` says: True, or a scalar."""
    micro = step.caller.gradient_accumulation_steps or 1
    if micro == every == 1:
        return True
    taken = ops.convert_to_tensor(keras_private.steps_taken(step.caller)) + 1
    return taken % (micro * every) == 0
