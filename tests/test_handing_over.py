"""Ties that end or begin under a `TiedOptimizer`: slots are handed over, and the next step is as large as the last."""

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize._backend import keras_private
from equalize._ties import slots
from equalize.callbacks import TieSchedule
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError, NotLinkedError
from equalize.optimizers import TiedOptimizer
from equalize.reductions import MGDA
from equalize.regularizers import MeanL2, PairwiseL2
from equalize.saving import load_model, save_model
from equalize.views import Scale, Slice, Transpose
from tests.bare import random_gradients, stepper
from tests.conftest import BACKEND, MODES, bitwise_equal, two_towers


def array(x):
    return ops.convert_to_numpy(x.value if hasattr(x, "value") else x)


def pair(*views, shapes=((4, 3), (4, 3))):
    members = [keras.Variable(np.ones(shape, "float32")) for shape in shapes]
    registry = equalize.GroupRegistry()
    views = views or (None, None)
    shown = [m if view is None else (m, view) for m, view in zip(members, views, strict=True)]
    registry.tie("pair", shown, Equal())
    return members, registry


DEGREES = {
    "SGD": {"momentums": 1},
    "Adam": {"_momentums": 1, "_velocities": 2, "_velocity_hats": 2},
    "AdamW": {"_momentums": 1, "_velocities": 2},
    "Nadam": {"_momentums": 1, "_velocities": 2},
    "Adamax": {"_m": 1, "_u": 1},
    "RMSprop": {"_velocities": 2, "_momentums": 0, "_average_gradients": 1},
    "Adagrad": {"_accumulators": 2},
    "Adadelta": {"_accumulated_grads": 2, "_accumulated_delta_vars": 0},
    "Ftrl": {"_accumulators": 2, "_linears": 1},
    "Lion": {"_momentums": 1},
    "Lamb": {"_momentums": 1, "_velocities": 2},
    "Adafactor": {"_r": 2, "_c": 2, "_v": 2},
}
OPTIONS = {"SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}, "RMSprop": {"momentum": 0.5, "centered": True}}


@pytest.mark.parametrize("name", DEGREES)
def test_the_power_of_the_gradients_in_each_slot_is_measured(name):
    optimizer = getattr(keras.optimizers, name)(clipnorm=1.0, **OPTIONS.get(name, {}))
    optimizer.build([keras.Variable(np.ones((3, 2), "float32"))])
    found = slots._degrees(optimizer)
    assert {kind: degree for kind, degree in found.items() if kind in DEGREES[name]} == DEGREES[name]


@pytest.mark.parametrize("ending", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.Adam,
        keras.optimizers.AdamW,
        keras.optimizers.Nadam,
        keras.optimizers.Adamax,
        keras.optimizers.RMSprop,
        keras.optimizers.Lion,
        keras.optimizers.Lamb,
    ],
)
def test_the_first_step_after_a_change_is_as_large_as_without_it(optimizer, mode, ending):
    """Gradients are the same in each step and for each member, so steps are, whether members are tied or not."""
    sizes = []
    for changing in (False, True):
        members, registry = pair()
        others = [keras.Variable(np.ones(2, "float32")) for _ in range(2)]
        registry.tie("other", others, Equal())
        if not ending:
            registry.replace("pair", None)
        variables = [*members, *others]
        tied = TiedOptimizer(optimizer(0.001), registry)
        gradients = [
            ops.convert_to_tensor(0.1 + np.arange(v.size, dtype="float32").reshape(v.shape))
            for v in map(array, variables)
        ]
        step = stepper(tied, variables, mode)
        for _ in range(5):
            step(gradients)
        if changing:
            registry.replace("pair", None if ending else Equal())
            step = stepper(tied, variables, mode)
        before = array(members[1]).copy()
        step(gradients)
        sizes.append(np.abs(array(members[1]) - before).mean())
        assert len(tied.groups) == 2 - (ending == changing)
        assert bitwise_equal(*members)
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_slots_go_through_views_and_to_what_is_left_free(mode):
    """A transposed, twice as large member and a part of a larger one; a free variable keeps its own slots."""
    first, second = keras.Variable(np.ones((2, 3), "float32")), keras.Variable(np.ones((3, 4), "float32"))
    free = keras.Variable(np.ones(5, "float32"))
    second_view = equalize.views.Chain(Transpose(), Scale(-2.0), Slice((0, 1), (3, 2)))
    registry = equalize.GroupRegistry()
    registry.tie("pair", [first, (second, second_view)], Equal())
    optimizer = TiedOptimizer(keras.optimizers.Adam(0.01), registry)
    variables = [first, second, free]
    step = stepper(optimizer, variables, mode)
    for gradients in random_gradients(3, (2, 3), (3, 4), (5,)):
        step([ops.convert_to_tensor(g) for g in gradients])
    found = keras_private.slots(optimizer.inner_optimizer)
    before = {kind: {key: array(slot).copy() for key, slot in found[kind].items()} for kind in found}
    registry.replace("pair", None)
    after = keras_private.slots(optimizer.inner_optimizer)
    m, v = (before[kind][id(first)] for kind in ("_momentums", "_velocities"))
    own = {kind: before[kind][id(second)] for kind in before}
    for kind, common, degree in (("_momentums", m / 2, 1), ("_velocities", v / 4, 2)):
        np.testing.assert_allclose(array(after[kind][id(first)]), common, rtol=1e-6)
        expected = own[kind].copy()
        expected[:, 1:3] = common.T / (-2.0) ** degree
        np.testing.assert_allclose(array(after[kind][id(second)]), expected, rtol=1e-6)
        assert np.array_equal(array(after[kind][id(free)]), before[kind][id(free)])
        assert degree == 1 or array(after[kind][id(second)]).min() >= 0.0
    registry.replace("pair", Equal())  # and back: the mean of both is what it was
    again = keras_private.slots(optimizer.inner_optimizer)
    np.testing.assert_allclose(array(again["_momentums"][id(first)]), m, rtol=1e-5)
    np.testing.assert_allclose(array(again["_velocities"][id(first)]), v, rtol=1e-5)
    step = stepper(optimizer, variables, mode)
    step([ops.convert_to_tensor(g) for g in gradients])
    assert registry.spread() == {"pair": 0.0}


def test_what_the_inner_optimizer_was_set_to_stays():
    members, registry = pair()
    other = keras.Variable(np.ones(3, "float32"))
    inner = keras.optimizers.AdamW(0.01, use_ema=True, gradient_accumulation_steps=2)
    inner.exclude_from_weight_decay([other])
    optimizer = TiedOptimizer(keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0), registry, reduction=MGDA())
    step = stepper(optimizer, [*members, other])
    optimizer.learning_rate = 0.005
    gradients = [ops.ones((4, 3)), ops.ones((4, 3)), ops.ones(3)]
    for _ in range(3):
        step(gradients)
    scale, taken = array(optimizer.inner_optimizer.dynamic_scale), array(keras_private.steps_taken(inner))
    halves = array(inner._accumulated_gradients[0]).copy()
    registry.replace("pair", None)
    assert optimizer.inner_optimizer.inner_optimizer is inner
    assert array(optimizer.inner_optimizer.dynamic_scale) == scale
    assert array(keras_private.steps_taken(inner)) == taken
    assert float(array(inner.learning_rate)) == pytest.approx(0.005)
    assert [keras_private.decays(inner, v) for v in (*members, other)] == [True, True, False]
    for slot in inner._accumulated_gradients[:2]:  # of a mean, which is as large as those of the uses
        np.testing.assert_allclose(array(slot), halves)
    step = stepper(optimizer, [*members, other])
    step(gradients)
    assert np.all(np.isfinite(array(members[0])))


def test_a_group_that_begins_is_equal_at_once():
    members, registry = pair()
    registry.replace("pair", None)
    optimizer = TiedOptimizer("adam", registry)
    optimizer.build(members)
    members[1].assign(3.0 * ops.ones((4, 3)))
    registry.replace("pair", Equal())
    assert bitwise_equal(*members)
    assert np.all(array(members[0]) == 2.0)


def test_members_that_are_treated_differently_are_not_tied_and_nothing_changes():
    members, registry = pair()
    registry.replace("pair", None)
    inner = keras.optimizers.AdamW(weight_decay=0.1)
    inner.exclude_from_weight_decay([members[1]])
    optimizer = TiedOptimizer(inner, registry)
    optimizer.build(members)
    with pytest.raises(GroupMismatchError, match="the optimizer treats"):
        registry.replace("pair", Equal())
    assert registry["pair"].rule is None
    optimizer.apply([ops.ones((4, 3))] * 2, members)
    assert not bitwise_equal(*members)


def test_slots_of_a_group_that_ended_are_there_once_a_member():
    members, registry = pair()
    optimizer = TiedOptimizer("adam", registry)
    optimizer.build(members)
    held = len(optimizer.variables)
    registry.replace("pair", MeanL2(factor=0.1))
    assert len(optimizer.variables) == held + 2
    registry.replace("pair", Equal())
    assert len(optimizer.variables) == held


def test_a_group_may_begin_with_an_anchor_and_an_outdated_optimizer_is_left_alone():
    members, registry = pair()
    other = keras.Variable(np.ones(2, "float32"))
    optimizer = TiedOptimizer("adam", registry)
    optimizer.build([*members, other])
    registry.replace("pair", None)
    members[0].trainable = False
    registry.replace("pair", Equal())
    optimizer.apply([ops.ones((4, 3)), ops.ones(2)], [members[1], other])
    assert np.all(array(members[1]) == 1.0)
    assert np.all(array(other) < 1.0)
    late = [keras.Variable(np.ones(2, "float32")) for _ in range(2)]
    registry.tie("late", late, None)
    registry.untie("pair")
    registry.replace("late", Equal())
    members[0].trainable = True
    with pytest.raises(EqualizeError, match="Ties have changed since the optimizer was built"):
        optimizer.apply([ops.ones((4, 3)), ops.ones((4, 3)), ops.ones(2)], [*members, other])


def towers():
    model, registry = two_towers()
    model.compile(TiedOptimizer("adam", registry), ["mse", "mse"])
    return model, registry


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(24, 4)).astype("float32")
    return x, [x[:, :3], -x[:, 1:]]


class Relations(keras.callbacks.Callback):
    """Whether the kernels were equal after each step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.seen.append(bitwise_equal(*(layer.kernel for layer in self.model.layers[1:])))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_step", [False, True])
def test_a_tie_ends_and_begins_within_one_fit(mode, on_step):
    model, registry = towers()
    model.compile(model.optimizer, ["mse", "mse"], **MODES[mode])
    x, y = data()
    rules = {2: None, 5: Equal()} if on_step else {1: None, 2: Equal()}
    relations = Relations()
    schedule = TieSchedule(registry, "towers", rules, on_step=on_step)
    model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[schedule, relations])
    free = range(2, 5) if on_step else range(3, 6)
    assert relations.seen == [step not in free for step in range(9)]


def test_it_is_the_run_of_its_parts():
    """Within one `fit`, or one after the other with `replace` in between: the same numbers, bit for bit."""
    x, y = data()
    results = []
    for whole in (True, False):
        model, registry = towers()
        fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
        if whole:
            model.fit(x, y, epochs=4, callbacks=[TieSchedule(registry, "towers", {2: None})], **fit)
        else:
            model.fit(x, y, epochs=2, **fit)
            registry.replace("towers", None)
            model.fit(x, y, epochs=2, **fit)
        results.append([array(weight) for weight in model.weights])
    assert all(np.array_equal(*both) for both in zip(*results, strict=True))


@pytest.mark.parametrize("on_step", [False, True])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_is_resumed_in_the_middle_of_a_schedule(tmp_path, on_step, stop):
    x, y = data()
    rules = {6: None} if on_step else {2: None}
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model, registry = towers()
    model.fit(x, y, epochs=stop, callbacks=[TieSchedule(registry, "towers", rules, on_step=on_step)], **fit)
    save_model(model, tmp_path / "model.keras", registry)
    model.fit(
        x, y, initial_epoch=stop, epochs=5, callbacks=[TieSchedule(registry, "towers", rules, on_step=on_step)], **fit
    )
    loaded, again = load_model(tmp_path / "model.keras")
    schedule = TieSchedule(again, "towers", rules, on_step=on_step)
    loaded.fit(x, y, initial_epoch=stop, epochs=5, callbacks=[schedule], **fit)
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(array(ours), array(theirs), rtol=1e-6)
    assert not bitwise_equal(*(layer.kernel for layer in loaded.layers[1:]))


def test_rules_that_differ_in_a_matrix_only_are_two():
    model, registry = towers()
    weak, strong = ([[0.0, factor], [factor, 0.0]] for factor in (0.1, 0.2))
    registry.replace("towers", PairwiseL2(factor=weak))
    model.compile("sgd", ["mse", "mse"])
    schedule = TieSchedule(registry, "towers", {1: PairwiseL2(factor=strong)})
    model.fit(*data(), epochs=2, verbose=0, callbacks=[schedule])
    assert registry["towers/kernel"].rule.factor[0][1] == 0.2


def test_what_cannot_be_scheduled_is_an_error():
    model, registry = towers()
    for rules, error in (
        ({}, EqualizeError),
        ([None], TypeError),
        ({0: "hard"}, TypeError),
        ({-1: None}, EqualizeError),
    ):
        with pytest.raises(error, match="`rules`"):
            TieSchedule(registry, "towers", rules)
    other, _ = towers()
    with pytest.raises(NotLinkedError, match="TieSchedule has nothing to change"):
        other.fit(*data(), verbose=0, callbacks=[TieSchedule(registry, "towers", {0: None})])
    assert model.optimizer.registry["towers/kernel"].hard


@pytest.mark.skipif(BACKEND != "jax", reason="only there a step holds the state")
def test_slots_in_a_running_step_are_not_handed_over():
    class Replace(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with pytest.raises(EqualizeError, match="TiedOptimizer cannot hand slots over"):
                registry.replace("towers", None)
            assert registry["towers/kernel"].hard

    model, registry = towers()
    model.fit(*data(), verbose=0, callbacks=[Replace()])
