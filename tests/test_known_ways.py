"""The ways of sharing that people know, each as plain Keras, by `share`, by `Equal` and by `TiedOptimizer`.

The same data and the same start for all four; numbers are compared bit for bit after every step.
"""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from tests.conftest import MODES, QUICK, Recorder, compile_quickly


class Injected(keras.layers.Layer):
    """A dense layer with a weight that somebody else made, and a bias of its own."""

    def __init__(self, weight, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight

    def build(self, shape):
        self.bias = self.add_weight(shape=(self.weight.shape[-1],), initializer="zeros", name="bias")

    def call(self, x):
        return ops.tanh(x @ self.weight + self.bias)


class Dilated(keras.layers.Layer):
    """A convolution over a kernel that somebody else made."""

    def __init__(self, kernel, dilation, **kwargs):
        super().__init__(**kwargs)
        self.kernel, self.dilation = kernel, dilation

    def call(self, x):
        return ops.conv(x, self.kernel, padding="same", dilation_rate=self.dilation)


def layer_used_twice(way):
    """One layer called on two inputs, against two layers."""
    entrances = [keras.Input((5,)), keras.Input((5,))]
    layers = [keras.layers.Dense(3, activation="tanh", use_bias=False) for _ in range(1 if way == "plain" else 2)]
    layers = layers * 2 if way == "plain" else layers
    return entrances, layers, [layer(entrance) for layer, entrance in zip(layers, entrances, strict=True)]


def convolutions_over_one_kernel(way):
    """Two dilations of one kernel."""
    entrance = keras.Input((6, 6, 1))
    if way == "plain":
        kernel = keras.Variable(np.zeros((3, 3, 1, 2), "float32"), name="kernel")
        layers = [Dilated(kernel, 1), Dilated(kernel, 2)]
    else:
        arguments = {"padding": "same", "use_bias": False}
        layers = [keras.layers.Conv2D(2, 3, dilation_rate=dilation, **arguments) for dilation in (1, 2)]
    outputs = [keras.layers.Flatten()(keras.layers.Activation("tanh")(layer(entrance))) for layer in layers]
    return [entrance], layers, outputs


def dense_with_an_injected_weight(way):
    """One weight, two biases."""
    entrances = [keras.Input((5,)), keras.Input((5,))]
    if way == "plain":
        weight = keras.Variable(np.zeros((5, 3), "float32"), name="weight")
        layers = [Injected(weight), Injected(weight)]
    else:
        layers = [keras.layers.Dense(3, activation="tanh") for _ in range(2)]
    return entrances, layers, [layer(entrance) for layer, entrance in zip(layers, entrances, strict=True)]


def weights_of(layers):
    return [layer.weight if isinstance(layer, Injected) else layer.kernel for layer in layers]


def run(build, way, optimizer, *, frozen=False):
    """The kernels of both layers and all other weights, after every step."""
    keras.utils.set_random_seed(1)
    entrances, layers, outputs = build(way)
    head = keras.layers.Dense(1)
    model = keras.Model(entrances, head(keras.layers.Concatenate()(outputs)))
    random = np.random.default_rng(0)
    head.kernel.assign(random.normal(size=tuple(head.kernel.shape), scale=0.5))
    start = random.normal(size=tuple(weights_of(layers)[0].shape), scale=0.5)
    for weight in weights_of(layers):
        weight.assign(start)
    if way == "share":
        equalize.share(*weights_of(layers))
    elif way != "plain":
        registry = equalize.GroupRegistry()
        registry.tie("kernels", weights_of(layers), Equal())
        optimizer = TiedOptimizer(optimizer, registry) if way == "tied" else optimizer
    for layer in (head, *layers) if frozen else ():
        for variable in layer.trainable_variables:
            variable.trainable = any(variable is weight for weight in weights_of(layers))
    compile_quickly(model, optimizer, "mse", **MODES[QUICK])
    kernels = Recorder(weights_of(layers))
    others = Recorder([head.kernel])
    x = [random.normal(size=(32, *entrance.shape[1:])).astype("float32") for entrance in entrances]
    y = random.normal(size=(32, 1))
    data = (x if len(x) > 1 else x[0]), y
    model.fit(*data, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[kernels, others])
    assert equalize.relation(*weights_of(layers)) == ("same" if way in ("plain", "share") else "equal")
    assert not np.array_equal(kernels.values[0], kernels.values[-1])
    return np.stack(kernels.values), np.stack(others.values)


@functools.cache
def plain_run(build):
    return run(build, "plain", keras.optimizers.Adam(0.02))


BUILDS = [layer_used_twice, convolutions_over_one_kernel, dense_with_an_injected_weight]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.sampled
def test_sharing_and_exact_ties_give_the_numbers_of_plain_sharing(build):
    plain, head = plain_run(build)
    for way in ("share", "tied"):
        kernels, other = run(build, way, keras.optimizers.Adam(0.02))
        assert kernels.tobytes() == plain.tobytes(), way
        assert other.tobytes() == head.tobytes(), way


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.sampled
def test_averaging_is_plain_sharing_with_sgd_at_half_the_rate_and_something_else_with_adam(build):
    plain, _ = run(build, "plain", keras.optimizers.SGD(0.02), frozen=True)
    averaged, _ = run(build, "equal", keras.optimizers.SGD(0.04), frozen=True)
    np.testing.assert_allclose(averaged, plain, rtol=1e-5, atol=1e-6)
    plain, _ = plain_run(build)
    averaged, _ = run(build, "equal", keras.optimizers.Adam(0.02))
    assert all(step[0].tobytes() == step[1].tobytes() for step in averaged)
    assert np.abs(averaged - plain).max() > 1e-3


# ---- two claims that circulate


def test_two_instances_of_a_class_do_not_share_what_each_makes():
    class Layer(keras.layers.Layer):
        def build(self, shape):
            self.weight = self.add_weight(shape=(shape[-1], 2), initializer="ones", name="weight")

        def call(self, x):
            return x @ self.weight

    one, two = Layer(), Layer()
    x = np.ones((1, 3), "float32")
    assert np.array_equal(ops.convert_to_numpy(one(x)), ops.convert_to_numpy(two(x)))
    assert one.weight is not two.weight
    assert equalize.relation(one, two) == {"weight": "equal"}


def test_equal_values_are_not_one_variable():
    one, two = (keras.Variable(np.ones(2, "float32")) for _ in range(2))
    assert bool(ops.convert_to_numpy(ops.all(one == two)))
    assert one is not two
    assert equalize.relation(one, two) == "equal"
    one.assign_add(np.ones(2, "float32"))
    assert equalize.relation(one, two) == "different"
