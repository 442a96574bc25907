import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize._ties.bound import BoundConstraint
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError, NotLinkedError
from tests.conftest import BACKEND, bits, bitwise_equal, data, fit, kernels, towers


def values(*variables):
    return [ops.convert_to_numpy(variable.value) for variable in variables]


def variables(*arrays):
    return [keras.Variable(np.float32(array), name=f"w{i}") for i, array in enumerate(arrays)]


def test_two_members_become_their_mean():
    left, right = variables([0.0, 1.0], [4.0, -1.0])
    registry = equalize.GroupRegistry()
    registry.tie("g", [left, right], Equal(rate=0.5))
    registry.replace("g", Equal())
    registry.project()
    assert [value.tolist() for value in values(left, right)] == [[2.0, 0.0], [2.0, 0.0]]


def test_weights_of_members():
    model = towers(2)
    left, right = kernels(model)
    left.constraint, right.constraint = Equal("g", rate=0.5, weight=3.0), Equal("g", rate=0.5, weight=1.0)
    before = values(left, right)
    registry = equalize.GroupRegistry().link(model)
    registry.project()
    mean = 0.75 * before[0] + 0.25 * before[1]
    for value, start in zip(values(left, right), before, strict=True):
        np.testing.assert_allclose(value, 0.5 * start + 0.5 * mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", [keras.constraints.NonNeg(), keras.constraints.MaxNorm(0.5)])
def test_inner_holds_for_the_common_value_after_every_step(inner):
    model = towers(3, constraint=lambda: Equal("g", inner=inner))
    registry = equalize.GroupRegistry().link(model)
    fit(model, registry)
    (kernel, *_) = values(*kernels(model))
    if isinstance(inner, keras.constraints.NonNeg):
        assert np.all(kernel >= 0.0)
        assert np.any(kernel > 0.0)
    else:
        assert np.all(np.linalg.norm(kernel, axis=0) <= 0.5 + 1e-5)


def test_inner_of_the_mean_is_the_nearest_point_of_both_sets():
    left, right = variables([1.0, -3.0], [2.0, 1.0])
    registry = equalize.GroupRegistry()
    registry.tie("g", [left, right], Equal(inner="non_neg"))
    left.assign([1.0, -3.0])
    right.assign([2.0, 1.0])
    registry.project()
    assert values(left)[0].tolist() == [1.5, 0.0]
    assert bitwise_equal(left, right)


def test_existing_constraint_is_kept_as_inner_and_left_after_untie():
    model = towers(2)
    ks = kernels(model)
    for kernel in ks:
        kernel.constraint = keras.constraints.NonNeg()
    registry = equalize.GroupRegistry()
    group = registry.tie("g", ks, Equal())
    assert isinstance(group.inner, keras.constraints.NonNeg)
    fit(model, registry)
    assert np.all(values(ks[0])[0] >= 0.0)
    registry.untie()
    assert all(isinstance(kernel.constraint, keras.constraints.NonNeg) for kernel in ks)
    fit(model)
    assert not bitwise_equal(*ks)
    assert all(np.all(value >= 0.0) for value in values(*ks))


def test_existing_constraints_that_differ_are_an_error_and_nothing_changes():
    model = towers(2)
    ks = kernels(model)
    ks[0].constraint = keras.constraints.NonNeg()
    before = [bits(kernel) for kernel in ks]
    registry = equalize.GroupRegistry()
    with pytest.raises(GroupMismatchError, match="what NonNeg of the first member does"):
        registry.tie("g", ks, Equal())
    assert ks[1].constraint is None
    assert isinstance(ks[0].constraint, keras.constraints.NonNeg)
    assert [bits(kernel) for kernel in ks] == before
    assert not registry


def test_existing_constraint_beside_another_inner_is_an_error():
    model = towers(2)
    ks = kernels(model)
    for kernel in ks:
        kernel.constraint = keras.constraints.NonNeg()
    with pytest.raises(GroupMismatchError, match="has the constraint NonNeg already"):
        equalize.GroupRegistry().tie("g", ks, Equal(inner=keras.constraints.MaxNorm(1.0)))


def test_existing_regularizer_goes_on_being_added():
    model = towers(2)
    for kernel in kernels(model):
        kernel.regularizer = keras.regularizers.L2(0.5)
    expected = float(sum(ops.convert_to_numpy(loss) for loss in model.losses))
    registry = equalize.GroupRegistry()
    registry.tie("hard", kernels(model), Equal(rate=0.5))
    registry.tie("soft", kernels(model), equalize.regularizers.MeanL2(factor=0.0))
    assert float(sum(ops.convert_to_numpy(loss) for loss in model.losses)) == pytest.approx(expected)
    registry.untie()
    assert all(isinstance(kernel.regularizer, keras.regularizers.L2) for kernel in kernels(model))
    assert all(kernel.constraint is None for kernel in kernels(model))


def test_unlinked_constraint_is_an_error_in_training_and_not_in_predicting():
    x, y = data()
    model = towers(2, constraint=lambda: Equal("g"))
    model.predict(x, verbose=0)
    model.compile("sgd", "mse")
    with pytest.raises(NotLinkedError, match=r"Equal\(group='g'\) on 'tower_0/kernel' has never been linked"):
        model.fit(x, y, verbose=0)


def test_config_round_trip():
    original = Equal("g", rate=0.5, weight=2.0, inner=keras.constraints.MaxNorm(3.0))
    config = keras.saving.serialize_keras_object(original)
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is Equal
    assert restored.get_config() == original.get_config()
    assert restored.inner.max_value == 3.0
    assert keras.constraints.get(config).get_config() == original.get_config()


def test_every_constructor_argument_is_in_the_config():
    assert set(Equal().get_config()) == {"group", "rate", "weight", "view", "inner"}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
def test_a_copy_of_a_bound_rule_is_unbound(duplicate):
    model = towers(2, constraint=lambda: Equal("g"))
    equalize.GroupRegistry().link(model)
    bound = kernels(model)[0].constraint
    assert isinstance(bound, BoundConstraint)
    assert type(duplicate(bound)) is Equal
    assert duplicate(bound).get_config() == bound.get_config()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group": 3}, TypeError, "`group` must be a string"),
        ({"group": ""}, EqualizeError, "`group` must not be empty"),
        ({"rate": 0.0}, EqualizeError, r"`rate` must be a finite number in \(0, 1\]"),
        ({"rate": 1.5}, EqualizeError, "`rate` must be a finite number"),
        ({"rate": True}, TypeError, "`rate` must be a number"),
        ({"weight": 0.0}, EqualizeError, r"`weight` must be a finite number in \(0, inf\)"),
        ({"weight": float("inf")}, EqualizeError, "`weight` must be a finite number"),
        ({"inner": "no such thing"}, EqualizeError, "`inner` must be a Keras constraint"),
        ({"view": 1}, TypeError, "`view` must be a view"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Equal(**arguments)


def test_a_config_dict_is_taken_by_a_layer():
    config = keras.saving.serialize_keras_object(Equal("g"))
    layer = keras.layers.Dense(2, kernel_constraint=config)
    assert isinstance(layer.kernel_constraint, Equal)


def test_a_hard_tie_brings_a_regularizer_where_a_step_on_jax_must_see_anchors_and_nowhere_else():
    variables = [keras.Variable([1.0]) for _ in range(2)]
    equalize.GroupRegistry().tie("pair", variables, Equal())
    assert [variable.regularizer is None for variable in variables] == [BACKEND != "jax"] * 2
