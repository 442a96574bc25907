"""One variable in several layers, by `share`, and what `relation` says of variables, layers and models."""

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize import relation, share
from equalize.constraints import Equal
from equalize.errors import GroupMismatchError, NotLinkedError
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
