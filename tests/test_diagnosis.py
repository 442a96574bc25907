import gc

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.errors import GroupMismatchError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.saving import load_model, save_model
from tests.conftest import BACKEND, fit, kernels, towers


def linked(optimizer="sgd", rule=lambda: Equal("towers"), **arguments):
    model = towers(3, constraint=rule, **arguments)
    registry = equalize.GroupRegistry().link(model)
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model, registry


def kinds(registry):
    return [finding.kind for finding in registry.diagnose()]


def test_nothing_to_say():
    model, registry = linked()
    assert registry.diagnose() == []
    del model


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (lambda: keras.optimizers.SGD(use_ema=True), "ema"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(use_ema=True)), "ema"),
        (lambda: keras.optimizers.SGD(global_clipnorm=1.0), "global_clipnorm"),
    ],
)
@pytest.mark.sampled
def test_optimizers_that_treat_members_otherwise_than_a_shared_variable(optimizer, kind):
    model, registry = linked(optimizer())
    assert kinds(registry) == [kind]
    (finding,) = registry.diagnose()
    assert finding.subject == "towers"
    assert finding.fix in str(finding)
    monitor = equalize.callbacks.TieMonitor(registry)
    assert kinds(registry) == ([] if kind == "ema" else [kind])
    del monitor
    model.compile("sgd", "mse")
    assert kinds(registry) == []


def tied(optimizer=None):
    """A model whose kernels `tie` has tied: its registry has linked no model."""
    model = towers(2)
    registry = equalize.GroupRegistry()
    registry.tie("towers", kernels(model), Equal())
    if optimizer is not None:
        model.compile(optimizer, "mse")
    return model, registry


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (lambda: keras.optimizers.SGD(use_ema=True), "ema"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(use_ema=True)), "ema"),
        (lambda: keras.optimizers.SGD(global_clipnorm=1.0), "global_clipnorm"),
    ],
)
@pytest.mark.sampled
def test_after_tie_it_knows_what_it_knows_after_link(optimizer, kind):
    model, registry = tied(optimizer())
    assert kinds(registry) == [kind]
    assert registry.diagnose(model) == registry.diagnose()
    model.compile(TiedOptimizer(optimizer(), registry), "mse")
    assert kinds(registry) == []


def test_models_nested_in_others_and_models_that_share_a_member():
    model, registry = tied(keras.optimizers.SGD(global_clipnorm=1.0))
    entrance = keras.Input((5,))
    outer = keras.Model(entrance, model(entrance))
    assert kinds(registry) == ["global_clipnorm"]
    outer.compile(keras.optimizers.SGD(use_ema=True), "mse")
    assert sorted(kinds(registry)) == ["ema", "global_clipnorm"]
    assert [finding.kind for finding in registry.diagnose(outer)] == ["ema"]
    beside = keras.Model(model.input, model.get_layer("tower_0").output)
    beside.compile(keras.optimizers.SGD(global_clipnorm=1.0), "mse")
    assert sorted(kinds(registry)) == ["ema", "global_clipnorm"]  # each said once


def test_a_clone_is_looked_at_only_where_it_is_given():
    model, registry = linked()
    clone = keras.models.clone_model(model)
    clone.compile(keras.optimizers.SGD(use_ema=True), "mse")
    assert kinds(registry) == []
    assert {finding.kind for finding in registry.diagnose(clone)} == {"unlinked"}
    assert kinds(equalize.GroupRegistry()) == []
    with pytest.raises(TypeError, match="`diagnose` expects Keras models"):
        registry.diagnose("towers")


def test_a_monitor_that_repairs_nothing_is_none():
    model, registry = tied(keras.optimizers.SGD(use_ema=True))
    watching = equalize.callbacks.TieMonitor(registry, repair=False)
    assert kinds(registry) == ["ema"]
    repairing = equalize.callbacks.TieMonitor(registry)
    assert kinds(registry) == []
    del model, watching, repairing


def test_an_anchor_leaves_one_member_that_clipping_counts_once():
    model = towers(2, frozen=(1,))
    registry = equalize.GroupRegistry()
    registry.tie("towers", kernels(model), Equal())
    model.compile(keras.optimizers.SGD(global_clipnorm=1.0), "mse")
    assert kinds(registry) == []


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this version of Keras has none")
@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({}, {}, []),
        ({"use_ema": True}, {}, ["ema"]),
        ({}, {"global_clipnorm": 1.0}, ["global_clipnorm"]),
        ({"weight_decay": 0.1}, {}, ["weight_decay"]),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}, []),
    ],
    ids=str,
)
@pytest.mark.sampled
def test_several_optimizers_in_one_each_with_the_members_that_it_updates(one, other, expected):
    model = towers(3)
    registry = equalize.GroupRegistry()
    registry.tie("towers", kernels(model), Equal())
    parts = keras.optimizers.OptimizerMap(keras.optimizers.SGD(**other), {"tower_0/.*": keras.optimizers.SGD(**one)})
    model.compile(keras.optimizers.MultiOptimizer(parts), "mse")
    assert kinds(registry) == []  # which optimizer updates what is known when it is built
    model.optimizer.build(model.trainable_variables)
    assert kinds(registry) == expected


def test_weight_decay_of_some_members():
    model = towers(3, constraint=lambda: Equal("towers"))
    registry = equalize.GroupRegistry().link(model)
    optimizer = keras.optimizers.SGD(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=kernels(model)[:1])
    model.compile(optimizer, "mse")
    assert kinds(registry) == ["weight_decay"]
    optimizer = keras.optimizers.SGD(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=kernels(model))
    model.compile(optimizer, "mse")
    assert kinds(registry) == []


def test_partial_averaging_under_gradient_accumulation():
    accumulating = keras.optimizers.SGD(gradient_accumulation_steps=2)
    model, registry = linked(accumulating, rule=lambda: Equal("towers", rate=0.5))
    assert kinds(registry) == ["accumulation"]
    model, registry = linked(keras.optimizers.SGD(gradient_accumulation_steps=2))
    assert kinds(registry) == []
    del model


def test_unequal_members():
    model, registry = linked()
    kernels(model)[0].assign(np.ones((5, 4), "float32"))
    assert kinds(registry) == ["unequal"]
    registry.sync()
    assert kinds(registry) == []


def test_a_constraint_that_quantization_dropped():
    model, registry = linked()
    layer = model.get_layer("tower_1")
    layer.quantize("int8")
    assert "dropped" in kinds(registry)
    finding = next(finding for finding in registry.diagnose() if finding.kind == "dropped")
    assert finding.subject == "tower_1"


def test_a_rule_that_a_variable_lost():
    model = towers(2, regularizer=lambda: MeanL2("soft"))
    registry = equalize.GroupRegistry().link(model)
    assert kinds(registry) == []
    kernels(model)[0].regularizer = None
    assert kinds(registry) == ["dropped"]


@pytest.mark.parametrize("rule", [Equal, MeanL2])
def test_a_tied_kernel_under_lora(rule):
    model = towers(2)
    registry = equalize.GroupRegistry()
    group = registry.tie("pair", kernels(model), rule())
    registry.link(model)
    assert kinds(registry) == []
    model.get_layer("tower_0").enable_lora(2)
    assert [member.anchor for member in group.members] == [True, False]
    assert [(finding.kind, finding.subject) for finding in registry.diagnose()] == [("lora", "tower_0")]
    assert "'pair'" in registry.diagnose()[0].message


def test_what_lora_leaves_to_training_is_no_finding():
    model = towers(2)
    layers = [model.get_layer(f"tower_{i}") for i in range(2)]
    registry = equalize.GroupRegistry()
    registry.tie("towers", layers, Equal())
    for layer in layers:
        layer.enable_lora(2)
    assert [finding.message.split("'")[1] for finding in registry.diagnose()] == ["towers/kernel"] * 2  # not the bias
    for layer in layers:
        layer.weights[0].trainable = True  # a tied kernel with a low-rank part of each layer's own
    assert kinds(registry) == []


def test_a_declared_rule_under_lora():
    model = towers(2, regularizer=lambda: MeanL2("soft"))
    registry = equalize.GroupRegistry().link(model)
    model.get_layer("tower_1").enable_lora(2)
    assert [(finding.kind, finding.subject) for finding in registry.diagnose()] == [("lora", "tower_1")]


def test_kernels_under_lora_are_equal_where_all_of_their_parts_are_tied():
    model = towers(2)
    registry = equalize.GroupRegistry()
    layers = [model.get_layer(f"tower_{i}") for i in range(2)]
    registry.tie("kernel", kernels(model), Equal())
    for layer in layers:
        layer.enable_lora(2)
    assert kinds(registry) == ["lora", "lora"]
    for part in ("lora_kernel_a", "lora_kernel_b"):
        registry.tie(part, [getattr(layer, part) for layer in layers], Equal())
    assert kinds(registry) == []
    before = ops.convert_to_numpy(layers[0].kernel)
    fit(model, registry)
    one, two = (ops.convert_to_numpy(layer.kernel) for layer in layers)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, before)


def test_layers_that_are_softly_tied_under_lora_have_the_factors_in_the_tie():
    model = towers(2)
    layers = [model.get_layer(f"tower_{i}") for i in range(2)]
    for layer in layers:
        layer.enable_lora(2)
    registry = equalize.GroupRegistry()
    registry.tie("towers", layers, MeanL2(factor=0.1))
    assert {"towers/lora_kernel_a", "towers/lora_kernel_b"} <= set(registry)
    assert kinds(registry) == []


def test_layers_that_are_tied_under_lora_have_the_factors_in_the_tie(tmp_path):
    model = towers(2)
    layers = [model.get_layer(f"tower_{i}") for i in range(2)]
    registry = equalize.GroupRegistry()
    registry.tie("towers", layers, Equal())
    for layer in layers:
        layer.enable_lora(2)
    assert "lora" in kinds(registry)
    registry.untie()
    registry.tie("towers", layers, Equal())
    assert {"towers/lora_kernel_a", "towers/lora_kernel_b"} <= set(registry)
    assert kinds(registry) == []
    fit(model, registry)
    registry.check()
    save_model(model, tmp_path / "model.keras")  # Keras saves the kernel with what LoRA adds to it
    merged, _ = load_model(tmp_path / "model.keras")
    one, two = (ops.convert_to_numpy(merged.get_layer(layer.name).kernel) for layer in layers)
    assert np.array_equal(one, two)


def test_members_that_were_quantized_alike_are_equal():
    model = towers(2)
    layers = [model.get_layer(f"tower_{i}") for i in range(2)]
    registry = equalize.GroupRegistry()
    registry.tie("towers", layers, Equal())
    fit(model, registry)
    for layer in layers:
        layer.quantize("int8")
    assert equalize.relation(*layers) == dict.fromkeys(equalize.relation(*layers), "equal")
    assert "lost" in kinds(registry)  # integers have no mean


def test_a_rule_that_was_never_linked():
    model, registry = linked()
    kernels(model)[2].constraint = Equal("towers")
    assert kinds(registry) == ["unlinked"]


def test_members_that_an_optimizer_on_jax_does_not_reach():
    model = towers(3, constraint=lambda: Equal("towers"))
    registry = equalize.GroupRegistry().link(model)
    model.compile("sgd", "mse")
    model.optimizer.build(kernels(model)[:2])
    assert kinds(registry) == (["optimizers"] if BACKEND == "jax" else [])


def test_summary_says_how_many_there_are():
    model, registry = linked(keras.optimizers.SGD(global_clipnorm=1.0, use_ema=True))
    lines = []
    registry.summary(print_fn=lines.append)
    assert "Findings: 2;" in lines[0]
    del model


def test_a_deleted_model_is_not_diagnosed():
    registry = linked(keras.optimizers.SGD(use_ema=True))[1]
    keras.backend.clear_session()
    gc.collect()
    assert registry.diagnose() == []


def test_ties_that_were_loaded_and_are_not_linked_are_found():
    model = towers(2)
    registry = equalize.GroupRegistry()
    registry.tie("pair", kernels(model), Equal())
    restored = equalize.GroupRegistry.from_config(registry.get_config())
    assert [(finding.kind, finding.subject) for finding in restored.diagnose()] == [("pending", "pair")]
    restored.link(keras.models.clone_model(model))
    assert restored.diagnose() == []


def test_regularizers_that_differ_within_a_hard_group_are_found():
    members = [keras.Variable([1.0, 2.0], dtype="float32", name=f"w{i}") for i in range(2)]
    members[0].regularizer, members[1].regularizer = keras.regularizers.L2(0.1), keras.regularizers.L2(0.1)
    registry = equalize.GroupRegistry()
    registry.tie("pair", members, Equal())
    assert registry.diagnose() == []
    registry.untie()
    members[1].regularizer = None
    registry.tie("pair", members, Equal())
    (finding,) = registry.diagnose()
    assert (finding.kind, finding.subject) == ("regularizers", "pair")
    assert "'w0': L2(l2=0.1" in finding.message
    assert "'w1': none" in finding.message
    registry.replace("pair", Equal(rate=0.5))
    assert registry.diagnose() == []


def attention(**shapes):
    layer = keras.layers.MultiHeadAttention(2, kernel_constraint=Equal("heads"), use_bias=False, name="mha", **shapes)
    entrance = keras.Input((3, 4))
    return keras.Model(entrance, layer(entrance, entrance))


def test_a_rule_that_a_layer_hands_to_several_weights_is_a_finding():
    model = keras.Sequential([keras.Input((3, 4)), TwoDense()])
    registry = equalize.GroupRegistry().link(model)
    (finding,) = registry.diagnose(model)
    assert (finding.kind, finding.subject) == ("handed_on", "two_dense")
    assert "/left/kernel'" in finding.message
    assert "registry.tie" in finding.fix


class TwoDense(keras.layers.Layer):
    """Hands its constraint to two layers."""

    def __init__(self):
        super().__init__(name="two_dense")
        self.kernel_constraint = Equal("both")
        self.left, self.right = (
            keras.layers.Dense(4, kernel_constraint=self.kernel_constraint, name=name) for name in ("left", "right")
        )

    def build(self, input_shape):
        self.left.build(input_shape)
        self.right.build(input_shape)

    def call(self, x):
        return self.left(x) + self.right(x)


def test_a_rule_that_attention_hands_to_weights_of_other_shapes_says_so():
    with pytest.raises(GroupMismatchError, match=r"One rule was given to several weights.*`registry\.tie\('heads'"):
        equalize.GroupRegistry().link(attention(key_dim=3))


def test_the_two_directions_of_a_layer_may_have_one_rule():
    layer = keras.layers.Bidirectional(keras.layers.SimpleRNN(3, kernel_constraint=Equal("directions")))
    model = keras.Sequential([keras.Input((3, 4)), layer])
    registry = equalize.GroupRegistry().link(model)
    assert len(registry["directions"].members) == 2
    assert registry.diagnose(model) == []
