"""FactorSchedule: factors and rates that change from epoch to epoch, seen by compiled steps."""

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.callbacks import FactorSchedule
from equalize.constraints import Equal
from equalize.errors import EqualizeError, NotLinkedError
from equalize.regularizers import MeanL2, PairwiseL2
from tests.conftest import BACKEND, MODES, QUICK, Recorder, bits, data, kernels, no_loss, towers

RATE = 0.1


def apart(rule, **kwargs):
    """Two towers whose kernels differ by 8 in every entry, and that nothing but their tie moves."""
    model = towers(2, **kwargs)
    for kernel, number in zip(kernels(model), (0.0, 8.0), strict=True):
        kernel.assign(np.full((5, 4), number))
    registry = equalize.GroupRegistry()
    registry.tie("towers", kernels(model), rule)
    return model, registry


def spreads(model, schedule, *, epochs=4, mode=QUICK):
    """The distance of the members before training and after every step, one an epoch."""
    model.compile(keras.optimizers.SGD(RATE), no_loss, **MODES[mode])
    recorder = Recorder(kernels(model))
    x, y = data(8)
    run = model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=[schedule, recorder])
    return [float(np.ptp(step, axis=0).max()) for step in recorder.values], run.history


@pytest.mark.parametrize(
    ("rule", "slope", "mode"), [(PairwiseL2, 4 * RATE, QUICK), *((MeanL2, 2 * RATE, mode) for mode in MODES)]
)
@pytest.mark.sampled
def test_a_factor_that_changes_is_seen_by_the_steps_of_its_epoch(rule, slope, mode):
    model, registry = apart(rule(factor=1.0))
    factors = [0.0, 0.5, 2.0, 0.25]
    found, history = spreads(model, FactorSchedule(registry, "towers", factors.__getitem__), mode=mode)
    expected = 8.0 * np.cumprod([1.0, *(1.0 - slope * factor for factor in factors)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert history["factor/towers"] == factors
    assert registry["towers"].rule.factor == 0.25


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_a_rate_that_changes_is_seen_by_the_steps_of_its_epoch_and_may_become_hard(mode):
    model, registry = apart(Equal(rate=0.5))
    rates = [0.5, 0.125, 0.75, 1.0, 0.5]
    schedule = FactorSchedule(registry, ["towers"], rates.__getitem__)
    found, _ = spreads(model, schedule, epochs=4, mode=mode)
    np.testing.assert_allclose(found, 8.0 * np.cumprod([1.0, *(1.0 - rate for rate in rates[:4])]), rtol=1e-5)
    assert registry["towers"].hard
    kernels(model)[0].assign(np.full((5, 4), -0.0))
    kernels(model)[1].assign(np.full((5, 4), 0.0))
    spreads(model, FactorSchedule(registry, "towers", lambda epoch: 1.0), epochs=1, mode=mode)
    assert len({bits(kernel) for kernel in kernels(model)}) == 1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="traces are counted where graphs are traced once")
def test_a_change_of_the_factor_traces_nothing_anew(monkeypatch):
    model, registry = apart(MeanL2(factor=1.0))
    traced = []
    monkeypatch.setattr(model, "train_step", lambda batch, step=model.train_step: traced.append(1) or step(batch))
    spreads(model, FactorSchedule(registry, "towers", float), epochs=6)
    assert len(traced) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_float16"])
@pytest.mark.sampled
def test_factors_and_rates_in_other_precisions(dtype):
    for rule, shrunk in ((MeanL2(factor=1.0), 1 - RATE), (Equal(rate=0.25), 0.5)):
        model, registry = apart(rule, dtype=dtype)
        found, _ = spreads(model, FactorSchedule(registry, "towers", lambda epoch: 0.5), epochs=1)
        assert found[1] == pytest.approx(8.0 * shrunk, rel=1e-2)


@pytest.mark.slow
def test_schedules_of_keras():
    for schedule, expected in (
        (keras.optimizers.schedules.PolynomialDecay(0.0, 4, 1.0), [0.0, 0.25, 0.5, 0.75]),
        (keras.optimizers.schedules.ExponentialDecay(0.125, 1, 2.0), [0.125, 0.25, 0.5, 1.0]),
        (lambda epoch: np.array(0.5), [0.5] * 4),
        (lambda epoch: 1, [1.0] * 4),
    ):
        model, registry = apart(MeanL2(factor=3.0))
        _, history = spreads(model, FactorSchedule(registry, "towers", schedule))
        assert history["factor/towers"] == pytest.approx(expected)


def test_ties_of_layers_are_named_as_a_whole_and_other_groups_stay():
    model = towers(2)
    registry = equalize.GroupRegistry()
    registry.tie("towers", [model.get_layer(f"tower_{i}") for i in range(2)], MeanL2(factor=1.0))
    registry.tie("other", kernels(model), MeanL2(factor=1.0))
    _, history = spreads(model, FactorSchedule(registry, "towers", lambda epoch: 2.0), epochs=1)
    assert {name: group.rule.factor for name, group in registry.items()} == {
        "towers/kernel": 2.0,
        "towers/bias": 2.0,
        "other": 1.0,
    }
    assert {key for key in history if "factor" in key} == {"factor/towers/kernel", "factor/towers/bias"}


def test_training_again_without_the_schedule_keeps_the_last_factor():
    model, registry = apart(MeanL2(factor=1.0))
    spreads(model, FactorSchedule(registry, "towers", lambda epoch: 0.5), epochs=2)
    before = registry.spread()["towers"]
    x, y = data(8)
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    assert registry.spread()["towers"] == pytest.approx(before * (1 - 2 * RATE * 0.5), rel=1e-5)
    penalty = float(ops.convert_to_numpy(registry.penalty()))
    assert penalty == pytest.approx(0.5 * 2 * 20 * (registry.spread()["towers"] / 2) ** 2, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"registry": {}}, TypeError, "`registry` must be an `equalize.GroupRegistry`"),
        ({"names": []}, EqualizeError, "`names` must name at least one group"),
        ({"names": [1]}, TypeError, "`names` must be"),
        ({"schedule": 0.5}, TypeError, "`schedule` must be a function of the epoch"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        FactorSchedule(**({"registry": equalize.GroupRegistry(), "names": "towers", "schedule": float} | arguments))


@pytest.mark.parametrize(
    ("rule", "value", "error", "message"),
    [
        (MeanL2(factor=1.0), -1.0, EqualizeError, "`factor` must be a finite number"),
        (MeanL2(factor=1.0), "much", TypeError, "`factor` must be a number"),
        (MeanL2(factor=1.0), np.ones(2), TypeError, "`factor` must be a number"),
        (Equal(), 0.0, EqualizeError, r"`rate` must be a finite number in \(0, 1\]"),
        (Equal(), 1.5, EqualizeError, "`rate` must be"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_changes(rule, value, error, message):
    model, registry = apart(rule)
    callback = FactorSchedule(registry, "towers", lambda epoch: value)
    callback.set_model(model)
    callback.on_train_begin()
    with pytest.raises(error, match=message):
        callback.on_epoch_begin(0)
    assert registry["towers"].rule.describe() == rule.describe()


def test_a_group_that_does_not_exist_is_an_error_when_training_starts():
    model, registry = apart(MeanL2(factor=1.0))
    callback = FactorSchedule(registry, "tower", float)
    callback.set_model(model)
    with pytest.raises(EqualizeError, match=r"no group 'tower'. Expected one of: \['towers'\]"):
        callback.on_train_begin()


def test_a_matrix_of_factors_is_refused():
    model, registry = apart(PairwiseL2(factor=[[0.0, 1.0], [1.0, 0.0]]))
    callback = FactorSchedule(registry, "towers", float)
    callback.set_model(model)
    with pytest.raises(EqualizeError, match="expected a rule with a number for it"):
        callback.on_train_begin()


def test_a_model_without_the_groups_is_an_error_when_training_starts():
    _, registry = apart(MeanL2(factor=1.0))
    callback = FactorSchedule(registry, "towers", float)
    callback.set_model(towers(2))
    with pytest.raises(NotLinkedError, match=r"nothing to change in the model .*none of \['towers'\]"):
        callback.on_train_begin()


def test_another_model_that_holds_the_members_sees_the_change():
    model, registry = apart(MeanL2(factor=0.0))
    entrance = keras.Input((5,))
    outputs = [model.get_layer(f"tower_{i}")(entrance) for i in range(2)]
    other = keras.Model(entrance, keras.layers.Concatenate()(outputs))
    other.compile(keras.optimizers.SGD(RATE), no_loss, **MODES[QUICK])
    x, _ = data(8)
    targets = np.zeros((8, 8), "float32")
    other.fit(x, targets, batch_size=8, verbose=0)
    before = bits(kernels(model)[0])
    spreads(model, FactorSchedule(registry, "towers", lambda epoch: 0.5 if epoch else 0.0), epochs=1)
    assert bits(kernels(model)[0]) == before
    callback = FactorSchedule(registry, "towers", lambda epoch: 0.5)
    callback.set_model(model)
    callback.on_epoch_begin(0)
    other.fit(x, targets, batch_size=8, verbose=0)
    assert bits(kernels(model)[0]) != before
