"""Ties that last: through files, new processes, copies, checkpoints and averages of weights."""

import copy
import functools
import inspect
import pathlib
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest

import equalize
from equalize.callbacks import TieMonitor
from equalize.constraints import Equal
from equalize.errors import NotLinkedError, TieBrokenError
from equalize.regularizers import MeanL2
from tests.conftest import EveryStep, bits, bitwise_equal, data, in_new_process, kernels, towers

HARD = functools.partial(Equal, "towers")


def momentum():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def compiled(*, seed=1, optimizer=None):
    """Three tied towers, with a soft tie of their biases, ready to train."""
    keras.utils.set_random_seed(seed)
    entrance = keras.Input((5,))
    layers = [
        keras.layers.Dense(
            4,
            activation="tanh",
            kernel_constraint=Equal("towers"),
            bias_regularizer=MeanL2("biases", 0.1),
            name=f"tower_{i}",
        )
        for i in range(3)
    ]
    joined = keras.layers.Concatenate()([layer(entrance) for layer in layers])
    model = keras.Model(entrance, keras.layers.Dense(1, name="head")(joined))
    registry = equalize.GroupRegistry().link(model)
    model.compile(optimizer or momentum(), "mse")
    model.optimizer.build(model.trainable_variables)  # Keras warns of a file with an optimizer that was never built
    return model, registry


def train(model, registry, *callbacks, epochs=2, initial_epoch=0, x=None, y=None, **kwargs):
    """Trains with a look at the members of hard groups after every step; returns the history."""
    if x is None:
        x, y = data()
    watch = EveryStep(registry)
    rounds = {"epochs": epochs, "initial_epoch": initial_epoch, "batch_size": len(x) // 4}
    run = model.fit(x, y, shuffle=False, verbose=0, callbacks=[watch, *callbacks], **rounds, **kwargs)
    assert watch.steps > 0
    return run.history


def state(model) -> list[bytes]:
    """Every weight and every optimizer slot, bit for bit."""
    return [bits(variable) for variable in [*model.variables, *model.optimizer.variables]]


def weights(model) -> list[bytes]:
    return [bits(variable) for variable in model.variables]


# ---- files, and a new process


def load_link_and_train_on(folder):
    """What a new process does with each saved model: load, link, train on, and tell every bit of it."""
    for name in ("model.keras", "model.h5"):
        model = keras.models.load_model(f"{folder}/{name}", compile=name == "model.keras")
        registry = equalize.GroupRegistry().link(model, initial="strict")
        assert list(registry) == ["towers", "biases"]
        if name == "model.h5":  # Keras 3 does not bring an optimizer's slots back from HDF5
            model.compile(momentum(), "mse")
        train(model, registry, epochs=4, initial_epoch=2)
        pathlib.Path(folder, f"{name}.state").write_bytes(pickle.dumps(state(model)))


@pytest.mark.parametrize("process", ["this", pytest.param("new", marks=pytest.mark.slow)])
def test_a_saved_model_trains_on_as_if_there_had_been_no_break(process, tmp_path):
    model, registry = compiled()
    train(model, registry)
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    halfway = model.get_weights()
    train(model, registry, epochs=4, initial_epoch=2)
    expected = {"model.keras": state(model)}
    model.set_weights(halfway)
    model.compile(momentum(), "mse")
    train(model, registry, epochs=4, initial_epoch=2)
    expected["model.h5"] = state(model)
    assert expected["model.keras"] != expected["model.h5"]  # the slots matter
    if process == "new":
        assert in_new_process(load_link_and_train_on, tmp_path) == 0
    else:
        load_link_and_train_on(tmp_path)
    assert {name: pickle.loads((tmp_path / f"{name}.state").read_bytes()) for name in expected} == expected


def test_a_loaded_model_does_not_train_before_it_is_linked(tmp_path):
    model, _ = compiled()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.all(np.isfinite(loaded.predict(data()[0], verbose=0)))
    with pytest.raises(NotLinkedError, match=r"link\(model\)"):
        loaded.fit(*data(), verbose=0)


@pytest.mark.slow
def test_weights_alone_bring_back_the_same_run(tmp_path):
    model, registry = compiled()
    train(model, registry)
    model.save_weights(tmp_path / "model.weights.h5")
    other, other_registry = compiled(seed=2)
    other.load_weights(tmp_path / "model.weights.h5")
    other_registry.check()
    assert state(other) == state(model)
    for each, its_registry in ((model, registry), (other, other_registry)):
        train(each, its_registry, epochs=4, initial_epoch=2)
    assert state(other) == state(model)


@pytest.mark.slow
def test_a_model_from_json_is_linked_anew_and_trains_like_the_original():
    model, registry = compiled()
    other = keras.models.model_from_json(model.to_json())
    other.set_weights(model.get_weights())
    other.compile(momentum(), "mse")
    other_registry = equalize.GroupRegistry().link(other, initial="strict")
    assert [len(group.members) for group in other_registry.values()] == [3, 3]
    for each, its_registry in ((model, registry), (other, other_registry)):
        train(each, its_registry)
    assert state(other) == state(model)


def test_two_loads_of_one_file_are_tied_apart(tmp_path):
    model, _ = compiled()
    model.save(tmp_path / "model.keras")
    one, two = (keras.models.load_model(tmp_path / "model.keras") for _ in range(2))
    registries = [equalize.GroupRegistry().link(each) for each in (one, two)]
    before = state(model), state(two)
    train(one, registries[0])
    assert (state(model), state(two)) == before
    train(two, registries[1])
    assert state(two) == state(one) != state(model)


# ---- copies


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.sampled
def test_a_copy_of_a_tied_model_is_tied_apart_from_the_original(duplicate):
    model, registry = compiled()
    train(model, registry)
    other = duplicate(model)
    before = state(model)
    with pytest.raises(NotLinkedError, match="has never been linked"):
        other.fit(*data(), verbose=0)
    other_registry = equalize.GroupRegistry().link(other, initial="strict")
    train(other, other_registry)
    assert state(model) == before
    copied = weights(other)
    train(model, registry)
    assert weights(other) == copied
    assert weights(model) != before[: len(copied)]
    registry.check()
    other_registry.check()


@pytest.mark.slow
def test_a_copy_of_a_model_tied_by_tie_is_untied_and_a_tied_optimizer_goes_with_it(tmp_path):
    model = towers(2)
    registry = equalize.GroupRegistry()
    registry.tie("towers", kernels(model), Equal())
    for optimizer in (momentum(), equalize.optimizers.TiedOptimizer(momentum(), registry)):
        model.compile(optimizer, "mse")
        model.optimizer.build(model.trainable_variables)
        model.save(tmp_path / "model.keras")
        copies = [keras.models.load_model(tmp_path / "model.keras"), keras.models.clone_model(model)]
        copies[1].compile(momentum(), "mse")
        for other in copies:  # a `TiedOptimizer` is copied with the model, and links itself
            other.fit(*data(), verbose=0)
            tied = isinstance(optimizer, equalize.optimizers.TiedOptimizer)
            assert bitwise_equal(*kernels(other)) == tied
            if not tied:  # which is why the docs of `tie` say it: nothing can see what is not there
                copied = equalize.GroupRegistry.from_config(registry.get_config())
                with pytest.warns(UserWarning, match="have been trained"):
                    copied.link(other)
                train(other, copied)


@pytest.mark.slow
def test_a_clone_is_tied_apart_from_the_original():
    model, registry = compiled()
    before = weights(model)
    clone = keras.models.clone_model(model)
    clone.compile(momentum(), "mse")
    clone_registry = equalize.GroupRegistry().link(clone)
    train(clone, clone_registry)
    assert weights(model) == before
    trained = weights(clone)
    train(model, registry)
    assert weights(clone) == trained
    assert weights(model) != before


# ---- wrappers, and parts of a model


def bidirectional():
    layer = keras.layers.LSTM(2, kernel_constraint=Equal("kernel"), recurrent_constraint=Equal("recurrent"))
    return keras.layers.Bidirectional(layer), {"kernel": 2, "recurrent": 2}


def time_distributed():
    layers = [keras.layers.Dense(3, kernel_constraint=Equal("kernel"), activation="tanh") for _ in range(2)]
    return keras.layers.TimeDistributed(keras.Sequential(layers)), {"kernel": 2}


@pytest.mark.parametrize("wrapper", [bidirectional, time_distributed])
@pytest.mark.slow
def test_a_rule_given_to_the_inner_layer_ties_what_a_wrapper_makes_of_it_and_survives_saving(wrapper, tmp_path):
    layer, expected = wrapper()
    model = keras.Sequential([keras.Input((4, 3)), layer])
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(8, *shape[1:])).astype("float32") for shape in (model.input_shape, model.output_shape))
    registry = equalize.GroupRegistry().link(model)
    model.compile(momentum(), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded_registry = equalize.GroupRegistry().link(loaded, initial="strict")
    for each, its_registry in ((model, registry), (loaded, loaded_registry)):
        assert {name: len(group.members) for name, group in its_registry.items()} == expected
        before = weights(each)
        train(each, its_registry, x=x, y=y)
        assert weights(each) != before
        its_registry.check()
    one, two = (each.trainable_variables + each.optimizer.variables for each in (loaded, model))
    assert [bits(variable) for variable in one] == [bits(variable) for variable in two]  # LSTM seeds are apart


@pytest.mark.slow
def test_a_part_taken_out_of_an_untied_model_trains_alone():
    model, registry = compiled()
    train(model, registry)
    registry.untie()
    part = keras.Sequential([keras.Input((5,)), model.get_layer("tower_1"), keras.layers.Dense(1)])
    others = [bits(model.get_layer(f"tower_{i}").kernel) for i in (0, 2)]
    before = bits(model.get_layer("tower_1").kernel)
    part.compile(momentum(), "mse")
    part.fit(*data(), batch_size=8, verbose=0)
    assert bits(model.get_layer("tower_1").kernel) != before
    assert [bits(model.get_layer(f"tower_{i}").kernel) for i in (0, 2)] == others == [before, before]


# ---- checkpoints whose copies differ


def test_strict_linking_says_which_copies_of_a_checkpoint_differ_and_by_how_much(tmp_path):
    plain = towers(3)
    for kernel in kernels(plain):
        kernel.assign(np.zeros(kernel.shape))
    kernels(plain)[1].assign(np.full((5, 4), 0.25))
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = towers(3, constraint=HARD)
    model.load_weights(tmp_path / "plain.weights.h5")
    before = weights(model)
    with pytest.raises(TieBrokenError, match=r"(?s)'towers'.*tower_1/kernel.*0\.25"):
        equalize.GroupRegistry().link(model, initial="strict")
    assert weights(model) == before
    registry = equalize.GroupRegistry().link(model, initial="mean")
    registry.check()
    assert np.allclose(keras.ops.convert_to_numpy(registry["towers"].value), 0.25 / 3, rtol=1e-6)


def test_loading_copies_that_differ_into_a_linked_model_is_found_and_mended_by_the_next_step(tmp_path):
    plain = towers(3)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = towers(3, constraint=HARD)
    registry = equalize.GroupRegistry().link(model)
    model.load_weights(tmp_path / "plain.weights.h5")
    with pytest.raises(TieBrokenError, match="'towers': spread"):
        registry.check()
    model.compile(momentum(), "mse")
    train(model, registry, epochs=1)
    registry.check()


# ---- callbacks of Keras that write weights


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.sampled
def test_averages_of_weights_end_equal(swap):
    model, registry = compiled(optimizer=keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.8))
    swaps = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)] if swap else []
    monitor = TieMonitor(registry)
    train(model, registry, *swaps, monitor, epochs=3)
    assert list(monitor.broken) == ["towers"]
    assert bitwise_equal(*kernels(model))


@pytest.mark.slow
def test_the_checkpoint_with_the_best_weights_is_equal(tmp_path):
    file = tmp_path / "best.keras"
    model, registry = compiled(optimizer=keras.optimizers.SGD(0.6, momentum=0.9))
    best = keras.callbacks.ModelCheckpoint(str(file), monitor="val_loss", save_best_only=True)
    losses = train(model, registry, best, epochs=6, validation_data=data(seed=1))["val_loss"]
    assert losses[-1] > min(losses)
    loaded = keras.models.load_model(file)
    loaded_registry = equalize.GroupRegistry().link(loaded, initial="strict")
    assert loaded.evaluate(*data(seed=1), verbose=0) == pytest.approx(min(losses), rel=1e-5)
    train(loaded, loaded_registry, epochs=1)
    loaded_registry.check()


@pytest.mark.slow
def test_the_best_weights_that_early_stopping_restores_are_equal():
    model, registry = compiled(optimizer=keras.optimizers.SGD(0.6, momentum=0.9))
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True)
    losses = train(model, registry, stop, epochs=12, validation_data=data(seed=1))["val_loss"]
    assert losses[-1] > min(losses)
    assert bitwise_equal(*kernels(model))
    assert model.evaluate(*data(seed=1), verbose=0) == pytest.approx(min(losses), rel=1e-5)


# ---- what was untied


class OwnLayer(keras.layers.Layer):
    """A layer that hands its constraints, in a dictionary, to a layer inside it."""

    def __init__(self, constraints, **kwargs):
        super().__init__(**kwargs)
        self.constraints = {key: keras.constraints.get(value) for key, value in constraints.items()}
        self.inner = keras.layers.Dense(2, kernel_constraint=self.constraints["kernel"])

    def call(self, x):
        return self.inner(x)

    def get_config(self):
        constraints = {key: keras.constraints.serialize(value) for key, value in self.constraints.items()}
        return super().get_config() | {"constraints": constraints}


DECLARED = {
    "dense": lambda rule: keras.layers.Dense(2, kernel_constraint=rule),
    "regularized": lambda rule: keras.layers.Dense(2, kernel_regularizer=MeanL2("g", inner="l2")),
    "convolution": lambda rule: keras.layers.SeparableConv1D(2, 2, pointwise_constraint=rule),
    "recurrent": lambda rule: keras.layers.LSTM(2, recurrent_constraint=rule),
    "wrapped": lambda rule: keras.layers.TimeDistributed(keras.layers.Dense(2, kernel_constraint=rule)),
    "bidirectional": lambda rule: keras.layers.Bidirectional(keras.layers.GRU(2, kernel_constraint=rule)),
    "normalization": lambda rule: keras.layers.BatchNormalization(gamma_constraint=rule),
    "nested": lambda rule: keras.Sequential([keras.Input((4, 3)), keras.layers.Dense(2, kernel_constraint=rule)]),
    "own": lambda rule: OwnLayer({"kernel": rule}),
    "attention": lambda rule: keras.layers.MultiHeadAttention(3, 3, kernel_constraint=rule),
}


@pytest.mark.parametrize("kind", DECLARED)
@pytest.mark.sampled
def test_a_model_that_was_untied_is_plain_keras_config_included(kind):
    rule = Equal("g", inner=keras.constraints.MaxNorm(3.0))
    entrance = keras.Input((4, 3))
    layers = [DECLARED[kind](rule) for _ in range(2)]
    inputs = [entrance] * (2 if kind == "attention" else 1)
    model = keras.Model(entrance, [layer(*inputs) for layer in layers])
    registry = equalize.GroupRegistry().link(model)
    assert "equalize" in str(keras.saving.serialize_keras_object(model))
    registry.untie()
    config = str(keras.saving.serialize_keras_object(model))
    assert "equalize" not in config
    assert config.count("'L2'" if kind == "regularized" else "'MaxNorm'") >= 2
    with pytest.raises(NotLinkedError, match="No rule was found"):
        equalize.GroupRegistry().link(model)


def test_untying_one_group_leaves_the_rules_of_others_and_of_copies():
    entrance = keras.Input((4,))
    layers = [
        keras.layers.Dense(4, kernel_constraint=Equal("kernels"), bias_constraint=Equal("biases")) for _ in range(2)
    ]
    model = keras.Model(entrance, [layer(entrance) for layer in layers])
    copied = keras.models.clone_model(model)
    registry = equalize.GroupRegistry().link(model)
    equalize.GroupRegistry().link(copied)
    registry.untie("kernels")
    assert all(layer.kernel_constraint is None and layer.bias_constraint.group == "biases" for layer in layers)
    assert all(layer.kernel_constraint.group == "kernels" for layer in copied.layers[1:])


def load_without_equalize(file, expected):
    """What a process does where equalize is not installed: loads a model, compares its predictions, trains it."""
    sys.modules["equalize"] = None
    model = keras.models.load_model(file)
    x, y = data()
    prediction = model.predict(x, verbose=0)
    np.testing.assert_allclose(prediction, np.load(expected), rtol=1e-5)  # by other threads, so in another order
    model.fit(x, y, verbose=0)


@pytest.mark.slow
@pytest.mark.parametrize("save", [keras.saving.save_model, equalize.saving.save_model])
def test_a_model_that_was_untied_loads_where_equalize_is_not_installed(save, tmp_path):
    model, registry = compiled()
    train(model, registry, epochs=1)
    registry.untie()
    if save is equalize.saving.save_model:  # what `tie` made is in no layer's config
        kernels = [layer.kernel for layer in model.layers if layer.name.startswith("tower_")]
        registry.tie("again", kernels, Equal())
    save(model, tmp_path / "model.keras")
    np.save(tmp_path / "expected.npy", model.predict(data()[0], verbose=0))
    # The tests' own modules need equalize, so this function's source runs by itself.
    source = inspect.getsource(load_without_equalize) + inspect.getsource(data)
    call = f"load_without_equalize({str(tmp_path / 'model.keras')!r}, {str(tmp_path / 'expected.npy')!r})"
    imports = "import sys; import keras; import numpy as np\n"
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"{imports}{source}\n{call}"], check=True, cwd=tmp_path)
