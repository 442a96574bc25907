"""The laws of hard and partial ties through real `fit`, with the members compared bit for bit after every step."""

import functools
import itertools

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from tests import bare
from tests.conftest import (
    BACKEND,
    MODES,
    QUICK,
    Blocked,
    EveryStep,
    Recorder,
    bits,
    bitwise_equal,
    compile_quickly,
    data,
    fit,
    kernels,
    towers,
)

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
else:
    import torch

OTHERS = [mode for mode in MODES if mode != QUICK] or [QUICK]

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.9, centered=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.1),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "weight decay": lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
    "clipnorm": lambda: keras.optimizers.Adam(0.01, clipnorm=1e-2),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.01, global_clipnorm=1e-2),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=1e-2),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3),
}


class AfterStep(keras.callbacks.Callback):
    """Calls a function after one step of the training."""

    def __init__(self, step, function):
        super().__init__()
        self.step, self.function = step, function

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.step:
            if BACKEND == "jax":
                self.model.jax_state_sync()
            self.function()


def tied_towers(n=3, *, rate=1.0, **kwargs):
    model = towers(n, constraint=lambda: Equal("towers", rate=rate), **kwargs)
    if len(kwargs.get("frozen", ())) > 1:
        start_from(*kernels(model))  # frozen members must agree
    return model, equalize.GroupRegistry().link(model)


def tower(model, i):
    return model.get_layer(f"tower_{i}")


def biases(model, n=3):
    return [tower(model, i).bias for i in range(n)]


def train(model, registry, *, mode=QUICK, **kwargs):
    return fit(model, registry, **MODES[mode] | kwargs)


def train_apart(model, registry, twins, **kwargs):
    """Trains, and makes sure that there was something to keep equal.

    All members must have moved and be finite. The twins, untied variables beside the members that started equal,
    must have come apart, since the members got different gradients.
    """
    members = [member.variable for group in registry.values() for member in group.members]
    before = [bits(variable) for variable in members]
    assert members
    assert bitwise_equal(*twins)
    watch = train(model, registry, **kwargs)
    assert not bitwise_equal(*twins)
    assert all(bits(variable) != old for variable, old in zip(members, before, strict=True))
    assert all(np.isfinite(ops.convert_to_numpy(ops.cast(variable.value, "float32"))).all() for variable in members)
    return watch


def train_recorded(model, variables, optimizer, *, x=None, y=None, epochs=1, callbacks=(), **compile_args):
    """What the variables held before training and after every step, an array of shape (steps + 1, variables, ...)."""
    if x is None:
        x, y = data()
    compile_quickly(model, optimizer, "mse", **(compile_args or MODES[QUICK]))
    recorder = Recorder(variables)
    model.fit(x, y, epochs=epochs, batch_size=8, verbose=0, shuffle=False, callbacks=[*callbacks, recorder])
    return np.stack(recorder.values)


def equal_throughout(values):
    return all(len({value.tobytes() for value in step}) == 1 for step in values)


def moving_steps(values):
    steps = enumerate(itertools.pairwise(values), 1)
    return [number for number, (before, after) in steps if before.tobytes() != after.tobytes()]


def start_from(*variables, seed=0):
    """One value for all, which no initializer of a layer has a say in."""
    value = np.random.default_rng(seed).normal(size=tuple(variables[0].shape), scale=0.5).astype("float32")
    for variable in variables:
        variable.assign(value)


def headed(entrance, outputs):
    return keras.Model(entrance, keras.layers.Dense(1, name="head")(keras.layers.Concatenate()(outputs)))


# ---- every optimizer, dtype and way to run a step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_members_are_bitwise_equal_after_every_step_of_each_optimizer(optimizer):
    if optimizer == "muon" and not hasattr(keras.optimizers, "Muon"):
        pytest.skip("this version of Keras has no Muon")
    start = np.random.default_rng(1).normal(size=(5, 4), scale=0.5).astype("float32")
    members, twins = ([keras.Variable(start, name=f"{name}_{i}") for i in range(3)] for name in ("member", "twin"))
    equalize.GroupRegistry().tie("members", members, Equal())
    gradients = [each * 2 for each in bare.random_gradients(6, *[(5, 4)] * 3)]  # the same for members and twins
    seen = bare.take_steps(OPTIMIZERS[optimizer](), [*members, *twins], gradients)
    assert all(len(set(step[:3])) == 1 for step in seen[:7])
    assert len({step[0] for step in seen[:7]}) == 7
    assert all(len(set(step[3:])) == 3 for step in seen[1:])
    assert np.isfinite(np.frombuffer(seen[6][0], "float32")).all()


def test_members_are_bitwise_equal_after_every_step_of_fit():
    model, registry = tied_towers()
    model.compile(
        OPTIMIZERS["global_clipnorm"](), "mse", **MODES[QUICK]
    )  # whose slots are made inside of the first step
    watch = EveryStep(registry)
    before = bits(kernels(model)[0])
    model.fit(*data(), epochs=2, batch_size=8, verbose=0, shuffle=False, callbacks=[watch])
    assert watch.steps == 8
    assert bits(kernels(model)[0]) != before
    assert not bitwise_equal(*biases(model))


@pytest.mark.parametrize(("n", "mode"), [(7, QUICK), *((3, mode) for mode in MODES if mode != QUICK)])
def test_members_are_bitwise_equal_in_each_way_to_run_a_step(n, mode):
    model, registry = tied_towers(n)
    train_apart(model, registry, biases(model, n), mode=mode)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no `steps_per_execution` there")
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "eager"])
@pytest.mark.sampled
def test_members_are_bitwise_equal_when_several_steps_are_run_at_once(mode):
    model, registry = tied_towers()
    train_apart(model, registry, biases(model), mode=mode, steps_per_execution=2)


@pytest.mark.slow  # test_loops.py has the optimizer's step alone
@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile is PyTorch's")
def test_members_are_bitwise_equal_under_torch_compile(monkeypatch):
    # Dynamo traces the step as usual; generating C++ from the trace would take a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, registry = tied_towers(2)
    train_apart(model, registry, biases(model, 2), epochs=1, optimizer="sgd", jit_compile=True)


@pytest.fixture
def set_policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.sampled
def test_members_are_bitwise_equal_in_half_and_mixed_precision(set_policy, policy):
    set_policy(policy)
    model, registry = tied_towers()
    # In bfloat16, Keras's Adam does not move: its bias correction rounds to zero.
    optimizer = OPTIMIZERS["adam" if "mixed" in policy else "momentum"]()
    train_apart(model, registry, biases(model), optimizer=optimizer)
    dtype = keras.backend.standardize_dtype(kernels(model)[0].dtype)
    assert dtype == ("float32" if "mixed" in policy else policy)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_a_step_that_loss_scaling_skips_changes_nothing(mode):
    model, _ = tied_towers()
    x, y = data()
    y[:8] = 1e3  # the gradients of the first step overflow, those of a later one do not
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**127)
    values = train_recorded(model, kernels(model), scaled, x=x, y=y, **MODES[mode])
    assert equal_throughout(values)
    assert moving_steps(values)
    assert 1 not in moving_steps(values)


def test_gradient_accumulation_moves_members_only_when_it_updates():
    model, _ = tied_towers()  # a plain sum of equal members, divided by 3, moves some of their entries
    accumulating = OPTIMIZERS["momentum"]()
    accumulating.gradient_accumulation_steps = 3
    x, y = data(64)
    values = train_recorded(model, kernels(model), accumulating, x=x, y=y)
    assert equal_throughout(values)
    assert moving_steps(values) == [3, 6]
    assert not bitwise_equal(*biases(model))


def bare_members(values):
    """Tied variables that hold the values, one each."""
    members = [keras.Variable(value, name=f"member_{i}") for i, value in enumerate(values)]
    equalize.GroupRegistry().tie("members", members, Equal())
    for member, value in zip(members, values, strict=True):
        member.assign(value)
    return members


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_gradients_move_members_only_when_they_are_applied_in_each_way_to_run_a_step(mode):
    members = bare_members([np.full((5, 4), 0.1, "float32")] * 3)
    accumulating = keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
    *seen, _ = bare.take_steps(accumulating, members, bare.random_gradients(7, *[(5, 4)] * 3), mode)
    assert all(len(set(step)) == 1 for step in seen)
    assert [i for i, (before, after) in enumerate(itertools.pairwise(seen), 1) if before != after] == [3, 6]


def test_projecting_mends_the_tie_that_an_average_of_weights_breaks_when_fit_ends():
    model, registry = tied_towers()
    train(model, registry, optimizer=keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9))
    averages = np.stack([ops.convert_to_numpy(kernel.value) for kernel in kernels(model)])
    assert registry.spread()["towers"] > 1e-3
    registry.project()
    assert bitwise_equal(*kernels(model))
    np.testing.assert_allclose(ops.convert_to_numpy(kernels(model)[0].value), averages.mean(0), rtol=1e-5, atol=1e-7)


# ---- every kind of layer


def convolutions():
    entrance = keras.Input((5, 5, 1))
    layers = [keras.layers.Conv2D(2, 3, kernel_constraint=Equal("conv")) for _ in range(2)]
    return entrance, [keras.layers.GlobalMaxPooling2D()(layer(entrance)) for layer in layers]


def recurrences():
    entrance = keras.Input((3, 2))
    constraints = {"kernel_constraint": Equal("kernel"), "recurrent_constraint": Equal("recurrent")}
    return entrance, [keras.layers.SimpleRNN(2, **constraints)(entrance) for _ in range(2)]


def attentions():
    entrance = keras.Input((3, 4))
    layers = [keras.layers.MultiHeadAttention(2, 2, use_bias=False, name=f"attention_{i}") for i in range(2)]
    return entrance, [keras.layers.Flatten()(layer(entrance, entrance)) for layer in layers]


def normalizations():
    entrance = keras.Input((4,))
    layers = [keras.layers.BatchNormalization(gamma_constraint=Equal("gamma")) for _ in range(2)]
    return entrance, [keras.layers.Activation("tanh")(layer(entrance)) for layer in layers]


def embeddings():
    entrance = keras.Input((2,), dtype="int32")
    layers = [keras.layers.Embedding(6, 3, embeddings_constraint=Equal("words")) for _ in range(2)]
    return entrance, [keras.layers.Flatten()(layer(entrance)) for layer in layers]


@pytest.mark.slow
def test_layers_of_every_kind_stay_tied_until_they_are_untied():
    entrances, outputs = zip(
        *(build() for build in (convolutions, recurrences, attentions, normalizations, embeddings)), strict=True
    )
    model = headed(list(entrances), [output for pair in outputs for output in pair])
    registry = equalize.GroupRegistry().link(model)
    registry.tie("attention", [model.get_layer(f"attention_{i}") for i in range(2)], Equal())
    groups = {name: [member.variable for member in group.members] for name, group in registry.items()}
    parts = {f"attention/{name}/kernel" for name in ("query", "key", "value", "attention_output")}
    assert groups.keys() == {"conv", "kernel", "recurrent", "gamma", "words", *parts}
    random = np.random.default_rng(0)
    x = [random.integers(0, 6, (16, *entrance.shape[1:])).astype(entrance.dtype) for entrance in entrances]
    y = random.normal(size=(16, 1))
    before = {name: bits(members[0]) for name, members in groups.items()}
    train(model, registry, x=x, y=y, optimizer="sgd")
    assert [name for name, members in groups.items() if bits(members[0]) == before[name]] == []
    registry.untie()
    train(model, x=x, y=y, registry=None, epochs=1, optimizer="sgd")
    assert [name for name, members in groups.items() if bitwise_equal(*members)] == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_a_row_that_one_embedding_looked_up_moves_in_all_and_a_row_that_none_did_stays(mode):
    entrances = [keras.Input((2,), dtype="int32") for _ in range(2)]
    layers = [keras.layers.Embedding(6, 3, embeddings_constraint=Equal("words")) for _ in range(2)]
    rows = [layer(entrance) for layer, entrance in zip(layers, entrances, strict=True)]
    model = headed(entrances, [keras.layers.Flatten()(row) for row in rows])
    registry = equalize.GroupRegistry().link(model)
    before = ops.convert_to_numpy(layers[0].embeddings.value)
    random = np.random.default_rng(0)
    x = [random.integers(0, 2, (16, 2)), random.integers(3, 5, (16, 2))]
    train(model, registry, mode=mode, x=x, y=random.normal(size=(16, 1)), optimizer=OPTIMIZERS["momentum"]())
    moved = (ops.convert_to_numpy(layers[1].embeddings.value) != before).any(axis=1)
    assert moved.tolist() == [True, True, False, True, True, False]


# ---- who gets a gradient


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize(
    ("connected", "mode"),
    [((1,), QUICK), *(((0, 2), mode) for mode in OTHERS)],
    ids=str,
)
@pytest.mark.sampled
def test_members_without_a_gradient_follow_the_others(connected, mode):
    entrance = keras.Input((5,))
    layers = [keras.layers.Dense(4, activation="tanh", kernel_constraint=Equal("towers")) for _ in range(3)]
    gates = [keras.layers.Identity() if i in connected else Blocked() for i in range(3)]
    model = headed(entrance, [gate(layer(entrance)) for gate, layer in zip(gates, layers, strict=True)])
    registry = equalize.GroupRegistry().link(model)
    assert [member.variable for member in registry["towers"].members] == [layer.kernel for layer in layers]
    before = bits(layers[0].kernel)
    train(model, registry, mode=mode, epochs=1, optimizer=OPTIMIZERS["momentum"]())
    assert bits(layers[0].kernel) != before
    assert [i for i, layer in enumerate(layers) if ops.convert_to_numpy(layer.bias.value).any()] == list(connected)


class TwoOptimizers(keras.Model):
    """Trains with two optimizers in one step: the compiled one, and `second` for the variables in `part`."""

    def use(self, second, part):
        self.second = second
        self.part = {id(variable) for variable in part}
        second.build(part)
        self.optimizer.build([variable for variable in self.trainable_variables if id(variable) not in self.part])

    @property
    def non_trainable_variables(self):
        return super().non_trainable_variables + (self.second.variables if hasattr(self, "part") else [])

    def apply_both(self, gradients):
        pairs = list(zip(gradients, self.trainable_variables, strict=True))
        self.second.apply_gradients([(g, v) for g, v in pairs if id(v) in self.part])
        self.optimizer.apply_gradients([(g, v) for g, v in pairs if id(v) not in self.part])

    def train_step(self, *args):
        return getattr(self, f"train_step_on_{BACKEND}")(*args)

    def train_step_on_tensorflow(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(self(x, training=True) - y))
        self.apply_both(tape.gradient(loss, self.trainable_variables))
        return {"loss": loss}

    def train_step_on_torch(self, batch):
        x, y = batch
        self.zero_grad()
        loss = ops.mean(ops.square(self(x, training=True) - y))
        loss.backward()
        with torch.no_grad():
            self.apply_both([variable.value.grad for variable in self.trainable_variables])
        return {"loss": loss}

    def train_step_on_jax(self, state, batch):
        trainable, others, _, metrics = state
        x, y = batch

        def loss_of(trainable):
            return ops.mean(ops.square(self.stateless_call(trainable, others, x, training=True)[0] - y))

        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        places = [self.trainable_variables, self.non_trainable_variables, self.optimizer.variables]
        mapping = [pair for group in zip(places, state[:3], strict=True) for pair in zip(*group, strict=True)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self.apply_both(gradients)
        return {"loss": loss}, (*([scope.get_current_value(v) for v in place] for place in places), metrics)


def seeded_towers():
    keras.utils.set_random_seed(1)
    return tied_towers()


@functools.cache
def run_of_one_optimizer():
    model, _ = seeded_towers()
    return train_recorded(model, kernels(model), OPTIMIZERS["momentum"]())


@pytest.mark.parametrize(("part", "mode"), [((1, 2), QUICK), *(((0,), mode) for mode in OTHERS)], ids=str)
@pytest.mark.sampled
def test_two_optimizers_in_one_step_that_each_train_a_part_of_a_group_are_one_for_all(part, mode):
    expected = run_of_one_optimizer()
    plain, _ = seeded_towers()
    model = TwoOptimizers(plain.input, plain.output)
    model.compile(OPTIMIZERS["momentum"](), **MODES[mode])
    model.use(OPTIMIZERS["momentum"](), [kernels(model)[i] for i in part])
    recorder = Recorder(kernels(model))
    x, y = data()
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=[recorder])
    assert equal_throughout(recorder.values)
    assert moving_steps(recorder.values) == [1, 2, 3, 4]
    np.testing.assert_allclose(recorder.values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this version of Keras has none")
def test_an_optimizer_made_of_two_that_each_train_a_part_of_a_group_is_one_for_all():
    expected = run_of_one_optimizer()
    model, _ = seeded_towers()
    both = keras.optimizers.OptimizerMap(OPTIMIZERS["momentum"](), {"tower_1/kernel": OPTIMIZERS["momentum"]()})
    values = train_recorded(model, kernels(model), keras.optimizers.MultiOptimizer(both))
    assert equal_throughout(values)
    assert moving_steps(values) == [1, 2, 3, 4]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="an optimizer loses writes to variables of others on JAX only")
def test_an_optimizer_that_would_lose_the_write_to_a_member_raises_and_changes_nothing():
    model, _ = tied_towers()
    part = kernels(model)[:2]
    optimizer = OPTIMIZERS["adam"]()
    optimizer.build(part)
    values = [variable.value for variable in part]
    before = [bits(variable) for variable in (*kernels(model), *optimizer.variables)]
    with pytest.raises(
        equalize.errors.EqualizeError, match=r"cannot reach its member 'tower_2/kernel'.*StatelessScope"
    ):
        optimizer.stateless_apply([variable.value for variable in optimizer.variables], values, values)
    assert [bits(variable) for variable in (*kernels(model), *optimizer.variables)] == before


def test_a_group_over_two_models_follows_the_one_that_trains_or_says_that_it_cannot():
    models = [towers(1, constraint=lambda: Equal("towers")) for _ in range(2)]
    registry = equalize.GroupRegistry().link(*models)
    before = bits(kernels(models[1])[0])
    if BACKEND == "jax":
        with pytest.raises(equalize.errors.EqualizeError, match=r"'towers' cannot reach .*StatelessScope"):
            train(models[0], registry)
    else:
        train(models[0], registry)
        assert bits(kernels(models[1])[0]) != before


@pytest.mark.slow
def test_the_same_model_trains_again_with_and_without_compiling_anew():
    model, registry = tied_towers()
    train_apart(model, registry, biases(model), epochs=1, optimizer="sgd")
    before = bits(kernels(model)[0])
    x, y = data(seed=1)
    recorder = Recorder(kernels(model))
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[recorder])
    for mode in MODES:
        recorder.values += list(train_recorded(model, kernels(model), OPTIMIZERS["momentum"](), **MODES[mode]))
    assert equal_throughout(recorder.values)
    assert bits(kernels(model)[0]) != before
    assert len(moving_steps(recorder.values)) == 4 * (1 + len(MODES))


# ---- frozen members


@pytest.mark.parametrize("frozen", [(0,), (2,), (0, 2)], ids=str)
@pytest.mark.sampled
def test_frozen_members_never_move_and_the_others_take_their_value(frozen):
    model, registry = tied_towers(frozen=frozen)
    anchor = bits(kernels(model)[frozen[0]])
    free = [i for i in range(3) if i not in frozen]
    for i in free:
        kernels(model)[i].assign(np.ones((5, 4)))
    head = bits(model.get_layer("head").kernel)
    train(model, registry, optimizer=OPTIMIZERS["momentum"]())
    assert {bits(kernel) for kernel in kernels(model)} == {anchor}
    assert bits(model.get_layer("head").kernel) != head
    assert [i for i in range(3) if ops.convert_to_numpy(tower(model, i).bias.value).any()] == free


@pytest.mark.parametrize(
    ("way", "mode"),
    [
        *(("plain", mode) for mode in MODES if mode != QUICK),
        ("several", QUICK),
        ("accumulation", QUICK),
        ("loss scale", QUICK),
    ],
)
@pytest.mark.sampled
def test_members_take_the_value_of_a_frozen_one_in_each_way_to_run_a_step(way, mode):
    if (way, BACKEND) == ("several", "torch"):
        pytest.skip("Keras has no `steps_per_execution` there")
    model, registry = tied_towers(frozen=(1,))
    anchor = bits(kernels(model)[1])
    kernels(model)[0].assign(np.ones((5, 4)))
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2 if way == "accumulation" else None)
    if way == "loss scale":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)
    steps = {"steps_per_execution": 2} if way == "several" else {}
    train(model, registry, mode=mode, optimizer=optimizer, **steps)
    assert {bits(kernel) for kernel in kernels(model)} == {anchor}
    assert all(ops.convert_to_numpy(tower(model, i).bias.value).any() for i in (0, 2))


def test_a_group_that_is_frozen_as_a_whole_stays_while_the_rest_trains():
    model, registry = tied_towers(frozen=(0, 1, 2))
    before = bits(kernels(model)[0])
    head = bits(model.get_layer("head").kernel)
    train(model, registry, optimizer=OPTIMIZERS["adamw"]())
    assert {bits(kernel) for kernel in kernels(model)} == {before}
    assert bits(model.get_layer("head").kernel) != head


def test_freezing_and_thawing_a_member_counts_from_the_next_compile():
    model, registry = tied_towers()
    train_apart(model, registry, biases(model), epochs=1)
    held = bits(kernels(model)[1])
    tower(model, 1).trainable = False
    train(model, registry, epochs=1)
    assert {bits(kernel) for kernel in kernels(model)} == {held}
    tower(model, 1).trainable = True
    train(model, registry, epochs=1)
    assert held not in {bits(kernel) for kernel in kernels(model)}


def test_a_value_given_to_a_frozen_member_during_training_reaches_the_others():
    model, _ = tied_towers(frozen=(0,))
    new = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    give = AfterStep(1, lambda: kernels(model)[0].assign(new))
    values = train_recorded(model, kernels(model), "sgd", callbacks=[give])
    assert [len({value.tobytes() for value in step}) for step in values] == [1, 1, 2, 1, 1]
    assert values[-1][0].tobytes() == new.tobytes() != values[0][0].tobytes()


# ---- what must not matter


def train_towers(*, layers=(0, 1, 2), names=("tower_0", "tower_1", "tower_2"), members=None):
    """Trains three tied towers with the layers or the members in some order; returns a kernel and the members."""
    entrance = keras.Input((5,))
    made = [keras.layers.Dense(4, activation="tanh", name=name) for name in names]
    model = headed(entrance, [made[i](entrance) for i in layers])
    start_from(*(layer.kernel for layer in made))
    heads = np.random.default_rng(1).normal(size=(3, 4, 1)).astype("float32")
    model.get_layer("head").kernel.assign(np.concatenate([heads[i] for i in layers]))
    registry = equalize.GroupRegistry()
    if members is not None:
        registry.tie("towers", [made[i].kernel for i in members], Equal())
    else:
        for layer in made:
            layer.kernel.constraint = Equal("towers")
        registry.link(model)
    train_apart(model, registry, [layer.bias for layer in made], epochs=1, optimizer=OPTIMIZERS["momentum"]())
    return ops.convert_to_numpy(made[0].kernel.value), [member.path for member in registry["towers"].members]


def test_the_order_of_members_and_of_layers_does_not_change_the_result():
    value, paths = train_towers()
    for order in ({"members": (2, 0, 1)}, {"layers": (2, 0, 1)}):
        other, other_paths = train_towers(**order)
        assert other_paths == ["tower_2/kernel", "tower_0/kernel", "tower_1/kernel"] != paths
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-6)


def test_the_names_of_layers_do_not_change_a_bit_of_the_result():
    value, _ = train_towers()
    other, paths = train_towers(names=("zebra", "tower_0", "a"))
    assert paths == ["zebra/kernel", "tower_0/kernel", "a/kernel"]
    assert other.tobytes() == value.tobytes()


def test_layers_and_groups_may_have_odd_names():
    names = ["-dash", "a>b", "__x"]
    if BACKEND != "tensorflow":  # which takes layer names for scopes of a graph
        names += ["a b", "a:b", "{x} %s", "[bold]é🙂", "'\t\\"]
    entrance = keras.Input((5,))
    group = "group / {x} %s [bold]é🙂\n"
    layers = [keras.layers.Dense(4, activation="tanh", name=name, kernel_constraint=Equal(group)) for name in names]
    model = headed(entrance, [layer(entrance) for layer in layers])
    registry = equalize.GroupRegistry().link(model)
    assert len(registry[group].members) == len(names)
    train_apart(model, registry, [layer.bias for layer in layers], epochs=1)


def test_layers_of_one_name_in_nested_models_stay_tied():
    entrance, inner = keras.Input((5,)), keras.Input((5,))
    layers = [
        keras.layers.Dense(4, activation="tanh", name="same", kernel_constraint=Equal("towers")) for _ in range(3)
    ]
    nested = [keras.Model(inner, layer(inner), name=f"nested_{i}") for i, layer in enumerate(layers)]
    model = headed(entrance, [branch(entrance) for branch in nested])
    registry = equalize.GroupRegistry().link(model)
    assert [member.path for member in registry["towers"].members] == ["same/kernel"] * 3
    train_apart(model, registry, [layer.bias for layer in layers], epochs=1)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.left = keras.layers.Dense(4, activation="tanh", kernel_constraint=Equal("towers"))
        self.right = keras.Sequential([keras.layers.Dense(4, activation="tanh", kernel_constraint=Equal("towers"))])
        self.head = keras.layers.Dense(1)

    def call(self, x):
        return self.head(ops.concatenate([self.left(x), self.right(x)], axis=-1))


def test_subclassed_models_stay_tied():
    model = Subclassed()
    model(np.zeros((1, 5), "float32"))
    registry = equalize.GroupRegistry().link(model)
    train_apart(model, registry, [model.left.bias, model.right.layers[0].bias], epochs=1)


def test_a_shared_layer_that_is_met_twice_is_one_member():
    entrances, inner = [keras.Input((5,)) for _ in range(3)], keras.Input((5,))
    shared, other = [keras.layers.Dense(4, activation="tanh", kernel_constraint=Equal("towers")) for _ in range(2)]
    nested = keras.Model(inner, shared(inner))
    model = headed(entrances, [shared(entrances[0]), nested(entrances[1]), other(entrances[2])])
    registry = equalize.GroupRegistry().link(nested, model)
    assert [member.variable for member in registry["towers"].members] == [shared.kernel, other.kernel]
    x = [data(seed=seed)[0] for seed in range(3)]
    train_apart(model, registry, [shared.bias, other.bias], x=x, y=data()[1], epochs=1)


# ---- values that are no ordinary numbers

SPECIALS = {
    (np.nan, 1.0, 2.0): np.nan,
    (np.nan, np.nan, np.nan): np.nan,
    (1.0, np.inf, 2.0): np.inf,
    (1.0, 2.0, -np.inf): -np.inf,
    (np.inf, np.inf, np.inf): np.inf,
    (np.inf, -np.inf, 1.0): np.nan,
    (3e38, -3e38, 3e38): 1e38,
    (3e38, 3e38, 1.5e38): 2.5e38,
    (1.0, 2.0, 6.0): 3.0,
}


def only_project(members, mode):
    """Steps of an optimizer that gathers gradients and never applies them, so that only projections write."""
    gradients = bare.random_gradients(3, *[tuple(member.shape) for member in members])
    return bare.take_steps(keras.optimizers.SGD(gradient_accumulation_steps=100), members, gradients, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_value_that_is_no_ordinary_number_reaches_all_members_and_stays_in_its_entry(mode):
    _, *seen = only_project(bare_members(np.array(list(SPECIALS), "float32").T), mode)
    assert all(len(set(step)) == 1 for step in seen)
    means = np.frombuffer(seen[-1][0], "float32")
    np.testing.assert_allclose(means, np.array(list(SPECIALS.values()), "float32"), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_equal_members_keep_their_bits_whatever_number_they_hold(mode):
    numbers = [1e-40, -1e-45, 0.0, -0.0, 3e38, -3e38, np.inf, -np.inf, np.nan, 0.1]
    value = np.array(numbers * 2, "float32").reshape(5, 4)
    seen = only_project(bare_members([value] * 3), mode)
    assert {each for step in seen for each in step} == {value.tobytes()}


@pytest.mark.parametrize("number", [1e-40, np.nan])
def test_members_stay_bitwise_equal_while_one_of_them_spoils_the_training(number):
    model, registry = tied_towers()
    kernels(model)[1].assign(np.full((5, 4), number, "float32"))
    train(model, registry, epochs=1)
    assert np.isfinite(ops.convert_to_numpy(kernels(model)[0].value)).all() == np.isfinite(number)


# ---- partial ties and sharing, step by step


def require_shrinking(values):
    """Every distance to the mean shrinks by a quarter in each step, and the mean stays."""
    means = values.mean(1, keepdims=True)
    expected = (values - means)[:1] * 0.75 ** np.arange(len(values)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(values - means, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(means, means[:1].repeat(len(values), 0), rtol=1e-6, atol=1e-6)


def test_a_partial_tie_shrinks_every_distance_to_the_mean_by_its_rate_each_step():
    model, _ = tied_towers(5, rate=0.25)
    for seed, kernel in enumerate(kernels(model)):
        start_from(kernel, seed=seed)
    values = train_recorded(model, kernels(model), keras.optimizers.SGD(0.0))
    require_shrinking(values.astype("float64"))


@pytest.mark.parametrize(("n", "mode"), [(2, QUICK), (17, QUICK), *((3, mode) for mode in MODES)])
def test_a_partial_tie_of_variables_shrinks_every_distance_in_each_way_to_run_a_step(n, mode):
    members = [keras.Variable(np.zeros((5, 4), "float32")) for _ in range(n)]
    equalize.GroupRegistry().tie("members", members, Equal(rate=0.25))
    for seed, member in enumerate(members):
        start_from(member, seed=seed)
    gradients = [[np.zeros((5, 4), "float32")] * n] * 4
    *seen, _ = bare.take_steps(keras.optimizers.SGD(0.0), members, gradients, mode)
    values = np.array([[np.frombuffer(each, "float32").reshape(5, 4) for each in step] for step in seen])
    require_shrinking(values.astype("float64"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_a_partial_tie_pulls_to_a_frozen_member_by_its_rate_each_step(mode):
    model, _ = tied_towers(frozen=(1,), rate=0.25)
    for seed, kernel in enumerate(kernels(model)):
        start_from(kernel, seed=seed)
    values = train_recorded(model, kernels(model), keras.optimizers.SGD(0.0), **MODES[mode])
    assert len({step[1].tobytes() for step in values}) == 1
    expected = (values[0] - values[0, 1]) * 0.75 ** np.arange(5).reshape(5, 1, 1, 1)
    np.testing.assert_allclose(values - values[0, 1], expected, rtol=1e-5, atol=1e-6)


def branches(layers):
    """One layer a branch, each with an input of its own, and a head that stays as it is."""
    entrances = [keras.Input((5,)) for _ in layers]
    model = headed(entrances, [layer(entrance) for layer, entrance in zip(layers, entrances, strict=True)])
    start_from(*(layer.kernel for layer in layers))
    start_from(model.get_layer("head").kernel, seed=1)
    model.get_layer("head").trainable = False
    return model


def train_branches(n, optimizer, *, shared=False):
    """The kernels of n branches, step by step: tied, or one for all."""
    layers = [keras.layers.Dense(4, activation="tanh", use_bias=False) for _ in range(1 if shared else n)]
    model = branches(layers * n if shared else layers)
    if not shared:
        equalize.GroupRegistry().tie("tied", [layer.kernel for layer in layers], Equal())
    x = [data(seed=seed)[0] for seed in range(n)]
    return train_recorded(model, [layer.kernel for layer in layers], optimizer, x=x, y=data()[1], epochs=2)


@pytest.mark.parametrize(("n", "momentum"), [(2, 0.0), (3, 0.9)])
def test_projecting_with_sgd_is_sharing_at_the_learning_rate_divided_by_the_number_of_members(n, momentum):
    tied = train_branches(n, keras.optimizers.SGD(0.3, momentum))
    shared = train_branches(n, keras.optimizers.SGD(0.3 / n, momentum), shared=True)
    assert np.abs(shared[-1] - shared[0]).max() > 0.05
    np.testing.assert_allclose(tied, shared.repeat(n, 1), rtol=1e-5, atol=1e-6)


def test_projecting_with_adam_is_not_sharing():
    tied = train_branches(2, keras.optimizers.Adam(0.1))
    for rate in (0.1, 0.05):
        shared = train_branches(2, keras.optimizers.Adam(rate), shared=True)
        assert np.abs(tied - shared).max() > 0.01
