"""Members that count differently, that join later, and that have several dtypes."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal, Follow
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import ChainL2, MeanL2, PairwiseL1, PairwiseL2, PairwiseNorm, TraceNorm
from equalize.saving import load_model, save_model
from equalize.views import Pattern, Scale, Slice, Transpose
from tests.bare import random_gradients, stepper
from tests.conftest import BACKEND, MODES, bits, bitwise_equal, gradients


def array(x):
    return ops.convert_to_numpy(x)


def variables(count=3, shape=(3, 2), dtype="float32"):
    random = np.random.default_rng(0)
    return [keras.Variable(random.normal(size=shape), dtype=dtype, name=f"v{i}") for i in range(count)]


def built(*layers, inputs=4):
    for layer in layers:
        layer.build((None, inputs))
    return layers


# ---- weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_a_step_takes_the_weighted_mean(rate, mode):
    members = variables()
    registry = equalize.GroupRegistry()
    registry.tie("g", members, Equal(rate=rate), weights=[3, 1, 0.5], initial="mean")
    before = [array(member.value) for member in members]
    (g,) = random_gradients(1, *[(3, 2)] * 3)
    stepper(keras.optimizers.SGD(0.1), members, mode)([ops.convert_to_tensor(x) for x in g])
    moved = [value - 0.1 * x for value, x in zip(before, g, strict=True)]
    mean = np.average(moved, axis=0, weights=[3, 1, 0.5])
    for member, value in zip(members, moved, strict=True):
        np.testing.assert_allclose(array(member.value), (1 - rate) * value + rate * mean, rtol=1e-4, atol=1e-6)


def test_weights_count_when_members_are_synchronized():
    for rule in (Equal(rate=0.5), MeanL2(), PairwiseL2()):
        members = variables()
        registry = equalize.GroupRegistry()
        registry.tie("g", members, rule, weights=np.array([100, 20, 4]))
        mean = np.average([array(member.value) for member in members], axis=0, weights=[100, 20, 4])
        np.testing.assert_allclose(array(registry["g"].value), mean, rtol=1e-5, atol=1e-6)
        registry.sync("mean", "g")
        assert bitwise_equal(*members)
        np.testing.assert_allclose(array(members[0].value), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2), (200, 100)])
@pytest.mark.parametrize("make", [MeanL2, PairwiseL2])
def test_weighted_penalties_and_their_gradients(make, shape):
    members = variables(shape=shape)
    registry = equalize.GroupRegistry()
    registry.tie("g", [*members[:2], (members[2], Scale(2.0))], make(factor=0.3), weights=[3, 1, 2])
    values = [array(v.value).astype("float64") for v in members]
    values[2] /= 2.0
    weights = np.array([3, 1, 2]) / 2.0
    mean = np.average(values, axis=0, weights=weights)
    times = 0.3 * (3 if make is PairwiseL2 else 1)
    expected = times * sum(a * ((value - mean) ** 2).sum() for a, value in zip(weights, values, strict=True))
    pairs = 0.3 * sum(
        weights[i] * weights[j] * ((values[i] - values[j]) ** 2).sum() for i in range(3) for j in range(i)
    )
    assert make is MeanL2 or pairs == pytest.approx(expected, rel=1e-9)
    assert float(array(registry.penalty())) == pytest.approx(expected, rel=1e-5)
    assert float(sum(array(v.regularizer(v)) for v in members)) == pytest.approx(expected, rel=1e-5)
    slopes = [2 * times * a * (value - mean) for a, value in zip(weights, values, strict=True)]
    slopes[2] /= 2.0
    for function in (registry.penalty, lambda: sum(v.regularizer(v) for v in members)):
        for found, slope in zip(gradients(function, members), slopes, strict=True):
            np.testing.assert_allclose(array(found), slope, rtol=1e-4, atol=1e-5)


def test_equal_weights_are_none():
    members = variables()
    registry = equalize.GroupRegistry()
    registry.tie("g", members, MeanL2(factor=0.3), weights=[2, 2, 2])
    weighted = float(array(registry.penalty()))
    registry.untie()
    registry.tie("g", members, MeanL2(factor=0.3))
    assert float(array(registry.penalty())) == weighted


@pytest.mark.parametrize("make", [PairwiseL1, PairwiseNorm, ChainL2, TraceNorm, Follow])
def test_a_rule_without_a_mean_refuses_weights(make):
    members = variables()
    with pytest.raises(GroupMismatchError, match="no mean in which members could count"):
        equalize.GroupRegistry().tie("g", members, make(), weights=[3, 1, 1])
    factor = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    with pytest.raises(GroupMismatchError, match="no mean in which members could count"):
        equalize.GroupRegistry().tie("g", members, PairwiseL2(factor=factor), weights=[3, 1, 1])
    registry = equalize.GroupRegistry()
    registry.tie("g", members, MeanL2(), weights=[3, 1, 1])
    with pytest.raises(GroupMismatchError, match="no mean in which members could count"):
        registry.replace("g", make())
    assert all(member.constraint is None for member in members)


def test_a_weight_in_the_rule_is_refused_with_the_argument_to_use():
    members = variables()
    with pytest.raises(EqualizeError, match=r"`weights=\[...\]`"):
        equalize.GroupRegistry().tie("g", members, Equal(weight=3))
    assert all(member.constraint is None for member in members)


def test_weights_of_layers_are_saved_with_them(tmp_path):
    layers = [keras.layers.Dense(4) for _ in range(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    registry = equalize.GroupRegistry()
    registry.tie("layers", layers, Equal(rate=0.5), weights=[3, 1])
    assert [[m.weight for m in group.members] for group in registry.values()] == [[3.0, 1.0]] * 2
    model.compile("sgd", "mse")
    save_model(model, tmp_path / "model.keras", registry)
    _, again = load_model(tmp_path / "model.keras")
    assert [[m.weight for m in group.members] for group in again.values()] == [[3.0, 1.0]] * 2
    config = json.loads(json.dumps(registry.get_config()))
    clone = keras.models.clone_model(model)
    again = equalize.GroupRegistry.from_config(config).link(clone)
    assert [[m.weight for m in group.members] for group in again.values()] == [[3.0, 1.0]] * 2


def test_federated_averaging_by_the_numbers_of_examples(tmp_path):
    """Three clients train alone for an epoch, and their models become the mean by the sizes of their data."""
    sizes, random = [24, 8, 16], np.random.default_rng(0)
    clients = [keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]) for _ in sizes]
    registry = equalize.GroupRegistry()
    registry.tie("clients", clients, None, weights=sizes)
    registry.sync("first", "clients")
    for _ in range(2):
        for client, size in zip(clients, sizes, strict=True):
            x = random.normal(size=(size, 3)).astype("float32")
            client.compile("sgd", "mse")
            client.fit(x, x.sum(axis=1), batch_size=8, verbose=0)
        kernels = [array(client.weights[0]) for client in clients]
        registry.sync("mean", "clients")
        expected = np.average(kernels, axis=0, weights=sizes)
        for client in clients:
            np.testing.assert_allclose(array(client.weights[0]), expected, rtol=1e-5, atol=1e-6)
    entrance = keras.Input((3,))
    together = keras.Model(entrance, [client(entrance) for client in clients])
    save_model(together, tmp_path / "clients.keras", registry)
    loaded, again = load_model(tmp_path / "clients.keras")
    clients = [layer for layer in loaded.layers if isinstance(layer, keras.Sequential)]
    clients[0].weights[0].assign(np.ones((3, 1)))
    expected = np.average([array(client.weights[0]) for client in clients], axis=0, weights=sizes)
    again.sync("mean", "clients")
    np.testing.assert_allclose(array(clients[2].weights[0]), expected, rtol=1e-5, atol=1e-6)


# ---- members that join later


def test_a_layer_that_joins_takes_the_value_and_is_tied_from_then_on():
    layers = built(*(keras.layers.Dense(2) for _ in range(3)))
    for rule in (Equal(), Equal(rate=0.5), MeanL2(factor=0.1), PairwiseL1(factor=0.1)):
        registry = equalize.GroupRegistry()
        registry.tie("heads", layers[:2], rule)
        groups = list(registry.values())
        registry["heads/kernel"].members[0].variable.assign(np.full((4, 2), 3.0))
        value = array(registry["heads/kernel"].value)
        registry.extend("heads", [layers[2]])
        assert list(registry.values()) == groups
        assert len(registry["heads/bias"].members) == 3
        if rule.setting != "rate" or not registry["heads/kernel"].hard:
            np.testing.assert_array_equal(array(layers[2].kernel), value)
        assert registry["heads/kernel"].spread() == 0.0 or not registry["heads/kernel"].hard
        step = stepper(keras.optimizers.SGD(0.1), [layer.kernel for layer in layers])
        for arrays in random_gradients(2, *[(4, 2)] * 3):
            step([ops.convert_to_tensor(x) for x in arrays])
            assert bitwise_equal(*(layer.kernel for layer in layers)) == registry["heads/kernel"].hard
        registry.untie()


def test_variables_views_and_weights_that_join():
    one, two, three = variables(shape=(3, 3))
    registry = equalize.GroupRegistry()
    registry.tie("g", [one, two], Equal(), weights=[2, 1])
    registry.extend("g", [(three, Transpose())], weights=[5])
    np.testing.assert_array_equal(array(three.value), array(one.value).T)
    assert [member.weight for member in registry["g"].members] == [2.0, 1.0, 5.0]


def test_towers_with_statistics_take_in_another():
    def tower():
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])

    towers = [tower() for _ in range(3)]
    towers[0].layers[1].moving_mean.assign(np.ones(3))
    registry = equalize.GroupRegistry()
    registry.tie("towers", towers[:2], Equal(), statistics=True)
    registry.extend("towers", [towers[2]])
    assert {len(group.members) for group in registry.values()} == {3}
    assert set(registry.spread().values()) == {0.0}
    assert all(equalize.relation(towers[0].weights[i], towers[2].weights[i]) == "equal" for i in range(6))


def test_a_member_of_a_hard_group_joins_a_soft_one_with_the_value_that_it_has():
    one, two, three, four = variables(4)
    registry = equalize.GroupRegistry()
    registry.tie("hard", [one, two], Equal())
    registry.tie("soft", [three, four], MeanL2(factor=0.1))
    before = bits(one)
    registry.extend("soft", [one])
    assert bits(one) == bits(two) == before
    assert len(registry["soft"].members) == 3


def test_what_does_not_fit_does_not_join_and_changes_nothing():
    layers = built(*(keras.layers.Dense(2) for _ in range(2)))
    (wide,) = built(keras.layers.Dense(3))
    (deep,) = built(keras.Sequential([keras.layers.Dense(2), keras.layers.Dense(2)]))
    registry = equalize.GroupRegistry()
    registry.tie("heads", layers, Equal())
    before = registry.get_config()
    for wrong, match in ((wide, "expected shape"), (deep, "their structures differ"), (layers[0], "more than once")):
        with pytest.raises(GroupMismatchError, match=match):
            registry.extend("heads", [wrong])
    with pytest.raises(TypeError, match="a list of layers"):
        registry.extend("heads", [layers[0].kernel])
    with pytest.raises(EqualizeError, match="There is no group"):
        registry.extend("other", [wide])
    assert registry.get_config() == before
    assert wide.kernel.constraint is None


@pytest.mark.parametrize(
    ("rule", "members", "message"),
    [
        (Equal(), [0, 1], "belongs to group 'other' already"),
        (Equal(rate=0.5), [0, 1], "belongs to group 'other' already"),
        (Equal(), [(0, Pattern([[0, 1], [1, 0]], (2, 1)))], "belongs to group 'other' already"),
        (Follow(rate=0.5), [0, 1], "what follows cannot lead"),
        (Follow(rate=0.5), [1, 0], "belongs to group 'other' already"),
    ],
)
def test_what_another_group_moves_or_follows_cannot_join_those_who_follow(rule, members, message):
    """The first that joins a group is not its leader."""
    places = [keras.Variable(np.full((2, 2), float(i))) for i in range(2)]
    leader, follower = keras.Variable(np.zeros((2, 2))), keras.Variable(np.zeros((2, 2)), trainable=False)
    registry = equalize.GroupRegistry()
    registry.tie("other", [places[m] if isinstance(m, int) else (places[m[0]], m[1]) for m in members], rule)
    registry.tie("teacher", [leader, follower], Follow(rate=0.5))
    with pytest.raises(GroupMismatchError, match=message):
        registry.extend("teacher", [places[0]])
    assert len(registry["teacher"].members) == 2


def test_a_declared_group_is_extended_by_declaring():
    layers = [keras.layers.Dense(4, kernel_constraint=Equal("g")) for _ in range(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    registry = equalize.GroupRegistry().link(model)
    (other,) = built(keras.layers.Dense(4))
    with pytest.raises(EqualizeError, match="is declared by its layers"):
        registry.extend("g", [other.kernel])


# ---- several dtypes


LOW = ["bfloat16", "float16"]


def mixed(low, view=None):
    """A float32 master and a member of lower precision."""
    (master,) = variables(1)
    half = keras.Variable(np.zeros((2, 3) if view else (3, 2)), dtype=low, name="half")
    registry = equalize.GroupRegistry()
    return registry, master, half, [master, (half, view) if view else half]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("view", [None, Transpose(), Scale(-3.0)])
def test_members_of_lower_precision_show_the_master_rounded(view, low, mode):
    if isinstance(view, Scale):
        registry, master, half, _ = mixed(low)
        members = [master, (half, view)]
    else:
        registry, master, half, members = mixed(low, view)
    optimizer = TiedOptimizer(keras.optimizers.Adam(0.01), registry)
    registry.tie("g", members, Equal())
    alone = keras.Variable(array(master.value))
    step = stepper(optimizer, [half, master], mode)
    reference = stepper(keras.optimizers.Adam(0.01), [alone], mode)
    for g, h in random_gradients(4, (3, 2), tuple(half.shape)):
        h = ops.convert_to_tensor(h, low)
        step([h, ops.convert_to_tensor(g)])
        back = array(ops.cast(h, "float32"))
        total = g + (back if view is None else back.T if isinstance(view, Transpose) else -3.0 * back)
        reference([ops.convert_to_tensor(total)])
        np.testing.assert_allclose(array(master.value), array(alone.value), rtol=1e-5, atol=1e-6)
        shown = master.value if view is None else view.forward(ops.convert_to_tensor(master.value))
        shown, held = (ops.cast(ops.cast(x, low), "float32") for x in (shown, half.value))
        assert array(shown).tobytes() == array(held).tobytes()
        assert registry["g"].spread() == 0.0
        registry.check()


def test_the_widest_dtype_is_the_common_one_wherever_it_stands():
    registry, master, half, members = mixed("bfloat16")
    optimizer = TiedOptimizer(keras.optimizers.SGD(0.1), registry)
    half.assign(np.full((3, 2), 1.1))
    registry.tie("g", members[::-1], Equal())
    assert array(master.value).astype("float64")[0, 0] == float(array(ops.cast(half.value, "float32"))[0, 0])
    assert registry["g"].value.dtype == master.value.dtype
    optimizer.build([half, master])
    assert [tuple(v.shape) for v in optimizer.inner_optimizer.variables[2:]] == []
    registry.sync("mean", "g")
    assert registry["g"].spread() == 0.0


def test_equal_alone_refuses_and_says_why(recwarn):
    _, master, half, members = mixed("bfloat16")
    with pytest.raises(GroupMismatchError, match=r"expected dtype float32.*rounded at every step.*TiedOptimizer"):
        equalize.GroupRegistry().tie("g", members, Equal())
    with pytest.raises(GroupMismatchError, match="expected dtype float32"):
        equalize.GroupRegistry().tie("g", members, MeanL2())
    registry = equalize.GroupRegistry()
    optimizer = TiedOptimizer("sgd", registry)
    with pytest.raises(GroupMismatchError, match="expected dtype float32"):
        registry.tie("g", members, Equal(rate=0.5))
    with pytest.raises(GroupMismatchError, match="expected dtype bfloat16"):
        registry.tie("g", [half, keras.Variable(np.zeros((3, 2)), dtype="float16")], Equal())
    registry.tie("g", members, Equal())
    with pytest.raises(EqualizeError, match="their mean would be rounded at every step"):
        stepper(keras.optimizers.SGD(0.1), [master, half])([ops.zeros((3, 2)), ops.zeros((3, 2), "bfloat16")])
    assert optimizer.registry is registry


def test_a_master_of_a_part_leaves_the_rest_alone():
    registry = equalize.GroupRegistry()
    optimizer = TiedOptimizer(keras.optimizers.SGD(0.1), registry)
    (master,) = variables(1)
    half = keras.Variable(np.arange(8.0).reshape(4, 2), dtype="bfloat16")
    registry.tie("g", [master, (half, Slice((1, 0), (3, 2)))], Equal())
    step = stepper(optimizer, [master, half])
    step([ops.ones((3, 2)), ops.zeros((4, 2), "bfloat16")])
    assert array(ops.cast(half.value, "float32"))[0].tolist() == [0.0, 1.0]
    assert registry["g"].spread() == 0.0


@pytest.mark.skipif(BACKEND == "torch", reason="once is enough")
def test_mixed_dtypes_are_saved_and_loaded(tmp_path):
    master = keras.layers.Dense(4, name="master")
    half = keras.layers.Dense(4, dtype="bfloat16", name="half")
    entrance = keras.Input((4,))
    model = keras.Model(entrance, [master(entrance), ops.cast(half(entrance), "float32")])
    registry = equalize.GroupRegistry()
    optimizer = TiedOptimizer(keras.optimizers.Adam(0.01), registry)
    registry.tie("g", [master, half], Equal())
    model.compile(optimizer, ["mse", "mse"])
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    model.fit(x, [x, x], verbose=0)
    save_model(model, tmp_path / "model.keras", registry)
    loaded, again = load_model(tmp_path / "model.keras")
    assert bits(loaded.get_layer("half").kernel) == bits(half.kernel)
    loaded.fit(x, [x, x], verbose=0)
    assert set(again.spread().values()) == {0.0}


def test_a_member_that_joins_under_an_optimizer_leaves_it_its_slots():
    fused, other = variables(1, (3, 4))[0], variables(1)[0]
    registry = equalize.GroupRegistry()
    registry.tie("g", [(fused, Slice((0, 0), (3, 2))), (fused, Slice((0, 2), (3, 2)))], Equal())
    optimizer = TiedOptimizer(keras.optimizers.Adam(0.1), registry)
    shared = keras.Variable(array(fused.value)[:, :2])
    step = stepper(optimizer, [fused, other], "eager")
    reference = stepper(keras.optimizers.Adam(0.1), [shared], "eager")
    for number, (g, h) in enumerate(random_gradients(6, (3, 4), (3, 2))):
        if number == 3:
            registry.extend("g", [other])
        step([ops.convert_to_tensor(g), ops.convert_to_tensor(h)])
        reference([ops.convert_to_tensor(g[:, :2] + g[:, 2:] + (h if number >= 3 else 0.0))])
        np.testing.assert_allclose(array(fused.value)[:, :2], array(shared.value), rtol=1e-5, atol=1e-6)
        assert registry["g"].spread() == 0.0


def test_a_group_of_several_dtypes_can_be_set_free():
    registry, _, _, members = mixed("bfloat16")
    optimizer = TiedOptimizer("sgd", registry)
    registry.tie("g", members, Equal())
    registry.replace("g", None)
    assert registry["g"].rule is None
    assert optimizer.registry is registry
