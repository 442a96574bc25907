"""Ties of parts: several groups in one variable, several parts of one variable in a group, and entries that repeat."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal, Follow
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.saving import load_model, save_model
from equalize.views import Chain, Pattern, Scale, Slice, Transpose
from tests.bare import random_gradients, stepper
from tests.conftest import BACKEND, MODES, QUICK, bits, bitwise_equal, data, gradients, in_new_processes

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
}


def array(x):
    return ops.convert_to_numpy(x)


def variable(*shape, seed=0):
    return keras.Variable(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def columns(first, count, rows=4):
    return Slice((0, first), (rows, count))


def fused_and_apart(rule=Equal, wrap=lambda view: view):
    """A fused kernel, whose three parts are tied to kernels of their own, and whose last column is free."""
    fused, apart = variable(4, 10), [variable(4, 3, seed=seed) for seed in (1, 2, 3)]
    registry = equalize.GroupRegistry()
    for name, place, kernel in zip("qkv", (0, 3, 6), apart, strict=True):
        registry.tie(name, [kernel, (fused, wrap(columns(place, 3)))], rule())
    return registry, fused, apart


def parts_equal(registry):
    return registry.spread() == dict.fromkeys(registry, 0.0)


# ---- several groups in one variable


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fused_kernel_and_three_separate_ones_are_equal_after_every_step(optimizer, mode):
    _registry, fused, apart = fused_and_apart()
    before = array(fused.value)[:, 9]
    step = stepper(OPTIMIZERS[optimizer](), [fused, *apart], mode)
    for arrays in random_gradients(3, (4, 10), (4, 3), (4, 3), (4, 3)):
        step([ops.convert_to_tensor(x) for x in arrays])
        for place, kernel in zip((0, 3, 6), apart, strict=True):
            np.testing.assert_array_equal(array(fused.value)[:, place : place + 3], array(kernel.value))
    assert (array(fused.value)[:, 9] != before).all()


def test_each_part_becomes_the_mean_of_its_own_group_and_the_rest_trains_alone():
    _registry, fused, apart = fused_and_apart()
    values, alone = [array(kernel.value) for kernel in apart], array(fused.value)[:, 9]
    g, *separate = random_gradients(1, (4, 10), (4, 3), (4, 3), (4, 3))[0]
    stepper(keras.optimizers.SGD(0.1), [fused, *apart])([ops.convert_to_tensor(x) for x in (g, *separate)])
    for place, kernel, value, own in zip((0, 3, 6), apart, values, separate, strict=True):
        expected = value - 0.1 * (g[:, place : place + 3] + own) / 2
        np.testing.assert_allclose(array(kernel.value), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(array(fused.value)[:, 9], alone - 0.1 * g[:, 9], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exact_ties_of_parts_have_the_numbers_of_variables_of_their_own(optimizer, mode):
    registry, fused, apart = fused_and_apart()
    shared = [keras.Variable(array(kernel.value)) for kernel in apart] + [keras.Variable(array(fused.value)[:, 9:])]
    step = stepper(TiedOptimizer(OPTIMIZERS[optimizer](), registry), [fused, *apart], mode)
    reference = stepper(OPTIMIZERS[optimizer](), shared, mode)
    for g, *separate in random_gradients(4, (4, 10), (4, 3), (4, 3), (4, 3)):
        step([ops.convert_to_tensor(x) for x in (g, *separate)])
        sums = [own + g[:, place : place + 3] for place, own in zip((0, 3, 6), separate, strict=True)]
        reference([ops.convert_to_tensor(x) for x in (*sums, g[:, 9:])])
        assert parts_equal(registry)
        for kernel, expected in zip(apart, shared[:3], strict=True):
            np.testing.assert_allclose(array(kernel.value), array(expected.value), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(array(fused.value)[:, 9:], array(shared[3].value), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_new_tokens_of_a_table_that_has_grown_are_trained_saved_and_trained_on(order, tmp_path):
    """Old rows tied to the table of before, which is frozen, and new ones to those of another new table."""
    tables = {"old": 6, "new": 8, "other": 8}
    words, outputs = keras.Input((5,), dtype="int32"), []
    for name, rows in tables.items():
        outputs.append(keras.layers.Embedding(rows, 3, name=name, trainable=name != "old")(words % rows))
    model = keras.Model(words, keras.layers.Concatenate()(outputs))
    old, new, other = (model.get_layer(name).embeddings for name in tables)
    first, last = Slice((0, 0), (6, 3)), Slice((6, 0), (2, 3))
    ties = [("old", [old, (new, first)]), ("new", [(new, last), (other, last)])]
    registry = equalize.GroupRegistry()
    for place in order:
        registry.tie(*ties[place], Equal())
    x = np.random.default_rng(0).integers(0, 8, size=(32, 5))
    y = np.random.default_rng(1).normal(size=(32, 5, 9)).astype("float32")
    before = array(old.value).copy(), array(new.value)[6:].copy()
    for optimizer in (keras.optimizers.Adam(0.01), TiedOptimizer(keras.optimizers.Adam(0.01), registry)):
        model.compile(optimizer, "mse")
        for _ in range(3):
            model.train_on_batch(x, y)
            assert parts_equal(registry)
    np.testing.assert_array_equal(array(new.value)[:6], before[0])
    assert (array(new.value)[6:] != before[1]).all()
    save_model(model, tmp_path / "tables.keras", registry)
    loaded, again = load_model(tmp_path / "tables.keras")
    loaded.fit(x, y, batch_size=16, verbose=0)
    assert parts_equal(again)
    np.testing.assert_array_equal(array(loaded.get_layer("new").embeddings)[:6], before[0])


def test_a_partial_and_a_hard_group_of_one_variable_each_pull_once_a_step():
    fused, hard, soft = variable(4, 6), variable(4, 3, seed=1), variable(4, 3, seed=2)
    for make in (lambda registry: keras.optimizers.SGD(0.0), lambda registry: TiedOptimizer("sgd", registry)):
        registry = equalize.GroupRegistry()
        registry.tie("hard", [hard, (fused, columns(0, 3))], Equal())
        registry.tie("partial", [soft, (fused, columns(3, 3))], Equal(rate=0.5))
        distance = array(soft.value) - array(fused.value)[:, 3:]
        step = stepper(make(registry), [hard, fused, soft])
        step([ops.zeros((4, 3)), ops.zeros((4, 6)), ops.zeros((4, 3))])
        np.testing.assert_allclose(array(soft.value) - array(fused.value)[:, 3:], 0.5 * distance, rtol=1e-5, atol=1e-7)
        assert registry["hard"].spread() == 0.0
        registry.untie()


@pytest.mark.parametrize("mode", MODES)
def test_what_no_group_has_obeys_the_constraint_of_its_layer(mode):
    layer, other = keras.layers.Dense(6, kernel_constraint="non_neg"), keras.layers.Dense(2)
    for each in (layer, other):
        each.build((None, 4))
    registry = equalize.GroupRegistry()
    registry.tie("a", [(layer.kernel, columns(0, 2)), (other.kernel, None)[0]], Equal(inner="non_neg"))
    step = stepper(keras.optimizers.SGD(1.0), [layer.kernel, other.kernel], mode)
    for _ in range(2):
        step([ops.ones((4, 6)), ops.ones((4, 2))])
        assert (array(layer.kernel.value) == 0.0).all()
        assert (array(other.kernel.value) == 0.0).all()


def test_untying_one_of_several_groups_leaves_the_others():
    registry, fused, apart = fused_and_apart()
    registry.untie("k")
    step = stepper(keras.optimizers.SGD(0.1), [fused, *apart])
    for arrays in random_gradients(2, (4, 10), (4, 3), (4, 3), (4, 3)):
        step([ops.convert_to_tensor(x) for x in arrays])
        assert parts_equal(registry)
        assert not np.array_equal(array(fused.value)[:, 3:6], array(apart[1].value))
    registry.untie()
    assert all(each.constraint is None and each.regularizer is None for each in (fused, *apart))


def test_parts_that_overlap_are_refused_and_change_nothing():
    registry, fused, _apart = fused_and_apart()
    other = variable(4, 2, seed=5)
    before = bits(fused), bits(other)
    with pytest.raises(GroupMismatchError, match=r"belongs to group 'v' already.*parts that do not overlap"):
        registry.tie("more", [other, (fused, columns(8, 2))], Equal())
    with pytest.raises(GroupMismatchError, match="given more than once"):
        equalize.GroupRegistry().tie("g", [(other, columns(0, 1)), (other, columns(0, 1))], Equal())
    with pytest.raises(GroupMismatchError, match="another group has a part of the variable"):
        registry.tie("more", [(other, columns(0, 1)), (fused, columns(9, 1))], Equal(inner="non_neg"))
    assert (bits(fused), bits(other)) == before
    registry.tie("more", [(other, columns(0, 1)), (fused, columns(9, 1))], Equal())
    assert registry["more"].spread() == 0.0


def test_regularizers_of_a_layer_count_once_for_each_part():
    """A member's own regularizer, on a variable of which two groups have parts: each part has half, the rest all."""
    fused = keras.layers.Dense(5, kernel_regularizer="l2", use_bias=False)
    apart = [keras.layers.Dense(2, kernel_regularizer="l2", use_bias=False) for _ in range(2)]
    for layer in (fused, *apart):
        layer.build((None, 4))
    registry = equalize.GroupRegistry()
    for name, place, layer in zip("ab", (0, 2), apart, strict=True):
        registry.tie(name, [layer.kernel, (fused.kernel, columns(place, 2))], Equal())
    variables = [layer.kernel for layer in (fused, *apart)]

    def loss():
        return sum(ops.cast(v.regularizer(v), "float32") for v in variables)

    found = [array(g) for g in gradients(loss, variables)]
    for part, own in zip(found, variables, strict=True):
        expected = 2 * 0.01 * array(own.value)
        expected[:, :4] *= 0.5  # one of two members
        np.testing.assert_allclose(part, expected, rtol=1e-5)


# ---- several parts of one variable in one group


def heads(rule, count=4, rows=6, size=2, extra=0):
    kernel = variable(rows, count * size + extra)
    registry = equalize.GroupRegistry()
    registry.tie("heads", [(kernel, columns(size * i, size, rows)) for i in range(count)], rule)
    return registry, kernel


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_heads_of_one_kernel_are_equal_after_every_step(optimizer, extra, mode):
    _registry, kernel = heads(Equal(), extra=extra)
    step = stepper(OPTIMIZERS[optimizer](), [kernel], mode)
    for (g,) in random_gradients(3, (6, 8 + extra)):
        before = array(kernel.value)
        step([ops.convert_to_tensor(g)])
        after = array(kernel.value)
        for i in range(1, 4):
            np.testing.assert_array_equal(after[:, :2], after[:, 2 * i : 2 * i + 2])
        if optimizer == "sgd":
            moved = before[:, :2] - 0.1 * g[:, :8].reshape(6, 4, 2).mean(1)
            np.testing.assert_allclose(after[:, :2], moved, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(after[:, 8:], before[:, 8:] - 0.1 * g[:, 8:], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exactly_tied_heads_have_the_numbers_of_one_head(optimizer, extra, mode):
    registry, kernel = heads(Equal(), extra=extra)
    start = array(kernel.value)
    shared = [keras.Variable(start[:, :2]), *([keras.Variable(start[:, 8:])] if extra else [])]
    step = stepper(TiedOptimizer(OPTIMIZERS[optimizer](), registry), [kernel], mode)
    reference = stepper(OPTIMIZERS[optimizer](), shared, mode)
    for (g,) in random_gradients(4, (6, 8 + extra)):
        step([ops.convert_to_tensor(g)])
        sums = g[:, :8].reshape(6, 4, 2).sum(1)
        reference([ops.convert_to_tensor(x) for x in (sums, *([g[:, 8:]] if extra else []))])
        after = array(kernel.value)
        for i in range(4):
            np.testing.assert_allclose(after[:, 2 * i : 2 * i + 2], array(shared[0].value), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(after[:, :2], after[:, 2 * i : 2 * i + 2])
        if extra:
            np.testing.assert_allclose(after[:, 8:], array(shared[1].value), rtol=1e-6)


def test_a_soft_tie_of_heads_pulls_each_to_their_mean():
    registry, kernel = heads(MeanL2(factor=0.5))
    parts = array(kernel.value).reshape(6, 4, 2)
    (found,) = gradients(lambda: kernel.regularizer(kernel), [kernel])
    expected = (parts - parts.mean(1, keepdims=True)).reshape(6, 8)
    np.testing.assert_allclose(array(found), expected, rtol=1e-5, atol=1e-6)
    penalty = 0.5 * ((parts - parts.mean(1, keepdims=True)) ** 2).sum()
    np.testing.assert_allclose(float(array(registry.penalty())), penalty, rtol=1e-5)
    np.testing.assert_allclose(float(array(kernel.regularizer(kernel))), penalty, rtol=1e-5)


def test_synchronizing_and_projecting_by_hand_reaches_every_part():
    for make in (lambda r, k: r.sync("mean", "heads"), lambda r, k: r.project("heads"), by_constraint):
        registry, kernel = heads(MeanL2(factor=0.5))
        registry.replace("heads", Equal())
        mean = array(kernel.value).reshape(6, 4, 2).mean(1)
        make(registry, kernel)
        assert registry["heads"].spread() == 0.0
        np.testing.assert_allclose(array(kernel.value)[:, 4:6], mean, rtol=1e-5, atol=1e-6)


def by_constraint(registry, kernel):
    kernel.assign(kernel.constraint(kernel))


def test_declared_parts_travel_with_the_config():
    """Rules inside of each other, one a part, as a layer of one's own declares them."""
    rule = Equal("heads", view=columns(0, 2), inner=Equal("heads", view=columns(2, 2), inner="non_neg"))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, kernel_constraint=rule)])
    copies = [keras.models.clone_model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
    unlinked = [make(model) for make in copies]
    equalize.GroupRegistry().link(model)
    for each in (model, *unlinked, *(make(model) for make in copies)):
        registry = equalize.GroupRegistry().link(each)
        (kernel, _) = each.trainable_variables
        step = stepper(keras.optimizers.SGD(0.1), [kernel], QUICK)
        for (g,) in random_gradients(2, (4, 6)):
            step([ops.convert_to_tensor(g)])
            assert registry["heads"].spread() == 0.0
            assert len(registry["heads"].members) == 2
            assert (array(kernel.value)[:, :4] >= 0.0).all()


def test_parts_are_saved_loaded_and_trained_on(tmp_path):
    layers = [keras.layers.Dense(8, activation="tanh", name="fused"), keras.layers.Dense(8, name="out")]
    model = keras.Sequential([keras.Input((8,)), *layers])
    registry = equalize.GroupRegistry()
    left, right = (Slice((0, place), (8, 4)) for place in (0, 4))
    registry.tie("a", [(layer.kernel, left) for layer in layers], Equal())
    registry.tie(
        "b", [(layers[0].kernel, Chain(Transpose(), right)), (layers[1].kernel, Chain(Transpose(), right))], Equal()
    )
    model.compile(TiedOptimizer(keras.optimizers.Adam(0.01), registry), "mse")
    x, y = (np.random.default_rng(seed).normal(size=(16, 8)).astype("float32") for seed in (0, 1))
    model.fit(x, y, batch_size=8, verbose=0)
    save_model(model, tmp_path / "parts.keras", registry)
    loaded, again = load_model(tmp_path / "parts.keras")
    assert sorted(again) == ["a", "b"]
    assert bitwise_equal(*[m.get_layer("fused").kernel for m in (model, loaded)])
    for each, ties in ((model, registry), (loaded, again)):
        each.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        assert parts_equal(ties)
    np.testing.assert_allclose(array(model.get_layer("out").kernel), array(loaded.get_layer("out").kernel), rtol=1e-5)


def test_weights_are_counted_by_parts():
    registry, _kernel = heads(Equal(), extra=3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    layer = model.layers[0]
    equal = equalize.GroupRegistry()
    circulant = (np.arange(4) - np.arange(4)[:, None]) % 4
    equal.tie("conv", [(layer.kernel, Pattern(circulant, (4,)))], Equal())
    assert equal.count_params(model) == (20, 4 + 4)
    lines = []
    registry.summary(lines.append)
    assert "30 free" in "".join(lines).replace("weights ", "")


# ---- entries that repeat


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_pattern_holds_after_every_step(optimizer, mode):
    indices = np.random.default_rng(3).integers(0, 5, size=(6, 7))
    indices.reshape(-1)[:5] = np.arange(5)
    kernel, other = variable(6, 7), variable(5, seed=1)
    registry = equalize.GroupRegistry()
    registry.tie("hashed", [(kernel, Pattern(indices, (5,))), (other, Scale(-2.0))], Equal())
    step = stepper(OPTIMIZERS[optimizer](), [kernel, other], mode)
    for g, h in random_gradients(3, (6, 7), (5,)):
        before = array(kernel.value), array(other.value)
        step([ops.convert_to_tensor(g), ops.convert_to_tensor(h)])
        common = -array(other.value) / 2
        np.testing.assert_array_equal(array(kernel.value), common[indices])
        if optimizer == "sgd":
            sums = np.bincount(indices.reshape(-1), (before[0] - 0.1 * g).reshape(-1), 5)
            counts = np.bincount(indices.reshape(-1))
            expected = (sums - 2 * (before[1] - 0.1 * h)) / (counts + 4)
            np.testing.assert_allclose(common, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_exact_pattern_has_the_numbers_of_the_few_weights_that_it_shows(optimizer, mode):
    indices = (np.arange(6) - np.arange(6)[:, None]) % 6
    kernel = variable(6, 6)
    registry = equalize.GroupRegistry()
    registry.tie("conv", [(kernel, Pattern(indices, (6,)))], Equal())
    shared = keras.Variable(array(kernel.value)[0])
    step = stepper(TiedOptimizer(OPTIMIZERS[optimizer](), registry), [kernel], mode)
    reference = stepper(OPTIMIZERS[optimizer](), [shared], mode)
    for (g,) in random_gradients(4, (6, 6)):
        step([ops.convert_to_tensor(g)])
        reference([ops.convert_to_tensor(np.bincount(indices.reshape(-1), g.reshape(-1)).astype("float32"))])
        np.testing.assert_allclose(array(kernel.value)[0], array(shared.value), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(array(kernel.value), array(kernel.value)[0][indices])


def test_a_dense_layer_that_is_a_circular_convolution_trains_as_conv1d():
    n, x = 6, np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
    y = np.random.default_rng(1).normal(size=(32, 6)).astype("float32")
    dense = keras.layers.Dense(n, use_bias=False)
    circular = keras.Sequential([keras.Input((n,)), dense])
    conv = keras.layers.Conv1D(1, 3, use_bias=False)
    entrance = keras.Input((n,))
    padded = ops.concatenate([entrance[:, -1:], entrance, entrance[:, :1]], axis=1)
    expected = keras.Model(entrance, ops.squeeze(conv(ops.expand_dims(padded, -1)), -1))
    # Output j reads the inputs j − 1, j and j + 1, and no other: their weights are 0, and stay so.
    offset = (np.arange(n)[:, None] - np.arange(n) + 1) % n
    registry = equalize.GroupRegistry()
    dense.kernel.assign(np.append(array(conv.kernel).reshape(-1), np.zeros(n - 3))[offset])
    registry.tie("conv", [(dense.kernel, Pattern(offset, (n,)))], Equal(inner=OnlyThree()))
    circular.compile(TiedOptimizer(keras.optimizers.SGD(0.05), registry), "mse")
    expected.compile(keras.optimizers.SGD(0.05), "mse")
    for model in (circular, expected):
        model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    np.testing.assert_allclose(array(registry["conv"].value)[:3], array(conv.kernel).reshape(-1), rtol=1e-4, atol=1e-6)
    assert (array(registry["conv"].value)[3:] == 0.0).all()
    np.testing.assert_allclose(circular.predict(x, verbose=0), expected.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


@keras.saving.register_keras_serializable(package="tests")
class OnlyThree(keras.constraints.Constraint):
    def __call__(self, w):
        return w * ops.convert_to_tensor([1.0] * 3 + [0.0] * (w.shape[0] - 3), w.dtype)


def test_one_member_alone_is_tied_only_by_a_pattern():
    kernel = variable(4, 4)
    with pytest.raises(GroupMismatchError, match="has one member"):
        equalize.GroupRegistry().tie("g", [(kernel, Transpose())], Equal())
    repeated, registry = (kernel, Pattern(np.zeros((4, 4), int), (1,))), equalize.GroupRegistry()
    for rule in (MeanL2(), Equal(rate=0.5), Follow(), Follow(rate=0.5)):
        with pytest.raises(GroupMismatchError, match="repeats entries"):
            registry.tie("g", [repeated], rule)
    registry.tie("g", [repeated], None)
    assert registry["g"].spread() > 0.0
    registry.replace("g", Equal())
    registry.project("g")
    assert registry["g"].spread() == 0.0


def test_a_declared_pattern_is_saved_and_loaded(tmp_path):
    x, _ = data(inputs=4)
    view = Pattern((np.arange(4) - np.arange(4)[:, None]) % 4, (4,))
    layer = keras.layers.Dense(4, kernel_constraint=Equal("circulant", view=view))
    model = keras.Sequential([keras.Input((4,)), layer])
    registry = equalize.GroupRegistry().link(model)
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    assert registry["circulant"].spread() == 0.0
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = equalize.GroupRegistry().link(loaded)
    assert bitwise_equal(layer.kernel, loaded.layers[0].kernel)
    loaded.fit(x, x, verbose=0)
    assert again["circulant"].spread() == 0.0


def test_a_registry_with_a_pattern_alone_survives_its_config():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    registry = equalize.GroupRegistry()
    view = Pattern((np.arange(4) - np.arange(4)[:, None]) % 4, (4,))
    registry.tie("circulant", [(model.layers[0].kernel, view)], Equal())
    clone = keras.models.clone_model(model)
    again = equalize.GroupRegistry.from_config(registry.get_config()).link(clone)
    assert again["circulant"].members[0].view == view
    assert again["circulant"].spread() == 0.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Pattern([0, 1], (3,)), "every entry"),
        (lambda: Pattern([0, 3], (3,)), "from 0 to 2"),
        (lambda: Pattern([], (1,)), "not be empty"),
        (lambda: Chain(Slice((0,), (2,)), Pattern([0, 1, 0], (2,))), "what a `Slice` leaves free"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(make, match):
    with pytest.raises(EqualizeError, match=match):
        make()


def test_a_step_of_parts_has_no_scatter():
    """The sum over entries that repeat is taken in one order: by gathers alone, which no backend orders anew."""
    jax = pytest.importorskip("jax")
    if BACKEND != "jax":
        pytest.skip("programs are read on JAX")
    view = Pattern(np.arange(12).reshape(3, 4) % 5, (5,))
    for function in (view.least_squares, view.adjoint, view.forward):
        shape = (5,) if function == view.forward else (3, 4)
        program = jax.jit(function).lower(np.zeros(shape, "float32")).as_text()
        assert "scatter" not in program


def attention_of_one_key_head():
    attention = keras.layers.MultiHeadAttention(num_heads=4, key_dim=2, name="attention")
    inputs = keras.Input((3, 8))
    return keras.Model(inputs, attention(inputs, inputs)), attention


def test_grouped_query_attention_is_saved_loaded_and_trained_on(tmp_path):
    """Two key heads and two value heads for four query heads."""
    model, attention = attention_of_one_key_head()
    registry = equalize.GroupRegistry()
    for name in ("key", "value"):
        kernel = getattr(attention, f"{name}_dense").kernel
        for half in (0, 1):
            heads = [(kernel, Slice((0, head, 0), (8, 1, 2))) for head in (2 * half, 2 * half + 1)]
            registry.tie(f"{name} {half}", heads, Equal())
    x = np.random.default_rng(0).normal(size=(16, 3, 8)).astype("float32")
    model.compile(TiedOptimizer("adam", registry), "mse")
    model.fit(x, x, batch_size=8, verbose=0)
    advice = registry.advise(model, x, x, print_fn=lambda text: None)
    assert all(each.cosine == each.cosine for each in advice.values())
    save_model(model, tmp_path / "model.keras", registry)
    loaded, again = load_model(tmp_path / "model.keras")
    loaded.fit(x, x, batch_size=8, verbose=0)
    for ties, layer in ((registry, attention), (again, loaded.get_layer("attention"))):
        assert parts_equal(ties)
        for kernel in (layer.key_dense.kernel, layer.value_dense.kernel):
            value = array(kernel.value)
            np.testing.assert_array_equal(value[:, 0], value[:, 1])
            np.testing.assert_array_equal(value[:, 2], value[:, 3])
            assert (value[:, 1] != value[:, 2]).all()


def _train_parts_of_a_sharded_kernel():
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout["fused/kernel"] = (None, "model")
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout))
    fused, apart = keras.layers.Dense(8, name="fused"), [keras.layers.Dense(4, name=f"apart_{i}") for i in range(2)]
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Concatenate()([layer(inputs) for layer in (fused, *apart)]))
    registry = equalize.GroupRegistry()
    for i, layer in enumerate(apart):
        registry.tie(f"part {i}", [layer.kernel, (fused.kernel, Slice((0, 4 * i), (4, 4)))], Equal())
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    y = np.random.default_rng(1).normal(size=(8, 16)).astype("float32")
    for optimizer in ("adam", TiedOptimizer("adam", registry)):
        model.compile(optimizer, "mse")
        for _ in range(3):
            model.train_on_batch(x, y)
            assert set(registry.spread().values()) == {0.0}
            whole = np.concatenate([array(layer.kernel.value) for layer in apart], axis=1)
            np.testing.assert_array_equal(array(fused.kernel.value), whole)


@pytest.mark.skipif(BACKEND != "jax", reason="sharded variables are JAX's")
def test_parts_of_a_sharded_kernel():
    flags = "--xla_force_host_platform_device_count=2"
    assert in_new_processes(_train_parts_of_a_sharded_kernel, [()], XLA_FLAGS=flags) == [0]
