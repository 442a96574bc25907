"""One variable in several layers, by `share`, and what `relation` says of variables, layers and models."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize import relation, share
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError, NotLinkedError, TieBrokenError
from equalize.regularizers import MeanL2
from tests.conftest import BACKEND, MODES, QUICK, bits, data, fit, kernels, towers


def built(layer, *shape):
    layer.build((None, *shape))
    return layer


def two_layers(make, *shape):
    """A model of two layers of one kind, side by side."""
    entrance = keras.Input(shape)
    layers = [make(), make()]
    outputs = [keras.layers.Flatten()(layer(entrance)) for layer in layers]
    return keras.Model(entrance, keras.layers.Dense(1, name="head")(keras.layers.Concatenate()(outputs))), layers


# ---- share


def test_two_kernels_become_one_variable_that_the_optimizer_sees_once():
    model = towers(2)
    left, right = (model.get_layer(f"tower_{i}") for i in range(2))
    value = bits(left.kernel)
    before = len(model.trainable_variables)
    assert share(left.kernel, right.kernel) is left.kernel
    assert left.kernel is right.kernel
    assert left.bias is not right.bias
    assert bits(right.kernel) == value
    assert len(model.trainable_variables) == before - 1
    fit(model, optimizer="adam")
    assert left.kernel is right.kernel
    assert bits(left.kernel) != value
    assert len(model.optimizer.variables) == 2 + 2 * (before - 1)


@pytest.mark.slow
def test_the_run_is_that_of_one_layer_used_twice():
    results = []
    for way in ("one layer", "share"):
        keras.utils.set_random_seed(1)
        entrance = keras.Input((5,))
        first = keras.layers.Dense(5, activation="tanh", name="first", kernel_regularizer="l2")
        second = keras.layers.Dense(5, activation="tanh", name="second", kernel_regularizer="l2")
        head = keras.layers.Dense(1, name="head")
        again = first if way == "one layer" else second
        model = keras.Model(entrance, head(again(first(entrance))))
        random = np.random.default_rng(0)
        for layer in (first, head):
            layer.kernel.assign(random.normal(size=tuple(layer.kernel.shape)))
        if way == "share":
            share(first, second)
        fit(model, **MODES[QUICK])
        results.append([bits(variable) for variable in model.trainable_variables])
    assert results[0] == results[1]


LAYERS = {
    "dense": (lambda: keras.layers.Dense(3), (5,), 2),
    "conv": (lambda: keras.layers.Conv2D(2, 3), (5, 5, 1), 2),
    "lstm": (lambda: keras.layers.LSTM(2), (3, 2), 3),
    "embedding": (lambda: keras.layers.Embedding(6, 3), (4,), 1),
    "attention": (lambda: keras.layers.Bidirectional(keras.layers.GRU(2)), (3, 4), 6),
    "normalization": (lambda: keras.layers.BatchNormalization(), (4,), 2),
    "block": (lambda: keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)]), (5,), 4),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_share_weight_by_weight_and_keep_their_order_in_files(kind, tmp_path):
    make, shape, count = LAYERS[kind]
    model, layers = two_layers(make, *shape)
    shapes = [tuple(weight.shape) for weight in layers[1].weights]
    plain, _ = two_layers(make, *shape)
    variables = share(*layers)
    assert len(variables) == count
    kept = set(map(id, variables))
    assert all(id(weight) in kept for layer in layers for weight in layer.trainable_variables)
    assert [tuple(weight.shape) for weight in layers[1].weights] == shapes
    random = np.random.default_rng(0)
    x = random.integers(0, 6, (16, *shape)).astype("float32")
    # A step is enough, and TensorFlow would take seconds to trace a recurrence.
    run_eagerly = BACKEND == "tensorflow"
    fit(model, x=x, y=random.normal(size=(16, 1)), epochs=1, batch_size=16, run_eagerly=run_eagerly)
    model.save_weights(tmp_path / "model.weights.h5")
    plain.load_weights(tmp_path / "model.weights.h5", skip_mismatch=False)
    assert [bits(weight) for weight in plain.weights[: len(shapes)]] == [bits(w) for w in layers[0].weights]
    apart = {place for place, how in relation(*layers).items() if how != "same"}
    assert len(apart) == len(shapes) - count  # the moving statistics


@pytest.mark.parametrize("kind", ["dense", "lstm", "block"])
def test_frozen_layers_share_and_keep_their_order(kind):
    make, shape, count = LAYERS[kind]
    model, layers = two_layers(make, *shape)
    for layer in layers:
        layer.trainable = False
    before = [weight.name for weight in layers[1].weights]
    shapes = [tuple(weight.shape) for weight in layers[1].weights]
    variables = share(*layers)
    assert len(variables) == count
    assert [weight.name for weight in layers[1].weights] == before
    assert [tuple(weight.shape) for weight in layers[1].weights] == shapes
    assert set(relation(*layers).values()) == {"same"}
    assert not any(variable.trainable for variable in variables)
    for layer in layers:
        layer.trainable = True
    assert len(model.trainable_variables) == count + 2


def test_a_saved_model_has_the_values_and_shares_again_after_loading(tmp_path):
    model = towers(2)
    share(*kernels(model))
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert relation(*kernels(loaded)) == "equal"
    assert [bits(kernel) for kernel in kernels(loaded)] == [bits(kernel) for kernel in kernels(model)]
    share(*kernels(loaded))
    assert relation(*kernels(loaded)) == "same"
    assert relation(*kernels(keras.models.clone_model(model))) == "different"
    for each in (model, loaded):
        keras.utils.set_random_seed(1)
        fit(each)
    assert {bits(kernel) for kernel in kernels(model)} == {bits(kernel) for kernel in kernels(loaded)}


def test_a_variable_of_nobody_can_be_put_into_layers():
    weight = keras.Variable(np.full((5, 3), 0.5, "float32"), name="weight")
    first, second = built(keras.layers.Dense(3), 5), built(keras.layers.Dense(3), 5)
    share(weight, first.kernel, second.kernel)
    assert first.kernel is second.kernel is weight
    assert first.weights[0] is weight
    assert first.bias is not second.bias


class Pieces(keras.layers.Layer):
    """Holds weights in a list, a dictionary and a tuple."""

    def build(self, shape):
        self.listed = [self.add_weight(shape=(2,), name="listed", initializer="zeros")]
        self.named = {"a": self.add_weight(shape=(3,), name="named", initializer="zeros")}
        self.fixed = (self.add_weight(shape=(4,), name="fixed", initializer="zeros"),)
        self.built = True


def test_weights_in_lists_dictionaries_and_tuples_are_found():
    one, two = built(Pieces(), 1), built(Pieces(), 1)
    share(one, two)
    assert two.listed[0] is one.listed[0]
    assert two.named["a"] is one.named["a"]
    assert two.fixed[0] is one.fixed[0]
    assert [variable.name for variable in two.trainable_variables] == ["listed", "named", "fixed"]


def test_what_was_replaced_is_gone():
    layers = [keras.layers.Dense(2) for _ in range(3)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    replaced = [weakref.ref(weight) for layer in layers[1:] for weight in layer.weights]
    share(*layers)
    gc.collect()
    assert [weight() for weight in replaced] == [None] * 4
    assert len(model.weights) == 2


def test_sharing_after_training_is_seen_by_the_next_step():
    model = towers(2)
    fit(model)
    left, right = (model.get_layer(f"tower_{i}") for i in range(2))
    stale = right.kernel
    share(left.kernel, right.kernel)
    before = bits(left.kernel), bits(stale)
    if BACKEND == "jax":  # where an optimizer refuses another number of variables than it was built for
        model.compile("adam", "mse")
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)  # of the shape that was traced
    assert bits(left.kernel) != before[0]
    assert bits(stale) == before[1]


@pytest.mark.skipif(BACKEND != "torch", reason="only PyTorch lists parameters")
def test_torch_lists_the_shared_parameter_once():
    model = towers(2)
    stale = kernels(model)[1].value
    before = len(list(model.parameters()))
    share(*kernels(model))
    assert len(list(model.parameters())) == before - 1
    assert not any(parameter is stale for parameter in model.parameters())


def test_a_frozen_layer_and_a_trained_one_share_nothing():
    model = towers(2, frozen=(1,))
    with pytest.raises(GroupMismatchError, match=r"'tower_0/kernel'.*expected trainable True, received False"):
        share(*kernels(model))


@pytest.mark.parametrize(
    ("one", "two", "what"),
    [
        ({"units": 3}, {"units": 4}, r"shape \(5, 3\), received \(5, 4\)"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "dtype float32, received bfloat16"),
        ({}, {"kernel_constraint": "non_neg"}, "constraint none, received"),
        ({"kernel_regularizer": "l2"}, {}, "regularizer .*L2.* received none"),
    ],
)
def test_variables_that_do_not_fit_are_refused_and_nothing_changes(one, two, what):
    first, second = (built(keras.layers.Dense(**({"units": 3} | each)), 5) for each in (one, two))
    third = built(keras.layers.Dense(**({"units": 3} | one)), 5)
    before = third.kernel
    with pytest.raises(GroupMismatchError, match=f"(?s)Cannot share .*expected {what}"):
        share(first.kernel, third.kernel, second.kernel)
    assert third.kernel is before


def test_tied_variables_are_refused():
    model = towers(2, constraint=lambda: Equal("towers"))
    with pytest.raises(GroupMismatchError, match=r"it has the rule Equal\(\) of group 'towers'.*untie"):
        share(*kernels(model))
    model = towers(2, regularizer=lambda: MeanL2("towers", 0.1))
    equalize.GroupRegistry().link(model)
    with pytest.raises(GroupMismatchError, match="rule MeanL2"):
        share(*kernels(model))


def test_two_weights_of_one_layer_are_refused():
    layer = built(keras.layers.LSTM(3), 4, 3)
    with pytest.raises(GroupMismatchError, match="two of one, which Keras saves and loads by their number"):
        share(layer.cell.kernel, layer.cell.recurrent_kernel)


def test_a_variable_that_no_layer_owns_can_only_come_first():
    layer = built(keras.layers.Dense(3), 5)
    with pytest.raises(GroupMismatchError, match="no layer owns 'free'"):
        share(layer.kernel, keras.Variable(np.zeros((5, 3), "float32"), name="free"))


@pytest.mark.parametrize("given", [[], [keras.layers.Dense(1)]])
def test_one_is_not_enough(given):
    with pytest.raises(GroupMismatchError, match="needs at least two"):
        share(*given)


def test_other_things_and_mixtures_are_refused():
    layer = built(keras.layers.Dense(3), 5)
    for given in ([layer, layer.kernel], [layer.kernel, np.zeros((5, 3))], ["kernel", "kernel"]):
        with pytest.raises(TypeError, match=r"expects `keras.Variable`s .*, or layers, and not both"):
            share(*given)
    with pytest.raises(NotLinkedError, match=r"Cannot share the weights of layers: layer .* has no weights"):
        share(layer, keras.layers.Dense(3))
    with pytest.raises(GroupMismatchError, match="structures differ"):
        share(layer, built(keras.layers.Dense(3, use_bias=False), 5))


# ---- relation


def test_relation_of_variables():
    one, two = (keras.Variable(np.float32([0.0, np.nan]), name=name) for name in ("one", "two"))
    assert relation(one, one) == "same"
    assert relation(one, two) == "equal"
    two.assign(np.float32([-0.0, np.nan]))
    assert bool(ops.convert_to_numpy(one == two)[0])  # equal numbers, other bits
    assert relation(one, two) == "different"
    assert relation(one, keras.Variable(np.float32([[0.0, np.nan]]))) == "different"
    assert relation(one, keras.Variable(np.float32([0.0, np.nan]), dtype="bfloat16")) == "different"


def test_relation_of_layers_and_models_is_told_weight_by_weight():
    model = towers(2)
    left, right = (model.get_layer(f"tower_{i}") for i in range(2))
    assert relation(left, right) == {"kernel": "different", "bias": "equal"}
    equalize.GroupRegistry().tie("towers", [left.kernel, right.kernel], Equal())
    assert relation(left, right) == {"kernel": "equal", "bias": "equal"}
    assert set(relation(model, model).values()) == {"same"}
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert set(relation(model, clone).values()) == {"equal"}
    assert list(relation(model, clone))[:2] == ["tower/kernel", "tower/bias"]


def test_relation_refuses_other_things():
    layer = built(keras.layers.Dense(3), 5)
    for pair in ((layer, layer.kernel), (layer.kernel, np.zeros((5, 3))), (1, 1)):
        with pytest.raises(TypeError, match=r"expects two `keras.Variable`s, or two layers"):
            relation(*pair)
    with pytest.raises(GroupMismatchError, match="Cannot compare layers: their structures differ"):
        relation(layer, built(keras.layers.Dense(3, use_bias=False), 5))


# ---- a registry's hard groups as shared variables


def tied_layers(count=3, *, statistics=False):
    def block(i):
        norms = [keras.layers.BatchNormalization()] if statistics else []
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(6, name="dense"), *norms], name=f"block_{i}")

    blocks = [block(i) for i in range(count)]
    model = keras.Sequential([keras.Input((6,)), *blocks])
    registry = equalize.GroupRegistry()
    registry.tie("blocks", blocks, Equal(), statistics=statistics)
    return model, registry, blocks


@pytest.mark.parametrize("statistics", [False, True])
def test_a_registry_shares_its_hard_groups_and_the_model_computes_what_it_did(statistics):
    model, registry, blocks = tied_layers(statistics=statistics)
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    model.fit(x, x, verbose=0)
    before, names = model.predict(x, verbose=0), list(registry)
    kept = registry.share("blocks")
    assert len(kept) == len(names) == (6 if statistics else 2)
    assert list(registry) == []
    assert set(equalize.relation(blocks[0], blocks[2]).values()) == {"same"}
    assert model.count_params() == blocks[0].count_params()
    assert np.array_equal(model.predict(x, verbose=0), before)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    assert set(equalize.relation(blocks[0], blocks[1]).values()) == {"same"}
    if not statistics:
        assert not any(variable.constraint for variable in model.trainable_variables)


def test_rules_that_layers_declare_and_what_is_inside_end_or_stay():
    def layer():
        return keras.layers.Dense(6, kernel_constraint=Equal("k", inner="non_neg"), kernel_regularizer="l2")

    layers = [layer(), layer()]
    model = keras.Sequential([keras.Input((6,)), *layers])
    registry = equalize.GroupRegistry().link(model)
    registry.share()
    assert layers[0].kernel is layers[1].kernel
    assert isinstance(layers[0].kernel.constraint, keras.constraints.NonNeg)
    assert isinstance(layers[0].kernel.regularizer, keras.regularizers.L2)
    assert len(model.losses) == 1
    assert "equalize" not in model.to_json()


def test_groups_that_cannot_be_shared_are_refused_and_nothing_changes():
    model, registry, blocks = tied_layers()
    kernels = [block.layers[0].kernel for block in blocks]
    one, other, third = (keras.layers.Dense(6, name=name) for name in ("one", "other", "third"))
    beside = keras.Sequential([keras.Input((6,)), one, other, third])
    registry.tie("soft", [one.kernel, other.kernel], MeanL2(factor=0.1))
    registry.tie("turned", [one.kernel, (third.kernel, equalize.views.Transpose())], Equal())
    registry.tie("held", [one.bias, np.zeros(6, "float32")], Equal())
    names = list(registry)
    for name, error, message in (
        ("soft", GroupMismatchError, "does not keep its members equal"),
        ("turned", GroupMismatchError, "does not show the common value as a variable of its own"),
        ("held", GroupMismatchError, "no constants"),
        ("nowhere", EqualizeError, "There is no group"),
    ):
        with pytest.raises(error, match=message):
            registry.share("blocks", name)
    kernels[1].assign(np.ones((6, 6), "float32"))
    with pytest.raises(TieBrokenError, match="are not equal"):
        registry.share("blocks")
    registry.sync()
    registry.tie("pulled", kernels[:2], MeanL2(factor=0.1))
    with pytest.raises(GroupMismatchError, match="it has the rule MeanL2"):
        registry.share("blocks")
    assert list(registry) == [*names, "pulled"]
    assert len({id(kernel) for kernel in kernels}) == 3
    assert registry["blocks/dense/kernel"].hard
    assert (model.built, beside.built) == (True, True)


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="what TensorFlow exports")
def test_what_is_exported_holds_shared_weights_once(tmp_path):
    width = 256

    def saved(name, layers):
        x = entrance = keras.Input((width,))
        for layer in layers:
            x = layer(x)
        model, registry = keras.Model(entrance, x), equalize.GroupRegistry()
        if len(set(layers)) > 1:
            registry.tie("layers", layers, Equal())
        if name == "shared":
            registry.share()
        model.export(tmp_path / name, verbose=False)
        return size_of(tmp_path / name)

    one = keras.layers.Dense(width, name="one")
    sizes = {name: saved(name, [keras.layers.Dense(width) for _ in range(6)]) for name in ("tied", "shared")}
    sizes["one"] = saved("one", [one] * 6)
    assert sizes["shared"] <= 1.02 * sizes["one"]
    assert sizes["tied"] > 3 * sizes["one"]
