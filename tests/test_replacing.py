"""The road from free to exact: the rule of a group is replaced, and the next step follows."""

import functools
import gc

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize._ties.bound import BoundRegularizer
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2, PairwiseL2
from equalize.views import Scale
from tests.conftest import BACKEND, MODES, QUICK, Recorder, bits, bitwise_equal, data, kernels, no_loss, towers

ROAD = {
    "free": None,
    "soft": MeanL2(factor=0.5),
    "partial": Equal(rate=0.25),
    "hard": Equal(),
}


def apart(n=2):
    """Towers whose kernels differ, which nothing but their tie moves."""
    model = towers(n)
    for i, kernel in enumerate(kernels(model)):
        kernel.assign(np.full((5, 4), 4.0**i))
    registry = equalize.GroupRegistry()
    group = registry.tie("towers", kernels(model), ROAD["free"])
    return model, registry, group


def train(model, *callbacks, epochs=1):
    x, y = data(8)
    model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=[*callbacks])


def distances(model):
    values = np.stack([ops.convert_to_numpy(kernel.value) for kernel in kernels(model)])
    return np.ptp(values, axis=0)[0, 0]


FACTORS = {"free": 1.0, "soft": 1 - 2 * 0.1 * 0.5, "partial": 0.75, "hard": 0.0}  # with SGD at 0.1


@pytest.mark.parametrize(("mode", "compile_again"), [*((mode, False) for mode in MODES), (QUICK, True)])
@pytest.mark.sampled
def test_every_switch_takes_effect_in_the_next_fit(mode, compile_again):
    model, registry, group = apart()
    model.compile(keras.optimizers.SGD(0.1), no_loss, **MODES[mode])
    train(model)
    long = mode == QUICK and not compile_again
    held = []  # somebody may hold what was compiled before
    for name in ("soft", "free", "partial", "soft", "partial", "hard", "free") if long else ("partial", "hard", "free"):
        held.append(model.train_function)
        registry.replace(group.name, ROAD[name])
        assert registry["towers"].rule == ROAD[name] or registry["towers"].tying.describe() == ROAD[name].describe()
        assert group.hard == (name == "hard")
        if compile_again:
            model.compile(keras.optimizers.SGD(0.1), no_loss, **MODES[mode])
        before = distances(model)
        train(model)
        assert distances(model) == pytest.approx(before * FACTORS[name], rel=1e-5)
    assert bitwise_equal(*kernels(model))


class Switch(keras.callbacks.Callback):
    """Gives a group the next rule at the beginning of every epoch."""

    def __init__(self, registry, names):
        super().__init__()
        self.registry, self.names = registry, names

    def on_epoch_begin(self, epoch, logs=None):
        self.registry.replace("towers", ROAD[self.names[epoch]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_every_switch_takes_effect_in_the_next_step_inside_a_running_fit(mode):
    model, registry, _ = apart()
    model.compile(keras.optimizers.SGD(0.1), no_loss, **MODES[mode])
    names = ["partial", "soft", "hard", "free"]
    recorder = Recorder(kernels(model))
    train(model, Switch(registry, names), recorder, epochs=len(names))
    spreads = [np.ptp(step, axis=0)[0, 0] for step in recorder.values]
    expected = np.cumprod([3.0, *(FACTORS[name] for name in names)])
    np.testing.assert_allclose(spreads, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_road_ends_in_an_exact_tie():
    model, registry, group = apart(3)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    train(model, epochs=3)
    registry.replace(group.name, Equal())
    registry.sync("mean")
    optimizer = TiedOptimizer(keras.optimizers.SGD(0.01, momentum=0.9), registry)
    model.compile(optimizer, "mse")
    train(model, epochs=3)
    registry.check()
    assert sum(tuple(variable.shape) == (5, 4) for variable in optimizer.variables) == 1


def test_the_sum_of_the_losses_is_that_of_the_new_rule():
    model, registry, group = apart()
    x, y = data()
    model.compile("sgd", "mse")
    free = model.evaluate(x, y, verbose=0)
    registry.replace(group.name, MeanL2(factor=0.5))
    penalty = float(ops.convert_to_numpy(registry.penalty()))
    assert penalty == pytest.approx(0.5 * 2 * 20 * 1.5**2)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(free + penalty, rel=1e-5)


def test_what_else_is_on_the_variables_stays():
    model, registry, group = apart()
    registry.untie()
    for kernel in kernels(model):
        kernel.constraint = keras.constraints.NonNeg()
        kernel.regularizer = keras.regularizers.L2(0.125)
    group = registry.tie("towers", kernels(model), MeanL2(factor=0.5))
    other = registry.tie("other", kernels(model), MeanL2(factor=0.25))
    registry.replace(group.name, Equal())
    assert isinstance(group.inner, keras.constraints.NonNeg)
    registry.replace(group.name, MeanL2(factor=1.0))
    for kernel in kernels(model):
        assert isinstance(kernel.constraint, keras.constraints.NonNeg)
        found = float(ops.convert_to_numpy(kernel.regularizer(kernel.value)))
        value = ops.convert_to_numpy(kernel.value)
        assert found == pytest.approx(0.125 * np.sum(value**2) + 1.25 * 20 * 1.5**2, rel=1e-5)
    registry.untie("towers", "other")
    for kernel in kernels(model):
        assert isinstance(kernel.regularizer, keras.regularizers.L2)
    assert other.name not in registry


def test_members_keep_their_views_and_weights():
    one, two = keras.Variable(np.float32([1.0, 2.0])), keras.Variable(np.float32([6.0, 8.0]))
    registry = equalize.GroupRegistry()
    group = registry.tie("scaled", [one, (two, Scale(2))], MeanL2(factor=0.0))
    registry.replace(group.name, Equal())
    registry.project()
    assert ops.convert_to_numpy(two.value).tolist() == (2 * ops.convert_to_numpy(one.value)).tolist()
    for rule in (Equal(view=Scale(3)), Equal(weight=2.0)):
        with pytest.raises(EqualizeError, match=r"has the view .* and the weight .*Expected: a rule without, Equal"):
            registry.replace(group.name, rule)


def test_a_declared_rule_comes_back_with_a_copy_of_the_model():
    model = towers(2, regularizer=lambda: MeanL2("towers", 0.5))
    registry = equalize.GroupRegistry().link(model)
    registry.replace("towers", Equal())
    registry.link(model)  # changes nothing
    assert registry["towers"].hard
    clone = keras.models.clone_model(model)
    assert equalize.GroupRegistry().link(clone)["towers"].rule.describe() == "MeanL2(factor=0.5)"


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ("equal", TypeError, "`rule` must be a constraint or regularizer of equalize"),
        (Equal("others"), EqualizeError, "was given the name 'towers' and a rule of group 'others'"),
        (Equal(inner="non_neg"), GroupMismatchError, "it has the constraint MaxNorm.* already"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_and_nothing_changes(rule, error, message):
    model, registry, group = apart()
    for kernel in kernels(model):
        kernel.constraint = keras.constraints.MaxNorm(9.0)
    before = [(kernel.constraint, kernel.regularizer, bits(kernel)) for kernel in kernels(model)]
    with pytest.raises(error, match=message):
        registry.replace(group.name, rule)
    assert group.rule is ROAD["free"]
    assert [(kernel.constraint, kernel.regularizer, bits(kernel)) for kernel in kernels(model)] == before


def test_a_second_hard_rule_and_anchors_that_differ_are_refused():
    model, registry, group = apart()
    registry.replace(group.name, MeanL2(factor=0.0))
    registry.tie("hard", kernels(model), Equal(rate=0.5))
    with pytest.raises(GroupMismatchError, match="belongs to group 'hard' already"):
        registry.replace(group.name, Equal())
    registry.untie("hard")
    for i in range(2):
        model.get_layer(f"tower_{i}").trainable = False
    with pytest.raises(GroupMismatchError, match="do not move"):
        registry.replace(group.name, Equal())
    if BACKEND == "jax":
        assert all(type(kernel.regularizer) is BoundRegularizer for kernel in kernels(model))


def test_a_group_that_was_untied_takes_no_rule_and_no_rule_is_assigned():
    model, registry, group = apart()
    with pytest.raises(EqualizeError, match=r"Expected: `registry\.replace\('towers', rule\)`"):
        group.rule = Equal()
    registry.untie("towers")
    with pytest.raises(EqualizeError, match="There is no group 'towers'"):
        registry.replace(group.name, Equal())
    assert all(kernel.constraint is None for kernel in kernels(model))


def test_the_rule_of_a_tie_of_layers_is_replaced_in_all_its_groups_or_in_none():
    layers = [keras.layers.Dense(2, name=name) for name in ("one", "two")]
    model = keras.Sequential([keras.Input((2,)), *layers])
    registry = equalize.GroupRegistry()
    registry.tie("layers", layers, MeanL2())
    registry.replace("layers", Equal(rate=0.5))
    assert [group.rule.describe() for group in registry.values()] == ["Equal(rate=0.5)"] * 2
    registry.replace("layers", MeanL2())
    registry.tie("other", [layer.bias for layer in layers], Equal(rate=0.5))
    with pytest.raises(GroupMismatchError, match="belongs to group 'other' already"):
        registry.replace("layers", Equal())
    assert [registry[name].rule.describe() for name in ("layers/kernel", "layers/bias")] == ["MeanL2(factor=0.01)"] * 2
    assert all(layer.kernel.constraint is None for layer in model.layers)


def test_a_matrix_counts_the_members_that_are_left():
    layers = [keras.layers.Dense(2) for _ in range(4)]
    for i, layer in enumerate(layers):
        layer.build((None, 3))
        layer.kernel.assign(np.full((3, 2), 2.0**i))
    registry = equalize.GroupRegistry()
    group = registry.tie("kernels", [layer.kernel for layer in layers], PairwiseL2(factor=1.0))
    del layers[0], layer
    gc.collect()
    registry.replace(group.name, PairwiseL2(factor=[[0, 100, 0], [100, 0, 1], [0, 1, 0]]))
    del layers[2]
    gc.collect()
    assert float(ops.convert_to_numpy(registry.penalty())) == pytest.approx(100 * 6 * (4.0 - 2.0) ** 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_ties_made_and_taken_away_after_training_are_followed_without_compiling_anew(mode):
    model, registry, _ = apart()
    registry.untie()
    model.compile(keras.optimizers.SGD(0.1), no_loss, **MODES[mode])
    train(model)
    before = distances(model)
    registry.tie("towers", kernels(model), Equal(rate=0.25))
    train(model)
    assert distances(model) == pytest.approx(0.75 * before, rel=1e-5)
    registry.untie("towers")
    train(model)
    assert distances(model) == pytest.approx(0.75 * before, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile is PyTorch's")
def test_what_torch_has_compiled_follows_ties_made_later(monkeypatch):
    import torch

    # Dynamo traces and guards as usual; generating C++ from the trace would take a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, registry, _ = apart()
    registry.untie()
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True)
    train(model, epochs=2)
    group = registry.tie("towers", kernels(model), Equal(rate=0.5))
    before = distances(model)
    train(model)
    assert distances(model) == pytest.approx(0.5 * before, rel=0.05)  # the loss moves them, too
    registry.replace(group.name, Equal())
    train(model)
    assert bitwise_equal(*kernels(model))
    registry.untie()
    train(model)
    assert not bitwise_equal(*kernels(model))


def test_no_finding_says_that_a_rule_was_dropped_that_was_replaced():
    model = towers(2, regularizer=lambda: MeanL2("towers", 0.5))
    registry = equalize.GroupRegistry().link(model)
    registry.replace("towers", Equal())
    assert [finding.kind for finding in registry.diagnose()] == ["unequal"]


def test_a_rule_that_is_replaced_takes_what_it_brought_with_it():
    model = towers(2)
    registry = equalize.GroupRegistry()
    for brings, slot in ((Equal(inner="non_neg"), "constraint"), (MeanL2(factor=0.1, inner="l2"), "regularizer")):
        registry.tie("towers", kernels(model), brings)
        registry.replace("towers", Equal())
        copy = equalize.GroupRegistry.from_config(registry.get_config()).link(keras.models.clone_model(model))
        assert copy["towers"].rule.describe() == registry["towers"].rule.describe() == "Equal()"
        registry.replace("towers", brings)
        registry.untie()
        assert all(getattr(kernel, slot) is None for kernel in kernels(model))


def test_a_rule_that_is_replaced_does_not_take_over_what_the_layers_have_themselves():
    layers = [keras.layers.Dense(2, kernel_constraint="non_neg", kernel_regularizer="l2") for _ in range(2)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    registry = equalize.GroupRegistry()
    for rule, other in ((Equal(rate=0.5), Equal()), (MeanL2(factor=0.5), PairwiseL2(factor=0.5))):
        registry.tie("pair", [layer.kernel for layer in layers], rule)
        registry.replace("pair", other)
        (entry,) = registry.get_config()["groups"]
        assert entry["rule"]["config"]["inner"] is None
        registry.untie()
    del model
