"""The law of `TiedOptimizer`: its run is the run of one shared variable, number by number, after every step."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.views import Chain, Flip, Rotate90, Scale, Slice, Transpose
from tests import bare
from tests.conftest import BACKEND, KERAS_3_5, MODES, QUICK, Blocked, Recorder, bits, compile_quickly, data

O = keras.optimizers  # noqa: E741

OPTIMIZERS = {
    "sgd": functools.partial(O.SGD, 0.1),
    "momentum": functools.partial(O.SGD, 0.05, momentum=0.9),
    "nesterov": functools.partial(O.SGD, 0.05, momentum=0.9, nesterov=True),
    "rmsprop": functools.partial(O.RMSprop, 0.01, momentum=0.5, centered=True),
    "adagrad": functools.partial(O.Adagrad, 0.05),
    "adadelta": functools.partial(O.Adadelta, 1.0),
    "adam": functools.partial(O.Adam, 0.01),
    "amsgrad": functools.partial(O.Adam, 0.01, amsgrad=True),
    "adamw": functools.partial(O.AdamW, 0.01),
    "adamax": functools.partial(O.Adamax, 0.01),
    "nadam": functools.partial(O.Nadam, 0.01),
    "ftrl": functools.partial(O.Ftrl, 0.05),
    "lion": functools.partial(O.Lion, 0.005),
    "lamb": functools.partial(O.Lamb, 0.01),
    "adafactor": functools.partial(O.Adafactor, 0.05),
}
OPTIMIZERS |= {
    name.lower(): functools.partial(getattr(O, name), 0.01)
    for name in ("Muon", "ScheduleFreeAdamW")
    if hasattr(O, name)  # newer than the oldest Keras
}

SETTINGS = {
    "weight decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.02},
    "global_clipnorm": {"global_clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.01},
    "ema": {"use_ema": True, "ema_momentum": 0.9},
    "ema overwrites": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 3},
    "all": {
        "weight_decay": 0.1,
        "global_clipnorm": 0.05,
        "use_ema": True,
        "ema_momentum": 0.9,
        "gradient_accumulation_steps": 3,
    },
}


def branches(n, *, shared, units=4, blocked=(), **arguments):
    """n branches with an input each and a head that all share, with one kernel or with n equal ones.

    Those that are blocked get no gradient.
    """
    keras.utils.set_random_seed(1)
    entrances = [keras.Input((5,)) for _ in range(n)]
    layers = [
        keras.layers.Dense(units, activation="tanh", use_bias=False, name=f"branch_{i}", **arguments)
        for i in range(1 if shared else n)
    ]
    layers = layers * n if shared else layers
    outputs = [layer(entrance) for layer, entrance in zip(layers, entrances, strict=True)]
    outputs = [Blocked()(output) if i in blocked else output for i, output in enumerate(outputs)]
    model = keras.Model(entrances, keras.layers.Dense(1, name="head")(keras.layers.Concatenate()(outputs)))
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if "branch" not in variable.path:
            variable.assign(random.normal(size=tuple(variable.shape), scale=0.5))
    start = random.normal(size=(5, units), scale=0.5)
    for layer in layers:
        layer.kernel.assign(start)
    return model, [layer.kernel for layer in layers]


def tie(kernels, rule=None):
    registry = equalize.GroupRegistry()
    registry.tie("branches", kernels, rule or Equal())
    return registry


def inputs(n):
    return [data(seed=seed)[0] for seed in range(n)]


def run(model, optimizer, variables, *, steps=8, x=None, **compile_args):
    """What the variables hold before training, after every step, and once `fit` has ended."""
    x = inputs(len(model.inputs)) if x is None else x
    compile_quickly(model, optimizer, "mse", **(compile_args or MODES[QUICK]))
    recorder = Recorder(variables)
    y = data(len(x[0]))[1]
    x = x if len(x) > 1 else x[0]
    model.fit(x, y, epochs=steps * 8 // len(y), batch_size=8, shuffle=False, verbose=0, callbacks=[recorder])
    return np.stack([*recorder.values, recorder._read()])


def require_same_slots(tied, shared):
    assert [tuple(v.shape) for v in tied.variables] == [tuple(v.shape) for v in shared.variables]


def both_runs(make_optimizer, n=2, **kwargs):
    """The `fit` of a model with one shared variable, and that of one with n tied ones."""
    model, kernels = branches(n, shared=True)
    shared_optimizer = make_optimizer()
    expected = run(model, shared_optimizer, kernels[:1], **kwargs), bits(model.get_layer("head").kernel)
    model, kernels = branches(n, shared=False)
    optimizer = TiedOptimizer(make_optimizer(), tie(kernels))
    tied = run(model, optimizer, kernels, **kwargs), bits(model.get_layer("head").kernel)
    require_same_slots(optimizer, shared_optimizer)
    return expected, tied


def assert_same_bits(expected, tied):
    shared, others = expected[0], tied[0]
    assert np.isfinite(shared).all()
    assert not np.array_equal(shared[0], shared[-1])
    for step, (one, all_of_them) in enumerate(zip(shared, others, strict=True)):
        assert {value.tobytes() for value in all_of_them} == {one[0].tobytes()}, f"step {step}"
    assert tied[1] == expected[1]  # the head, which is not tied


def both_bare(make_optimizer, n=2, *, steps=12, rule=None, constraint=None, mode=QUICK):
    """The same on bare variables, an untied one beside them, with gradients that are given."""
    random = np.random.default_rng(1)
    start, beside = (random.normal(size=shape, scale=0.5).astype("float32") for shape in ((5, 4), (4, 2)))
    gradients = bare.random_gradients(steps, *[(5, 4)] * n, (4, 2))

    shared = keras.Variable(start, name="shared")
    shared.constraint = constraint
    shared_optimizer = make_optimizer()
    summed = [[functools.reduce(np.add, each[:-1]), each[-1]] for each in gradients]
    expected = bare.take_steps(shared_optimizer, [shared, keras.Variable(beside, name="head")], summed, mode)

    members = [keras.Variable(start, name=f"member_{i}") for i in range(n)]
    optimizer = TiedOptimizer(make_optimizer(), tie(members, rule))
    found = bare.take_steps(optimizer, [*members, keras.Variable(beside, name="head")], gradients, mode)
    require_same_slots(optimizer, shared_optimizer)
    assert np.isfinite(np.frombuffer(expected[-1][0], "float32")).all()
    assert expected[0][0] != expected[-1][0]
    return expected, found


def assert_same_bare(expected, found):
    for step, ((shared, head), (*members, tied_head)) in enumerate(zip(expected, found, strict=True)):
        assert set(members) == {shared}, f"step {step}"
        assert tied_head == head, f"step {step}"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_run_is_that_of_one_shared_variable_bit_for_bit(name):
    assert_same_bare(*both_bare(OPTIMIZERS[name]))


# Keras's base class does this for all of them; those that run by default do something of their own besides.
OWN = {"rmsprop", "adamw", "lamb", "adafactor", "muon", "schedulefreeadamw"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OWN else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_decay_clipping_averages_and_accumulation_act_as_on_one_shared_variable(name):
    if name == "schedulefreeadamw" and BACKEND == "jax":
        pytest.skip("Keras's own accumulation of gradients fails with it there")
    assert_same_bare(*both_bare(functools.partial(OPTIMIZERS[name], **SETTINGS["all"])))


@pytest.mark.parametrize("settings", [key for key in SETTINGS if key != "all"])
@pytest.mark.parametrize("name", ["adam", pytest.param("momentum", marks=pytest.mark.slow)])
def test_each_setting_acts_as_on_one_shared_variable(name, settings):
    assert_same_bare(*both_bare(functools.partial(OPTIMIZERS[name], **SETTINGS[settings])))


@pytest.mark.parametrize(("name", "settings"), [("momentum", {}), ("adam", SETTINGS["all"])], ids=["plain", "all"])
@pytest.mark.sampled
def test_a_fit_is_that_of_one_shared_variable_bit_for_bit(name, settings):
    assert_same_bits(*both_runs(functools.partial(OPTIMIZERS[name], **settings), steps=16))


@pytest.mark.parametrize("n", [3, 5])
def test_more_members_agree_to_the_rounding_of_a_sum(n):
    expected, found = both_bare(OPTIMIZERS["adam"], n, steps=40)
    assert all(len(set(members)) == 1 for *members, _ in found)
    shared, tied = (np.array([np.frombuffer(step[0], "float32") for step in run]) for run in (expected, found))
    assert np.abs(tied - shared).max() <= 1e-6 * np.abs(shared).max()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != QUICK])
def test_in_every_way_to_run_a_step(mode):
    expected, tied = both_runs(OPTIMIZERS["momentum"], **MODES[mode])
    assert all(len({value.tobytes() for value in step}) == 1 for step in tied[0])
    np.testing.assert_allclose(tied[0], expected[0].repeat(2, 1), rtol=1e-5, atol=1e-6)  # XLA fuses the two apart


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no `steps_per_execution` there")
def test_several_steps_at_once():
    assert_same_bits(*both_runs(OPTIMIZERS["adam"], steps_per_execution=2, **MODES[QUICK]))


@pytest.mark.parametrize("blocked", [(0,), (1, 2)], ids=str)
@pytest.mark.sampled
def test_members_without_a_gradient_count_as_zero(blocked):
    results = []
    for shared in (True, False):
        model, kernels = branches(3, shared=shared, blocked=blocked)
        optimizer = OPTIMIZERS["momentum"]() if shared else TiedOptimizer(OPTIMIZERS["momentum"](), tie(kernels))
        results.append(run(model, optimizer, kernels))
    assert not np.array_equal(results[0][0], results[0][-1])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6, atol=1e-7)
    assert all(len({value.tobytes() for value in step}) == 1 for step in results[1])


def test_a_mean_of_gradients_is_sharing_at_a_smaller_learning_rate():
    results = []
    for shared in (True, False):
        model, kernels = branches(2, shared=shared)
        model.get_layer("head").trainable = False
        optimizer = O.SGD(0.05) if shared else TiedOptimizer(O.SGD(0.1), tie(kernels), reduction="mean")
        results.append(run(model, optimizer, kernels[: 1 if shared else 2]))
    np.testing.assert_allclose(results[1], results[0].repeat(2, 1), rtol=1e-5, atol=1e-7)


class Shrink(keras.constraints.Constraint):
    """Tells how often it was called: every call counts."""

    def __call__(self, w):
        return 0.9 * w


def test_the_inner_constraint_is_called_once_a_step_and_nothing_is_projected():
    rule = Equal(inner=Shrink())
    assert_same_bare(*both_bare(OPTIMIZERS["adam"], rule=rule, constraint=Shrink()))


# ---- loss scaling

SCALED = {
    "around": lambda registry: O.LossScaleOptimizer(TiedOptimizer(O.Adam(0.01), registry), initial_scale=2.0**10),
    "inside": lambda registry: TiedOptimizer(O.LossScaleOptimizer(O.Adam(0.01), initial_scale=2.0**10), registry),
    "factor": lambda registry: TiedOptimizer(O.Adam(0.01, loss_scale_factor=2.0**10), registry),
}


@functools.cache
def shared_run(dtype=None, scaled=False):
    """The run that those with loss scaling are compared with."""
    model, kernels = branches(2, shared=True, dtype=dtype)
    model.dtype_policy = keras.DTypePolicy(dtype or "float32")
    optimizer = O.LossScaleOptimizer(O.Adam(0.01)) if scaled else O.Adam(0.01)
    return run(model, optimizer, kernels[:1]).repeat(2, 1)


@pytest.mark.parametrize("place", SCALED)
@pytest.mark.sampled
def test_loss_scaling_inside_or_around(place):
    model, kernels = branches(2, shared=False)
    tied = run(model, SCALED[place](tie(kernels)), kernels)
    assert tied.tobytes() == shared_run().tobytes()  # powers of two scale without rounding


def test_the_factor_that_the_loss_is_multiplied_by_is_told():
    kernels = branches(2, shared=False)[1]
    registry = tie(kernels)
    assert SCALED["factor"](registry).loss_scale_factor == 2.0**10
    assert TiedOptimizer(O.Adam(0.01), registry).loss_scale_factor is None
    inside, around = SCALED["inside"](registry), SCALED["around"](registry)
    for optimizer in (inside, around):
        optimizer.build(kernels)
    assert ops.convert_to_numpy(inside.loss_scale_factor) == 2.0**10
    assert around.inner_optimizer.loss_scale_factor is None


@pytest.mark.parametrize("place", ["auto", "inside and auto", "inside", "around"])
@pytest.mark.sampled
def test_mixed_precision(place):
    if KERAS_3_5 and place == "inside and auto":
        pytest.skip("the LossScaleOptimizer of Keras 3.5 does not tell what it wraps, so the loss is unscaled twice")
    model, kernels = branches(2, shared=False, dtype="mixed_float16")
    model.dtype_policy = keras.DTypePolicy("mixed_float16")
    if place == "auto":
        optimizer = TiedOptimizer(O.Adam(0.01), tie(kernels))
    elif "inside" in place:
        optimizer = TiedOptimizer(O.LossScaleOptimizer(O.Adam(0.01)), tie(kernels))
    else:
        optimizer = O.LossScaleOptimizer(TiedOptimizer(O.Adam(0.01), tie(kernels)))
    tied = run(model, optimizer, kernels, auto_scale_loss=place != "inside", **MODES[QUICK])
    assert isinstance(model.optimizer, O.LossScaleOptimizer) == (place != "inside")
    expected = shared_run("mixed_float16", scaled=True)
    assert not np.array_equal(expected[0], expected[-1])
    np.testing.assert_allclose(tied, expected, rtol=2e-3, atol=2e-4)  # float16 gradients round as they add
    assert all(step[0].tobytes() == step[1].tobytes() for step in tied)


@pytest.mark.parametrize("place", ["around", "inside"])
@pytest.mark.sampled
def test_a_step_that_loss_scaling_skips_changes_nothing(place):
    model, kernels = branches(2, shared=False)
    scale = {"initial_scale": 2.0**127}
    optimizer = (
        O.LossScaleOptimizer(TiedOptimizer(O.SGD(0.1), tie(kernels)), **scale)
        if place == "around"
        else TiedOptimizer(O.LossScaleOptimizer(O.SGD(0.1), **scale), tie(kernels))
    )
    values = run(model, optimizer, kernels, x=[1e3 * x for x in inputs(2)])
    assert values[1].tobytes() == values[0].tobytes()
    assert all(step[0].tobytes() == step[1].tobytes() for step in values)


# ---- views

VIEWS = {
    "transpose": [None, Transpose()],
    "flip": [None, Flip(0)],
    "rotate": [None, Rotate90(1)],
    "minus": [None, Scale(-1)],
    "double": [Scale(2), None],
    "chain": [None, Chain(Transpose(), Scale(-4), Flip((0, 1)))],
    "no plain one": [Transpose(), Flip(1)],
    "third": [None, Scale(3)],
    "slice": [None, Slice((1, 2), (4, 4))],
    "slice first": [Slice((1, 2), (4, 4)), None],
    "only slices": [Slice((1, 2), (4, 4)), Slice((0, 0), (4, 4))],
    "all scaled": [Scale(2), Scale(-4)],
}
# What is shared is the member that is updated; the others show it through what takes it to the common value and on.
SEEN_FROM_THE_FIRST = {"all scaled": [None, Scale(-2)]}


@keras.saving.register_keras_serializable(package="tests")
class Shows(keras.layers.Layer):
    """x·V(w) for a weight that was made elsewhere, of which the view shows a part."""

    def __init__(self, common, free, view):
        super().__init__()
        self.common, self.free, self.view = common, free, view

    def call(self, x):
        return ops.tanh(x @ self.shown())

    def shown(self):
        if not isinstance(self.view, Slice):
            return self.common + 0.0 if self.view is None else self.view.forward(self.common + 0.0)
        ends = zip(self.view.start_indices, self.view.shape, self.free.shape, strict=True)
        pads = [(start, size - start - length) for start, length, size in ends]
        inside = ops.pad(ops.ones(self.view.shape), pads)
        return ops.pad(self.common + 0.0, pads) + (1.0 - inside) * self.free


def starts(view, random):
    """A common value, and a member that shows it."""
    size = 6 if isinstance(view, Slice) else 4
    return random.normal(size=(size, size), scale=0.5).astype("float32")


def shown_values(views, random):
    """A common value, and members that show it."""
    common = random.normal(size=(4, 4), scale=0.5).astype("float32")
    if isinstance(views[0], Scale) and not any(view is None for view in views):
        common = common / views[0].factor
    members = [starts(view, random) for view in views]
    return common, [
        common if view is None else ops.convert_to_numpy(view.forward(ops.convert_to_tensor(common), member))
        for view, member in zip(views, members, strict=True)
    ]


def shown_model(*, shared):
    """Square kernels that show a common value for each kind of view; the shared model computes them from it.

    Returns the model, and for each kind either the weight and the free parts, or the members' kernels.
    """
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    layers, starting, made = [], [], {}
    for kind, views in VIEWS.items():
        views = SEEN_FROM_THE_FIRST.get(kind, views) if shared else views
        common, members = shown_values(VIEWS[kind], random)
        if shared:
            common = members[0] if kind in SEEN_FROM_THE_FIRST else common
            weight = keras.Variable(common)
            frees = [keras.Variable(member) for member in members]
            layers += [Shows(weight, free, view) for free, view in zip(frees, views, strict=True)]
            made[kind] = weight, frees
        else:
            made[kind] = [keras.layers.Dense(len(member), activation="tanh", use_bias=False) for member in members]
            layers += made[kind]
        starting += members
    entrances = [keras.Input((len(member),)) for member in starting]
    outputs = [layer(entrance) for layer, entrance in zip(layers, entrances, strict=True)]
    head = keras.layers.Dense(1)
    model = keras.Model(entrances, head(keras.layers.Concatenate()(outputs)))
    head.kernel.assign(random.normal(size=tuple(head.kernel.shape), scale=0.1))
    if not shared:
        for layer, member in zip(layers, starting, strict=True):
            layer.kernel.assign(member)
        made = {kind: [layer.kernel for layer in tied] for kind, tied in made.items()}
    return model, made


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("name", ["momentum", pytest.param("adam", marks=pytest.mark.slow)])
def test_through_views(name):
    """All kinds of views in one model, a group each."""
    model, shared = shown_model(shared=True)
    random = np.random.default_rng(2)
    x = [random.normal(size=(32, *shape[1:])).astype("float32") for shape in model.input_shape]
    run(model, OPTIMIZERS[name](), [shared["flip"][0]], x=x)
    model, tied = shown_model(shared=False)
    registry = equalize.GroupRegistry()
    for kind, kernels in tied.items():
        pairs = [kernel if view is None else (kernel, view) for kernel, view in zip(kernels, VIEWS[kind], strict=True)]
        registry.tie(kind, pairs, Equal())
    before = {kind: [bits(kernel) for kernel in kernels] for kind, kernels in tied.items()}
    run(model, TiedOptimizer(OPTIMIZERS[name](), registry), tied["flip"], x=x)
    assert set(registry.spread().values()) == {0.0}
    for kind, kernels in tied.items():
        weight, frees = shared[kind]
        for kernel, free, view, old in zip(
            kernels, frees, SEEN_FROM_THE_FIRST.get(kind, VIEWS[kind]), before[kind], strict=True
        ):
            assert bits(kernel) != old, kind
            common, own = (ops.convert_to_tensor(ops.convert_to_numpy(v.value)) for v in (weight, free))
            expected = ops.convert_to_numpy(common if view is None else view.forward(common, own))
            found = ops.convert_to_numpy(kernel.value)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=kind)


# ---- what is in a model besides


def test_soft_ties_beside_exact_ones():
    results = []
    for shared in (True, False):
        model, kernels = branches(2, shared=shared)
        extra = [keras.layers.Dense(3, name=f"extra_{i}") for i in range(2)]
        outputs = [layer(entrance) for layer, entrance in zip(extra, model.inputs, strict=True)]
        model = keras.Model(model.inputs, keras.layers.Dense(1)(keras.layers.Concatenate()([model.output, *outputs])))
        random = np.random.default_rng(3)
        for variable in model.trainable_variables[-6:]:
            variable.assign(random.normal(size=tuple(variable.shape), scale=0.5))
        registry = equalize.GroupRegistry() if shared else tie(kernels)
        registry.tie("soft", [layer.kernel for layer in extra], MeanL2(factor=0.5))
        registry.tie("partial", [layer.bias for layer in extra], Equal(rate=0.5))
        optimizer = OPTIMIZERS["momentum"]() if shared else TiedOptimizer(OPTIMIZERS["momentum"](), registry)
        watched = [kernels[0], *(weight for layer in extra for weight in layer.weights)]
        run(model, optimizer, [kernels[0]])
        results.append([bits(variable) for variable in watched])
    assert results[0] == results[1]


def test_whole_blocks():
    results = []
    for shared in (True, False):
        keras.utils.set_random_seed(1)

        def block():
            return keras.Sequential([keras.layers.Dense(5, activation="tanh"), keras.layers.LayerNormalization()])

        blocks = [block()] * 2 if shared else [block(), block()]
        entrance = keras.Input((5,))
        model = keras.Model(entrance, keras.layers.Dense(1, name="head")(blocks[1](blocks[0](entrance))))
        random = np.random.default_rng(0)
        model.get_layer("head").kernel.assign(random.normal(size=(5, 1)))
        for each in blocks:
            each.layers[0].kernel.assign(np.random.default_rng(4).normal(size=(5, 5), scale=0.5))
        optimizer = OPTIMIZERS["momentum"]()
        if not shared:
            registry = equalize.GroupRegistry()
            assert len(registry.tie("blocks", blocks, Equal())) == 4
            optimizer = TiedOptimizer(optimizer, registry)
        run(model, optimizer, blocks[0].trainable_variables[:1], x=[data()[0]])
        results.append([bits(variable) for variable in blocks[1].trainable_variables])
    assert results[0] == results[1]


@pytest.mark.parametrize(("name", "mode"), [("adam", QUICK), *(("momentum", mode) for mode in MODES if mode != QUICK)])
@pytest.mark.sampled
def test_embeddings_that_look_up_different_rows(name, mode):
    results = []
    for shared in (True, False):
        keras.utils.set_random_seed(1)
        entrances = [keras.Input((2,), dtype="int32") for _ in range(2)]
        layers = [keras.layers.Embedding(50, 3, name=f"words_{i}") for i in range(1 if shared else 2)]
        layers = layers * 2 if shared else layers
        rows = [keras.layers.Flatten()(layer(entrance)) for layer, entrance in zip(layers, entrances, strict=True)]
        model = keras.Model(entrances, keras.layers.Dense(1, name="head")(keras.layers.Concatenate()(rows)))
        model.get_layer("head").kernel.assign(np.random.default_rng(0).normal(size=(12, 1)))
        layers[0].embeddings.assign(np.random.default_rng(1).normal(size=(50, 3)))
        optimizer = OPTIMIZERS[name]()
        if not shared:
            optimizer = TiedOptimizer(optimizer, tie([layer.embeddings for layer in layers]))
        random = np.random.default_rng(2)
        x = [random.integers(0, 5, (32, 2)), random.integers(3, 9, (32, 2))]
        values = run(model, optimizer, [layer.embeddings for layer in layers[: 1 if shared else 2]], x=x, **MODES[mode])
        results.append(values)
    assert all(step[0].tobytes() == step[1].tobytes() for step in results[1])
    assert not np.array_equal(results[0][0], results[0][-1])
    np.testing.assert_allclose(results[1], results[0].repeat(2, 1), rtol=1e-5, atol=1e-6)
