"""Groups of small members that an optimizer projects together come out as if each were by itself."""

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize._ties import together
from equalize.constraints import Equal
from equalize.views import Scale, Transpose
from tests.bare import random_gradients, take_steps
from tests.conftest import MODES, bits, bitwise_equal
from tests.strategies import DTYPES

# A group's shape, its members' dtype, views and weights, and its rule.
GROUPS = {
    "hard": ((3, 2), "float32", [None, None], None, Equal()),
    "hard, another shape": ((5,), "float32", [None, None], None, Equal()),
    "hard, scalars": ((), "float32", [None, None], None, Equal()),
    "hard, empty": ((0, 2), "float32", [None, None], None, Equal()),
    "hard, turned": ((2, 2), "float32", [None, Transpose()], None, Equal()),
    "hard, doubled": ((2, 2), "float32", [Scale(2.0), None], None, Equal()),
    "hard, three": ((4,), "float32", [None, None, None], None, Equal()),
    "hard, three again": ((2, 2), "float32", [None, None, None], None, Equal()),
    "hard, weighted": ((4,), "float32", [None, None], (1.0, 3.0), Equal()),
    "hard, weighted too": ((2, 2), "float32", [None, None], (1.0, 3.0), Equal()),
    "hard, half": ((4,), "bfloat16", [None, None, None], None, Equal()),
    "hard, half again": ((2, 2), "bfloat16", [None, None, None], None, Equal()),
    "hard, positive": ((4,), "float32", [None, None], None, Equal(inner="non_neg")),
    "hard, positive too": ((2,), "float32", [None, None], None, Equal(inner="non_neg")),
    "hard, large": ((200, 100), "float32", [None, None], None, Equal()),
    "hard, large too": ((200, 101), "float32", [None, None], None, Equal()),
    "partial": ((3, 2), "float32", [None, None], None, Equal(rate=0.3)),
    "partial, another shape": ((4,), "float32", [None, None], None, Equal(rate=0.3)),
    "partial, another rate": ((4,), "float32", [None, None], None, Equal(rate=0.4)),
}
JOINED = [
    {"hard", "hard, another shape", "hard, scalars", "hard, empty", "hard, turned"},
    {"hard, three", "hard, three again"},
    {"hard, weighted", "hard, weighted too"},
    {"hard, half", "hard, half again"},
    {"partial", "partial, another shape"},
]


def world():
    """The groups in one registry, and the variables of each."""
    random = np.random.default_rng(0)
    registry, variables = equalize.GroupRegistry(), {}
    for name, (shape, dtype, views, weights, rule) in GROUPS.items():
        of_group = [keras.Variable(random.normal(size=shape), dtype=dtype) for _ in views]
        members = [v if view is None else (v, view) for v, view in zip(of_group, views, strict=True)]
        group = registry.tie(name, members, rule)
        for member, weight in zip(group.members, weights or [1.0] * len(members), strict=True):
            member.weight = weight
        variables[name] = of_group
    return registry, variables


def trained(mode):
    """The registry, its variables, and for each group what each of its members holds after every step."""
    registry, variables = world()
    flat = [variable for of_group in variables.values() for variable in of_group]
    gradients = [
        [array.astype(variable.dtype) for array, variable in zip(arrays, flat, strict=True)]
        for arrays in random_gradients(3, *(variable.shape for variable in flat))
    ]
    steps = take_steps(keras.optimizers.SGD(0.1, momentum=0.9), flat, gradients, mode)
    of_variable = dict(zip(map(id, flat), zip(*steps, strict=True), strict=True))
    return registry, variables, {name: [of_variable[id(v)] for v in of_group] for name, of_group in variables.items()}


@pytest.mark.parametrize("mode", MODES)
def test_groups_come_out_as_by_themselves_after_every_step(mode, monkeypatch):
    joined, seen = together._joined, []
    monkeypatch.setattr(together, "_joined", lambda groups: seen.append({g.name for g in groups}) or joined(groups))
    registry, _variables, values = trained(mode)
    assert [names for names in JOINED if names in seen] == JOINED
    assert all(names in JOINED for names in seen)
    monkeypatch.setattr(together, "_all", lambda variables: {})
    *_, alone = trained(mode)
    for name, (_, dtype, views, *_) in GROUPS.items():
        closeness = 2.0**-7 if dtype == "bfloat16" else 1e-6
        for now, then in zip(values[name], alone[name], strict=True):
            for one, other in zip(now, then, strict=True):
                one, other = (np.frombuffer(each, DTYPES[dtype]).astype(float) for each in (one, other))
                np.testing.assert_allclose(one, other, closeness, closeness, err_msg=name)
        if registry[name].hard and not any(views):
            assert all(len(set(step)) == 1 for step in zip(*values[name], strict=True)), name
        assert registry[name].spread() == 0.0 or not registry[name].hard


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_group_without_gradients_stays_as_it_is():
    _registry, variables = world()
    left_out = {"hard", "hard, three", "partial"}
    for name in left_out:
        variables[name][0].assign_add(ops.ones_like(variables[name][0].value))
    before = {name: [bits(variable) for variable in variables[name]] for name in left_out}
    pairs = [
        (None if name in left_out else ops.ones_like(variable.value), variable)
        for name, of_group in variables.items()
        for variable in of_group
    ]
    keras.optimizers.SGD(0.1).apply_gradients(pairs)
    assert {name: [bits(variable) for variable in variables[name]] for name in left_out} == before
    assert bitwise_equal(*variables["hard, another shape"])


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_step_leaves_nothing_behind():
    _, variables = world()
    flat = [variable for of_group in variables.values() for variable in of_group]
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(flat)
    optimizer.apply([None, *(ops.ones_like(variable.value) for variable in flat[1:])])
    assert not any(together._DONE.values())
