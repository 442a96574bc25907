"""Groups of small members that one optimizer trains, projected together.

An operation takes a few microseconds, whether it is on one entry or on a thousand. So the groups that are alike in all
but their shapes become one: the entries of their first members are one vector, those of their second another.
"""

import math
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor, keras_private
from equalize._math import means
from equalize._ties import bound
from equalize._ties.rules import Rule

_DONE: weakref.WeakKeyDictionary[Any, dict[Any, list[Tensor]]] = weakref.WeakKeyDictionary()
"""For each call of an optimizer that runs: what the rules made of the groups that have not asked for it yet."""


def projected(step: Any, group: Any) -> list[Tensor] | None:
    """What the rule of a group makes of its members in a step, if it was computed with that of groups like it.

    Args:
        step: What stands for the call of the optimizer, as `equalize._backend.applying` gives it.
        group: The group, a `TiedGroup`.
    """
    if step not in _DONE:
        _DONE[step] = {}  # nothing is joined twice where a computation fails
        _DONE[step] = _all(keras_private.updated_variables(step.caller))
    return _DONE[step].pop(group, None)


def _all(variables: Sequence[Any]) -> dict[Any, list[Tensor]]:
    """What the rules make of the groups on some variables that can be joined with others."""
    if keras.distribution.distribution() is not None:
        return {}  # members are spread over devices, each in its own way
    groups = dict.fromkeys(tie.group for variable in variables for tie in bound.projections(variable))
    alike: dict[Hashable, list[Any]] = {}
    for group in groups:
        alike.setdefault(_kind(group), []).append(group)
    alike.pop(None, None)
    return {group: values for several in alike.values() if len(several) > 1 for group, values in _joined(several)}


def _kind(group: Any) -> Hashable:
    """What groups that are joined have in common; None for one that is projected by itself."""
    members = group.members
    if not group.tying.entrywise or group.inner is not None or not group.can_read(members):
        return None
    if group.mixed:
        return None
    if any(member.anchor for member in members) or math.prod(members[0].common_shape) > means.SMALL:
        return None
    rule = group.computing_rule(members)
    if any(isinstance(weight, np.ndarray) for weight in rule.weights):
        return None
    strength = rule.strength if isinstance(rule.strength, float) else id(rule.strength)
    return type(rule), strength, rule.weights, backend.dtype(members[0].variable)


def _joined(groups: Sequence[Any]) -> Iterator[tuple[Any, list[Tensor]]]:
    """Groups of one kind, with what their rule makes of their members."""
    values = [group.pulled(group.members) for group in groups]
    shapes = [each[0].shape for each in values]
    rule = groups[0].computing_rule(groups[0].members)
    vectors = once_for_all(rule, rule.project([backend.join(row) for row in zip(*values, strict=True)]))
    parts = {id(vector): backend.split(vector, shapes) for vector in vectors}
    for place, group in enumerate(groups):
        yield group, [parts[id(vector)][place] for vector in vectors]


def once_for_all(rule: Rule, values: Sequence[Tensor]) -> list[Tensor]:
    """What a rule has made of members, each value computed once for all that get it, with the constraint inside."""
    if rule.one_value and not rule.hard:
        return list(values)  # of which each goes to one member
    done = {id(value): value for value in values}
    for key, value in done.items():
        # A rule of one value has applied the constraint itself.
        obeying = value if rule.inner is None or rule.one_value else ops.cast(rule.inner(value), value.dtype)
        done[key] = backend.computed_once(obeying)
    return [done[id(value)] for value in values]
