"""What must not change when something is refused, and what must hold when it is taken."""

import json

import keras

import equalize
from equalize._ties.bound import group_of, ties_on
from tests.conftest import bits


def picture(registry: equalize.GroupRegistry, *models: keras.Model):
    """Everything that a refused call must leave as it is: groups, rules, values, and what is on the variables."""
    groups = [
        (name, id(group), id(group.rule), group.tying.describe(), [(m.path, m.view, m.weight) for m in group.members])
        for name, group in registry.items()
    ]
    weights = [weight for model in models for weight in model.weights]
    on = [(w.path, w.trainable, _chain(w.constraint), _chain(w.regularizer)) for w in weights]
    return groups, on, [bits(weight) for weight in weights], json.dumps(registry._pending, default=repr)


def _chain(rule):
    """A rule and what it carries inside, by identity."""
    return () if rule is None else (id(rule), *_chain(getattr(rule, "inner", None)))


def require_whole(registry: equalize.GroupRegistry):
    """No group is linked by half: every member carries the group's rule, and hard groups are equal."""
    for name, group in registry.items():
        assert group.name == name
        assert len(group.members) >= 2
        for member in group.members:
            bound = [tie for tie in ties_on(member.variable) if group_of(tie) is group]
            assert len(bound) == (0 if member.constant or group.rule is None else 1), (name, member.path)
        if group.hard:
            assert group.spread() == 0.0, name
    projected = [id(m.variable) for group in registry.values() if group.projects for m in group.members]
    assert len(set(projected)) == len(projected)
    json.dumps(registry.get_config())
