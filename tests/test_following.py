"""`Follow`: the first member leads, and the others move towards it after every step, and nothing comes back."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.callbacks import FactorSchedule, PeriodicSync
from equalize.constraints import Equal, Follow
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.saving import load_model, save_model
from equalize.views import Scale, Slice, Transpose
from tests.bare import random_gradients, stepper
from tests.conftest import BACKEND, MODES, bits, bitwise_equal

# On JAX an optimizer that is compiled carries what it trains and nothing else.
WAYS = ["eager"] if BACKEND == "jax" else list(MODES)
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=4),
}


def array(x):
    return ops.convert_to_numpy(x)


def variable(*shape, seed=0, trainable=True):
    value = np.random.default_rng(seed).normal(size=shape).astype("float32")
    return keras.Variable(value, trainable=trainable, name=f"variable_{seed}")


def pair(rule, view=None, trainable=False, shape=(3, 2)):
    leader, follower = variable(*shape), variable(*(shape[::-1] if view else shape), seed=1, trainable=trainable)
    registry = equalize.GroupRegistry()
    registry.tie("teacher", [leader, (follower, view) if view else follower], rule)
    return registry, leader, follower


@pytest.mark.parametrize("mode", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_follows_is_the_average_of_the_leader_after_a_hundred_steps(optimizer, mode):
    registry, leader, follower = pair(Follow(rate=0.05))
    expected = array(follower.value).astype("float64")
    made = OPTIMIZERS[optimizer]()
    step = stepper(made, [leader], mode)
    micro = made.gradient_accumulation_steps or 1
    for number, (g,) in enumerate(random_gradients(100, (3, 2))):
        step([ops.convert_to_tensor(g)])
        if (number + 1) % micro == 0:
            expected += 0.05 * (array(leader.value).astype("float64") - expected)
        np.testing.assert_allclose(array(follower.value), expected, rtol=0, atol=1e-6)
    assert registry["teacher"].spread() > 0.0


@pytest.mark.parametrize("mode", WAYS)
@pytest.mark.parametrize("micro", [1, 2])
def test_a_hard_update_copies_at_every_third_step(micro, mode):
    _, leader, follower = pair(Follow(every=3))
    accumulation = micro if micro > 1 else None
    step = stepper(keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulation), [leader], mode)
    for number, (g,) in enumerate(random_gradients(14, (3, 2)), start=1):
        before = bits(follower)
        step([ops.convert_to_tensor(g)])
        if number % (3 * micro) == 0:
            assert bits(follower) == bits(leader) != before
        else:
            assert bits(follower) == before


@pytest.mark.parametrize("mode", WAYS)
def test_followers_through_views_and_several_of_them(mode):
    leader, others = variable(3, 2), [variable(2, 3, seed=1), variable(3, 2, seed=2), variable(4, 2, seed=3)]
    registry = equalize.GroupRegistry()
    views = [Transpose(), Scale(2.0), Slice((1, 0), (3, 2))]
    registry.tie("g", [leader, *zip(others, views, strict=True)], Follow(rate=0.5))
    expected = [array(other.value).astype("float64") for other in others]
    free = array(others[2].value)[0]
    step = stepper(keras.optimizers.SGD(0.1), [leader], mode)
    for (g,) in random_gradients(3, (3, 2)):
        step([ops.convert_to_tensor(g)])
        value = array(leader.value)
        for i, target in enumerate([value.T, 2 * value, np.vstack([expected[2][:1], value])]):
            expected[i] += 0.5 * (target - expected[i])
            np.testing.assert_allclose(array(others[i].value), expected[i], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(array(others[2].value)[0], free)


def test_the_leader_is_never_changed_and_trains_as_alone():
    _, leader, _ = pair(Follow(rate=0.5))
    alone = keras.Variable(array(leader.value))
    steps = [stepper(keras.optimizers.Adam(0.1), [each], WAYS[0]) for each in (leader, alone)]
    for (g,) in random_gradients(4, (3, 2)):
        for step in steps:
            step([ops.convert_to_tensor(g)])
        assert bitwise_equal(leader, alone)


def test_followers_that_the_optimizer_trains_follow_once_a_step():
    _, leader, follower = pair(Follow(rate=0.25), trainable=True)
    distance = array(leader.value) - array(follower.value)
    step = stepper(keras.optimizers.SGD(0.0), [follower, leader])
    step([ops.zeros((3, 2)), ops.zeros((3, 2))])
    np.testing.assert_allclose(array(leader.value) - array(follower.value), 0.75 * distance, rtol=1e-5)


def test_a_frozen_leader_is_followed_by_what_trains():
    leader, follower = variable(3, 2, trainable=False), variable(3, 2, seed=1)
    registry = equalize.GroupRegistry()
    registry.tie("g", [leader, follower], Follow(rate=0.25))
    distance = array(leader.value) - array(follower.value)
    stepper(keras.optimizers.SGD(0.0), [follower], WAYS[0])([ops.zeros((3, 2))])
    np.testing.assert_allclose(array(leader.value) - array(follower.value), 0.75 * distance, rtol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_a_leader_in_a_hard_group_is_followed_as_the_group_has_it(exact):
    for order in ((0, 1), (1, 0)):
        one, two, teacher = variable(3, 2), variable(3, 2, seed=1), variable(3, 2, seed=2, trainable=False)
        registry = equalize.GroupRegistry()
        ties = [("towers", [one, two], Equal()), ("teacher", [two, teacher], Follow())]
        for place in order:
            registry.tie(*ties[place])
        optimizer = keras.optimizers.SGD(0.1)
        step = stepper(TiedOptimizer(optimizer, registry) if exact else optimizer, [one, two], WAYS[0])
        for arrays in random_gradients(2, (3, 2), (3, 2)):
            step([ops.convert_to_tensor(x) for x in arrays])
            assert bitwise_equal(one, two, teacher)
        registry.untie()
        assert one.constraint is None
        assert two.constraint is None
        assert teacher.constraint is None


def test_a_leader_with_a_constraint_is_followed_as_it_becomes():
    layer, other = keras.layers.Dense(2, kernel_constraint="non_neg"), keras.layers.Dense(2)
    for each in (layer, other):
        each.build((None, 3))
    other.trainable = False
    equalize.GroupRegistry().tie("g", [layer.kernel, other.kernel], Follow())
    stepper(keras.optimizers.SGD(10.0), [layer.kernel], WAYS[0])([ops.ones((3, 2))])
    assert (array(layer.kernel) == 0.0).all()
    assert (array(other.kernel) == 0.0).all()


def test_one_variable_follows_one_leader_and_leads_many():
    one, two, three = (variable(3, 2, seed=seed) for seed in range(3))
    registry = equalize.GroupRegistry()
    registry.tie("a", [one, two], Follow())
    registry.tie("b", [one, three], Follow(rate=0.5))
    four = variable(3, 2, seed=3)
    with pytest.raises(GroupMismatchError, match="belongs to group 'a' already"):
        registry.tie("c", [four, two], Follow())
    for chained in ([three, four], [four, one]):
        with pytest.raises(GroupMismatchError, match="what follows cannot lead"):
            registry.tie("c", chained, Follow())
    with pytest.raises(GroupMismatchError, match="a constant cannot follow"):
        registry.tie("c", [one, np.ones((3, 2))], Follow())


def networks(inside=True):
    """A student and its teacher, which is frozen, in one model or apart."""
    student, teacher = (
        keras.Sequential(
            [keras.layers.Dense(4, activation="tanh"), keras.layers.BatchNormalization(), keras.layers.Dense(2)],
            name=name,
        )
        for name in ("student", "teacher")
    )
    for each in (student, teacher):
        each.build((None, 3))
    teacher.trainable = False
    entrance = keras.Input((3,))
    outputs = [student(entrance), teacher(entrance)] if inside else student(entrance)
    return student, teacher, keras.Model(entrance, outputs)


def train(model, registry, steps=6, callbacks=(), **arguments):
    x, y = (np.random.default_rng(seed).normal(size=(8 * steps, n)).astype("float32") for seed, n in ((0, 3), (1, 2)))
    if BACKEND == "jax":
        callbacks = [*callbacks, PeriodicSync(registry, every=1)]
    several = isinstance(model.output, list)
    model.compile(keras.optimizers.Adam(0.01), ["mse", None] if several else "mse", **arguments)
    model.fit(x, [y, y] if several else y, batch_size=8, shuffle=False, verbose=0, callbacks=list(callbacks))


class Averages(keras.callbacks.Callback):
    """The averages of a student in float64."""

    def __init__(self, student, teacher, rate):
        super().__init__()
        self.student, self.rate = student, rate
        self.values = [array(weight.value).astype("float64") for weight in teacher.weights]

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        for value, weight in zip(self.values, self.student.weights, strict=True):
            value += self.rate * (array(weight.value) - value)


@pytest.mark.parametrize("inside", [True, False])
def test_a_mean_teacher_with_its_statistics_in_a_fit(inside, tmp_path):
    student, teacher, model = networks(inside)
    registry = equalize.GroupRegistry()
    registry.tie("teacher", [student, teacher], Follow(rate=0.1), statistics=True)
    registry.sync("first", "teacher")
    assert bitwise_equal(*[each.layers[1].moving_variance for each in (student, teacher)])
    averages = Averages(student, teacher, 0.1)
    train(model, registry, callbacks=[averages])
    for weight, expected in zip(teacher.weights, averages.values, strict=True):
        np.testing.assert_allclose(array(weight.value), expected, rtol=0, atol=1e-6)
    if inside:
        save_model(model, tmp_path / "model.keras", registry)
        loaded, again = load_model(tmp_path / "model.keras")
        assert {group.rule.describe() for group in again.values()} == {"Follow(rate=0.1)"}
        assert len(again) == len(registry)
        pairs = [loaded.get_layer(name) for name in ("student", "teacher")]
        averages = Averages(*pairs, 0.1)
        train(loaded, again, callbacks=[averages])
        for weight, expected in zip(pairs[1].weights, averages.values, strict=True):
            np.testing.assert_allclose(array(weight.value), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere an optimizer changes what it likes")
def test_jax_says_how_what_is_frozen_can_follow():
    student, teacher, model = networks()
    registry = equalize.GroupRegistry()
    registry.tie("teacher", [student.layers[0], teacher.layers[0]], Follow(rate=0.1))
    model.compile("adam", ["mse", None])
    x, y = np.ones((8, 3)), np.ones((8, 2))
    with pytest.raises(EqualizeError, match=r"PeriodicSync\(registry, every=1\)"):
        model.fit(x, [y, y], verbose=0)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_trainable_followers_in_the_model_follow_in_every_fit():
    """The output of the teacher has its gradients stopped, as BYOL does it."""
    student, teacher, _ = networks()
    teacher.trainable = True
    entrance = keras.Input((3,))
    model = keras.Model(entrance, [student(entrance), ops.stop_gradient(teacher(entrance))])
    registry = equalize.GroupRegistry()
    registry.tie("teacher", [student.layers[0], teacher.layers[0]], Follow(rate=0.1))
    averages = Averages(student.layers[0], teacher.layers[0], 0.1)
    model.compile(keras.optimizers.Adam(0.01), ["mse", None])
    x, y = (np.random.default_rng(seed).normal(size=(32, n)).astype("float32") for seed, n in ((0, 3), (1, 2)))
    model.fit(x, [y, y], batch_size=8, verbose=0, callbacks=[averages])
    for weight, expected in zip(teacher.layers[0].weights, averages.values, strict=True):
        np.testing.assert_allclose(array(weight.value), expected, rtol=0, atol=1e-6)


def test_the_rate_follows_a_schedule():
    student, teacher, model = networks(inside=False)
    registry = equalize.GroupRegistry()
    registry.tie("teacher", [student.layers[0], teacher.layers[0]], Follow(rate=0.5))
    before = [bits(weight) for weight in teacher.layers[0].weights]
    schedule = FactorSchedule(registry, "teacher", lambda epoch: float(epoch))
    train(model, registry, callbacks=[schedule])
    assert [bits(weight) for weight in teacher.layers[0].weights] == before
    assert registry["teacher/kernel"].rule.rate == 0.0
    x, y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")
    more = [PeriodicSync(registry, every=1)] if BACKEND == "jax" else []
    model.fit(x, y, epochs=2, verbose=0, callbacks=[schedule, *more])
    assert bitwise_equal(student.layers[0].kernel, teacher.layers[0].kernel)


def test_a_target_network_in_a_loop_by_hand_is_saved_and_goes_on(tmp_path):
    """Q-learning with a hard update every fourth step."""
    entrance = keras.Input((3,))
    nets = [keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name=name) for name in ("online", "target")]
    both = keras.Model(entrance, [net(entrance) for net in nets])
    nets[1].trainable = False
    registry = equalize.GroupRegistry()
    registry.tie("target", nets, Follow(every=4))
    registry.sync("first", "target")
    learn(*nets)
    save_model(both, tmp_path / "q.keras", registry)
    loaded, again = load_model(tmp_path / "q.keras")
    assert list(again) == list(registry)
    learn(*(loaded.get_layer(name) for name in ("online", "target")))


def learn(online, target):
    optimizer = keras.optimizers.Adam(0.05)
    optimizer.build(online.trainable_variables)
    random, copies = np.random.default_rng(0), 0
    for number in range(1, 13):
        before = bits(target.weights[0])
        states, after = (random.normal(size=(4, 3)).astype("float32") for _ in range(2))
        goal = ops.convert_to_tensor(1.0 + 0.9 * array(target(after)).max(axis=1, keepdims=True))
        gradients = gradients_of(lambda: ops.mean((online(states) - goal) ** 2), online.trainable_variables)  # noqa: B023
        optimizer.apply([ops.convert_to_tensor(g) for g in gradients], online.trainable_variables)
        if number % 4 == 0:
            copies += 1
            assert bits(target.weights[0]) == bits(online.weights[0])
        else:
            assert bits(target.weights[0]) == before != bits(online.weights[0])
    assert copies == 3


def gradients_of(function, variables):
    from tests.conftest import gradients

    return gradients(function, variables)


def test_declared_leaders_and_followers_travel_with_their_configs():
    first, second = (keras.layers.Dense(2, kernel_constraint=Follow("teacher", rate=0.5)) for _ in range(2))
    second.trainable = False
    model = keras.Sequential([keras.Input((2,)), first, second])
    for each in (model, keras.models.clone_model(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        registry = equalize.GroupRegistry().link(each)
        leader, follower = registry["teacher"].members
        assert (leader.leads, follower.leads, follower.anchor) == (True, False, False)
        distance = array(leader.variable.value) - array(follower.variable.value)
        stepper(keras.optimizers.SGD(0.0), [leader.variable], WAYS[0])([ops.zeros((2, 2))])
        np.testing.assert_allclose(
            array(leader.variable.value) - array(follower.variable.value), 0.5 * distance, rtol=1e-5
        )


def test_following_by_hand_and_changing_one_s_mind():
    registry, leader, follower = pair(Follow(rate=0.5, every=10))
    distance = array(leader.value) - array(follower.value)
    registry.project("teacher")
    np.testing.assert_allclose(array(leader.value) - array(follower.value), 0.5 * distance, rtol=1e-5)
    registry.replace("teacher", MeanL2(factor=0.5))
    assert [member.leads for member in registry["teacher"].members] == [None, None]
    registry.replace("teacher", Follow())
    registry.project("teacher")
    assert bitwise_equal(leader, follower)


def test_what_people_try_first_is_found_and_named():
    student, teacher, model = networks()
    registry = equalize.GroupRegistry()
    registry.tie("teacher", [student.layers[0], teacher.layers[0]], Equal(rate=0.01))
    model.compile("adam", ["mse", None])
    found = [finding for finding in registry.diagnose(model) if finding.kind == "frozen"]
    assert len(found) == 2
    assert all("Follow" in finding.fix for finding in found)
    registry.untie()
    registry.tie("teacher", [student.layers[0], teacher.layers[0]], Follow(rate=0.01))
    assert not [finding for finding in registry.diagnose(model) if finding.kind in ("frozen", "followers")]
    teacher.trainable = True
    found = [finding for finding in registry.diagnose(model) if finding.kind == "followers"]
    assert found
    assert "trainable = False" in found[0].fix


def test_a_follower_has_nothing_to_choose():
    student, teacher, model = networks()
    registry = equalize.GroupRegistry()
    registry.tie("teacher", [student, teacher], Follow(rate=0.01))
    free = sum(int(np.prod(weight.shape)) for weight in student.trainable_weights)
    assert registry.count_params(model)[1] == free
    teacher.trainable = True
    assert registry.count_params(model)[1] == free


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_followers_on_every_replica():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        student, teacher, model = networks(inside=False)
        registry = equalize.GroupRegistry()
        registry.tie("teacher", [student.layers[0], teacher.layers[0]], Follow(rate=0.1))
        averages = Averages(student.layers[0], teacher.layers[0], 0.1)
        train(model, registry, callbacks=[averages])
    for weight, expected in zip(teacher.layers[0].weights, averages.values, strict=True):
        np.testing.assert_allclose(array(weight.value), expected, rtol=0, atol=1e-6)


def test_parts_of_one_variable_follow_another_part_of_it():
    kernel = variable(3, 4)
    left, right = Slice((0, 0), (3, 2)), Slice((0, 2), (3, 2))
    equalize.GroupRegistry().tie("f", [(kernel, left), (kernel, right)], Follow(rate=0.5))
    step = stepper(keras.optimizers.SGD(0.1), [kernel])
    for (g,) in random_gradients(2, (3, 4)):
        moved = array(kernel.value) - 0.1 * g
        step([ops.convert_to_tensor(g)])
        np.testing.assert_allclose(array(kernel.value)[:, :2], moved[:, :2], rtol=1e-6)
        np.testing.assert_allclose(
            array(kernel.value)[:, 2:], 0.5 * (moved[:, :2] + moved[:, 2:]), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_each_of_two_exactly_tied_towers_has_a_teacher_of_its_own(rate):
    towers, teachers = [variable(3, 2), variable(3, 2)], [variable(3, 2, seed=i, trainable=False) for i in (1, 2)]
    registry = equalize.GroupRegistry()
    registry.tie("towers", towers, Equal())
    for i in range(2):
        registry.tie(f"teacher {i}", [towers[i], teachers[i]], Follow(rate=rate))
    before = [array(teacher.value) for teacher in teachers]
    optimizer = TiedOptimizer(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), registry)
    step = stepper(optimizer, towers, WAYS[0])
    for arrays in random_gradients(2, (3, 2), (3, 2)):
        step([ops.convert_to_tensor(x) for x in arrays])
    for teacher, old in zip(teachers, before, strict=True):
        expected = old + rate * (array(towers[0].value) - old)
        np.testing.assert_allclose(array(teacher.value), expected, rtol=1e-5, atol=1e-6)


def test_a_leader_that_only_its_hard_group_moves_is_followed():
    left, right, teacher = variable(3, 2), variable(3, 2, seed=1), variable(3, 2, seed=2, trainable=False)
    registry = equalize.GroupRegistry()
    registry.tie("towers", [left, right], Equal())
    registry.tie("teacher", [left, teacher], Follow())
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build([left, right])
    optimizer.apply([ops.ones((3, 2))], [right])
    assert bitwise_equal(left, right, teacher)


def test_what_follows_in_a_hard_part_of_its_leader_keeps_both():
    fused, half = variable(3, 4), variable(3, 2, seed=1)
    teacher = variable(3, 4, seed=2, trainable=False)
    registry = equalize.GroupRegistry()
    registry.tie("half", [half, (fused, Slice((0, 0), (3, 2)))], Equal())
    registry.tie("teacher", [fused, teacher], Follow())
    step = stepper(keras.optimizers.SGD(0.1), [fused, half], WAYS[0])
    for arrays in random_gradients(2, (3, 4), (3, 2)):
        step([ops.convert_to_tensor(x) for x in arrays])
        np.testing.assert_array_equal(array(fused.value)[:, :2], array(half.value))
        assert bitwise_equal(fused, teacher)


def test_the_rule_of_frozen_members_is_replaced_by_what_they_have_then():
    leader, one, two = variable(3, 2), *(variable(3, 2, seed=i, trainable=False) for i in (1, 2))
    registry = equalize.GroupRegistry()
    registry.tie("t", [leader, one, two], Follow(rate=0.5))
    with pytest.raises(GroupMismatchError, match="do not move"):
        registry.replace("t", Equal())
    registry.replace("t", None)
    registry.replace("t", Follow(rate=0.5))
    assert registry["t"].rule.rate == 0.5


def test_nothing_that_trains_is_a_finding():
    leader, follower = (variable(3, 2, seed=i, trainable=False) for i in range(2))
    registry = equalize.GroupRegistry()
    registry.tie("t", [leader, follower], Follow())
    assert [finding.kind for finding in registry.diagnose()] == ["followers"]


class Interrupts(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


def test_an_interrupted_fit_leaves_no_follower_behind():
    student, teacher, model = networks(inside=False)
    registry = equalize.GroupRegistry()
    registry.tie("teacher", [student.layers[0], teacher.layers[0]], Follow())
    model.compile("sgd", "mse")
    x, y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")
    sync = PeriodicSync(registry, every=1)
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[sync, Interrupts()])
    if BACKEND == "jax":
        model.jax_state_sync()
        with pytest.raises(EqualizeError, match="PeriodicSync"):
            model.fit(x, y, verbose=0)
        return
    model.fit(x, y, verbose=0)
    assert bitwise_equal(student.layers[0].kernel, teacher.layers[0].kernel)


def test_callbacks_that_come_and_go_have_what_is_theirs_follow():
    student, _, model = networks(inside=False)
    teachers = [keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)]) for _ in range(2)]
    registry = equalize.GroupRegistry()
    for i, teacher in enumerate(teachers):
        teacher.trainable = False
        registry.tie(f"t{i}", [student.layers[0], teacher.layers[0]], Follow())
    syncs = [PeriodicSync(registry, f"t{i}", every=1) for i in range(2)]
    model.compile("sgd", "mse")
    x, y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")
    for callbacks in ([], syncs[:1], syncs, syncs[1:], []):
        if BACKEND == "jax" and len(callbacks) < 2:
            continue  # where each must be there
        model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
        assert bitwise_equal(student.layers[0].kernel, *[teacher.layers[0].kernel for teacher in teachers])
