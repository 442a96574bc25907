"""What `equalize.saving` refuses, and what ties of statistics refuse."""

import json
import os
import pathlib
import tempfile
import zipfile

import h5py
import keras

import equalize
from equalize.constraints import Equal
from equalize.saving import deduplicate, load_model, save_model
from tests.messages import kernels, message, tied


def in_a_folder(write, read):
    """Writes a file of some name in a folder that is soon gone, and reads it."""
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path.cwd()
        try:
            os.chdir(folder)
            write()
            read()
        finally:
            os.chdir(here)


def norms(count=2):
    layers = [keras.layers.BatchNormalization(name=f"norm_{i}") for i in range(count)]
    return keras.Sequential([keras.Input((4,)), *layers], name="model"), layers


def ties(text):
    def write():
        with zipfile.ZipFile("model.keras", "w") as archive:
            archive.writestr("equalize.json", text)

    return write


def linked(name, target):
    def write():
        with h5py.File("a.weights.h5", "w") as file:
            file.create_group("layers")[name] = target(file)

    return write


@message(
    """
    `filepath` must be the path of a file. Received: 3 of type <class 'int'>.
    """
)
def saving_to_something_else():
    save_model(norms()[0], 3)


@message(
    """
    `filepath` must be on a local disk and end in '.keras'. Received: 'model.h5'.
    """
)
def saving_under_another_name():
    save_model(norms()[0], "model.h5")


@message(
    """
    Cannot save group 'pair' with the model 'half': 'right/kernel' (4, 3) float32 is not one of its
    weights. Expected: a model that has all members. Save one model that holds both parts, or
    `untie('pair')` first.
    """
)
def saving_with_members_elsewhere():
    registry, (left, _right) = tied()
    save_model(keras.Sequential([keras.Input((4,)), left], name="half"), "model.keras", registry)


@message(
    """
    There is no file 'none.keras'. Expected: one that `save_model` or Keras wrote.
    """
)
def loading_of_no_file():
    load_model("none.keras")


@message(
    """
    The ties in 'model.keras' are damaged: Expecting property name enclosed in double quotes: line 1
    column 2 (char 1). Expected: what was saved.
    """
)
def loading_of_ties_that_are_no_json():
    in_a_folder(ties("{"), lambda: load_model("model.keras"))


@message(
    """
    The ties in 'model.keras' are damaged: expected a registry; received [] of type <class 'list'>.
    """
)
def loading_of_ties_that_are_something_else():
    in_a_folder(ties("[]"), lambda: load_model("model.keras"))


@message(
    """
    'model.keras' is damaged: File is not a zip file. Expected: a file that Keras wrote.
    """
)
def small_files_of_no_archive():
    in_a_folder(lambda: pathlib.Path("model.keras").write_text("text"), lambda: deduplicate("model.keras"))


@message(
    """
    'a.weights.h5' is damaged: Unable to synchronously open file (file signature not found). Expected: a
    file that Keras wrote.
    """
)
def small_files_of_no_weights():
    in_a_folder(lambda: pathlib.Path("a.weights.h5").write_text("text"), lambda: deduplicate("a.weights.h5"))


@message(
    """
    'a.weights.h5' has no data of its own at 'link'. Expected: a file that Keras wrote.
    """
)
def small_files_with_links_elsewhere():
    link = linked("link", lambda file: h5py.ExternalLink("secret.h5", "/data"))
    in_a_folder(link, lambda: deduplicate("a.weights.h5"))


@message(
    """
    'a.weights.h5' has one group in two places. Expected: a file that Keras wrote.
    """
)
def small_files_that_are_a_circle():
    in_a_folder(linked("again", lambda file: file["/"]), lambda: deduplicate("a.weights.h5"))


@message(
    """
    `statistics=True` needs layers, which have moving statistics. Received: variables for 'pair'. Give
    the layers, or leave it out.
    """
)
def statistics_of_variables():
    equalize.GroupRegistry().tie("pair", list(kernels("left", "right")), Equal(), statistics=True)


@message(
    """
    `statistics` must be True or False. Received: 'yes' of type <class 'str'>.
    """
)
def statistics_that_are_neither_true_nor_false():
    equalize.GroupRegistry().tie("norms", norms()[1], Equal(), statistics="yes")


@message(
    """
    Cannot tie the moving statistics 'more/moving_mean': some belong to 'norms/moving_mean' already.
    Expected: one tie of layers with `statistics=True`. Name all layers in one tie, or call
    `untie('norms')` first.
    Members:
        'model/norm_1/moving_mean' (4,) float32
        'model/norm_2/moving_mean' (4,) float32
    """
)
def statistics_that_are_tied_already():
    _model, layers = norms(3)
    registry = equalize.GroupRegistry()
    registry.tie("norms", layers[:2], Equal(), statistics=True)
    registry.tie("more", layers[1:], equalize.regularizers.MeanL2(), statistics=True)


@message(
    """
    Group 'norms/moving_mean' is of moving statistics, which are kept equal and nothing else. Expected:
    the name of another group. Received: 'norms/moving_mean'.
    """
)
def another_rule_for_statistics():
    registry = equalize.GroupRegistry()
    registry.tie("norms", norms()[1], Equal(), statistics=True)
    registry.replace("norms/moving_mean", Equal(rate=0.5))


@message(
    """
    This is not the config of a registry: expected names that are strings; received
    ['norms/moving_variance', 3] of type <class 'list'>. Use what `registry.get_config()` returned,
    unchanged.
    """
)
def names_in_a_config_that_are_none():
    registry = equalize.GroupRegistry()
    registry.tie("norms", norms()[1], Equal(), statistics=True)
    config = json.loads(json.dumps(registry.get_config()))
    equalize.GroupRegistry.from_config({"groups": [config["groups"][-1] | {"tie": 3}]})


@message(
    """
    This is not the config of a registry: expected moving statistics of a tie in
    'norms/moving_variance'; received True of type <class 'bool'>. Use what `registry.get_config()`
    returned, unchanged.
    """
)
def statistics_in_a_config_that_belong_to_nothing():
    registry, (_model, layers) = equalize.GroupRegistry(), norms()
    registry.tie("norms", layers, Equal(), statistics=True)
    entry = json.loads(json.dumps(registry.get_config()))["groups"][-1]
    equalize.GroupRegistry.from_config({"groups": [{k: v for k, v in entry.items() if k != "tie"}]})


@message(
    """
    The layers of 'norms' have moving statistics that this does not tie ('norms/moving_mean' and 1
    more), so they will give different results in inference. Expected: `tie(..., statistics=True)`,
    which keeps them equal; or statistics that are meant to be each layer's own.
    """
)
def a_tie_of_layers_without_their_statistics():
    equalize.GroupRegistry().tie("norms", norms()[1], Equal())


@message(
    """
    This is not the config of a registry: expected a hard tie of the moving statistics
    'norms/moving_variance'; received {'module': 'equalize.constraints', 'class_name': 'Equal',
    'config': {'rate': 0.5}, 'registered_name': 'equalize>Equal'} of type <class 'dict'>. Use what
    `registry.get_config()` returned, unchanged.
    """
)
def statistics_in_a_config_with_a_soft_rule():
    registry, (model, layers) = equalize.GroupRegistry(), norms()
    registry.tie("norms", layers, Equal(), statistics=True)
    entry = json.loads(json.dumps(registry.get_config()))["groups"][-1]
    assert model.built
    equalize.GroupRegistry.from_config({"groups": [entry | {"rule": entry["rule"] | {"config": {"rate": 0.5}}}]})


@message(
    """
    The model 'unbuilt' has no weights to save, since it is not built. Expected: a built model. Build
    it, or call it once on data, before.
    """
)
def saving_of_a_model_that_is_not_built():
    save_model(keras.Sequential([keras.layers.Dense(2)], name="unbuilt"), "model.keras")
