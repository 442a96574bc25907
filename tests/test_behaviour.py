"""What happens when, as the tables of docs/behaviour.md say, where no other file tests it."""

import gc

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.errors import GroupMismatchError, NotLinkedError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.views import Slice
from tests.conftest import BACKEND, bits, bitwise_equal, fit, kernels, no_loss, towers

# ---- the variables of a group


def test_a_member_of_a_soft_group_without_a_gradient_is_pulled():
    model = towers(2, regularizer=lambda: MeanL2("soft", 0.25))
    equalize.GroupRegistry().link(model)
    before = [ops.convert_to_numpy(kernel.value).copy() for kernel in kernels(model)]
    model.compile(keras.optimizers.SGD(1.0), no_loss)
    model.fit(np.zeros((4, 5)), np.zeros((4, 1)), verbose=0)  # zeros at the entrance: no gradient but the penalty's
    apart = 0.5 * (before[0] - before[1])
    expected = [before[0] - 0.5 * apart, before[1] + 0.5 * apart]
    np.testing.assert_allclose([ops.convert_to_numpy(k.value) for k in kernels(model)], expected, rtol=1e-5, atol=1e-6)


def test_a_soft_group_that_is_frozen_as_a_whole_stays():
    model = towers(2, regularizer=lambda: MeanL2("soft", 0.25), frozen=(0, 1))
    registry = equalize.GroupRegistry().link(model)
    before = [bits(kernel) for kernel in kernels(model)]
    fit(model, registry)
    assert [bits(kernel) for kernel in kernels(model)] == before


def test_lora_is_refused_or_freezes_what_is_tied():
    model = towers(2, constraint=lambda: Equal("towers"))
    equalize.GroupRegistry().link(model)
    with pytest.raises(ValueError, match="incompatible with kernel constraints"):
        model.get_layer("tower_0").enable_lora(2)

    model = towers(3)
    registry = equalize.GroupRegistry()
    registry.tie("towers", kernels(model), Equal())
    layer = model.get_layer("tower_0")
    kernel = registry["towers"].members[0].variable
    layer.enable_lora(2)
    before, added = bits(kernel), bits(layer.lora_kernel_b)
    fit(model, registry)
    assert [member.anchor for member in registry["towers"].members] == [True, False, False]
    assert {bits(member.variable) for member in registry["towers"].members} == {before}
    assert bits(layer.lora_kernel_b) != added


def test_lora_takes_the_declared_rule_of_a_soft_group():
    model = towers(2, regularizer=lambda: MeanL2("soft"))
    registry = equalize.GroupRegistry().link(model)
    model.get_layer("tower_0").enable_lora(2)
    with pytest.raises(NotLinkedError, match="lora_kernel_a" if BACKEND != "jax" else "never been linked"):
        fit(model, registry)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("rule", [Equal, MeanL2])
@pytest.mark.sampled
def test_a_quantized_kernel_leaves_its_group(rule, declared):
    slot = {"constraint" if rule is Equal else "regularizer": lambda: rule("towers")} if declared else {}
    model = towers(3, **slot)
    registry = equalize.GroupRegistry()
    _ = registry.link(model) if declared else registry.tie("towers", kernels(model), rule())
    model.get_layer("tower_1").quantize("int8")
    gc.collect()
    assert [member.path for member in registry["towers"].members] == ["tower_0/kernel", "tower_2/kernel"]
    assert {finding.kind for finding in registry.diagnose()} == ({"lost", "dropped"} if declared else {"lost"})
    fit(model, registry)


class Growing(keras.layers.Layer):
    """A layer that can be rebuilt, with other variables."""

    def __init__(self, rule=None, **kwargs):
        super().__init__(**kwargs)
        self.rule = rule

    def build(self, shape):
        if self.built:
            self._tracker.unlock()
            self._untrack_variable(self.kernel)
        self.kernel = self.add_weight(shape=(shape[-1], 4), constraint=self.rule, name="kernel")

    def call(self, x):
        return x @ self.kernel


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.sampled
def test_the_variables_of_a_layer_that_is_built_anew_are_other_ones(declared):
    entrance = keras.Input((5,))
    layers = [Growing(Equal("towers") if declared else None, name=f"tower_{i}") for i in range(3)]
    model = keras.Model(entrance, keras.layers.Dense(1)(keras.layers.add([layer(entrance) for layer in layers])))
    registry = equalize.GroupRegistry()
    _ = registry.link(model) if declared else registry.tie("towers", [layer.kernel for layer in layers], Equal())
    layers[1].build((None, 5))
    gc.collect()
    assert [member.path for member in registry["towers"].members] == ["tower_0/kernel", "tower_2/kernel"]
    assert "lost" in {finding.kind for finding in registry.diagnose()}
    if declared:
        with pytest.raises(NotLinkedError):
            fit(model, registry)
    else:
        fit(model, registry)
        assert not bitwise_equal(layers[0].kernel, layers[1].kernel)


def test_a_vocabulary_that_has_grown_keeps_its_old_rows_tied():
    old, new = keras.layers.Embedding(6, 3, name="old"), keras.layers.Embedding(8, 3, name="new")
    entrance = keras.Input((2,), dtype="int32")
    rows = keras.layers.concatenate([keras.layers.Flatten()(layer(entrance)) for layer in (old, new)])
    model = keras.Model(entrance, keras.layers.Dense(1)(rows))
    registry = equalize.GroupRegistry()
    with pytest.raises(GroupMismatchError, match=r"expected shape \(6, 3\).*received \(8, 3\)"):
        registry.tie("words", [old.embeddings, new.embeddings], Equal())
    free = ops.convert_to_numpy(new.embeddings.value)[6:].copy()
    registry.tie("words", [old.embeddings, (new.embeddings, Slice((0, 0), (6, 3)))], Equal())
    x = np.random.default_rng(0).integers(0, 6, (16, 2))
    fit(model, registry, x=x, y=np.ones((16, 1)))
    assert np.array_equal(ops.convert_to_numpy(new.embeddings.value)[6:], free)


# ---- what an optimizer does besides


def clipped(gradient, norm=1.0):
    return gradient * min(1.0, norm / np.linalg.norm(gradient))


def clipped_together(gradients, norm=1.0):
    whole = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients))
    return [gradient * min(1.0, norm / whole) for gradient in gradients]


def bounded(gradient):
    return np.clip(gradient, -0.5, 0.5)


START = np.array([1.0, -2.0], "float32")
GRADIENTS = [np.array(gradient, "float32") for gradient in ([3.0, 4.0], [0.3, -0.4])]
# Settings of SGD with the learning rate 1, and what they make of the start: alone, and as one variable.
SETTINGS = {
    "clipnorm": (
        {"clipnorm": 1.0},
        lambda gradients: [START - clipped(gradient) for gradient in gradients],
        lambda total: START - clipped(total),
    ),
    "global_clipnorm": (
        {"global_clipnorm": 1.0},
        lambda gradients: [START - gradient for gradient in clipped_together(gradients)],
        lambda total: START - clipped(total),
    ),
    "clipvalue": (
        {"clipvalue": 0.5},
        lambda gradients: [START - bounded(gradient) for gradient in gradients],
        lambda total: START - bounded(total),
    ),
    "weight_decay": (
        {"weight_decay": 0.1},
        lambda gradients: [0.9 * START - gradient for gradient in gradients],
        lambda total: 0.9 * START - total,
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 2},
        lambda gradients: [START - 0.5 * gradient for gradient in gradients],
        lambda total: START - 0.5 * total,
    ),
}


@pytest.mark.parametrize("way", ["hard", "exact", "soft"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_optimizer_act_as_the_table_says(setting, way):
    arguments, alone, as_one = SETTINGS[setting]
    variables = [keras.Variable(START, name=name) for name in ("one", "two")]
    registry = equalize.GroupRegistry()
    registry.tie("pair", variables, MeanL2() if way == "soft" else Equal())
    optimizer = keras.optimizers.SGD(1.0, **arguments)
    optimizer = TiedOptimizer(optimizer, registry) if way == "exact" else optimizer
    optimizer.build(variables)
    optimizer.apply([ops.convert_to_tensor(gradient) for gradient in GRADIENTS], variables)
    if setting == "accumulation":
        assert {bits(variable) for variable in variables} == {START.tobytes()}
        optimizer.apply([ops.zeros((2,)) for _ in GRADIENTS], variables)
    stepped = alone(GRADIENTS)  # what a soft tie adds is in the gradients that an optimizer is given
    expected = {
        "soft": stepped,
        "hard": [np.mean(stepped, axis=0)] * 2,
        "exact": [as_one(np.sum(GRADIENTS, axis=0))] * 2,
    }[way]
    np.testing.assert_allclose([ops.convert_to_numpy(v.value) for v in variables], expected, rtol=1e-5, atol=1e-6)
    assert bitwise_equal(*variables) == (way != "soft")


def test_the_gradient_of_a_penalty_is_clipped_with_that_of_the_loss():
    model = towers(2, regularizer=lambda: MeanL2("soft", 100.0))
    equalize.GroupRegistry().link(model)
    before = [ops.convert_to_numpy(kernel.value).copy() for kernel in kernels(model)]
    model.compile(keras.optimizers.SGD(1.0, clipnorm=0.125), no_loss)
    model.fit(np.zeros((4, 5)), np.zeros((4, 1)), verbose=0)
    after = [ops.convert_to_numpy(kernel.value) for kernel in kernels(model)]
    steps = [np.linalg.norm(now - then) for now, then in zip(after, before, strict=True)]
    np.testing.assert_allclose(steps, 0.125, rtol=1e-4)


def test_a_partial_tie_pulls_in_every_micro_step():
    variables = [keras.Variable([value], name=name) for name, value in (("one", 0.0), ("two", 16.0))]
    registry = equalize.GroupRegistry()
    registry.tie("pair", variables, Equal(rate=0.5))
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
    optimizer.build(variables)
    spreads = []
    for _ in range(2):
        optimizer.apply([ops.zeros((1,)) for _ in variables], variables)
        spreads.append(registry.spread()["pair"])
    assert spreads == [8.0, 4.0]


def test_decay_of_some_members_is_a_decay_in_between():
    variables = [keras.Variable(START, name=name) for name in ("one", "two")]
    equalize.GroupRegistry().tie("pair", variables, Equal())
    optimizer = keras.optimizers.SGD(1.0, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=variables[:1])
    optimizer.build(variables)
    optimizer.apply([ops.zeros((2,)) for _ in variables], variables)
    np.testing.assert_allclose(ops.convert_to_numpy(variables[0].value), 0.95 * START, rtol=1e-6)


def test_averages_of_a_soft_group_are_those_of_its_members():
    untied, tied = towers(2), towers(2)
    tied.set_weights(untied.get_weights())
    registry = equalize.GroupRegistry()
    registry.tie("soft", kernels(tied), MeanL2(factor=0.0))
    for model in (untied, tied):
        fit(model, registry, optimizer=keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5))
    values = [[ops.convert_to_numpy(kernel.value) for kernel in kernels(model)] for model in (untied, tied)]
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6)
