"""The laws of hard and partial ties through real `fit`, with the members compared bit for bit after every step."""

import keras
import numpy as np
import pytest
from tests.conftest import BACKEND, bits, bitwise_equal, data, fit, kernels, towers
from keras import ops

import equalize
from equalize.constraints import Equal

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
else:
    import torch

# The ways to run a step, the quickest first. PyTorch is always eager; torch.compile has a test of its own.
MODES = {
    "tensorflow": {"graph": {"jit_compile": False}, "jit": {"jit_compile": True}, "eager": {"run_eagerly": True}},
    "jax": {"jit": {"jit_compile": True}, "eager": {"run_eagerly": True}},
    "torch": {"eager": {"jit_compile": False}},
}[BACKEND]
QUICK = next(iter(MODES.values()))

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


class Recorder(keras.callbacks.Callback):
    """Keeps what the variables hold before training and after every step."""

    def __init__(self, variables):
        super().__init__()
        self.variables = variables
        self.values = [self._read()]

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        self.values.append(self._read())

    def _read(self):
        return np.stack([ops.convert_to_numpy(variable.value) for variable in self.variables])


class AtStep(keras.callbacks.Callback):
    """Calls a function after one step of the training."""

    def __init__(self, step, function):
        super().__init__()
        self.step, self.function, self.steps = step, function, 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == self.step:
            self.function()


def tied_towers(n=3, *, rate=1.0, name="towers", **kwargs):
    model = towers(n, constraint=lambda: Equal(name, rate=rate), **kwargs)
    return model, equalize.GroupRegistry().link(model)


def towers_of(model):
    return [layer for layer in model.layers if layer.name.startswith("tower_")]


def trained(model, registry, twins=None, **kwargs):
    """Trains, and makes sure that there was something to keep equal.

    All members must have moved and be finite. The twins, untied variables beside the members that started equal
    (the biases of the towers, unless others are given), must have come apart: the gradients did differ.
    """
    members = [member.variable for group in registry.values() for member in group.members]
    assert members
    before = [bits(variable) for variable in members]
    watch = fit(model, registry, **({} if "run_eagerly" in kwargs else QUICK) | kwargs)
    assert all(bits(variable) != old for variable, old in zip(members, before, strict=True))
    assert all(np.isfinite(ops.convert_to_numpy(ops.cast(variable.value, "float32"))).all() for variable in members)
    twins = [layer.bias for layer in towers_of(model)] if twins is None else twins
    assert len({bits(variable) for variable in twins}) == len(twins) > 1
    return watch


def start_from(variables, seed=0):
    """The same value for all, which no initializer of a layer has a say in."""
    value = np.random.default_rng(seed).normal(size=tuple(variables[0].shape), scale=0.5).astype("float32")
    for variable in variables:
        variable.assign(value)


def run_recorded(model, variables, *, optimizer, x=None, y=None, epochs=1, loss="mse", **compile_args):
    """What the variables held before training and after every step, an array of shape (steps + 1, variables, ...)."""
    if x is None:
        x, y = data()
    model.compile(optimizer, loss, **({} if "run_eagerly" in compile_args else QUICK) | compile_args)
    recorder = Recorder(variables)
    model.fit(x, y, epochs=epochs, batch_size=8, verbose=0, shuffle=False, callbacks=[recorder])
    return np.stack(recorder.values)


# ---- every optimizer, dtype and way to run a step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_members_are_bitwise_equal_after_every_step_of_each_optimizer(optimizer):
    if optimizer == "muon" and not hasattr(keras.optimizers, "Muon"):
        pytest.skip("this version of Keras has no Muon")
    model, registry = tied_towers()
    trained(model, registry, optimizer=OPTIMIZERS[optimizer]())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [2, 5])
def test_members_are_bitwise_equal_in_each_way_to_run_a_step(mode, n):
    model, registry = tied_towers(n)
    trained(model, registry, optimizer=keras.optimizers.Adam(0.01), **mode)


@pytest.fixture
def policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=no_torch_compile)])
def test_members_are_bitwise_equal_in_half_and_mixed_precision(policy, name, jit):
    policy(name)
    model, registry = tied_towers()
    trained(model, registry, optimizer=keras.optimizers.Adam(0.01, epsilon=1e-3), jit_compile=jit)
    dtype = keras.backend.standardize_dtype(kernels(model)[0].dtype)
    assert dtype == ("float32" if "mixed" in name else name)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (name == "mixed_float16")


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_step_that_loss_scaling_skips_changes_nothing(mode):
    model, registry = tied_towers()
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**127)
    x, y = data()
    recorder = Recorder(kernels(model))
    model.compile(scaled, "mse", **mode)
    y[:8] = 1e3  # so that the first gradients overflow and the second do not
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=[recorder])
    equal = [len({value.tobytes() for value in step}) == 1 for step in recorder.values]
    moved = [bool((after != before).any()) for before, after in zip(recorder.values, recorder.values[1:], strict=False)]
    assert all(equal)
    assert not moved[0]
    assert any(moved)


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_gradient_accumulation_moves_members_only_when_it_updates(mode, optimizer):
    model, registry = tied_towers(7, dtype="float32")  # a plain mean of 7 moves half of the entries of equal members
    accumulating = OPTIMIZERS[optimizer]()
    accumulating.gradient_accumulation_steps = 3
    recorder = Recorder(kernels(model))
    x, y = data(64)
    model.compile(accumulating, "mse", **mode)
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=[recorder])
    assert all(len({value.tobytes() for value in step}) == 1 for step in recorder.values)
    steps = zip(recorder.values, recorder.values[1:], strict=False)
    moved = [number for number, (before, after) in enumerate(steps, 1) if before.tobytes() != after.tobytes()]
    assert moved == [3, 6]
    assert len({bits(layer.bias) for layer in towers_of(model)}) == 7


def test_an_average_of_weights_breaks_the_tie_at_the_end_and_projecting_mends_it_exactly():
    model, registry = tied_towers()
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)
    trained(model, equalize.GroupRegistry(), optimizer=optimizer) if False else fit(
        model, registry, optimizer=optimizer, **QUICK
    )
    averages = np.stack([ops.convert_to_numpy(kernel.value) for kernel in kernels(model)])
    assert registry.spread()["towers"] > 1e-3
    registry.project()
    assert bitwise_equal(*kernels(model))
    np.testing.assert_allclose(ops.convert_to_numpy(kernels(model)[0].value), averages.mean(0), rtol=1e-6, atol=1e-7)


# ---- every kind of layer


def dense_on(*branches):
    joined = keras.layers.Concatenate()(list(branches))
    return keras.layers.Dense(1, name="head")(joined)


def convolutions():
    entrance = keras.Input((5, 5, 1))
    layers = [keras.layers.Conv2D(2, 3, kernel_constraint=Equal("conv")) for _ in range(2)]
    pooled = [keras.layers.GlobalMaxPooling2D()(layer(entrance)) for layer in layers]
    return keras.Model(entrance, dense_on(*pooled)), None, (5, 5, 1)


def recurrent():
    entrance = keras.Input((3, 2))
    layers = [
        keras.layers.LSTM(2, kernel_constraint=Equal("kernel"), recurrent_constraint=Equal("recurrent"))
        for _ in range(2)
    ]
    return keras.Model(entrance, dense_on(*[layer(entrance) for layer in layers])), None, (3, 2)


def attention():
    entrance = keras.Input((3, 4))
    layers = [keras.layers.MultiHeadAttention(2, 2, use_bias=False) for _ in range(2)]
    outputs = [keras.layers.Flatten()(layer(entrance, entrance)) for layer in layers]
    return keras.Model(entrance, dense_on(*outputs)), layers, (3, 4)


def normalization():
    entrance = keras.Input((4,))
    layers = [keras.layers.BatchNormalization(gamma_constraint=Equal("gamma")) for _ in range(2)]
    outputs = [keras.layers.Activation("tanh")(layer(entrance)) for layer in layers]
    return keras.Model(entrance, dense_on(*outputs)), None, (4,)


def embeddings():
    entrance = keras.Input((2,), dtype="int32")
    layers = [keras.layers.Embedding(6, 3, embeddings_constraint=Equal("words")) for _ in range(2)]
    outputs = [keras.layers.Flatten()(layer(entrance)) for layer in layers]
    return keras.Model(entrance, dense_on(*outputs)), None, (2,)


@pytest.mark.parametrize("build", [convolutions, recurrent, attention, normalization, embeddings])
def test_layers_of_every_kind_stay_tied_until_they_are_untied(build):
    model, layers, shape = build()
    registry = equalize.GroupRegistry()
    registry.tie("tied", layers, Equal()) if layers else registry.link(model)
    random = np.random.default_rng(0)
    x = random.integers(0, 6, (16, *shape)) if build is embeddings else random.normal(size=(16, *shape))
    y = random.normal(size=(16, 1))
    members = {name: [member.variable for member in group.members] for name, group in registry.items()}
    assert members
    before = {name: bits(group[0]) for name, group in members.items()}
    fit(model, registry, x=x, y=y, optimizer=OPTIMIZERS["adam"](), **QUICK)
    assert all(bits(group[0]) != before[name] for name, group in members.items())
    registry.untie()
    fit(model, x=x, y=y, epochs=1, optimizer=OPTIMIZERS["adam"](), run_eagerly=True)
    assert not any(bitwise_equal(*group) for group in members.values())


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_a_row_that_one_embedding_looked_up_moves_in_all_and_a_row_that_none_did_stays(mode, optimizer):
    entrances = [keras.Input((2,), dtype="int32") for _ in range(2)]
    layers = [keras.layers.Embedding(6, 3, embeddings_constraint=Equal("words")) for _ in range(2)]
    branches = [
        keras.layers.Flatten()(layer(entrance)) for layer, entrance in zip(layers, entrances, strict=True)
    ]
    model = keras.Model(entrances, dense_on(*branches))
    registry = equalize.GroupRegistry().link(model)
    before = ops.convert_to_numpy(layers[0].embeddings.value)
    random = np.random.default_rng(0)
    x = [random.integers(0, 2, (16, 2)), random.integers(3, 5, (16, 2))]
    fit(model, registry, x=x, y=random.normal(size=(16, 1)), optimizer=OPTIMIZERS[optimizer](), **mode)
    moved = (ops.convert_to_numpy(layers[1].embeddings.value) != before).any(axis=1)
    assert moved.tolist() == [True, True, False, True, True, False]


# ---- who gets a gradient


def partly_connected(connected, n=3):
    """Towers of which only some get a gradient."""
    entrance = keras.Input((5,))
    layers = [
        keras.layers.Dense(4, activation="tanh", kernel_constraint=Equal("towers"), name=f"tower_{i}") for i in range(n)
    ]
    outputs = [layer(entrance) for layer in layers]
    outputs = [output if i in connected else ops.stop_gradient(output) for i, output in enumerate(outputs)]
    model = keras.Model(entrance, dense_on(*outputs))
    return model, equalize.GroupRegistry().link(model)


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("connected", [(1, 2), (0, 2), (0, 1), (1,)], ids=str)
def test_members_without_a_gradient_follow_the_others(connected, mode):
    model, registry = partly_connected(connected)
    before = bits(kernels(model)[0])
    fit(model, registry, epochs=1, optimizer=OPTIMIZERS["momentum"](), **mode)
    assert bits(kernels(model)[0]) != before
    biases = [layer.bias for layer in towers_of(model)]
    assert [i for i, bias in enumerate(biases) if np.any(ops.convert_to_numpy(bias.value))] == list(connected)


class TwoOptimizers(keras.Model):
    """Trains with two optimizers in one step: the compiled one, and `second` for the variables in `part`."""

    def use(self, second, part):
        self.second = second
        self.part = {id(variable) for variable in part}
        second.build(part)
        self.optimizer.build([v for v in self.trainable_variables if id(v) not in self.part])

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
        trainable, others, optimizer, metrics = state
        x, y = batch

        def loss_of(trainable):
            return ops.mean(ops.square(self.stateless_call(trainable, others, x, training=True)[0] - y))

        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        places = [self.trainable_variables, self.non_trainable_variables, self.optimizer.variables]
        mapping = [pair for group in zip(places, state[:3], strict=True) for pair in zip(*group, strict=True)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self.apply_both(gradients)
        trainable, others, optimizer = [[scope.get_current_value(v) for v in variables] for variables in places]
        return {"loss": loss}, (trainable, others, optimizer, metrics)


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("part", [(0,), (1, 2)], ids=str)
def test_two_optimizers_in_one_step_may_each_train_a_part_of_a_group(part, mode):
    plain, _ = tied_towers()
    model = TwoOptimizers(plain.inputs, plain.outputs)
    registry = equalize.GroupRegistry().link(plain)
    model.compile(OPTIMIZERS["adam"](), **mode)
    model.use(OPTIMIZERS["momentum"](), [kernels(model)[i] for i in part])
    recorder = Recorder(kernels(model))
    x, y = data()
    model.fit(x, y, epochs=2, batch_size=8, verbose=0, shuffle=False, callbacks=[recorder])
    assert all(len({value.tobytes() for value in step}) == 1 for step in recorder.values)
    assert len({step.tobytes() for step in recorder.values}) == 9
    assert [int(o.iterations.numpy()) for o in (model.optimizer, model.second)] == [8, 8]
    assert registry.spread() == {"towers": 0.0}


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this version of Keras has none")
def test_one_optimizer_made_of_two_may_train_each_a_part_of_a_group():
    model, registry = tied_towers()
    second = OPTIMIZERS["momentum"]()
    both = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(OPTIMIZERS["adam"](), {"tower_1/kernel": second})
    )
    trained(model, registry, optimizer=both)
    assert int(second.iterations.numpy()) == 8


@pytest.mark.skipif(BACKEND != "jax", reason="an optimizer loses writes to other variables on JAX only")
def test_an_optimizer_that_would_lose_the_write_to_another_member_raises_and_changes_nothing():
    model, _ = tied_towers()
    part = kernels(model)[:2]
    optimizer = OPTIMIZERS["adam"]()
    optimizer.build(part)
    values = [variable.value for variable in part]
    before = [bits(kernel) for kernel in kernels(model)]
    with pytest.raises(equalize.errors.EqualizeError, match=r"'towers' cannot reach.*tower_2(.|\n)*StatelessScope"):
        optimizer.stateless_apply([variable.value for variable in optimizer.variables], values, values)
    assert [bits(kernel) for kernel in kernels(model)] == before


def test_the_same_model_trains_again_with_and_without_compiling_anew():
    model, registry = tied_towers()
    trained(model, registry, epochs=1, optimizer="sgd")
    trained(model, registry, epochs=1, optimizer=OPTIMIZERS["adam"]())
    before = bits(kernels(model)[0])
    x, y = data(seed=1)
    recorder = Recorder(kernels(model))
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[recorder])
    assert all(len({value.tobytes() for value in step}) == 1 for step in recorder.values)
    assert bits(kernels(model)[0]) != before
    trained(model, registry, epochs=1, run_eagerly=True)


# ---- frozen members


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_frozen_members_never_move_and_the_others_take_their_value(frozen):
    model, registry = tied_towers(frozen=frozen)
    anchor = bits(kernels(model)[frozen[0]])
    opened = [layer for i, layer in enumerate(towers_of(model)) if i not in frozen]
    for layer in opened:
        layer.kernel.assign(np.ones((5, 4)))
    head = bits(model.get_layer("head").kernel)
    fit(model, registry, optimizer=OPTIMIZERS["momentum"](), **QUICK)
    assert {bits(kernel) for kernel in kernels(model)} == {anchor}
    assert bits(model.get_layer("head").kernel) != head
    assert all(np.any(ops.convert_to_numpy(layer.bias.value)) for layer in opened)


ANCHORED_MODES = [
    *MODES[1:],
    pytest.param(QUICK | {"gradient_accumulation_steps": 2}, id="accumulation"),
    pytest.param(QUICK | {"loss_scale": 2.0**10}, id="loss scale"),
]


@pytest.mark.parametrize("mode", ANCHORED_MODES)
def test_members_take_the_value_of_a_frozen_one_in_each_way_to_run_a_step(mode):
    mode = dict(mode)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=mode.pop("gradient_accumulation_steps", None))
    if "loss_scale" in mode:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=mode.pop("loss_scale"))
    model, registry = tied_towers(frozen=(1,))
    anchor = bits(kernels(model)[1])
    kernels(model)[0].assign(np.ones((5, 4)))
    fit(model, registry, optimizer=optimizer, **mode)
    assert {bits(kernel) for kernel in kernels(model)} == {anchor}
    assert all(np.any(ops.convert_to_numpy(towers_of(model)[i].bias.value)) for i in (0, 2))


def test_a_group_that_is_frozen_as_a_whole_stays_while_the_rest_trains():
    model, registry = tied_towers(frozen=(0, 1, 2))
    before = bits(kernels(model)[0])
    head = bits(model.get_layer("head").kernel)
    fit(model, registry, optimizer=OPTIMIZERS["adamw"](), **QUICK)
    assert {bits(kernel) for kernel in kernels(model)} == {before}
    assert bits(model.get_layer("head").kernel) != head


def test_freezing_and_thawing_a_member_counts_from_the_next_compile():
    model, registry = tied_towers()
    trained(model, registry, epochs=1, optimizer=OPTIMIZERS["adam"]())
    towers_of(model)[1].trainable = False
    held = bits(kernels(model)[1])
    fit(model, registry, epochs=1, optimizer=OPTIMIZERS["adam"](), **QUICK)
    assert {bits(kernel) for kernel in kernels(model)} == {held}
    towers_of(model)[1].trainable = True
    trained(model, registry, epochs=1, optimizer=OPTIMIZERS["adam"]())


def test_a_value_given_to_a_frozen_member_during_training_reaches_the_others():
    model, registry = tied_towers(frozen=(0,))
    new = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")

    def give():
        if BACKEND == "jax":
            model.jax_state_sync()
        kernels(model)[0].assign(new)

    x, y = data()
    model.compile("sgd", "mse", **QUICK)
    recorder = Recorder(kernels(model))
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[AtStep(2, give), recorder])
    unlike = [bool((step[1:] != step[0]).any()) for step in recorder.values]
    assert unlike == [False, False, True, False, False]
    assert all(bits(kernel) == new.tobytes() for kernel in kernels(model))


# ---- what must not matter


def run_named(order=(0, 1, 2), names=("tower_0", "tower_1", "tower_2"), members=None):
    """Trains three tied towers that were made in some order under some names; returns the trained kernel."""
    entrance = keras.Input((5,))
    layers = {i: keras.layers.Dense(4, activation="tanh", name=names[i]) for i in order}
    outputs = {i: layers[i](entrance) for i in order}
    head = keras.layers.Dense(1, name="head")
    model = keras.Model(entrance, head(keras.layers.Concatenate()([outputs[i] for i in range(3)])))
    tied = [layers[i].kernel for i in range(3)]
    start_from(tied)
    start_from([head.kernel], seed=1)
    registry = equalize.GroupRegistry()
    if members is None:
        for layer in layers.values():
            layer.kernel.constraint = Equal("towers")
        registry.link(model)
    else:
        registry.tie("towers", [tied[i] for i in members], Equal())
    twins = [layers[i].bias for i in range(3)]
    trained(model, registry, twins, optimizer=OPTIMIZERS["momentum"]())
    return ops.convert_to_numpy(tied[0].value), [member.path for member in registry["towers"].members]


def test_the_order_of_members_and_of_layers_does_not_change_the_result():
    value, paths = run_named()
    for kwargs in ({"members": (2, 0, 1)}, {"order": (2, 0, 1)}):
        other, other_paths = run_named(**kwargs)
        assert other_paths != paths
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-6)


def test_the_names_of_layers_do_not_change_a_bit_of_the_result():
    value, _ = run_named()
    other, paths = run_named(names=("zebra", "tower_0", "a"))
    assert paths == ["zebra/kernel", "tower_0/kernel", "a/kernel"]
    assert other.tobytes() == value.tobytes()


ODD = ["-dash", "a>b", "__x"] + ([] if BACKEND == "tensorflow" else ["a b", "a:b", "{x} %s", "[bold]é🙂", "'\t\\"])


def test_layers_and_groups_may_have_odd_names():
    entrance = keras.Input((5,))
    group = "group / {x} %s [bold]é🙂\n"
    layers = [keras.layers.Dense(4, activation="tanh", name=name, kernel_constraint=Equal(group)) for name in ODD]
    model = keras.Model(entrance, dense_on(*[layer(entrance) for layer in layers]))
    registry = equalize.GroupRegistry().link(model)
    assert list(registry) == [group]
    trained(model, registry, [layer.bias for layer in layers])


def test_layers_of_one_name_in_nested_models_stay_tied():
    entrance = keras.Input((5,))
    branches, layers = [], []
    for i in range(3):
        inner = keras.Input((5,))
        layers.append(keras.layers.Dense(4, activation="tanh", name="same", kernel_constraint=Equal("towers")))
        branches.append(keras.Model(inner, layers[-1](inner), name=f"branch_{i}"))
    model = keras.Model(entrance, dense_on(*[branch(entrance) for branch in branches]))
    registry = equalize.GroupRegistry().link(model)
    assert {member.path for member in registry["towers"].members} == {"same/kernel"}
    trained(model, registry, [layer.bias for layer in layers])


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
    trained(model, registry, [model.left.bias, model.right.layers[0].bias])


def test_a_shared_layer_is_one_member():
    entrances = [keras.Input((5,)) for _ in range(3)]
    shared, other = [
        keras.layers.Dense(4, activation="tanh", name=name, kernel_constraint=Equal("towers"))
        for name in ("shared", "other")
    ]
    inner = keras.Input((5,))
    nested = keras.Model(inner, shared(inner))
    model = keras.Model(entrances, dense_on(shared(entrances[0]), nested(entrances[1]), other(entrances[2])))
    registry = equalize.GroupRegistry().link(nested, model)
    assert [member.variable for member in registry["towers"].members] == [shared.kernel, other.kernel]
    x = [data(seed=seed)[0] for seed in range(3)]
    trained(model, registry, [shared.bias, other.bias], x=x, y=data()[1])


# ---- values that are no ordinary numbers

SPECIALS = {
    "one NaN": ((np.nan, 1.0, 2.0), np.nan),
    "all NaN": ((np.nan, np.nan, np.nan), np.nan),
    "one infinity": ((1.0, np.inf, 2.0), np.inf),
    "one negative infinity": ((1.0, 2.0, -np.inf), -np.inf),
    "all infinite": ((np.inf, np.inf, np.inf), np.inf),
    "opposite infinities": ((np.inf, -np.inf, 1.0), np.nan),
    "large": ((3e38, 3e38, 3e38), np.float32(3e38)),
    "large and equal": ((3e38, -3e38, 3e38), np.float32(1e38)),
    "ordinary": ((1.0, 2.0, 6.0), 3.0),
}


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_value_that_is_no_ordinary_number_spreads_to_all_members_in_its_entry_only(mode):
    model, registry = tied_towers(inputs=len(SPECIALS), units=1)
    columns = np.array([values for values, _ in SPECIALS.values()], "float32")
    for kernel, column in zip(kernels(model), columns.T, strict=True):
        kernel.assign(column[:, None])
    # Accumulated gradients are never applied here, so that nothing but the projection writes the members.
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=100)
    fit(model, registry, x=data(inputs=len(SPECIALS))[0], y=data()[1], optimizer=optimizer, **mode)
    expected = np.array([mean for _, mean in SPECIALS.values()], "float32")
    np.testing.assert_allclose(ops.convert_to_numpy(kernels(model)[0].value)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("number", [1e-40, -1e-45, -0.0, 3e38, np.inf, np.nan, 0.1], ids=str)
def test_equal_members_keep_their_bits_whatever_number_they_hold(number, mode):
    model, registry = tied_towers()
    value = np.full((5, 4), number, "float32")
    for kernel in kernels(model):
        kernel.assign(value)
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=100)
    fit(model, registry, epochs=1, optimizer=optimizer, **mode)
    assert {bits(kernel) for kernel in kernels(model)} == {value.tobytes()}


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e-40], ids=str)
def test_members_stay_bitwise_equal_while_a_training_goes_wrong(poison):
    model, registry = tied_towers()
    kernels(model)[1].assign(np.full((5, 4), poison, "float32"))
    fit(model, registry, optimizer=OPTIMIZERS["adam"](), **QUICK)
    assert np.isfinite(ops.convert_to_numpy(kernels(model)[0].value)).all() == np.isfinite(poison)


# ---- partial ties and sharing, step by step


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_partial_tie_shrinks_every_distance_to_the_mean_by_its_rate_each_step(n, mode):
    model, _ = tied_towers(n, rate=0.25)
    members = kernels(model)
    for seed, member in enumerate(members):
        start_from([member], seed)
    values = run_recorded(model, members, optimizer=keras.optimizers.SGD(0.0), **mode).astype("float64")
    means = values.mean(1, keepdims=True)
    assert len(values) == 5
    np.testing.assert_allclose(means, means[:1].repeat(5, 0), rtol=1e-6, atol=1e-6)
    expected = (values - means)[:1] * 0.75 ** np.arange(5).reshape(5, 1, 1, 1)
    np.testing.assert_allclose(values - means, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_partial_tie_pulls_to_a_frozen_member_by_its_rate_each_step(mode):
    model, _ = tied_towers(frozen=(1,), rate=0.25)
    members = kernels(model)
    for seed, member in enumerate(members):
        start_from([member], seed)
    values = run_recorded(model, members, optimizer=keras.optimizers.SGD(0.0), **mode)
    assert len({step[1].tobytes() for step in values}) == 1
    expected = (values - values[:1, 1:2])[:1] * 0.75 ** np.arange(5).reshape(5, 1, 1, 1)
    np.testing.assert_allclose(values - values[:1, 1:2], expected, rtol=1e-5, atol=1e-6)


def branches(layers, head):
    """One layer a branch, each with an input of its own, and a head that stays as it is."""
    entrances = [keras.Input((5,)) for _ in layers]
    outputs = [layer(entrance) for layer, entrance in zip(layers, entrances, strict=True)]
    model = keras.Model(entrances, head(keras.layers.Concatenate()(outputs)))
    start_from(list({id(layer): layer.kernel for layer in layers}.values()))
    start_from([head.kernel], seed=1)
    head.trainable = False
    return model


def kernel_layer():
    return keras.layers.Dense(4, activation="tanh", use_bias=False)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("n", [2, 3])
def test_projecting_with_sgd_is_sharing_at_the_learning_rate_divided_by_the_number_of_members(n, momentum):
    x, y = [data(seed=seed)[0] for seed in range(n)], data()[1]
    layers = [kernel_layer() for _ in range(n)]
    model = branches(layers, keras.layers.Dense(1))
    equalize.GroupRegistry().tie("tied", [layer.kernel for layer in layers], Equal())
    sgd = keras.optimizers.SGD(0.3, momentum)
    tied = run_recorded(model, [layer.kernel for layer in layers], optimizer=sgd, x=x, y=y, epochs=2)

    one = kernel_layer()
    model = branches([one] * n, keras.layers.Dense(1))
    shared = run_recorded(model, [one.kernel], optimizer=keras.optimizers.SGD(0.3 / n, momentum), x=x, y=y, epochs=2)
    assert len(tied) == len(shared) == 9
    assert np.abs(shared[-1] - shared[0]).max() > 0.05
    np.testing.assert_allclose(tied, shared.repeat(n, 1), rtol=1e-5, atol=1e-6)


def test_projecting_with_adam_is_not_sharing():
    x, y = [data(seed=seed)[0] for seed in range(2)], data()[1]
    layers = [kernel_layer() for _ in range(2)]
    model = branches(layers, keras.layers.Dense(1))
    equalize.GroupRegistry().tie("tied", [layer.kernel for layer in layers], Equal())
    tied = run_recorded(model, [layers[0].kernel], optimizer=keras.optimizers.Adam(0.1), x=x, y=y)
    one = kernel_layer()
    model = branches([one] * 2, keras.layers.Dense(1))
    for rate in (0.1, 0.05):
        start_from([one.kernel])
        shared = run_recorded(model, [one.kernel], optimizer=keras.optimizers.Adam(rate), x=x, y=y)
        assert np.abs(shared - tied).max() > 0.01
