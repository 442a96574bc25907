"""TieMonitor: the spread in the logs of real `fit`s, and hard ties made equal when training has ended."""

import csv
import functools
import gc
import warnings
from collections.abc import Callable

import keras
import numpy as np
import pytest

import equalize
from equalize._ties.rules import Rule
from equalize.callbacks import TieMonitor
from equalize.constraints import Equal, Invariant
from equalize.errors import EqualizeError, NotLinkedError, TieBrokenError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.views import Transpose
from tests.conftest import BACKEND, KERAS_3_5, EveryStep, bits, bitwise_equal, compile_quickly, data, kernels, towers

HARD = functools.partial(Equal, "towers")
SOFT = functools.partial(MeanL2, "towers", 0.5)
PARTIAL = functools.partial(Equal, "towers", rate=0.5)


def averaging():
    return keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)


def tied(n=2, *, rule: Callable[[], Rule] = HARD, **kwargs):
    """A model of towers with a tie, and its registry."""
    model = towers(n, **{rule().slot: rule}, **kwargs)
    return model, equalize.GroupRegistry().link(model)


def train(model, *callbacks, optimizer="sgd", epochs=3, **kwargs):
    x, y = data()
    compile_quickly(model, optimizer, "mse")
    return model.fit(x, y, epochs=epochs, batch_size=8, shuffle=False, verbose=0, callbacks=[*callbacks], **kwargs)


class Spreads(keras.callbacks.Callback):
    """Reads every epoch's spread from the registry itself."""

    def __init__(self, registry):
        super().__init__()
        self.registry = registry
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(self.registry.spread()["towers"])


@pytest.mark.parametrize("rule", [SOFT, PARTIAL], ids=["soft", "partial"])
@pytest.mark.sampled
def test_history_shows_the_spread_of_groups_that_are_not_hard(rule):
    model, registry = tied(3, rule=rule)
    before = registry.spread()["towers"]
    spreads = Spreads(registry)
    history = train(model, TieMonitor(registry), spreads).history
    assert history["spread/towers"] == spreads.seen
    assert 0.0 < spreads.seen[-1] < before
    assert registry.spread()["towers"] == spreads.seen[-1]  # logged only, never repaired


def test_history_shows_every_group_under_its_name():
    model = towers(2, constraint=HARD)
    registry = equalize.GroupRegistry().link(model)
    registry.tie("biases", [model.get_layer("tower_0").bias, model.get_layer("tower_1").bias], MeanL2(factor=0.1))
    history = train(model, TieMonitor(registry)).history
    assert set(history) == {"loss", "spread/towers", "spread/biases"}
    assert history["spread/towers"] == [0.0, 0.0, 0.0]
    assert all(spread > 0.0 for spread in history["spread/biases"])


def test_csv_logger_after_the_monitor_writes_the_spread(tmp_path):
    model, registry = tied(rule=SOFT)
    file = tmp_path / "log.csv"
    history = train(model, TieMonitor(registry), keras.callbacks.CSVLogger(str(file))).history
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["spread/towers"]) for row in rows] == history["spread/towers"]


def test_tensorboard_after_the_monitor_writes_the_spread(tmp_path):
    pytest.importorskip("tensorboard", reason="Keras's TensorBoard needs the package of that name on every backend")
    import tensorflow as tf  # which Keras writes the files with on every backend

    model, registry = tied(rule=SOFT)
    history = train(model, TieMonitor(registry), keras.callbacks.TensorBoard(str(tmp_path))).history
    (file,) = (tmp_path / "train").iterdir()
    events = map(tf.compat.v1.Event.FromString, tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
    values = [(event.step, value) for event in events for value in event.summary.value]
    written = [(step, float(tf.make_ndarray(v.tensor))) for step, v in values if v.tag == "epoch_spread/towers"]
    assert written == list(enumerate(np.float32(history["spread/towers"]).tolist()))


def test_the_progress_bar_shows_the_spread(capsys):
    model, registry = tied(rule=SOFT)
    model.compile("sgd", "mse")
    model.fit(*data(), epochs=1, verbose=2, callbacks=[TieMonitor(registry)])
    assert "spread/towers" in capsys.readouterr().out


def test_early_stopping_can_watch_the_spread():
    model, registry = tied(rule=SOFT)
    stop = keras.callbacks.EarlyStopping(monitor="spread/towers", mode="max")  # the spread of a soft tie falls
    history = train(model, TieMonitor(registry), stop, epochs=9).history
    assert len(history["spread/towers"]) == 2
    assert stop.best == history["spread/towers"][0]


def test_the_spread_is_logged_beside_validation_metrics():
    model, registry = tied(rule=SOFT)
    history = train(model, TieMonitor(registry), validation_data=data(seed=1)).history
    assert set(history) == {"loss", "val_loss", "spread/towers"}


@pytest.mark.slow
def test_the_monitor_changes_no_number_of_a_run_that_stays_equal():
    x, y = data()
    weights = []
    for callbacks in ([], ["monitor"]):
        keras.utils.set_random_seed(3)
        model, registry = tied(3)
        model.compile("adam", "mse")
        model.fit(x, y, epochs=2, batch_size=8, verbose=0, callbacks=[TieMonitor(registry) for _ in callbacks])
        weights.append([bits(variable) for variable in model.variables])
    assert weights[0] == weights[1]


def test_averaging_breaks_a_hard_tie_without_the_monitor():
    model, registry = tied()
    train(model, EveryStep(registry), optimizer=averaging())
    with pytest.raises(TieBrokenError, match="'towers': spread"):
        registry.check()


@pytest.mark.parametrize("overwrite", [None, 3])
@pytest.mark.sampled
def test_averaging_ends_in_the_mean_of_the_averages_with_the_monitor(overwrite):
    model, registry = tied()
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=overwrite)
    monitor = TieMonitor(registry)
    train(model, EveryStep(registry), monitor, optimizer=optimizer)
    registry.check()
    order = [variable.path for variable in model.trainable_variables]
    left, right = (
        keras.ops.convert_to_numpy(optimizer._model_variables_moving_average[order.index(kernel.path)])
        for kernel in kernels(model)
    )
    assert not np.array_equal(left, right)
    assert monitor.broken == {"towers": float(np.max(np.abs(left.astype("float64") - right)))}
    for kernel in kernels(model):
        assert bits(kernel) == ((left + right) / 2).tobytes()


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.sampled
def test_the_repair_is_what_sync_to_the_mean_gives(n):
    results = []
    for monitored in (False, True):
        keras.utils.set_random_seed(5)
        model, registry = tied(n)
        train(model, *([TieMonitor(registry)] if monitored else []), optimizer=averaging())
        if not monitored:
            registry.sync("mean")
        assert bitwise_equal(*kernels(model))
        results.append([bits(variable) for variable in model.variables])
    assert results[0] == results[1]


def test_a_repaired_model_trains_on_equal_and_forgets_what_was_broken():
    model, registry = tied()
    monitor = TieMonitor(registry)
    train(model, monitor, optimizer=averaging())
    assert list(monitor.broken) == ["towers"]
    train(model, EveryStep(registry), monitor, optimizer="sgd")
    assert monitor.broken == {}
    registry.check()


def test_the_repair_leaves_soft_groups_and_equal_hard_groups_alone():
    model = towers(2, regularizer=SOFT)
    registry = equalize.GroupRegistry().link(model)
    biases = [model.get_layer(f"tower_{i}").bias for i in range(2)]
    registry.tie("towers/biases", biases, Equal())
    outside = [keras.Variable([value, value], name=f"outside_{value}") for value in (1.0, 1.0)]
    registry.tie("outside", outside, Equal())
    monitor = TieMonitor(registry)
    history = train(model, monitor, optimizer=averaging()).history
    assert list(monitor.broken) == ["towers/biases"]
    assert bitwise_equal(*biases)
    assert not bitwise_equal(*kernels(model))
    assert history["spread/outside"] == [0.0, 0.0, 0.0]


def test_the_repair_of_a_group_leaves_a_soft_group_below_its_name_alone():
    model = towers(2, constraint=HARD)
    registry = equalize.GroupRegistry().link(model)
    biases = [model.get_layer(f"tower_{i}").bias for i in range(2)]
    registry.tie("towers/biases", biases, MeanL2(factor=0.01))
    train(model, TieMonitor(registry), optimizer=averaging())
    assert bitwise_equal(*kernels(model))
    assert not bitwise_equal(*biases)


def test_the_repair_keeps_the_inner_constraint():
    model, registry = tied(rule=functools.partial(Equal, "towers", inner="non_neg"))
    train(model, TieMonitor(registry), optimizer=averaging())
    registry.check()
    assert np.all(keras.ops.convert_to_numpy(kernels(model)[0].value) >= 0.0)


def test_a_frozen_member_prevails_over_averages():
    model, registry = tied(3, frozen=[1])
    anchor = bits(kernels(model)[1])
    train(model, TieMonitor(registry), optimizer=averaging())
    assert [bits(kernel) for kernel in kernels(model)] == [anchor] * 3


def test_without_repair_a_warning_names_the_groups_and_the_fix_and_the_weights_stay():
    model, registry = tied()
    monitor = TieMonitor(registry, repair=False)
    with pytest.warns(UserWarning, match=r"Hard groups .*: 1 of 1; .* 'towers' \(spread .*repair=True") as caught:
        train(model, monitor, optimizer=averaging())
    assert sum("Hard groups" in str(warning.message) for warning in caught) == 1
    assert monitor.broken == registry.spread()
    assert not bitwise_equal(*kernels(model))


def test_without_repair_a_run_that_stays_equal_warns_of_nothing():
    model, registry = tied()
    monitor = TieMonitor(registry, repair=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(model, monitor)
    assert monitor.broken == {}


def test_a_spread_within_atol_is_neither_repaired_nor_warned_of():
    model, registry = tied()
    for repair in (True, False):
        monitor = TieMonitor(registry, atol=100.0, repair=repair)
        train(model, monitor, optimizer=averaging())
        assert monitor.broken == {}
        assert 0.0 < registry.spread()["towers"] <= 100.0


@pytest.mark.parametrize("on_epoch", [False, True])
@pytest.mark.parametrize("monitor_first", [False, True])
@pytest.mark.sampled
def test_swapped_averages_end_equal_and_the_monitor_changes_nothing_while_training(on_epoch, monitor_first):
    results = []
    for monitored in (False, True):
        keras.utils.set_random_seed(5)
        model, registry = tied()
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)
        monitor = TieMonitor(registry)
        callbacks = [swap, *([monitor] if monitored else [])]
        callbacks = callbacks[::-1] if monitor_first else callbacks
        history = train(model, *callbacks, optimizer=averaging(), validation_data=data(seed=1)).history
        if not monitored:
            registry.sync("mean")
        results.append((history["loss"], history["val_loss"], [bits(variable) for variable in model.variables]))
    assert results[0] == results[1]
    assert registry.spread() == {"towers": 0.0}
    swapped_in = on_epoch and not monitor_first
    # On TensorFlow Keras swaps by adding and subtracting, which rounds until the next step.
    assert all((spread > 1e-4) == swapped_in for spread in history["spread/towers"])


def test_weights_that_are_restored_at_the_end_are_repaired_by_a_monitor_that_comes_after():
    model, registry = tied()
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    best = keras.callbacks.EarlyStopping(monitor="loss", patience=9, restore_best_weights=True)
    monitor = TieMonitor(registry)
    train(model, swap, best, monitor, optimizer=averaging())
    assert list(monitor.broken) == ["towers"]
    registry.check()


class Reads(keras.callbacks.Callback):
    """Reads a registry in the middle of training, before and after the model has taken its values back."""

    def __init__(self, *calls):
        super().__init__()
        self.calls = calls

    def on_train_batch_end(self, batch, logs=None):
        for call in self.calls:
            with pytest.raises(EqualizeError, match=r"cannot read its member 'tower_0/kernel'.*jax_state_sync"):
                call()
        self.model.jax_state_sync()
        for call in self.calls:
            call()


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere variables hold their values while training runs")
@pytest.mark.parametrize("rule", [HARD, SOFT, PARTIAL], ids=["hard", "soft", "partial"])
def test_what_is_read_before_the_values_are_back_is_an_error_that_says_how_to_get_them(rule):
    model, registry = tied(rule=rule)
    calls = [registry.spread, lambda: registry.sync("mean", "towers"), lambda: registry["towers"].value]
    if rule is SOFT:
        calls.append(registry.penalty)
    else:
        calls.append(registry.project)
    train(model, Reads(*calls), epochs=1)


def test_logs_may_be_missing_in_a_loop_of_ones_own():
    model, registry = tied(rule=SOFT)
    monitor = TieMonitor(registry)
    monitor.set_model(model)
    logs = {}
    monitor.on_train_begin()
    monitor.on_epoch_end(0)
    monitor.on_epoch_end(1, logs)
    monitor.on_train_end()
    assert logs == {"spread/towers": registry.spread()["towers"]}
    assert monitor.broken == {}


def test_a_registry_of_another_model_is_an_error_when_training_starts():
    (model, _), (_other, registry) = tied(), tied()
    with pytest.raises(NotLinkedError, match=r"nothing to watch in the model .*link\(model\)"):
        train(model, TieMonitor(registry))


def test_an_empty_registry_is_an_error_when_training_starts():
    with pytest.raises(NotLinkedError, match="received <GroupRegistry: no groups>"):
        train(towers(2), TieMonitor(equalize.GroupRegistry()))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"registry": {"towers": 1}}, TypeError, "`registry` must be an `equalize.GroupRegistry`"),
        ({"registry": None}, TypeError, "`registry` must be"),
        ({"atol": -1e-3}, EqualizeError, r"`atol` must be a finite number in \[0, inf\)"),
        ({"atol": float("nan")}, EqualizeError, "`atol` must be a finite number"),
        ({"atol": float("inf")}, EqualizeError, "`atol` must be a finite number"),
        ({"atol": "0.1"}, TypeError, "`atol` must be a number"),
        ({"atol": True}, TypeError, "`atol` must be a number"),
        ({"repair": "no"}, TypeError, "`repair` must be True or False"),
        ({"repair": 1}, TypeError, "`repair` must be True or False"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, error, match):
    registry = kwargs.pop("registry", equalize.GroupRegistry())
    with pytest.raises(error, match=match):
        TieMonitor(registry, **kwargs)


class Symmetric(keras.layers.Dense):
    """A square Dense layer whose kernel is symmetric."""

    def __init__(self, units, **kwargs):
        super().__init__(units, use_bias=False, kernel_constraint=Invariant([Transpose()]), **kwargs)


def trained_with_averages(*, repair=None, tie=False):
    """A model with symmetric kernels after a run with averages of weights, and its monitor."""
    keras.utils.set_random_seed(2)
    entrance = keras.Input((5,))
    layers = [keras.layers.Dense(5, use_bias=False) if tie else Symmetric(5) for _ in range(2)]
    frozen = Symmetric(5)
    frozen.trainable = False
    model = keras.Model(entrance, keras.layers.Dense(1)(frozen(keras.layers.add([each(entrance) for each in layers]))))
    registry = equalize.GroupRegistry()
    optimizer = averaging()
    if tie:
        registry.tie("pair", [layer.kernel for layer in layers], Equal(inner=Invariant([Transpose()])))
        optimizer = TiedOptimizer(optimizer, registry)
    monitor = TieMonitor(registry, repair=bool(repair))
    callbacks = [monitor]
    if repair is None:
        callbacks.clear()
        registry.monitors.clear()
    compile_quickly(model, optimizer, "mse")
    found = {finding.subject for finding in registry.diagnose(model) if finding.kind == "ema"}
    assert found == (set() if repair else {layer.kernel.path for layer in layers})
    before = bits(frozen.kernel)
    model.fit(*data(), batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    assert bits(frozen.kernel) == before
    return [layer.kernel for layer in layers], monitor


def symmetric(kernel):
    value = keras.ops.convert_to_numpy(kernel.value)
    return bool((value == value.T).all())


def test_averages_of_symmetric_kernels_are_made_symmetric_when_training_ends():
    averages, _ = trained_with_averages()
    repaired, monitor = trained_with_averages(repair=True)
    assert not any(map(symmetric, averages))
    assert all(map(symmetric, repaired))
    for average, kernel in zip(averages, repaired, strict=True):
        assert keras.ops.convert_to_numpy(kernel.constraint(average.value)).tobytes() == bits(kernel)
    assert monitor.broken.keys() == {kernel.path for kernel in repaired}
    assert min(monitor.broken.values()) > 0.0


def test_averages_of_a_symmetric_group_are_made_symmetric_when_training_ends():
    averages, _ = trained_with_averages(tie=True)
    repaired, monitor = trained_with_averages(tie=True, repair=True)
    assert bitwise_equal(*averages)
    assert not symmetric(averages[0])
    assert bitwise_equal(*repaired)
    assert symmetric(repaired[0])
    assert monitor.broken.keys() == {"pair"}


def test_averages_of_symmetric_kernels_are_warned_of_without_repair():
    with pytest.warns(UserWarning, match=r"^Kernels that are not as .* 'symmetric\w*/kernel' \(off by .*repair=True"):
        kernels, _ = trained_with_averages(repair=False)
    assert not any(map(symmetric, kernels))


def swapping(*order):
    """A model that is trained as one variable with averages, and callbacks in an order."""
    model, registry = tied()
    compile_quickly(model, TiedOptimizer(averaging(), registry), "mse")
    monitor = TieMonitor(registry) if "monitor" in order else None
    made = {"monitor": monitor, "swap": keras.callbacks.SwapEMAWeights()}
    return model, registry, [made[name] for name in order]


def test_a_monitor_after_the_swap_evaluates_averages_of_all_members():
    model, registry, callbacks = swapping("swap", "monitor")
    x, y = data()
    model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks, validation_data=(x, y))
    assert registry.diagnose() == []
    registry.check()
    assert bitwise_equal(*kernels(model))
    model.optimizer.inner_optimizer._model_variables_moving_average[0].assign(keras.ops.ones((5, 4)))
    predicted = model.predict(x, verbose=0, callbacks=callbacks)
    for kernel in kernels(model):
        kernel.assign(keras.ops.ones((5, 4)))
    np.testing.assert_allclose(model.predict(x, verbose=0), predicted, rtol=1e-6)


def test_a_monitor_before_the_swap_is_an_error_when_a_run_begins():
    model, _, callbacks = swapping("monitor", "swap")
    x, y = data()
    with pytest.raises(EqualizeError, match=r"before SwapEMAWeights .*\['TieMonitor', 'SwapEMAWeights', 'History'\]"):
        model.fit(x, y, verbose=0, callbacks=callbacks)
    model.fit(x, y, verbose=0, callbacks=callbacks[::-1])
    for run in (functools.partial(model.evaluate, x, y), functools.partial(model.predict, x)):
        with pytest.raises(EqualizeError, match="before SwapEMAWeights"):
            run(verbose=0, callbacks=callbacks)


def test_a_swap_without_a_monitor_is_a_finding():
    model, registry, callbacks = swapping("swap")
    (finding,) = registry.diagnose(model)
    assert (finding.kind, finding.subject) == ("ema", "towers")
    assert "SwapEMAWeights(), equalize.callbacks.TieMonitor(registry)" in finding.fix
    del callbacks
    gc.collect()
    assert registry.diagnose(model) == []


@pytest.mark.skipif(KERAS_3_5, reason="Keras has MultiOptimizer since 3.15")
def test_averages_are_swapped_through_several_optimizers_around_a_tied_one():
    model, registry = tied()
    inner = TiedOptimizer(averaging(), registry)
    compile_quickly(
        model,
        keras.optimizers.MultiOptimizer(lambda v: inner if "tower" in v.path else keras.optimizers.SGD(0.1)),
        "mse",
    )
    x, y = data()
    model.optimizer.build(model.trainable_variables)
    swap, monitor = keras.callbacks.SwapEMAWeights(), TieMonitor(registry)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[swap, monitor], validation_data=(x, y))
    assert bitwise_equal(*kernels(model))
    registry.check()
