import copy
import json
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.regularizers import MeanL2
from equalize.views import Transpose
from tests.conftest import bits, bitwise_equal, fit, kernels, towers


def autoencoder():
    entrance = keras.Input((4,))
    encoder = keras.layers.Dense(3, name="encoder")
    decoder = keras.layers.Dense(4, name="decoder")
    return keras.Model(entrance, decoder(encoder(entrance))), encoder, decoder


def tied_autoencoder():
    model, encoder, decoder = autoencoder()
    registry = equalize.GroupRegistry()
    registry.tie("ae", [encoder.kernel, (decoder.kernel, Transpose())], Equal())
    registry.tie("prior", [decoder.bias, np.full(4, 0.25, "float32")], MeanL2(factor=0.5))
    return model, registry


def through_json(registry):
    return equalize.GroupRegistry.from_config(json.loads(json.dumps(registry.get_config())))


@pytest.mark.parametrize("duplicate", [through_json, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
@pytest.mark.sampled
def test_ties_made_by_hand_are_made_again_in_a_clone(duplicate):
    model, registry = tied_autoencoder()
    restored = duplicate(registry)
    assert len(restored) == 0
    assert restored.get_config() == registry.get_config()
    clone = keras.models.clone_model(model)
    before = [bits(weight) for weight in model.weights]
    restored.link(clone)
    assert sorted(restored) == ["ae", "prior"]
    assert restored["ae"].members[1].view == Transpose()
    assert restored["prior"].rule.factor == 0.5
    assert float(ops.convert_to_numpy(restored.penalty())) == pytest.approx(0.5 * 4 * 0.25**2 / 2)
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    fit(clone, x=x, y=x)
    encoder, decoder = (ops.convert_to_numpy(clone.get_layer(name).kernel.value) for name in ("encoder", "decoder"))
    assert np.array_equal(encoder, decoder.T)
    assert [bits(weight) for weight in model.weights] == before
    assert restored.get_config() == registry.get_config()


def test_ties_of_layers_and_declared_ties_together(tmp_path):
    model = towers(2, constraint=lambda: Equal("declared"))
    registry = equalize.GroupRegistry().link(model)
    registry.tie("biases", [model.get_layer("tower_0").bias, model.get_layer("tower_1").bias], Equal())
    assert [group["name"] for group in registry.get_config()["groups"]] == ["biases"]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    restored = through_json(registry).link(loaded, initial="strict")
    assert sorted(restored) == ["biases", "declared"]
    fit(loaded, restored)
    assert bitwise_equal(*kernels(loaded))


def test_an_existing_constraint_is_kept_through_a_config():
    model = towers(2)
    for layer in model.layers:
        if layer.name.startswith("tower_"):
            layer.kernel_constraint = layer.kernel.constraint = keras.constraints.NonNeg()
    registry = equalize.GroupRegistry()
    registry.tie("g", kernels(model), Equal())
    clone = keras.models.clone_model(model)
    restored = through_json(registry).link(clone)
    assert isinstance(restored["g"].inner, keras.constraints.NonNeg)
    fit(clone, restored)
    assert all(np.all(ops.convert_to_numpy(kernel.value) >= 0) for kernel in kernels(clone))


def test_a_path_that_is_gone_is_named_and_nothing_changes():
    _, registry = tied_autoencoder()
    other = towers(2)
    before = [(bits(weight), weight.constraint) for weight in other.weights]
    restored = through_json(registry)
    with pytest.raises(GroupMismatchError, match=r"'encoder/kernel' .* of group 'ae': .*tower_0"):
        restored.link(other)
    assert [(bits(weight), weight.constraint) for weight in other.weights] == before
    assert len(restored) == 0
    model, _, _ = autoencoder()
    assert sorted(restored.link(model)) == ["ae", "prior"]


def test_linking_again_changes_nothing():
    model, registry = tied_autoencoder()
    restored = through_json(registry)
    clone = keras.models.clone_model(model)
    group = restored.link(clone)["ae"]
    assert restored.link(clone)["ae"] is group
    assert len(restored) == 2


def damaged():
    _, registry = tied_autoencoder()
    good = registry.get_config()

    def changed(change):
        config = copy.deepcopy(good)
        change(config)
        return config

    return {
        "nothing": None,
        "a list": [],
        "empty": {},
        "groups": {"groups": {}},
        "group": {"groups": [3]},
        "missing": changed(lambda config: config["groups"][0].pop("rule")),
        "name": changed(lambda config: config["groups"][0].update(name=3)),
        "one member": changed(lambda config: config["groups"][0]["members"].pop()),
        "place": changed(lambda config: config["groups"][0]["members"][0].update(places=[["a", -1, "b"]])),
        "shape": changed(lambda config: config["groups"][0]["members"][0].update(shape=[2.0])),
        "no path": changed(lambda config: config["groups"][0]["members"][0].pop("path")),
        "path": changed(lambda config: config["groups"][0]["members"][0].update(path=3)),
        "rule": changed(lambda config: config["groups"][0].update(rule="Equal")),
        "rule config": changed(lambda config: config["groups"][0]["rule"].update(config={"rate": 7})),
        "view": changed(lambda config: config["groups"][0]["members"][1].update(view="Transpose")),
        "foreign": changed(lambda config: config["groups"][0]["rule"].update(registered_name=None, class_name="Dense")),
    }


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_config_is_an_error_and_runs_nothing(kind):
    with pytest.raises(
        EqualizeError, match=r"This is not the config of a registry|The config of group .* cannot be used"
    ):
        equalize.GroupRegistry.from_config(damaged()[kind])


def test_a_lambda_in_a_config_is_not_run():
    _, registry = tied_autoencoder()
    config = registry.get_config()
    layer = keras.layers.Lambda(lambda x: x)
    config["groups"][0]["rule"] = keras.saving.serialize_keras_object(layer)
    with pytest.raises(EqualizeError, match="a rule of equalize"):
        equalize.GroupRegistry.from_config(config)


def test_the_registry_is_keras_serializable():
    _, registry = tied_autoencoder()
    config = keras.saving.serialize_keras_object(registry)
    assert keras.saving.deserialize_keras_object(config).get_config() == registry.get_config()


def test_a_variable_in_two_soft_groups_keeps_both_through_a_config():
    model = towers(2, regularizer=lambda: MeanL2("declared", 0.5))
    registry = equalize.GroupRegistry().link(model)
    for name in ("one", "two"):
        registry.tie(name, kernels(model), MeanL2(factor=0.25))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    restored = through_json(registry).link(clone)
    assert sorted(restored) == ["declared", "one", "two"]
    expected = float(ops.convert_to_numpy(registry.penalty()))
    assert expected > 0.0
    for each in (model, clone):
        losses = sum(float(ops.convert_to_numpy(loss)) for loss in each.losses)
        assert losses == pytest.approx(expected, rel=1e-5)


# ---- places


@keras.saving.register_keras_serializable(package="tests")
class Scaled(keras.layers.Layer):
    """Two weights without names, a scale and a shift, and an attention in a dictionary."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.shift = self.add_weight(shape=(shape[-1],), initializer="zeros")
        self.parts = {"dense": [keras.layers.Dense(shape[-1]), keras.layers.Dense(shape[-1])]}
        for layer in self.parts["dense"]:
            layer.build(shape)

    def call(self, x):
        for layer in self.parts["dense"]:
            x = layer(x)
        return x * self.scale + self.shift


def backbone(names):
    """A ready-made backbone, which names its layers or not."""
    entrance = keras.Input((4,))
    return keras.Model(
        entrance, keras.layers.Dense(4, name=names and names[0])(Scaled(name=names and names[1])(entrance))
    )


def two_backbones(*names):
    entrance = keras.Input((4,))
    towers = [backbone(each) for each in names]
    return keras.Model(entrance, keras.layers.add([tower(entrance) for tower in towers])), towers


NAMES = {
    "without names": (None, None),
    "the same names": (("hidden", "scaled"), ("hidden", "scaled")),
    "a prefix": (("left_hidden", "left_scaled"), ("right_hidden", "right_scaled")),
    "names of no likeness": (("alpha", "beta"), ("gamma", "delta")),
}


def weights_in_pairs(towers):
    return list(zip(*(tower.trainable_variables for tower in towers), strict=True))


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.sampled
def test_two_copies_of_a_backbone_are_tied_saved_and_linked_by_place(names, tmp_path):
    model, towers = two_backbones(*NAMES[names])
    registry = equalize.GroupRegistry()
    assert len(registry.tie("towers", towers, Equal())) == 8
    for _ in range(2):
        _variable, _layer = keras.Variable(0.0), keras.layers.Dense(1)  # whatever Keras numbers in the meantime
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    restored = through_json(registry).link(loaded)
    assert [len(group.members) for group in restored.values()] == [2] * 8
    loaded_towers = [layer for layer in loaded.layers if isinstance(layer, keras.Model)]
    expected = {frozenset(map(id, pair)) for pair in weights_in_pairs(loaded_towers)}
    assert {frozenset(id(member.variable) for member in group.members) for group in restored.values()} == expected


def test_only_the_shifts_are_linked_where_only_they_were_tied():
    model, towers = two_backbones(None, None)
    layers = [next(layer for layer in tower.layers if isinstance(layer, Scaled)) for tower in towers]
    registry = equalize.GroupRegistry()
    registry.tie("shifts", [layer.shift for layer in layers], Equal())
    keras.Variable(0.0)  # so that the scales of the clone have the names that the shifts had
    clone = keras.models.clone_model(model)
    restored = through_json(registry).link(clone)
    copies = [layer for part in clone.layers for layer in getattr(part, "layers", []) if isinstance(layer, Scaled)]
    assert [id(m.variable) for m in restored["shifts"].members] == [id(layer.shift) for layer in copies]


def test_a_weight_of_another_shape_at_the_place_is_an_error_that_changes_nothing():
    def pair(width):
        entrance = keras.Input((4,))
        layers = [keras.layers.Dense(width) for _ in range(2)]
        return keras.Model(entrance, [layer(entrance) for layer in layers]), layers

    _model, layers = pair(3)
    registry = equalize.GroupRegistry()
    registry.tie("pair", layers, Equal())
    restored = through_json(registry)
    other, others = pair(5)
    with pytest.raises(GroupMismatchError, match=r"\(4, 3\) float32 .*the weight at its place, .* is \(4, 5\)"):
        restored.link(other)
    assert restored.pending == ["pair/kernel", "pair/bias"]
    assert all(layer.kernel.constraint is None for layer in others)


def test_a_place_and_a_path_that_contradict_each_other_are_an_error():
    def stack(*names):
        layers = [keras.layers.Dense(4, name=name) for name in names]
        return keras.Sequential([keras.Input((4,)), *layers], name="stack")

    model = stack("first", "second")
    registry = equalize.GroupRegistry()
    registry.tie("pair", [layer.kernel for layer in model.layers], Equal())
    longer = stack("zeroth", "first", "second")
    with pytest.raises(GroupMismatchError, match="its place and its path belong to two weights"):
        through_json(registry).link(longer)
    renamed = stack("one", "two")
    assert list(through_json(registry).link(renamed)) == ["pair"]


def test_a_tie_takes_the_place_of_a_pending_one_of_its_name():
    model, towers = two_backbones(None, None)
    registry = equalize.GroupRegistry()
    registry.tie("towers", towers, Equal())
    restored = through_json(registry)
    clone = keras.models.clone_model(model)
    restored.tie("towers", [layer for layer in clone.layers if isinstance(layer, keras.Model)], Equal())
    assert restored.pending == []
    assert list(through_json(restored).link(keras.models.clone_model(model))) == list(registry)


def test_two_models_of_one_structure_are_told_apart_by_their_order():
    first, second = two_backbones(None, None)[1]
    registry = equalize.GroupRegistry()
    registry.tie("pair", [first.layers[-1].kernel, second.layers[-1].kernel], Equal())
    clones = [keras.models.clone_model(model) for model in (first, second)]
    restored = through_json(registry).link(*clones)
    assert [id(m.variable) for m in restored["pair"].members] == [id(clone.layers[-1].kernel) for clone in clones]


def test_layers_that_are_in_no_model_have_places_of_their_own():
    layers = [keras.layers.Dense(3, name="same") for _ in range(2)]
    for layer in layers:
        layer.build((None, 2))
    registry = equalize.GroupRegistry()
    registry.tie("pair", layers, Equal())
    others = [keras.layers.Dense(3) for _ in range(2)]
    for layer in others:
        layer.build((None, 2))
    restored = through_json(registry).link(*others)
    assert [id(m.variable) for m in restored["pair/kernel"].members] == [id(layer.kernel) for layer in others]


def test_a_group_of_several_models_is_not_looked_for_in_one_of_them(tmp_path):
    """Models of one structure have the same places, so one alone would be tied to itself."""

    def net():
        return keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(3), keras.layers.Dense(3), keras.layers.Dense(2)]
        )

    student, teacher = net(), net()
    teacher.trainable = False
    registry = equalize.GroupRegistry()
    registry.tie("crossed", [student.layers[1].kernel, teacher.layers[0].kernel], equalize.constraints.Follow())
    registry.tie("same", [student.layers[1].bias, teacher.layers[1].bias], equalize.constraints.Follow())
    config = registry.get_config()
    clone = keras.models.clone_model(student)
    before = [bits(weight) for weight in clone.weights]
    with pytest.raises(GroupMismatchError, match=r"several models of one structure.*at least 2"):
        equalize.GroupRegistry.from_config(config).link(clone)
    assert [bits(weight) for weight in clone.weights] == before
    assert all(weight.constraint is None for weight in clone.weights)
    both = keras.models.clone_model(student), keras.models.clone_model(teacher)
    again = equalize.GroupRegistry.from_config(config).link(*both)
    assert again["crossed"].members[0].variable is both[0].layers[1].kernel
    assert again["crossed"].members[1].variable is both[1].layers[0].kernel
