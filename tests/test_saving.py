"""Files of tied models: small, readable by Keras, never half written, and tied again when they are loaded."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import zipfile

import h5py
import keras
import numpy as np
import pytest

import equalize
from benchmarks.memory.files import model_of
from equalize.callbacks import TiedCheckpoint
from equalize.constraints import Equal, GroupConstraint
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.saving import deduplicate, load_model, save_model, save_weights
from equalize.views import Transpose
from tests.conftest import EveryStep, bits, bitwise_equal, data, in_new_process, kernels, towers
from tests.test_faults import full_disk


@keras.saving.register_keras_serializable("tests_saving")
class Halves(GroupConstraint):
    """Two members that add up to the same as before and are equal: a rule of a user's own."""

    def project(self, values):
        return [0.5 * (values[0] + values[1])] * 2


def tied(way):
    """A model of towers that are tied in some way, with the registry."""
    model = towers(3, constraint=(lambda: Equal("towers")) if way == "declared" else None)
    registry = equalize.GroupRegistry()
    optimizer = keras.optimizers.Adam(0.05)
    if way == "declared":
        registry.link(model)
    elif way in ("hard", "exact"):
        registry.tie("towers", kernels(model), Equal())
    elif way == "layers":
        registry.tie("towers", [layer for layer in model.layers if layer.name.startswith("tower_")], Equal(rate=0.25))
    elif way == "own":
        registry.tie("towers", kernels(model)[:2], Halves())
    else:
        registry.tie("towers", kernels(model), MeanL2(factor=0.5))
        registry.tie("anchored", [kernels(model)[0], np.ones((5, 4), "float32")], Equal(rate=0.1))
    model.compile(TiedOptimizer(optimizer, registry) if way == "exact" else optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model, registry


WAYS = ["declared", "hard", "exact", "layers", "own", "soft"]


def train(model, registry, *callbacks, epochs=2):
    x, y = data()
    watch = EveryStep(registry)
    model.fit(x, y, epochs=epochs, batch_size=8, shuffle=False, verbose=0, callbacks=[watch, *callbacks])


def state(model):
    return [bits(variable) for variable in [*model.variables, *model.optimizer.variables]]


def ties_in(file):
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read("equalize.json"))["registry"]["groups"]


def datasets(file):
    """How many arrays an HDF5 file names, and how many it stores."""
    addresses = []
    with h5py.File(file) as opened:

        def walk(group):
            for item in group.values():
                if isinstance(item, h5py.Group):
                    walk(item)
                else:
                    addresses.append(h5py.h5o.get_info(item.id).addr)

        walk(opened)
    return len(addresses), len(set(addresses))


# ---- what is saved is loaded, tied


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_from_a_file_as_if_there_had_been_no_break(way, tmp_path):
    model, registry = tied(way)
    train(model, registry)
    save_model(model, tmp_path / "model.keras", registry)
    loaded, found = load_model(tmp_path / "model.keras")
    assert state(loaded) == state(model)
    assert list(found) == list(registry)
    assert {name: group.rule.describe() for name, group in found.items()} == {
        name: group.rule.describe() for name, group in registry.items()
    }
    train(model, registry)
    train(loaded, found)
    assert state(loaded) == state(model)
    assert not {id(m.variable) for g in found.values() for m in g.members} & {id(v) for v in model.variables}


def load_and_train(folder):
    model, registry = load_model(f"{folder}/model.keras")
    train(model, registry)
    save_model(model, f"{folder}/after.keras", registry)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["hard", "exact"])
def test_a_run_goes_on_in_a_new_process(way, tmp_path):
    model, registry = tied(way)
    train(model, registry)
    save_model(model, tmp_path / "model.keras", registry)
    assert in_new_process(load_and_train, tmp_path) == 0
    train(model, registry)
    after, found = load_model(tmp_path / "after.keras")
    assert state(after) == state(model)
    assert list(found) == ["towers"]


def test_without_a_registry_all_ties_of_the_model_are_saved(tmp_path):
    model = towers(3)
    first, second = equalize.GroupRegistry(), equalize.GroupRegistry()
    first.tie("kernels", kernels(model), Equal())
    second.tie("biases", [layer.bias for layer in model.layers if layer.name.startswith("tower_")], MeanL2(factor=0.1))
    save_model(model, tmp_path / "all.keras")
    save_model(model, tmp_path / "first.keras", first)
    assert list(load_model(tmp_path / "all.keras")[1]) == ["kernels", "biases"]
    assert list(load_model(tmp_path / "first.keras")[1]) == ["kernels"]


def test_a_file_that_keras_wrote_is_loaded_with_the_ties_that_it_has(tmp_path):
    for way, names in (("declared", ["towers"]), ("exact", ["towers"]), ("hard", [])):
        model, _ = tied(way)
        model.save(tmp_path / "model.keras")
        loaded, registry = load_model(tmp_path / "model.keras")
        assert list(registry) == names
        assert state(loaded) == state(model)


def test_ties_are_loaded_without_the_optimizer_too(tmp_path):
    model, registry = tied("exact")
    save_model(model, tmp_path / "model.keras", registry)
    _, found = load_model(tmp_path / "model.keras", compile=False)
    assert list(found) == ["towers"]


def test_views_weights_and_models_within_models_come_back(tmp_path):
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    outer = keras.layers.Dense(4)
    model = keras.Sequential([keras.Input((4,)), inner, outer])
    registry = equalize.GroupRegistry()
    registry.tie("codes", [inner.layers[0].kernel, (outer.kernel, Transpose())], Equal())
    save_model(model, tmp_path / "model.keras")
    loaded, found = load_model(tmp_path / "model.keras")
    group = found["codes"]
    assert group.members[0].variable is loaded.layers[0].layers[0].kernel
    assert isinstance(group.members[1].view, Transpose)
    assert group.spread() == 0.0


@pytest.mark.parametrize("custom_objects", [True, False])
def test_a_rule_that_is_not_registered_needs_custom_objects(custom_objects, tmp_path):
    class Unknown(Halves):
        pass

    model = towers(2)
    registry = equalize.GroupRegistry()
    with keras.saving.custom_object_scope({"Unknown": Unknown}):
        registry.tie("towers", kernels(model), Unknown())
        save_model(model, tmp_path / "model.keras")
    if custom_objects:
        _, found = load_model(tmp_path / "model.keras", custom_objects={"Unknown": Unknown})
        assert type(found["towers"].rule) is Unknown
    else:
        with pytest.raises(EqualizeError, match="register_keras_serializable"):
            load_model(tmp_path / "model.keras")


# ---- what is equal is stored once


def test_a_file_holds_equal_arrays_once_and_keras_reads_all_of_them(tmp_path):
    model, registry = tied("exact")
    train(model, registry)
    save_model(model, tmp_path / "small.keras", registry)
    model.save(tmp_path / "large.keras")
    for name in ("small", "large"):
        with zipfile.ZipFile(tmp_path / f"{name}.keras") as archive:
            archive.extract("model.weights.h5", tmp_path / name)
    named, stored = datasets(tmp_path / "small" / "model.weights.h5")
    assert datasets(tmp_path / "large" / "model.weights.h5") == (named, named)
    assert stored == named - 2  # of three kernels, one
    registry.untie()
    x, _ = data()
    plain = keras.models.load_model(tmp_path / "small.keras", compile=False)
    assert np.array_equal(plain.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "mixed_bfloat16"])
def test_weights_of_every_dtype_are_what_they_were(dtype, doubles, tmp_path):
    model = towers(3, dtype=dtype)
    equalize.GroupRegistry().tie("towers", kernels(model), Equal())
    save_weights(model, tmp_path / "model.weights.h5")
    named, stored = datasets(tmp_path / "model.weights.h5")
    assert named - stored >= 2
    other = towers(3, dtype=dtype)
    other.load_weights(tmp_path / "model.weights.h5")
    assert [bits(v) for v in other.variables] == [bits(v) for v in model.variables]


@pytest.mark.parametrize("ending", ["keras", "weights.h5"])
def test_deduplicate_makes_a_file_of_keras_small_and_once_is_enough(ending, tmp_path):
    layers = [keras.layers.Dense(64, kernel_initializer="ones", name=f"layer_{i}") for i in range(4)]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Normalization()])
    model.layers[-1].adapt(np.ones((4, 64), "float32"))
    file = tmp_path / f"model.{ending}"
    model.save(file) if ending == "keras" else model.save_weights(file)
    size = file.stat().st_size
    before, after = deduplicate(file)
    assert (before, after) == (size, file.stat().st_size)
    assert after < 0.5 * before
    assert deduplicate(file) == (after, after)
    if ending == "keras":
        loaded = keras.models.load_model(file)
    else:
        loaded = keras.models.clone_model(model)
        loaded.load_weights(file)
    assert [bits(v) for v in loaded.variables] == [bits(v) for v in model.variables]
    assert os.listdir(tmp_path) == [file.name]


def test_arrays_that_differ_in_shape_dtype_bits_or_note_stay_apart(tmp_path):
    file = tmp_path / "odd.weights.h5"
    nan = np.array([np.nan, -np.nan], "float32")
    nan.view("uint32")[1] += 1
    arrays = {
        "zeros": np.zeros((2, 3), "float32"),
        "turned": np.zeros((3, 2), "float32"),
        "wide": np.zeros((2, 3), "float64"),
        "negative": np.full((2, 3), -0.0, "float32"),
        "whole": np.zeros((2, 3), "int32"),
        "noted": np.zeros((2, 3), "float32"),
        "nan": nan[:1],
        "other nan": nan[1:],
        "empty": np.zeros((0, 3), "float32"),
        "scalar": np.float32(0),
    }
    with h5py.File(file, "w") as opened:
        for name, array in arrays.items():
            opened.create_group(name).create_dataset("again", data=array)
            opened[name]["array"] = array
        opened["noted/array"].attrs["dtype"] = "bfloat16"
        opened["noted/again"].attrs["dtype"] = "bfloat16"
        opened["noted"].attrs["name"] = "kept"
    deduplicate(file)
    with h5py.File(file) as opened:
        assert opened["noted"].attrs["name"] == "kept"
        assert opened["noted/again"].attrs["dtype"] == "bfloat16"
        for name, array in arrays.items():
            for key in ("array", "again"):
                assert opened[name][key].dtype == array.dtype
                assert opened[name][key][()].tobytes() == array.tobytes()
        addresses = {name: h5py.h5o.get_info(opened[name]["array"].id).addr for name in arrays}
    assert len(set(addresses.values())) == len(arrays)
    assert datasets(file) == (2 * len(arrays), len(arrays) + 1)  # what is empty takes no room


# ---- files are whole, or as they were


def test_what_was_left_by_a_process_that_died_is_cleared(tmp_path):
    (tmp_path / ".model.keras.saving").mkdir()
    (tmp_path / ".model.keras.saving" / "model.keras").write_text("half")
    model, registry = tied("hard")
    save_model(model, tmp_path / "model.keras", registry)
    assert os.listdir(tmp_path) == ["model.keras"]
    os.symlink("model.keras", tmp_path / "link.keras")
    save_model(model, tmp_path / "link.keras")
    assert (tmp_path / "link.keras").is_symlink()
    assert ties_in(tmp_path / "model.keras")


@pytest.mark.parametrize("write", [save_model, save_weights, "deduplicate"])
def test_who_has_the_old_file_open_reads_it_to_the_end(write, tmp_path):
    """A file that is replaced in one step is never half written; one that is written over is, for a while."""
    model, _ = tied("hard")
    file = tmp_path / ("model.weights.h5" if write is save_weights else "model.keras")
    model.save_weights(file) if write is save_weights else model.save(file)
    whole = file.read_bytes()
    with file.open("rb") as opened:
        deduplicate(file) if write == "deduplicate" else write(model, file)
        assert opened.read() == whole
    assert file.read_bytes() != whole


@pytest.mark.parametrize("part", [0.02, 0.4, 0.97])
@pytest.mark.parametrize("write", [save_model, save_weights, "deduplicate"])
def test_a_full_disk_leaves_the_old_file(write, part, tmp_path):
    model, registry = tied("hard")
    file = tmp_path / ("model.weights.h5" if write is save_weights else "model.keras")
    if write == "deduplicate":
        model.save(file)
    else:
        write(model, file)
    whole, size = file.read_bytes(), file.stat().st_size
    if write == "deduplicate":
        size = deduplicate(file)[1]
        file.write_bytes(whole)
    with full_disk(int(part * size)), pytest.raises(OSError, match="File too large"):
        deduplicate(file) if write == "deduplicate" else write(model, file)
    assert file.read_bytes() == whole
    assert os.listdir(tmp_path) == [file.name]
    registry.check()


def save_again_and_again(folder):
    model, registry = tied("exact")
    count = 0
    while True:
        model.get_layer("tower_0").bias.assign(np.full(4, count, "float32"))
        save_model(model, f"{folder}/model.keras", registry)
        count += 1
        print(count, flush=True)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    """Two hundred times; each time the file is one that was saved, from the first byte to the last."""
    code = f"from tests.test_saving import save_again_and_again; save_again_and_again({str(tmp_path)!r})"
    delays = random.Random(0)
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()
            for _ in range(50):  # a process takes long to start, so a stopped one stands for a killed one
                child.send_signal(signal.SIGCONT)
                time.sleep(0.05 * delays.random())
                child.send_signal(signal.SIGSTOP)
                with zipfile.ZipFile(tmp_path / "model.keras") as archive:
                    assert archive.testzip() is None
                    archive.extract("model.weights.h5", tmp_path / "found")
                assert datasets(tmp_path / "found" / "model.weights.h5")[0] > 10
            child.kill()
        loaded, registry = load_model(tmp_path / "model.keras")
        assert bitwise_equal(*kernels(loaded))
        assert list(registry) == ["towers"]
    save_model(loaded, tmp_path / "model.keras")
    assert sorted(os.listdir(tmp_path)) == ["found", "model.keras"]


# ---- files that were changed


def changed(file, ties):
    """The same archive with other ties."""
    made = file.with_name("changed.keras")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(made, "w") as target:
        for name in source.namelist():
            if name != "equalize.json":
                target.writestr(name, source.read(name))
        target.writestr("equalize.json", ties)
    return made


def test_ties_that_were_changed_are_an_error_and_nothing_is_tied(tmp_path):
    model, registry = tied("soft")
    save_model(model, tmp_path / "model.keras", registry)
    groups = ties_in(tmp_path / "model.keras")
    lost = json.loads(json.dumps(groups))
    lost[1]["members"][0] |= {"path": "nowhere/kernel", "places": [["0" * 16, 0, "nowhere/vars/0"]]}
    other = json.loads(json.dumps(groups))
    other[0]["rule"]["registered_name"] = "os>system"
    for ties, error, message in (
        ("{", EqualizeError, "are damaged"),
        ("[]", EqualizeError, "expected a registry"),
        ('{"registry": 3}', EqualizeError, "not the config of a registry"),
        (json.dumps({"registry": {"groups": groups[:1] * 2}}), EqualizeError, "a name of its own"),
        (json.dumps({"registry": {"groups": lost}}), GroupMismatchError, "Cannot find the member 'nowhere/kernel'"),
        (json.dumps({"registry": {"groups": other}}), EqualizeError, "registered"),
    ):
        with pytest.raises(error, match=message):
            load_model(changed(tmp_path / "model.keras", ties))


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "text.keras").write_text("no archive")
    (tmp_path / "text.weights.h5").write_text("no weights")
    for name in ("text.keras", "text.weights.h5"):
        with pytest.raises(EqualizeError, match="Keras wrote"):
            deduplicate(tmp_path / name)
    with h5py.File(tmp_path / "elsewhere.weights.h5", "w") as file:
        file["link"] = h5py.ExternalLink("secret.h5", "/data")
    with h5py.File(tmp_path / "circle.weights.h5", "w") as file:
        file.create_group("a")["b"] = file["/"]
    for name in ("elsewhere", "circle"):
        with pytest.raises(EqualizeError, match="Expected: a file that Keras wrote"):
            deduplicate(tmp_path / f"{name}.weights.h5")
    for call in (deduplicate, load_model):
        with pytest.raises(EqualizeError, match="There is no file"):
            call(tmp_path / "none.keras")


def test_arguments_are_checked_before_anything_is_written(tmp_path):
    model, registry = tied("hard")
    other = towers(2)
    registry.tie("over both", [kernels(model)[0], kernels(other)[0]], MeanL2(factor=0.1))
    for call, error, message in (
        (lambda: save_model(model, tmp_path / "model.h5"), EqualizeError, r"'\.keras'"),
        (lambda: save_model(model, "gs://bucket/model.keras"), EqualizeError, "local disk"),
        (lambda: save_model("model", tmp_path / "model.keras"), TypeError, "Keras model"),
        (lambda: save_model(model, tmp_path / "model.keras", "registry"), TypeError, "GroupRegistry"),
        (lambda: save_model(model, tmp_path / "model.keras", registry), EqualizeError, "over both"),
        (lambda: save_model(model, tmp_path / "model.keras"), EqualizeError, "over both"),
        (lambda: save_weights(keras.Sequential(), tmp_path / "model.weights.h5"), EqualizeError, "not built"),
        (lambda: save_model(model, 3), TypeError, "the path"),
        (lambda: save_weights(model, tmp_path / "model.h5"), EqualizeError, r"weights\.h5"),
        (lambda: deduplicate(tmp_path), EqualizeError, "end in"),
        (lambda: TiedCheckpoint(tmp_path / "model.keras", "registry"), TypeError, "GroupRegistry"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert os.listdir(tmp_path) == []


# ---- checkpoints


@pytest.mark.parametrize("way", ["hard", "exact"])
def test_checkpoints_are_small_and_tied(way, tmp_path):
    model, registry = tied(way)
    last = TiedCheckpoint(str(tmp_path / "last.keras"), registry)
    numbered = TiedCheckpoint(tmp_path / "{epoch:02d}.weights.h5", save_weights_only=True)
    best = TiedCheckpoint(tmp_path / "best.keras", registry, monitor="loss", save_best_only=True, save_freq=3)
    train(model, registry, last, numbered, best)
    assert sorted(os.listdir(tmp_path)) == ["01.weights.h5", "02.weights.h5", "best.keras", "last.keras"]
    loaded, found = load_model(tmp_path / "last.keras")
    assert state(loaded) == state(model)
    assert list(found) == ["towers"]
    named, stored = datasets(tmp_path / "02.weights.h5")
    assert named - stored >= 2
    other = towers(3)
    other.load_weights(tmp_path / "02.weights.h5")
    assert [bits(v) for v in other.variables] == [bits(v) for v in model.variables]
    assert list(load_model(tmp_path / "best.keras")[1]) == ["towers"]


@pytest.mark.slow
def test_twelve_tied_blocks_take_the_room_of_one(tmp_path):
    save_model(model_of("tied", 192), tmp_path / "tied.keras")
    save_model(model_of("again", 192), tmp_path / "one.keras")
    sizes = {name: pathlib.Path(tmp_path / f"{name}.keras").stat().st_size for name in ("tied", "one")}
    assert sizes["tied"] <= 1.05 * sizes["one"]
