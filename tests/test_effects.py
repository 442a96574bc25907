"""Law 19: two constraints are one if they do the same, whatever their configs say."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.errors import GroupMismatchError
from equalize.views import Scale, Transpose

EYE = np.eye(3, dtype="float32")


def masked_by_function(mask):
    def masked(w):
        return ops.multiply(w, mask)

    return masked


class NoConfig(keras.constraints.Constraint):
    def __init__(self, mask):
        self.mask = mask

    def __call__(self, w):
        return ops.multiply(w, self.mask)


class ArrayInConfig(NoConfig):
    def get_config(self):
        return {"mask": self.mask}


class BrokenConfig(NoConfig):
    def get_config(self):
        raise RuntimeError("no config")


MASKS = {
    "lambda": lambda mask: lambda w: ops.multiply(w, mask),
    "function": masked_by_function,
    "partial": lambda mask: functools.partial(ops.multiply, mask),
    "no config": NoConfig,
    "array in config": ArrayInConfig,
    "broken config": BrokenConfig,
}


def variables(constraints, shape=(3, 3)):
    made = [keras.Variable(np.ones(shape), dtype="float32", name=f"w{i}") for i in range(len(constraints))]
    for variable, constraint in zip(made, constraints, strict=True):
        variable.constraint = constraint
    return made


def step(members):
    keras.optimizers.SGD(0.1).apply([ops.ones(m.shape) for m in members], members)
    return [ops.convert_to_numpy(m.value) for m in members]


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_one_where_their_arrays_are(kind):
    make = MASKS[kind]
    alike = variables([make(EYE), make(EYE.copy())])
    equalize.GroupRegistry().tie("g", alike, Equal())
    for value in step(alike):
        np.testing.assert_allclose(value, 0.9 * EYE)
    for different in ([make(EYE), make(1 - EYE)], [make(EYE), None], [None, make(EYE)]):
        with pytest.raises(GroupMismatchError, match="which does something else to the common value"):
            equalize.GroupRegistry().tie("g", variables(different), Equal())
    with pytest.raises(GroupMismatchError, match="and the rule brings"):
        equalize.GroupRegistry().tie("g", variables([make(EYE)] * 2), Equal(inner=NoConfig(1 - EYE)))


@pytest.mark.parametrize("kind", ["no config", "broken config"])
def test_declared_rules_with_different_masks_are_refused(kind):
    entrance = keras.Input((3,))
    for other, fits in ((EYE.copy(), True), (1 - EYE, False)):
        layers = [keras.layers.Dense(3, kernel_constraint=Equal("g", inner=MASKS[kind](m))) for m in (EYE, other)]
        model = keras.Model(entrance, [layer(entrance) for layer in layers])
        if fits:
            equalize.GroupRegistry().link(model)
        else:
            with pytest.raises(GroupMismatchError, match="rules of group 'g' disagree"):
                equalize.GroupRegistry().link(model)


def unit(axis):
    return keras.constraints.UnitNorm(axis)


@pytest.mark.parametrize("viewed_first", [False, True])
def test_constraints_are_compared_and_applied_as_views_show_them(viewed_first):
    def tied(*axes):
        plain, turned = variables([None if axis is None else unit(axis) for axis in axes], (3, 3))
        plain.assign(np.random.default_rng(0).normal(size=(3, 3)))
        members = [plain, (turned, Transpose())]
        registry = equalize.GroupRegistry()
        registry.tie("g", members[::-1] if viewed_first else members, Equal(), initial="mean")
        return plain, turned, registry

    plain, turned, registry = tied(0, 1)  # one demand: the columns of the one are the rows of the other
    for value, axis in zip(step([plain, turned]), (0, 1), strict=True):
        np.testing.assert_allclose(np.linalg.norm(value, axis=axis), 1.0, rtol=1e-5)
    registry.check()
    registry.untie()
    assert (plain.constraint.axis, turned.constraint.axis) == (0, 1)
    for axes in ((0, 0), (None, 0), (0, None)):
        with pytest.raises(GroupMismatchError, match=r"UnitNorm\(axis=0\)"):
            tied(*axes)


def test_a_scaled_member_may_be_larger_than_the_norm_of_another_allows():
    small, large = variables([keras.constraints.MaxNorm(1.0), keras.constraints.MaxNorm(2.0)])
    equalize.GroupRegistry().tie("g", [small, (large, Scale(2.0))], Equal())
    other = variables([keras.constraints.MaxNorm(1.0), keras.constraints.MaxNorm(1.0)])
    with pytest.raises(GroupMismatchError, match="MaxNorm"):
        equalize.GroupRegistry().tie("g", [other[0], (other[1], Scale(2.0))], Equal())


def test_layers_share_a_variable_where_their_constraints_and_regularizers_do_the_same():
    def dense(mask, factor):
        layer = keras.layers.Dense(
            3, kernel_constraint=NoConfig(mask), kernel_regularizer=lambda w: factor * ops.sum(w)
        )
        layer.build((None, 3))
        return layer

    equalize.share(*(dense(EYE.copy(), 0.1) for _ in range(2)))
    for other in (dense(1 - EYE, 0.1), dense(EYE, 0.2)):
        with pytest.raises(GroupMismatchError, match=r"Cannot share .* expected (constraint|regularizer)"):
            equalize.share(dense(EYE, 0.1), other)


def test_the_config_of_a_tie_leaves_to_the_variables_what_is_theirs():
    entrance = keras.Input((3,))
    layers = [keras.layers.Dense(3, kernel_constraint=unit(0)) for _ in range(2)]
    model = keras.Model(entrance, [layer(entrance) for layer in layers])
    registry = equalize.GroupRegistry()
    registry.tie("g", [layer.kernel for layer in layers], Equal())
    assert registry.get_config()["groups"][0]["rule"]["config"]["inner"] is None
    clone = keras.models.clone_model(model)
    restored = equalize.GroupRegistry.from_config(registry.get_config()).link(clone)
    assert isinstance(restored["g"].inner, keras.constraints.UnitNorm)
