import keras
import numpy as np
import pytest

import equalize
from equalize.constraints import Equal
from equalize.errors import GroupMismatchError, NotLinkedError
from equalize.regularizers import MeanL2
from tests.conftest import bitwise_equal, fit


def built(layer, *shapes):
    layer(*(np.zeros(shape, "float32") for shape in shapes))
    return layer


SEQUENCE = (1, 3, 4)

BLOCKS = {
    "Dense": (lambda: built(keras.layers.Dense(3), (1, 4)), {"kernel", "bias"}),
    "BatchNormalization": (lambda: built(keras.layers.BatchNormalization(), (1, 4)), {"gamma", "beta"}),
    "LSTM": (lambda: built(keras.layers.LSTM(2), SEQUENCE), {"lstm_cell/kernel", "lstm_cell/recurrent_kernel"}),
    "Bidirectional": (
        lambda: built(keras.layers.Bidirectional(keras.layers.LSTM(2)), SEQUENCE),
        {"forward_lstm/lstm_cell/kernel", "backward_lstm/lstm_cell/kernel"},
    ),
    "TimeDistributed": (lambda: built(keras.layers.TimeDistributed(keras.layers.Dense(2)), SEQUENCE), {"dense/kernel"}),
    "MultiHeadAttention": (
        lambda: built(keras.layers.MultiHeadAttention(2, 2), SEQUENCE, SEQUENCE),
        {"query/kernel", "key/kernel", "value/kernel", "attention_output/kernel"},
    ),
    "Sequential": (
        lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(3)]),
        {"dense/kernel", "dense_1/kernel"},
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.sampled
def test_layers_pair_their_weights_by_their_place(kind):
    make, places = BLOCKS[kind]
    layers = [make() for _ in range(3)]
    registry = equalize.GroupRegistry()
    groups = registry.tie("blocks", layers, Equal(), statistics=True)
    assert isinstance(groups, list)
    assert {f"blocks/{place}" for place in places} <= set(registry)
    assert len(groups) == len(layers[0].weights) == len(registry)
    for group in groups:
        assert len(group.members) == 3
    for weights in zip(*(layer.weights for layer in layers), strict=True):
        assert bitwise_equal(*weights)
    registry.untie("blocks")
    assert not registry


def test_pairing_of_models_with_swapped_widths_is_refused():
    models = [
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(a), keras.layers.Dense(b)]) for a, b in ((4, 2), (2, 4))
    ]
    with pytest.raises(GroupMismatchError, match=r"expected shape \(4, 4\).*received \(4, 2\)"):
        equalize.GroupRegistry().tie("models", models, Equal())


def test_structures_that_differ_are_shown_both():
    with_bias = built(keras.layers.Dense(3, name="with_bias"), (1, 4))
    without = built(keras.layers.Dense(3, use_bias=False, name="without"), (1, 4))
    with pytest.raises(GroupMismatchError) as caught:
        equalize.GroupRegistry().tie("g", [with_bias, without], Equal())
    message = str(caught.value)
    assert "structures differ" in message
    assert "'with_bias' (Dense):\n    kernel (4, 3)\n    bias (3,)" in message
    assert "'without' (Dense):\n    kernel (4, 3)\n" in message


class Affine(keras.layers.Layer):
    names = ("scale", "offset")

    def build(self, shape):
        self.first, self.second = (self.add_weight(shape=(shape[-1],), name=name) for name in self.names)


class Likewise(keras.layers.Layer):
    names, build = Affine.names, Affine.build


class Otherwise(keras.layers.Layer):
    names, build = ("offset", "scale"), Affine.build


def test_layers_of_another_class_pair_where_their_weights_have_the_same_names():
    affine, likewise, otherwise = Affine(), Likewise(), Otherwise()
    for layer in (affine, likewise, otherwise):
        layer.build((None, 3))
    registry = equalize.GroupRegistry()
    registry.tie("alike", [affine, likewise], Equal())
    assert set(registry) == {"alike/scale", "alike/offset"}
    with pytest.raises(GroupMismatchError, match="structures differ"):
        registry.tie("others", [affine, otherwise], MeanL2())


def test_a_later_weight_that_does_not_fit_leaves_all_untied():
    one = built(keras.layers.Dense(3, bias_constraint=keras.constraints.NonNeg()), (1, 4))
    two = built(keras.layers.Dense(3), (1, 4))
    registry = equalize.GroupRegistry()
    with pytest.raises(GroupMismatchError, match="constraint"):
        registry.tie("g", [one, two], Equal())
    assert not registry
    assert one.kernel.constraint is None
    assert not bitwise_equal(one.kernel, two.kernel)


def test_unbuilt_layers_and_layers_without_weights():
    with pytest.raises(NotLinkedError, match="has no weights, since it is not built"):
        equalize.GroupRegistry().tie("g", [keras.layers.Dense(2), keras.layers.Dense(2)], Equal())
    with pytest.raises(NotLinkedError, match="has no weights"):
        equalize.GroupRegistry().tie("g", [built(keras.layers.Flatten(), (1, 2)) for _ in range(2)], Equal())


def test_a_frozen_block_is_an_anchor():
    entrance = keras.Input((4,))
    teacher, student = keras.layers.Dense(4), keras.layers.Dense(4)
    model = keras.Model(entrance, student(teacher(entrance)))
    teacher.trainable = False
    kept = keras.ops.convert_to_numpy(teacher.kernel.value).copy()
    registry = equalize.GroupRegistry()
    registry.tie("pair", [student, teacher], Equal())
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    fit(model, registry, x=x, y=x)
    assert np.array_equal(keras.ops.convert_to_numpy(teacher.kernel.value), kept)
    assert bitwise_equal(teacher.kernel, student.kernel)


@pytest.mark.slow
def test_tied_transformer_blocks_stay_equal_in_training():
    class Block(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.attention = keras.layers.MultiHeadAttention(2, 2)
            self.norm = keras.layers.LayerNormalization()
            self.feed = keras.layers.Dense(4, activation="gelu")

        def build(self, shape):
            self.attention.build(shape, shape)
            self.norm.build(shape)
            self.feed.build(shape)

        def call(self, x):
            return x + self.feed(self.norm(x + self.attention(x, x)))

    entrance = keras.Input((3, 4))
    blocks = [Block(name=name) for name in ("first", "second", "third")]
    y = entrance
    for block in blocks:
        y = block(y)
    model = keras.Model(entrance, y)
    registry = equalize.GroupRegistry()
    groups = registry.tie("blocks", blocks, Equal())
    assert len(groups) == 12
    x = np.random.default_rng(0).normal(size=(16, 3, 4)).astype("float32")
    before = keras.ops.convert_to_numpy(blocks[0].feed.kernel.value).copy()
    fit(model, registry, x=x, y=x[::-1].copy())
    assert not np.array_equal(keras.ops.convert_to_numpy(blocks[0].feed.kernel.value), before)


def test_layers_that_hold_each_others_weights_crosswise_are_refused_and_left_alone():
    left, right = (built(keras.layers.Dense(3, name="half"), (1, 4)) for _ in range(2))

    class Pair(keras.layers.Layer):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = first, second
            self.built = True

    registry = equalize.GroupRegistry()
    with pytest.raises(GroupMismatchError, match="one group that projects an entry"):
        registry.tie("pairs", [Pair(left, right), Pair(right, left)], Equal())
    assert len(registry) == 0
    assert left.kernel.constraint is right.kernel.constraint is None
    assert not bitwise_equal(left.kernel, right.kernel)
