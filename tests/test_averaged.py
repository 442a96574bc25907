"""Law 17: a hard group is one weight, so the regularizers of its members count once."""

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.views import Scale, Slice, Transpose
from tests.conftest import MODES, QUICK, data, gradients, no_loss

L2 = keras.regularizers.L2


def array(x):
    return ops.convert_to_numpy(x)


def variable(value, regularizer=None, **arguments):
    made = keras.Variable(np.asarray(value, "float32"), dtype="float32", **arguments)
    made.regularizer = regularizer
    return made


def penalties(variables):
    """What Keras adds to a loss for each variable."""
    return [float(array(v.regularizer(v))) for v in variables]


def total(variables):
    return lambda: sum(v.regularizer(v) for v in variables)


def chain(way, optimizer):
    """Three layers in a row with one regularized kernel, shared or tied, after some steps."""
    keras.utils.set_random_seed(1)
    entrance = keras.Input((4,))

    def dense():
        return keras.layers.Dense(4, use_bias=False, kernel_initializer="identity", kernel_regularizer=L2(0.2))

    layers = [dense()] * 3 if way == "shared" else [dense() for _ in range(3)]
    x = entrance
    for layer in layers:
        x = layer(x)
    model, registry = keras.Model(entrance, x), equalize.GroupRegistry()
    if way != "shared":
        registry.tie("chain", [layer.kernel for layer in layers], Equal())
    model.compile(TiedOptimizer(optimizer, registry) if way == "exact" else optimizer, "mse", **MODES[QUICK])
    assert sum(float(array(loss)) for loss in model.losses) == pytest.approx(0.8)
    inputs, _ = data(32, 4)
    model.fit(inputs, inputs[:, ::-1].copy(), batch_size=8, epochs=2, verbose=0, shuffle=False)
    return array(layers[0].kernel)


def with_everything(kind, rate):
    """An optimizer that averages, accumulates and scales the loss, all at once."""
    settings = {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3, "gradient_accumulation_steps": 2}
    return keras.optimizers.LossScaleOptimizer(getattr(keras.optimizers, kind)(rate, **settings))


OPTIMIZERS = {
    "plain": lambda: keras.optimizers.SGD(0.06),
    "averages": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9),
    "accumulation": lambda: keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05)),
    "SGD with everything": lambda: with_everything("SGD", 0.05),
    "Adam with everything": lambda: with_everything("Adam", 0.01),
    "Lion with everything": lambda: with_everything("Lion", 0.01),
}
if hasattr(keras.optimizers, "Muon"):
    OPTIMIZERS["Muon with everything"] = lambda: with_everything("Muon", 0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.sampled
def test_a_regularized_group_has_the_numbers_of_one_regularized_variable(name):
    shared, exact = (chain(way, OPTIMIZERS[name]()) for way in ("shared", "exact"))
    np.testing.assert_allclose(exact, shared, rtol=1e-5, atol=1e-6)


def test_a_hard_group_under_sgd_is_one_regularized_variable_at_a_third_of_the_rate():
    shared, hard = chain("shared", keras.optimizers.SGD(0.02)), chain("hard", keras.optimizers.SGD(0.06))
    np.testing.assert_allclose(hard, shared, rtol=1e-5, atol=1e-6)


def test_regularizers_count_as_their_mean_and_come_back_when_untied():
    mine, other = L2(0.1), keras.regularizers.L1(0.2)
    members = [variable([[1.0, 2.0]], r) for r in (mine, other, None)]
    registry = equalize.GroupRegistry()
    registry.tie("g", members, Equal())
    alone = [0.1 * 5.0, 0.2 * 3.0]
    assert penalties(members[:2]) == pytest.approx([p / 3 for p in alone])
    np.testing.assert_allclose(gradients(total(members[:2]), members[:2])[0], [[0.2 / 3, 0.4 / 3]], rtol=1e-6)
    registry.untie()
    assert [m.regularizer for m in members] == [mine, other, None]
    assert penalties(members[:2]) == pytest.approx(alone)


def test_members_that_do_not_move_are_not_counted():
    members = [variable([1.0, 2.0], L2(0.1)) for _ in range(3)]
    registry = equalize.GroupRegistry()
    registry.tie("g", members, Equal())
    members[0].trainable = False
    assert penalties(members[1:]) == pytest.approx([0.25, 0.25])
    members[0].trainable = True
    assert penalties(members) == pytest.approx([0.5 / 3] * 3)


def test_each_member_is_regularized_as_its_view_shows_the_value():
    members = [variable([[1.0, 2.0]], L2(0.1)), variable(np.zeros((2, 1)), L2(0.1)), variable([[0.0, 0.0]], L2(0.1))]
    views = [None, Transpose(), Scale(2.0)]
    equalize.GroupRegistry().tie("g", [(m, v) if v else m for m, v in zip(members, views, strict=True)], Equal())
    assert penalties(members) == pytest.approx([0.5 / 3, 0.5 / 3, 2.0 / 3])


@pytest.mark.parametrize("n", [2, 3])
def test_entries_that_a_view_leaves_free_are_regularized_in_full(n):
    whole = [variable([1.0, 2.0], L2(0.1)) for _ in range(n - 1)]
    part = variable([0.0, 0.0, 3.0], L2(0.1))
    equalize.GroupRegistry().tie("g", [*whole, (part, Slice((0,), (2,)))], Equal())
    *found, of_part = gradients(total([*whole, part]), [*whole, part])
    for of_whole in found:
        np.testing.assert_allclose(of_whole, [0.2 / n, 0.4 / n], rtol=1e-6)
    np.testing.assert_allclose(of_part, [0.2 / n, 0.4 / n, 0.6], rtol=1e-6)


@pytest.mark.parametrize("soft_first", [False, True])
def test_a_soft_tie_of_a_member_counts_in_full_beside_the_groups_mean(soft_first):
    members = [variable([1.0], L2(0.1)) for _ in range(2)]
    anchor = np.float32([3.0])
    registry = equalize.GroupRegistry()
    ties = [("hard", members, Equal()), ("soft", [members[0], anchor], MeanL2(factor=1.0))]
    for name, tied, rule in reversed(ties) if soft_first else ties:
        registry.tie(name, tied, rule)
    assert penalties(members) == pytest.approx([0.05 + 2.0, 0.05])
    registry.untie("hard")
    assert penalties(members) == pytest.approx([0.1 + 2.0, 0.1])
    registry.untie("soft")
    assert all(type(member.regularizer) is L2 for member in members)


def test_a_group_that_is_hard_no_longer_regularizes_each_member():
    members = [variable([1.0], L2(0.1)) for _ in range(2)]
    registry = equalize.GroupRegistry()
    registry.tie("g", members, Equal())
    assert penalties(members) == pytest.approx([0.05, 0.05])
    registry.replace("g", Equal(rate=0.5))
    assert penalties(members) == pytest.approx([0.1, 0.1])
    registry.replace("g", MeanL2(factor=0.0))
    assert penalties(members) == pytest.approx([0.1, 0.1])
    registry.replace("g", Equal())
    assert penalties(members) == pytest.approx([0.05, 0.05])


def test_configs_keep_what_the_user_wrote():
    entrance = keras.Input((4,))
    layers = [keras.layers.Dense(2, kernel_constraint=Equal("g"), kernel_regularizer=L2(0.3)) for _ in range(2)]
    model = keras.Model(entrance, [layer(entrance) for layer in layers])
    equalize.GroupRegistry().link(model)
    assert all(layer.get_config()["kernel_regularizer"]["config"]["l2"] == pytest.approx(0.3) for layer in layers)
    clone = keras.models.clone_model(model)
    equalize.GroupRegistry().link(clone)
    clone.compile("sgd", [no_loss, no_loss])
    assert float(array(sum(clone.losses))) == pytest.approx(
        0.3 * float(np.sum(array(clone.layers[1].kernel) ** 2)), rel=1e-5
    )


def test_what_stands_on_a_variable_has_the_config_of_its_users_regularizer():
    variables = [variable([1.0], L2(0.1)), variable([1.0], L2(0.1)), variable([1.0])]
    equalize.GroupRegistry().tie("pair", variables[:2], Equal())
    assert [v.regularizer.get_config() for v in variables[:2]] == [L2(0.1).get_config()] * 2
    equalize.GroupRegistry().tie("frozen", [variable([1.0], trainable=False), variables[2]], Equal())
    if variables[2].regularizer is not None:  # on JAX, where it records the frozen member
        assert variables[2].regularizer.get_config() == {}
