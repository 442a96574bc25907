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
    assert isinstance(restored["g"].rule.inner, keras.constraints.NonNeg)
    fit(clone, restored)
    assert all(np.all(ops.convert_to_numpy(kernel.value) >= 0) for kernel in kernels(clone))


def test_a_path_that_is_gone_is_named_and_nothing_changes():
    _, registry = tied_autoencoder()
    other = towers(2)
    before = [(bits(weight), weight.constraint) for weight in other.weights]
    restored = through_json(registry)
    with pytest.raises(GroupMismatchError, match=r"'encoder/kernel' of group 'ae': no weight has this path.*tower_0"):
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
        "no path": changed(lambda config: config["groups"][0]["members"][0].pop("path")),
        "path": changed(lambda config: config["groups"][0]["members"][0].update(path=3)),
        "rule": changed(lambda config: config["groups"][0].update(rule="Equal")),
        "rule config": changed(lambda config: config["groups"][0]["rule"].update(config={"rate": 7})),
        "view": changed(lambda config: config["groups"][0]["members"][1].update(view="Transpose")),
        "foreign": changed(lambda config: config["groups"][0]["rule"].update(registered_name=None, class_name="Dense")),
    }


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_config_is_an_error_and_runs_nothing(kind):
    with pytest.raises(EqualizeError, match=r"This is no config of a registry|The config of group .* is damaged"):
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
