"""`TiedOptimizer` as an optimizer: what callbacks, files, loops by hand and mistakes make of it."""

import copy
import functools
import json

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError, NotLinkedError, TieBrokenError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.views import Transpose
from tests.conftest import BACKEND, KERAS_3_5, MODES, QUICK, Recorder, bits, bitwise_equal, data, fit, kernels, towers

HARD = functools.partial(Equal, "towers")


def tied_towers(n=3, *, seed=1, inner=None, by_hand=False, **kwargs):
    """A model of towers, its registry, and an optimizer that trains the towers as one."""
    keras.utils.set_random_seed(seed)
    model = towers(n, constraint=None if by_hand else HARD, **kwargs)
    registry = equalize.GroupRegistry()
    if by_hand:
        registry.tie("towers", kernels(model), Equal())
    else:
        registry.link(model)
    return model, registry, TiedOptimizer(inner or keras.optimizers.SGD(0.05, momentum=0.9), registry)


def train(model, *callbacks, epochs=2, **kwargs):
    x, y = data()
    return model.fit(x, y, epochs=epochs, batch_size=8, shuffle=False, verbose=0, callbacks=[*callbacks], **kwargs)


def state(model):
    """Every weight and every optimizer variable, bit for bit."""
    return [bits(variable) for variable in [*model.variables, *model.optimizer.variables]]


def ones(variables):
    return [ops.ones(variable.shape) for variable in variables]


# ---- slots


def test_there_is_one_set_of_slots_a_group():
    model, _, optimizer = tied_towers(4, inner=keras.optimizers.Adam(0.05))
    assert len(model.trainable_variables) == 10
    optimizer.build(model.trainable_variables)
    paths = [tuple(variable.shape) for variable in optimizer.variables]
    assert paths.count((5, 4)) == 2  # Adam's two for the four kernels
    assert len(paths) == 2 + 2 * 7  # iterations and learning rate; a kernel, four biases, the head
    assert [group.name for group in optimizer.groups] == ["towers"]


def test_a_member_with_free_entries_has_slots_of_its_own():
    left, right = keras.Variable(np.ones((2, 2), "float32")), keras.Variable(np.ones((3, 2), "float32"))
    registry = equalize.GroupRegistry()
    registry.tie("part", [left, (right, equalize.views.Slice((1, 0), (2, 2)))], Equal())
    optimizer = TiedOptimizer(keras.optimizers.SGD(0.5, momentum=0.9), registry)
    optimizer.apply([2 * ops.ones((2, 2)), 4 * ops.ones((3, 2))], [left, right])
    assert ops.convert_to_numpy(left.value).tolist() == [[-2.0, -2.0]] * 2
    assert ops.convert_to_numpy(right.value).tolist() == [[-1.0, -1.0], [-2.0, -2.0], [-2.0, -2.0]]
    assert sorted(tuple(v.shape) for v in optimizer.variables) == [(), (), (2, 2), (3, 2)]


# ---- by hand


def test_a_member_that_shows_the_common_value_as_it_is_has_the_slots():
    turned, plain = keras.Variable(np.ones((2, 3))), keras.Variable(np.ones((3, 2)))
    registry = equalize.GroupRegistry()
    registry.tie("pair", [(turned, Transpose()), plain], Equal())
    optimizer = TiedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), registry)
    optimizer.build([turned, plain])
    assert optimizer.get_config()["updated"] == [1]


def test_gradients_are_summed_and_missing_ones_count_as_zero():
    variables = [keras.Variable(np.zeros(2, "float32"), name=f"w{i}") for i in range(3)]
    for reduction, expected in (("sum", -3.0), ("mean", -1.0)):
        for variable in variables:
            variable.assign(np.zeros(2))
        registry = equalize.GroupRegistry()
        registry.tie("w", variables, Equal())
        optimizer = TiedOptimizer(keras.optimizers.SGD(1.0), registry, reduction=reduction)
        optimizer.build(variables)
        optimizer.apply([ops.ones(2), None, 2 * ops.ones(2)], variables)
        assert [ops.convert_to_numpy(v.value).tolist() for v in variables] == [[expected, expected]] * 3
        registry.untie()


def test_one_member_in_the_call_is_enough():
    variables = [keras.Variable(np.zeros(2, "float32"), name=f"w{i}") for i in range(3)]
    registry = equalize.GroupRegistry()
    registry.tie("w", variables, Equal())
    optimizer = TiedOptimizer(keras.optimizers.SGD(1.0), registry)
    optimizer.build(variables)
    assert int(ops.convert_to_numpy(optimizer.apply_gradients([(ops.ones(2), variables[2])]))) == 1
    assert [ops.convert_to_numpy(v.value).tolist() for v in variables] == [[-1.0, -1.0]] * 3
    optimizer.apply([ops.ones(2)] * 3)
    assert [ops.convert_to_numpy(v.value).tolist() for v in variables] == [[-4.0, -4.0]] * 3


def tied_variables(n=3, name="w", **arguments):
    variables = [keras.Variable(np.zeros((2, 2), "float32"), name=f"{name}{i}") for i in range(n)]
    registry = equalize.GroupRegistry()
    registry.tie("g", variables, Equal(), **arguments)
    return variables, registry


def test_a_part_of_a_group_is_refused_when_slots_are_made():
    variables, registry = tied_variables()
    for part in (variables[:1], variables[1:]):
        with pytest.raises(GroupMismatchError, match=rf"expected all 3 members .* received {len(part)}, without 'w"):
            TiedOptimizer("sgd", registry).build(part)
    variables[0].trainable = False  # an anchor has no gradient that could be lost
    TiedOptimizer("sgd", registry).build(variables[1:])


def by_weight_decay(variables):
    inner = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    inner.exclude_from_weight_decay(var_list=variables)
    return inner


def by_map(variables):
    paths = {variable.path: keras.optimizers.SGD(0.0) for variable in variables[:1]}
    paths |= {variable.path: next(iter(paths.values())) for variable in variables[1:]}
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), paths))


def by_muon(variables):
    return keras.optimizers.Muon(0.1, exclude_layers=[variable.path for variable in variables])


@pytest.mark.parametrize(("make", "needs"), [(by_weight_decay, "AdamW"), (by_map, "MultiOptimizer"), (by_muon, "Muon")])
def test_members_that_the_inner_optimizer_treats_differently_are_refused(make, needs):
    if not hasattr(keras.optimizers, needs):
        pytest.skip(f"this version of Keras has no {needs}")
    for chosen in ([0], [1], [2], [0, 1]):
        variables, registry = tied_variables()
        inner = make([variables[i] for i in chosen])
        with pytest.raises(GroupMismatchError, match=r"'w0' and 'w[12]' differently\. Expected: one "):
            TiedOptimizer(inner, registry).build(variables)
    for chosen in ([], [0, 1, 2]):
        variables, registry = tied_variables()
        TiedOptimizer(make([variables[i] for i in chosen]), registry).build(variables)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has sparse gradients")
@pytest.mark.parametrize("dense", [False, True])
def test_sparse_gradients_stay_sparse_unless_one_is_dense(dense):
    import tensorflow as tf

    class Seen(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            self.sparse = isinstance(gradient, tf.IndexedSlices)
            super().update_step(gradient, variable, learning_rate)

    tables = [keras.Variable(np.zeros((6, 2), "float32"), name=f"table_{i}") for i in range(2)]
    registry = equalize.GroupRegistry()
    registry.tie("tables", tables, Equal())
    for reduction, factor in (("sum", 1.0), ("mean", 0.5)):
        optimizer = TiedOptimizer(Seen(1.0), registry, reduction=reduction)
        rows = [tf.IndexedSlices(tf.ones((2, 2)), tf.constant(i), tf.constant((6, 2))) for i in ([0, 1], [1, 3])]
        optimizer.apply([rows[0], tf.convert_to_tensor(rows[1])] if dense else rows, tables)
        assert optimizer.inner_optimizer.sparse != dense
        expected = -factor * np.array([1, 2, 0, 1, 0, 0])
        assert [table.numpy()[:, 1].tolist() for table in tables] == [expected.tolist()] * 2
        registry.sync()
        for table in tables:
            table.assign(tf.zeros((6, 2)))


# ---- frozen members


@pytest.mark.parametrize(
    ("frozen", "mode"),
    [((0,), QUICK), ((0, 1, 2), QUICK), *(((2,), mode) for mode in MODES if mode != QUICK)],
    ids=str,
)
@pytest.mark.sampled
def test_a_group_with_a_frozen_member_stays_while_the_rest_trains(frozen, mode):
    keras.utils.set_random_seed(1)
    model = towers(3, frozen=frozen)
    for kernel in kernels(model):
        kernel.assign(np.full((5, 4), 0.25))
    registry = equalize.GroupRegistry()
    registry.tie("towers", kernels(model), Equal())
    optimizer = TiedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9), registry)
    head = bits(model.get_layer("head").kernel)
    fit(model, registry, optimizer=optimizer, **MODES[mode])
    assert {bits(kernel) for kernel in kernels(model)} == {np.full((5, 4), 0.25, "float32").tobytes()}
    assert bits(model.get_layer("head").kernel) != head
    assert (5, 4) not in {tuple(variable.shape) for variable in optimizer.variables}


def test_a_value_given_to_a_frozen_member_reaches_the_others():
    model, registry, optimizer = tied_towers(frozen=(1,))
    model.compile(optimizer, "mse", **MODES[QUICK])
    train(model, epochs=1)
    new = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    kernels(model)[1].assign(new)
    train(model, epochs=1)
    assert {bits(kernel) for kernel in kernels(model)} == {new.tobytes()}
    registry.check()


# ---- learning rates and callbacks


def test_schedules_and_learning_rates_are_the_inner_optimizers():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    model, _, optimizer = tied_towers(inner=keras.optimizers.SGD(schedule))
    model.compile(optimizer, "mse", **MODES[QUICK])
    train(model, epochs=1)
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 4
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == pytest.approx(0.1 * 0.5**2)
    optimizer = TiedOptimizer("sgd", equalize.GroupRegistry())
    optimizer.learning_rate = 0.5
    assert float(ops.convert_to_numpy(optimizer.inner_optimizer.learning_rate)) == 0.5


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.sampled
def test_callbacks_set_the_learning_rate(around):
    model, registry, optimizer = tied_towers(inner=keras.optimizers.SGD(0.5))
    outer = keras.optimizers.LossScaleOptimizer(optimizer) if around else optimizer
    model.compile(outer, "mse", **MODES[QUICK])
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1, min_delta=1e9, factor=0.5)
    history = train(model, plateau, epochs=3).history
    assert history["learning_rate"] == [0.5, 0.5, 0.25]
    train(model, keras.callbacks.LearningRateScheduler(lambda epoch: 0.0), epochs=1)
    before = bits(kernels(model)[0])
    train(model, epochs=1)
    assert bits(kernels(model)[0]) == before
    registry.check()


def test_the_monitor_finds_nothing_to_repair_when_weights_are_averaged():
    inner = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)
    model, registry, optimizer = tied_towers(inner=inner)
    monitor = equalize.callbacks.TieMonitor(registry)
    model.compile(optimizer, "mse", **MODES[QUICK])
    history = train(model, monitor).history
    assert history["spread/towers"] == [0.0, 0.0]
    assert monitor.broken == {}
    registry.check()


@pytest.mark.skipif(KERAS_3_5, reason="SwapEMAWeights of Keras 3.5 takes averages for those of all variables, in order")
@pytest.mark.parametrize("on_epoch", [False, True])
@pytest.mark.slow
def test_swapped_averages_reach_all_members_with_the_monitor_after_the_swap(on_epoch):
    results = []
    for shared in (True, False):
        inner = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)
        model, registry, optimizer = tied_towers(inner=inner)
        if shared:
            registry.untie()
            equalize.share(*kernels(model))
        model.compile(inner if shared else optimizer, "mse", **MODES[QUICK])
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)
        monitor = [] if shared else [equalize.callbacks.TieMonitor(registry)]
        history = train(model, swap, *monitor, epochs=3, validation_data=data(seed=1)).history
        if monitor:
            assert monitor[0].broken == {}
            assert history["spread/towers"] == [0.0] * 3
        results.append((history["loss"], history["val_loss"], [bits(kernel) for kernel in kernels(model)]))
    assert results[0] == results[1]


def test_nothing_is_found_by_diagnose_that_concerns_members_one_by_one():
    inner = keras.optimizers.Adam(0.01, global_clipnorm=1.0, use_ema=True, gradient_accumulation_steps=2)
    model, registry, optimizer = tied_towers(inner=inner)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    assert registry.diagnose() == []
    model.compile(inner, "mse")
    assert {finding.kind for finding in registry.diagnose()} >= {"ema", "global_clipnorm"}


# ---- files


@pytest.mark.parametrize(("by_hand", "scaled"), [(False, False), (True, True)])
@pytest.mark.sampled
def test_a_loaded_model_links_itself_and_trains_on_as_if_there_had_been_no_break(tmp_path, by_hand, scaled):
    model, registry, optimizer = tied_towers(by_hand=by_hand)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "mse", **MODES[QUICK])
    train(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert state(loaded) == state(model)
    linked = (loaded.optimizer.inner_optimizer if scaled else loaded.optimizer).registry
    assert list(linked) == list(registry)
    assert linked.link(loaded) is linked  # once more changes nothing
    assert state(loaded) == state(model)
    for each in (model, loaded):
        train(each)
    linked.check()
    assert state(loaded) == state(model)
    loaded.save(tmp_path / "again.keras")
    again = keras.models.load_model(tmp_path / "again.keras")
    for each in (model, again):
        train(each)
    assert state(again) == state(model)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_a_model_in_which_nothing_is_trainable_trains_nothing_until_it_is_thawed():
    model, registry, optimizer = tied_towers()
    for layer in model.layers:
        layer.trainable = False
    before = [bits(weight) for weight in model.weights]
    model.compile(optimizer, "mse", **MODES[QUICK])
    model.fit(*data(), verbose=0)
    assert [bits(weight) for weight in model.weights] == before
    for layer in model.layers:
        layer.trainable = True
    model.compile(optimizer, "mse", **MODES[QUICK])
    train(model)
    assert all(bits(weight) != old for weight, old in zip(model.weights, before, strict=True))
    registry.check()


def test_a_loaded_optimizer_whose_ties_do_not_fit_says_why_when_training_starts():
    model, _, optimizer = tied_towers(by_hand=True)
    optimizer.build(model.trainable_variables)
    loaded = TiedOptimizer.from_config(optimizer.get_config())
    assert loaded.registry.pending == ["towers"]
    assert "'towers' (not linked yet)" in repr(loaded.registry)
    wider = towers(3, units=5)
    wider.compile(loaded, "mse")
    with pytest.raises(
        NotLinkedError, match=r"Linking the loaded ties failed: Cannot find the member 'tower_0/kernel'"
    ):
        wider.fit(*data(), verbose=0)


def test_weights_and_checkpoints_bring_back_the_same_run(tmp_path):
    model, _, optimizer = tied_towers()
    model.compile(optimizer, "mse", **MODES[QUICK])
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.weights.h5"), save_weights_only=True)
    train(model, checkpoint)
    other, registry, optimizer = tied_towers(seed=2)
    other.compile(optimizer, "mse", **MODES[QUICK])
    optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "1.weights.h5")
    train(other, epochs=1)
    assert state(other) == state(model)
    registry.check()


def test_the_file_holds_each_slot_once(tmp_path):
    import h5py

    model, _, optimizer = tied_towers(inner=keras.optimizers.Adam(0.05))
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "model.weights.h5")
    shapes = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(lambda path, item: shapes.append((path, getattr(item, "shape", None))))
    assert sum(shape == (5, 4) for path, shape in shapes if "optimizer" in path) == 2


def test_config_round_trip():
    model, _, optimizer = tied_towers(by_hand=True, inner=keras.optimizers.AdamW(0.02, weight_decay=0.1))
    optimizer.reduction = "mean"
    for _ in range(2):  # before and after slots are made
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
        copied = keras.saving.deserialize_keras_object(config)
        assert copied.get_config() == optimizer.get_config()
        assert copied.reduction == "mean"
        assert isinstance(copied.inner_optimizer, keras.optimizers.AdamW)
        assert copied.registry.get_config() == optimizer.registry.get_config()
        optimizer.build(model.trainable_variables)


def test_a_copied_model_trains_apart_from_the_original():
    model, _, optimizer = tied_towers()
    model.compile(optimizer, "mse", **MODES[QUICK])
    train(model)
    before = state(model)
    other = copy.deepcopy(model)
    equalize.GroupRegistry().link(other)
    train(other)
    assert state(model) == before != state(other)


# ---- mistakes


def test_it_must_be_linked_before_training():
    model = towers(2, constraint=HARD)
    optimizer = TiedOptimizer("adam", equalize.GroupRegistry())
    with pytest.raises(NotLinkedError, match=r"nothing to tie: .*<GroupRegistry: no groups>.*link\(model\)"):
        optimizer.build(model.trainable_variables)
    optimizer.registry.link(model)
    optimizer.build(model.trainable_variables)


def test_a_registry_with_soft_groups_only_has_nothing_to_tie():
    model = towers(2, regularizer=lambda: MeanL2("towers", 0.1))
    registry = equalize.GroupRegistry().link(model)
    with pytest.raises(NotLinkedError, match="expected a registry with a hard group"):
        TiedOptimizer("adam", registry).build(model.trainable_variables)


def test_members_that_differ_are_an_error():
    model, registry, optimizer = tied_towers(2)
    kernels(model)[1].assign(np.ones((5, 4)))
    with pytest.raises(TieBrokenError, match=r"(?s)group 'towers' are not equal.*sync\(\)"):
        optimizer.build(model.trainable_variables)
    registry.sync()
    optimizer.build(model.trainable_variables)


def test_ties_that_change_after_slots_were_made_are_an_error():
    model, registry, optimizer = tied_towers(2)
    optimizer.build(model.trainable_variables)
    optimizer.apply(ones(model.trainable_variables))
    biases = [model.get_layer(f"tower_{i}").bias for i in range(2)]
    registry.tie("biases", biases, Equal())
    before = [bits(variable) for variable in model.variables]
    with pytest.raises(EqualizeError, match=r"changed .* group 'biases' was not hard then.*Make a new TiedOptimizer"):
        optimizer.apply(ones(model.trainable_variables))
    registry.untie("towers")
    with pytest.raises(EqualizeError, match="no slots for 'tower_1/kernel'"):
        optimizer.apply(ones(model.trainable_variables))
    assert [bits(variable) for variable in model.variables] == before


@pytest.mark.skipif(BACKEND == "jax", reason="an optimizer refuses another number of variables than it was built for")
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.sampled
def test_a_member_that_is_frozen_later_holds_the_group(frozen):
    model, registry, optimizer = tied_towers(2)
    model.compile(optimizer, "mse", **MODES[QUICK])
    train(model, epochs=1)
    model.get_layer(f"tower_{frozen}").trainable = False
    model.compile(optimizer, "mse", **MODES[QUICK])
    before = bits(kernels(model)[0])
    train(model, epochs=1)
    assert {bits(kernel) for kernel in kernels(model)} == {before}
    registry.check()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"registry": None}, TypeError, "`registry` must be an `equalize.GroupRegistry`"),
        ({"registry": {}}, TypeError, "`registry` must be"),
        ({"reduction": "max"}, EqualizeError, r"`reduction` must be one of \['sum', 'mean'\]. Received: 'max'"),
        ({"reduction": None}, TypeError, "`reduction` must be one of"),
        ({"inner_optimizer": "no such thing"}, EqualizeError, "`inner_optimizer` must be a Keras optimizer"),
        ({"inner_optimizer": 3}, EqualizeError, "`inner_optimizer` must be a Keras optimizer"),
        ({"inner_optimizer": None}, EqualizeError, "`inner_optimizer` must be a Keras optimizer"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    arguments = {"inner_optimizer": "adam", "registry": equalize.GroupRegistry()} | arguments
    with pytest.raises(error, match=message):
        TiedOptimizer(**arguments)


@pytest.mark.parametrize("updated", [[1, 0], [0, 0], [-1], [True], "01"])
def test_a_config_lists_the_variables_that_had_slots_in_order(updated):
    config = TiedOptimizer("adam", equalize.GroupRegistry()).get_config()
    with pytest.raises(EqualizeError, match="`updated` must be a list of indices, ascending"):
        TiedOptimizer.from_config(config | {"updated": updated})


def test_one_inside_another_is_refused():
    inner = TiedOptimizer("adam", equalize.GroupRegistry())
    with pytest.raises(EqualizeError, match="must not be a TiedOptimizer itself"):
        TiedOptimizer(inner, equalize.GroupRegistry())


def test_gradients_without_variables_need_slots():
    with pytest.raises(EqualizeError, match=r"`build\(variables\)` before"):
        TiedOptimizer("adam", equalize.GroupRegistry()).apply([ops.ones(2)])


def test_no_gradients_are_no_step():
    optimizer = TiedOptimizer("adam", equalize.GroupRegistry())
    optimizer.apply([])
    assert not optimizer.built


def test_a_plain_optimizer_projects_the_same_groups_again():
    model, registry, optimizer = tied_towers(2)
    model.compile(optimizer, "mse", **MODES[QUICK])
    train(model, epochs=1)
    model.compile(keras.optimizers.SGD(0.1), "mse", **MODES[QUICK])
    recorder = Recorder(kernels(model))
    train(model, recorder, epochs=1)
    assert all(bitwise_equal(*map(keras.Variable, step)) for step in recorder.values)
    registry.check()


# ---- what Keras and its callbacks ask an optimizer for


def test_settings_are_those_of_the_inner_optimizer():
    settings = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3, "weight_decay": 0.25}
    for clip in ("clipnorm", "clipvalue", "global_clipnorm"):
        inner = keras.optimizers.SGD(**settings, **{clip: 2.0}, gradient_accumulation_steps=4)
        _, _, optimizer = tied_towers(inner=inner)
        for name in [*settings, clip, "gradient_accumulation_steps"]:
            assert getattr(optimizer, name) == getattr(inner, name) is not None
    optimizer.clipvalue = 0.5
    assert inner.clipvalue == 0.5
    plain = tied_towers()[2]
    assert plain.use_ema is False
    assert plain.weight_decay is plain.clipnorm is plain.gradient_accumulation_steps is None
    assert not hasattr(plain, "_model_variables_moving_average")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.sampled
def test_a_swap_of_averages_knows_the_wrapper(scaled):
    model, registry, optimizer = tied_towers(inner=keras.optimizers.SGD(0.1, use_ema=True))
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "mse")
    callbacks = [keras.callbacks.SwapEMAWeights(), equalize.callbacks.TieMonitor(registry)]
    train(model, *callbacks, validation_data=data())
    registry.check()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow has variables of its own")
def test_raw_variables_of_tensorflow_are_trained_beside_tied_ones():
    import tensorflow as tf

    raw = tf.Variable([1.0, 2.0])
    left, right = (keras.Variable(np.ones(2, "float32")) for _ in range(2))
    registry = equalize.GroupRegistry()
    registry.tie("pair", [left, right], Equal())
    for given in ([left, raw, right], [left.value, raw, right.value]):
        optimizer = TiedOptimizer(keras.optimizers.SGD(1.0, momentum=0.5), registry)
        for variable in (left, right, raw):
            variable.assign([1.0, 2.0])
        for _ in range(2):
            optimizer.apply([tf.ones(2), tf.ones(2), tf.zeros(2)], given)
        assert len(optimizer.variables) == 2 + 2
        for variable in (left, right, raw):
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), [-1.5, -0.5])
    with pytest.raises(EqualizeError, match="was not built with"):
        optimizer.apply([tf.ones(2)], [tf.Variable([1.0, 2.0])])


# ---- freezing and thawing


def staged(frozen):
    """A stack of two tied layers and one that is not, of which some are frozen."""
    keras.utils.set_random_seed(0)
    names = ("first", "second", "top")
    model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4, name=name) for name in names)])
    registry = equalize.GroupRegistry()
    registry.tie("pair", model.layers[:2], Equal())
    freeze(model, frozen)
    return model, registry


def freeze(model, names):
    for layer in model.layers:
        layer.trainable = layer.name not in names


@pytest.mark.parametrize("stages", [("", "first"), (("first", "second"), "second"), (("first", "second"), "")])
@pytest.mark.sampled
def test_what_one_optimizer_cannot_follow_asks_for_a_new_one(stages):
    model, registry = staged(stages[0])
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    model.compile(TiedOptimizer("adam", registry), "mse")
    model.fit(x, x, verbose=0)
    freeze(model, stages[1])
    model.compile(model.optimizer, "mse")
    if stages[0] == "" and BACKEND != "jax":
        model.fit(x, x, verbose=0)  # slots are there, and the frozen member holds the other
    else:
        with pytest.raises(EqualizeError, match="make a new TiedOptimizer"):
            model.fit(x, x, verbose=0)
        model, registry = staged(stages[1])
        model.compile(TiedOptimizer("adam", registry), "mse")
        model.fit(x, x, verbose=0)
    registry.check()


@pytest.mark.filterwarnings("ignore:Skipping variable loading")  # Keras's own of an optimizer that had no slots
def test_a_model_that_was_compiled_and_never_trained_can_be_saved_and_loaded(tmp_path):
    model, _, optimizer = tied_towers(by_hand=True)
    model.compile(optimizer, "mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert list(loaded.optimizer.registry) == ["towers"]
    train(loaded)
    assert bitwise_equal(*kernels(loaded))


def test_an_optimizer_without_ties_can_be_saved_and_loaded_and_not_trained(tmp_path):
    model = towers(2)
    model.compile(TiedOptimizer("sgd", equalize.GroupRegistry()), "mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for _ in range(2):
        with pytest.raises(NotLinkedError, match="nothing to tie"):
            train(loaded)
    loaded.optimizer.registry.tie("towers", kernels(loaded), Equal())
    train(loaded)
    assert bitwise_equal(*kernels(loaded))


def test_a_clone_whose_frozen_members_differ_is_linked_when_they_do_not():
    """Keras gives a clone other values and builds its optimizer, before anyone can give it those of the model."""
    model = towers(2)
    registry = equalize.GroupRegistry()
    registry.tie("towers", kernels(model), Equal(), initial="first")
    model.compile(TiedOptimizer("adam", registry), "mse")
    train(model)
    for layer in model.layers:
        if any(weight is kernel for weight in layer.weights for kernel in kernels(model)):
            layer.trainable = False
    with pytest.raises(NotLinkedError, match="do not move"):
        train(keras.models.clone_model(model))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    train(clone)
    assert list(clone.optimizer.registry) == ["towers"]
    assert bitwise_equal(*kernels(clone), *kernels(model))
