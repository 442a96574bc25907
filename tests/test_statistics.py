"""Moving statistics of tied layers: with `statistics=True` they are equal after every step, and towers one function."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.callbacks import FactorSchedule, TieMonitor
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.saving import load_model, save_model
from tests.conftest import BACKEND, EveryStep, bits, bitwise_equal, in_new_processes
from tests.places import PLACES, make_devices, pieces_of


def tower(name, *, affine=True, plain=False):
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(4, activation="tanh", name="first"),
            *(
                []
                if plain
                else [keras.layers.BatchNormalization(momentum=0.5, center=affine, scale=affine, name="norm")]
            ),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(3, name="second"),
        ],
        name=name,
    )


def test_statistics_beside_free_weights_are_free():
    registry = equalize.GroupRegistry()
    registry.tie("towers", [tower("left"), tower("right")], None, statistics=True)
    assert {group.rule for group in registry.values()} == {None}


def model_of(towers, *, apart=True):
    """Each tower sees inputs of its own."""
    entrances = [keras.Input((5,)) for _ in towers]
    outputs = [each(entrance) for each, entrance in zip(towers, entrances, strict=True)]
    return keras.Model(entrances, keras.layers.Dense(1)(keras.layers.Concatenate()(outputs)))


def inputs(count, samples=32):
    generator = np.random.default_rng(0)
    x = [(generator.normal(size=(samples, 5)) * (1 + i) + i).astype("float32") for i in range(count)]
    return x, generator.normal(size=(samples, 1)).astype("float32")


def made(count=3, *, rule=None, optimizer=None, exact=False, affine=True, **compile_args):
    towers = [tower(f"tower_{i}", affine=affine) for i in range(count)]
    model, registry = model_of(towers), equalize.GroupRegistry()
    registry.tie("towers", towers, rule or Equal(), statistics=True)
    optimizer = optimizer or keras.optimizers.Adam(0.05)
    model.compile(TiedOptimizer(optimizer, registry) if exact else optimizer, "mse", **compile_args)
    return model, registry, towers


class StatisticsEveryStep(keras.callbacks.Callback):
    """The groups of statistics are equal after every step, and have moved."""

    def __init__(self, registry):
        super().__init__()
        self.groups = [group for name, group in registry.items() if "moving" in name]
        self.seen = set()

    def on_train_batch_end(self, batch, logs=None):
        assert self.model is not None
        for group in self.groups:
            assert bitwise_equal(*[member.variable for member in group.members]), (batch, group)
        self.seen.add(bits(self.groups[0].members[0].variable))


def train(model, registry, *, count=3, epochs=2, **kwargs):
    x, y = inputs(count)
    watch = StatisticsEveryStep(registry)
    assert len(watch.groups) == 2
    model.fit(
        x, y, epochs=epochs, batch_size=8, shuffle=False, verbose=0, callbacks=[EveryStep(registry), watch], **kwargs
    )
    assert len(watch.seen) == 4 * epochs


def one_function(towers):
    x = np.random.default_rng(1).normal(size=(16, 5)).astype("float32")
    return len({each.predict(x, verbose=0).tobytes() for each in towers}) == 1


MODES = {"tensorflow": [{}, {"jit_compile": True}, {"run_eagerly": True}]}.get(BACKEND, [{}, {"run_eagerly": True}])


@pytest.mark.sampled
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_two_towers_are_one_function_after_every_step(mode, exact):
    model, registry, towers = made(exact=exact, **mode)
    train(model, registry)
    registry.check()
    assert registry.diagnose() == []
    assert one_function(towers)


@pytest.mark.sampled
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rule", [Equal(rate=0.25), MeanL2(factor=0.1)])
def test_statistics_are_equal_under_every_rule(rule, affine):
    model, registry, _ = made(rule=rule, affine=affine)
    train(model, registry)
    registry.replace("towers", Equal())
    train(model, registry)


OPTIMIZERS = {
    "accumulation": lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2),
    "ema": lambda: keras.optimizers.SGD(0.05, use_ema=True),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=2.0**127),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_that_an_optimizer_does_not_take_are_steps_of_statistics(name):
    """Accumulation updates weights in every second step, and loss scaling skips one whose gradients overflow."""
    model, registry, towers = made(optimizer=OPTIMIZERS[name]())
    train(model, registry)
    assert name == "ema" or one_function(towers)


def test_the_mean_is_what_they_become():
    towers = [keras.layers.BatchNormalization(momentum=0.5, name=f"norm_{i}") for i in range(2)]
    entrances = [keras.Input((5,)) for _ in towers]
    model = keras.Model(entrances, [each(entrance) for each, entrance in zip(towers, entrances, strict=True)])
    registry = equalize.GroupRegistry()
    registry.tie("norms", towers, Equal(), statistics=True)
    model.compile("sgd", ["mse", "mse"])
    x, _ = inputs(2, samples=8)
    model.train_on_batch(x, x)
    expected = np.mean([0.5 * batch.mean(axis=0) for batch in x], axis=0)
    np.testing.assert_allclose(ops.convert_to_numpy(towers[0].moving_mean.value), expected, rtol=1e-4)
    spread = np.mean([0.5 + 0.5 * batch.var(axis=0) for batch in x], axis=0)
    np.testing.assert_allclose(ops.convert_to_numpy(towers[1].moving_variance.value), spread, rtol=1e-4)


def test_they_move_half_as_fast_as_those_of_one_layer_that_is_called_twice():
    x, _ = inputs(1, samples=8)
    distances = {}
    for calls in ("once", "twice"):
        norms = [keras.layers.BatchNormalization(momentum=0.99, name=f"norm_{i}") for i in range(2)]
        entrances = [keras.Input((5,)) for _ in norms]
        used = norms if calls == "once" else norms[:1] * 2
        model = keras.Model(entrances, [each(entrance) for each, entrance in zip(used, entrances, strict=True)])
        if calls == "once":
            equalize.GroupRegistry().tie("norms", norms, Equal(), statistics=True)
        model.compile("sgd", ["mse", "mse"])
        targets = x * 2
        model.fit(x * 2, targets, batch_size=8, epochs={"once": 69, "twice": 35}[calls], verbose=0)
        moved = ops.convert_to_numpy(norms[0].moving_mean.value) / x[0].mean(axis=0)
        distances[calls] = float(moved.mean())
    assert distances["once"] == pytest.approx(0.5, abs=0.005)
    assert distances["twice"] == pytest.approx(0.5, abs=0.01)


def test_statistics_of_a_frozen_layer_stay_and_the_others_take_them():
    model, registry, towers = made(2)
    towers[0].trainable = False
    norm = towers[0].get_layer("norm")
    norm.moving_mean.assign(np.full(4, 0.5, "float32"))
    registry.sync()
    model.compile("sgd", "mse")
    before = bits(norm.moving_mean)
    x, y = inputs(2)
    model.fit(x, y, batch_size=8, verbose=0)
    assert bits(norm.moving_mean) == before
    registry.check()
    assert one_function(towers)


def test_layers_in_inference_mode_train_their_weights():
    """Nothing is written that backpropagation needs."""
    towers = [keras.layers.BatchNormalization(name=f"norm_{i}") for i in range(2)]
    entrances = [keras.Input((5,)) for _ in towers]
    outputs = [each(entrance, training=False) for each, entrance in zip(towers, entrances, strict=True)]
    model, registry = keras.Model(entrances, outputs), equalize.GroupRegistry()
    registry.tie("norms", towers, Equal(), statistics=True)
    model.compile("sgd", ["mse", "mse"])
    x, _ = inputs(2)
    model.fit(x, [each + 1 for each in x], verbose=0)
    registry.check()
    assert bits(towers[0].beta) != np.zeros(5, "float32").tobytes()


@pytest.mark.sampled
@pytest.mark.parametrize("way", ["file", "config", "clone"])
def test_statistics_are_tied_in_copies(way, tmp_path):
    model, registry, _ = made(exact=way == "file")
    train(model, registry)
    if way == "file":
        save_model(model, tmp_path / "model.keras")
        copy, found = load_model(tmp_path / "model.keras")
    else:
        copy = keras.models.clone_model(model) if way == "clone" else keras.Model.from_config(model.get_config())
        copy.set_weights(model.get_weights())
        copy.compile("sgd", "mse")
        found = equalize.GroupRegistry.from_config(registry.get_config()).link(copy)
    assert list(found) == list(registry)
    train(copy, found)
    registry.check()


def test_ties_of_statistics_end_with_their_tie():
    model, registry, towers = made()
    names = [name for name in registry if "moving" in name]
    registry.untie(names[0])
    assert names[0] not in registry
    registry.untie("towers/norm/gamma", "towers/norm/beta")  # others keep them
    train_one = StatisticsEveryStep(registry)
    x, y = inputs(3)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[train_one])
    assert not bitwise_equal(*[each.get_layer("norm").moving_mean for each in towers])
    registry.untie("towers")
    assert list(registry) == []
    registry.tie("towers", towers, Equal(), statistics=True, initial="mean")
    for name in list(registry):
        if "moving" not in name:
            registry.untie(name)
    assert list(registry) == []


def test_what_is_done_to_a_tie_is_done_to_its_weights():
    model, registry, _ = made(2, rule=MeanL2(factor=0.1))
    x, y = inputs(2)
    assert float(ops.convert_to_numpy(registry.penalty("towers"))) > 0.0
    schedule = FactorSchedule(registry, "towers", lambda epoch: 0.1 * epoch)
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[schedule, TieMonitor(registry)]).history
    assert history["factor/towers/norm/gamma"] == [0.0, 0.1]
    assert "factor/towers/norm/moving_mean" not in history
    assert history["spread/towers/norm/moving_mean"] == [0.0, 0.0]
    advice = registry.advise(model, x, y, print_fn=lambda text: None)
    assert set(advice) == {name for name in registry if "moving" not in name}
    with pytest.raises(EqualizeError, match="has no penalty"):
        registry.penalty("towers/norm/moving_mean")
    registry.replace("towers", Equal())
    registry.sync("mean", "towers")
    registry.check()
    assert all(group.hard for group in registry.values())


def test_without_it_a_tie_warns_and_diagnose_finds_it():
    towers = [tower(f"tower_{i}", affine=i < 0) for i in range(2)]
    model, registry = model_of(towers), equalize.GroupRegistry()
    with pytest.warns(UserWarning, match=r"moving statistics that this does not tie \('towers/norm/moving_mean' and 1"):
        registry.tie("towers", towers, Equal())
    (finding,) = registry.diagnose()
    assert finding.kind == "statistics"
    assert "tower_0/norm/moving_mean" in finding.message
    registry.untie()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        registry.tie("soft", towers, MeanL2(factor=0.1))
        plain = [tower(f"plain_{i}", plain=True) for i in range(2)]
        registry.tie("plain", plain, Equal(), statistics=True)
        assert len([name for name in registry if name.startswith("plain")]) == 4
    assert model is not None
    assert registry.diagnose() == []


def test_a_tower_that_alone_has_statistics_is_tied_to_one_without():
    normalization = keras.layers.Normalization()
    towers = [
        keras.Sequential([keras.Input((5,)), *before, keras.layers.Dense(3, name="dense")], name=f"tower_{i}")
        for i, before in enumerate([[], [normalization]])
    ]
    registry = equalize.GroupRegistry()
    with pytest.warns(UserWarning, match="'towers/normalization/mean' and 1 more"):
        registry.tie("towers", towers, Equal())
    assert list(registry) == ["towers/dense/kernel", "towers/dense/bias"]


def test_a_layer_beside_the_tied_ones_may_have_statistics():
    normalization = keras.layers.Normalization()
    normalization.adapt(np.ones((4, 5), "float32"))
    layers = [keras.layers.Dense(5, name=f"dense_{i}") for i in range(2)]
    model = keras.Sequential([keras.Input((5,)), normalization, *layers])
    registry = equalize.GroupRegistry()
    registry.tie("layers", layers, Equal())
    model.compile("sgd", "mse")
    assert registry.diagnose() == []


def test_seeds_are_no_statistics_and_vectors_of_spectral_norms_are():
    layers = [keras.layers.SpectralNormalization(keras.layers.Dense(5), name=f"spectral_{i}") for i in range(2)]
    entrances = [keras.Input((5,)) for _ in layers]
    outputs = [keras.layers.Dropout(0.5)(each(entrance)) for each, entrance in zip(layers, entrances, strict=True)]
    model, registry = keras.Model(entrances, outputs), equalize.GroupRegistry()
    registry.tie("spectral", layers, Equal(), statistics=True)
    (vectors,) = [group for name, group in registry.items() if group.of_statistics]
    assert "vector_u" in vectors.name
    model.compile("sgd", ["mse", "mse"])
    x, _ = inputs(2)
    model.fit(x, x, batch_size=8, verbose=0, callbacks=[EveryStep(registry)])
    assert bitwise_equal(*[member.variable for member in vectors.members])


def test_arguments_and_structures_are_checked_before_anything_changes():
    model, registry, towers = made(2)
    before = {name: group.rule.describe() for name, group in registry.items()}
    for call, error, message in (
        (lambda: registry.tie("a", towers, Equal(), statistics=1), TypeError, "`statistics` must be True or False"),
        (
            lambda: registry.tie("a", [layer.layers[-1].kernel for layer in towers], MeanL2(), statistics=True),
            EqualizeError,
            "needs layers",
        ),
        (
            lambda: registry.tie("a", towers, MeanL2(factor=0.1), statistics=True),
            GroupMismatchError,
            "belong to 'towers/norm/moving_mean' already",
        ),
        (lambda: registry.replace("towers/norm/moving_mean", Equal(rate=0.5)), EqualizeError, "of moving statistics"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert {name: group.rule.describe() for name, group in registry.items()} == before
    assert model is not None


def test_a_loop_by_hand_keeps_statistics():
    model, registry, towers = made(2)
    x, y = inputs(2, samples=8)
    optimizer = keras.optimizers.SGD(0.05)
    if BACKEND == "jax":
        import jax

        optimizer.build(model.trainable_variables)

        def loss(trainable, fixed):
            prediction, fixed, losses = model.stateless_call(trainable, fixed, x, training=True, return_losses=True)
            return ops.mean(ops.square(prediction - y)) + sum(losses), fixed

        trainable, fixed, slots = (
            [v.value for v in vs]
            for vs in (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
        )
        (_, fixed), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable, fixed)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        for variables, values in ((model.trainable_variables, trainable), (model.non_trainable_variables, fixed)):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
    elif BACKEND == "torch":
        ((model(x, training=True) - ops.convert_to_tensor(y)) ** 2).mean().backward()
        optimizer.apply([v.value.grad for v in model.trainable_variables], model.trainable_variables)
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            error = tf.reduce_mean((model(x, training=True) - y) ** 2)
        optimizer.apply(tape.gradient(error, model.trainable_variables), model.trainable_variables)
    norms = [each.get_layer("norm") for each in towers]
    assert bitwise_equal(*[norm.moving_mean for norm in norms])
    assert bits(norms[0].moving_mean) != np.zeros(4, "float32").tobytes()
    registry.check()


def train_on_devices(exact):
    """What a new process does: statistics that are equal on each device after every step."""
    name = {"tensorflow": "MirroredStrategy", "jax": "DataParallel"}[BACKEND]
    place = PLACES[BACKEND][name]
    make_devices(place)
    with place.scope():
        model, registry, towers = made(2, exact=exact == "exact")
        if BACKEND == "tensorflow":
            model.compile(model.optimizer, "mse", jit_compile=False)  # XLA refuses steps on two devices (TF 2.21)
        norms = [each.get_layer("norm") for each in towers]
        seen = set()

        def look(batch, logs):
            if BACKEND == "jax":
                model.jax_state_sync()
            for one, other in zip(*[(norm.moving_mean, norm.moving_variance) for norm in norms], strict=True):
                first, second = ([value for *_, value in pieces_of(each)] for each in (one, other))
                assert len(first) > 1
                assert [each.tobytes() for each in first] == [each.tobytes() for each in second]
                seen.add(first[0].tobytes())

        x, y = inputs(2)
        watch = keras.callbacks.LambdaCallback(on_train_batch_end=look)
        model.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0, callbacks=[watch])
        assert len(seen) == 2 * 8
        registry.check()


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "torch", reason="Keras distributes no training over devices of PyTorch")
@pytest.mark.parametrize("way", ["hard", "exact"])
def test_statistics_are_equal_on_several_devices(way):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"} if BACKEND == "jax" else {}
    assert in_new_processes(train_on_devices, [(way,)], **environment) == [0]
