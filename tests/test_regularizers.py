import keras
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from keras import ops

import equalize
from equalize._math import penalties
from equalize.errors import EqualizeError, NotLinkedError
from equalize.regularizers import ChainL2, MeanL2, PairwiseL1, PairwiseL2, PairwiseNorm, TraceNorm
from equalize.views import Scale, Transpose
from tests import references, strategies
from tests.conftest import MODES, XLA, bits, data, fit, gradients, kernels, no_loss, towers

RULES = {
    MeanL2: references.mean_l2,
    PairwiseL2: references.pairwise_l2,
    PairwiseNorm: references.pairwise_norm,
    PairwiseL1: references.pairwise_l1,
    ChainL2: references.chain_l2,
    TraceNorm: references.trace_norm,
}


def mean_l2(values, factor):
    return factor * references.mean_l2(np.asarray(values, "float64"))[0]


def tied(arrays, rule, frozen=()):
    variables = [keras.Variable(array, name=f"w{i}") for i, array in enumerate(arrays)]
    for i in frozen:
        variables[i].trainable = False
    registry = equalize.GroupRegistry()
    registry.tie("g", variables, rule)
    return registry, variables


def shares(variables):
    return [variable.regularizer(variable) for variable in variables if variable.trainable]


def test_a_rule_that_awaits_its_group_stays_inside_of_another():
    layers = [keras.layers.Dense(2, kernel_regularizer=MeanL2("a")) for _ in range(2)]
    for layer in layers:
        layer.build((None, 3))
    registry = equalize.GroupRegistry()
    registry.tie("b", [layer.kernel for layer in layers], MeanL2())
    with pytest.raises(NotLinkedError, match="group='a'"):
        layers[0].kernel.regularizer(layers[0].kernel)
    assert registry["b"].members[0].variable.regularizer.group is registry["b"]


def test_a_matrix_without_entries_is_refused():
    with pytest.raises(EqualizeError, match=r"an array of shape \(0, 0\)"):
        PairwiseL2(factor=np.zeros((0, 0)))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(MeanL2, 7.0), (PairwiseL2, 21.0), (PairwiseNorm, 6.0), (PairwiseL1, 7.0), (ChainL2, 14.5), (TraceNorm, 4.5)],
)
def test_penalty_of_three_by_hand(rule, expected):
    members = {
        PairwiseNorm: [[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]],
        TraceNorm: [[4.0, 0.0], [0.0, 3.0], [0.0, 4.0]],
    }.get(rule, [[0.0, 1.0], [3.0, 5.0], [3.0, 3.0]])
    registry, _ = tied([np.float32(member) for member in members], rule(factor=0.5))
    assert float(ops.convert_to_numpy(registry.penalty())) == pytest.approx(expected)


@pytest.mark.parametrize("rule", RULES)
@given(values=strategies.stacks(2, 6, min_dims=1), factor=st.floats(0.0, 10.0), data=st.data())
def test_shares_and_gradients_of_the_members_that_move_are_those_of_the_whole_penalty(rule, values, factor, data):
    frozen = data.draw(st.sets(st.integers(0, len(values) - 1), max_size=len(values) - 1))
    dtype = data.draw(st.sampled_from(sorted(strategies.DTYPES)))
    assume(rule is not TraceNorm or references.well_conditioned(values))
    registry, variables = tied(
        [value.astype(strategies.DTYPES[dtype]) for value in values], rule(factor=factor), frozen
    )
    expected, slopes = RULES[rule](values)
    slack = 1e-4 * (1.0 + factor * len(values) * np.sum(values**2))
    rounding = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    for function in (lambda: sum(shares(variables)), registry.penalty):
        assert float(ops.convert_to_numpy(function())) == pytest.approx(factor * expected, rel=1e-4, abs=slack)
        for variable, found, slope in zip(variables, gradients(function, variables), slopes, strict=True):
            if variable.trainable:
                found = np.asarray(found, "float64")
                np.testing.assert_allclose(found, factor * slope, rtol=rounding, atol=rounding * (1 + factor))


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_flows_from_a_share_to_another_member(rule):
    _, variables = tied([np.float32([1.0]), np.float32([2.0]), np.float32([5.0])], rule(factor=1.0))
    found = gradients(lambda: variables[2].regularizer(variables[2]), variables)
    assert all(gradient is None or not np.any(gradient) for gradient in found[:2])
    assert np.any(found[2])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_finite_in_every_dtype_where_a_sum_of_squares_overflows_half_precision(rule, dtype):
    values = [np.full((64,), sign * 200.0, "float32").astype(strategies.DTYPES[dtype]) for sign in (1, -1)]
    registry, _ = tied(values, rule(factor=1.0))
    expected = RULES[rule](np.float64(values))[0]
    assert float(ops.convert_to_numpy(registry.penalty())) == pytest.approx(expected)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule is not TraceNorm])
def test_zero_with_zero_gradient_at_equality(rule):
    value = np.random.default_rng(0).normal(size=(3, 2)).astype("float32")
    registry, variables = tied([value] * 3, rule(factor=2.0))
    assert float(ops.convert_to_numpy(registry.penalty())) == 0.0
    assert all(not np.any(gradient) for gradient in gradients(registry.penalty, variables))


@pytest.mark.parametrize("rule", RULES)
def test_views_pull_the_members_back_before_the_penalty_sees_them(rule):
    values = np.random.default_rng(0).normal(size=(3, 4, 2)).astype("float32")
    variables = [keras.Variable(values[0]), keras.Variable(values[1].T), keras.Variable(2.0 * values[2])]
    registry = equalize.GroupRegistry()
    registry.tie("g", [variables[0], (variables[1], Transpose()), (variables[2], Scale(2.0))], rule(factor=0.5))
    expected, slopes = RULES[rule](values.astype("float64"))
    assert float(ops.convert_to_numpy(registry.penalty())) == pytest.approx(0.5 * expected, rel=1e-5)
    found = gradients(registry.penalty, variables)
    for one, other in zip(found, (0.5 * slopes[0], 0.5 * slopes[1].T, 0.25 * slopes[2]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


class Weight(keras.layers.Layer):
    """A weight that nothing but its rule pulls."""

    def __init__(self, rule, **arguments):
        super().__init__(**arguments)
        self.w = self.add_weight(shape=(5, 4), initializer="glorot_uniform", regularizer=rule)

    def call(self, x):
        return x


@pytest.mark.parametrize(("mode", "few"), [*((mode, penalties._FEW) for mode in MODES), (XLA, 0)])
@pytest.mark.sampled
def test_a_step_of_fit_is_the_step_by_hand(mode, few, monkeypatch):
    monkeypatch.setattr(penalties, "_FEW", few)  # with 0, small groups take the forms that large ones do
    rules = RULES if few else [PairwiseL1, PairwiseNorm]  # which have other forms
    groups = {f"{rule.__name__}{n}": (rule, n) for rule in rules for n in (3, 4)}
    layers = {name: [Weight(rule(name, 0.3)) for _ in range(n)] for name, (rule, n) in groups.items()}
    for name, (_, n) in groups.items():
        layers[name][1].trainable = n == 3
    every = [layer for each in layers.values() for layer in each]
    model = keras.Sequential([keras.Input((5,)), *every, keras.layers.Dense(1)])
    registry = equalize.GroupRegistry().link(model)
    before = {name: np.stack([ops.convert_to_numpy(layer.w.value) for layer in layers[name]]) for name in groups}
    found = {name: RULES[rule](before[name].astype("float64")) for name, (rule, _) in groups.items()}
    for name, (expected, _) in found.items():
        penalty = float(ops.convert_to_numpy(registry.penalty(name)))
        losses = float(sum(ops.convert_to_numpy(loss) for layer in layers[name] for loss in layer.losses))
        assert [penalty, losses] == pytest.approx([0.3 * expected] * 2, rel=1e-5), name
    fit(model, optimizer=keras.optimizers.SGD(0.1), epochs=1, batch_size=32, **MODES[mode])
    for name, (_, slopes) in found.items():
        after = np.stack([ops.convert_to_numpy(layer.w.value) for layer in layers[name]])
        moving = np.array([layer.trainable for layer in layers[name]]).reshape(-1, 1, 1)
        expected = before[name] - 0.1 * 0.3 * slopes * moving
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_ties_are_saved_and_loaded_with_the_model(rule, tmp_path):
    model = towers(3, regularizer=lambda: rule("g", 0.3))
    before = float(ops.convert_to_numpy(equalize.GroupRegistry().link(model).penalty()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    registry = equalize.GroupRegistry().link(loaded)
    assert type(registry["g"].rule) is rule
    assert float(ops.convert_to_numpy(registry.penalty())) == pytest.approx(before)


def test_losses_of_a_model_add_up_to_the_penalty_whichever_members_train():
    for frozen in [(), (0,), (1, 2)]:
        model = towers(4, regularizer=lambda: MeanL2("g", 0.3), frozen=frozen)
        registry = equalize.GroupRegistry().link(model)
        expected = mean_l2([ops.convert_to_numpy(k) for k in kernels(model)], 0.3)
        assert float(sum(ops.convert_to_numpy(loss) for loss in model.losses)) == pytest.approx(expected, rel=1e-5)
        assert float(ops.convert_to_numpy(registry.penalty())) == pytest.approx(expected, rel=1e-5)


def test_losses_read_twice_in_one_step_are_the_same():
    model = towers(3, regularizer=lambda: MeanL2("g", 0.3))
    equalize.GroupRegistry().link(model)
    once, twice = ([float(ops.convert_to_numpy(loss)) for loss in model.losses] for _ in range(2))
    assert once == twice


def test_a_share_after_a_change_is_that_of_the_new_values():
    _, variables = tied([np.float32([0.0]), np.float32([2.0])], MeanL2(factor=1.0))
    assert float(ops.convert_to_numpy(variables[0].regularizer(variables[0]))) == 1.0
    variables[0].assign([4.0])
    assert float(ops.convert_to_numpy(variables[1].regularizer(variables[1]))) == 1.0
    assert float(ops.convert_to_numpy(variables[0].regularizer(variables[0]))) == 1.0
    variables[1].assign([10.0])
    assert float(ops.convert_to_numpy(variables[1].regularizer(variables[1]))) == 9.0


def test_one_rule_object_for_all_members_is_as_good_as_many():
    rule = MeanL2("g", 0.5)
    model = towers(3, regularizer=lambda: rule)
    equalize.GroupRegistry().link(model)
    expected = mean_l2([ops.convert_to_numpy(k) for k in kernels(model)], 0.5)
    assert float(sum(ops.convert_to_numpy(loss) for loss in model.losses)) == pytest.approx(expected, rel=1e-5)


def test_training_equals_training_with_the_penalty_written_out():
    def train(soft):
        keras.utils.set_random_seed(3)
        model = towers(3, regularizer=(lambda: MeanL2("g", 0.2)) if soft else None)
        if soft:
            equalize.GroupRegistry().link(model)
        else:
            group = kernels(model)

            class Written(keras.regularizers.Regularizer):
                def __call__(self, x):
                    values = [ops.convert_to_tensor(k.value) for k in group]
                    center = sum(values) / 3.0
                    return 0.2 * sum(ops.sum(ops.square(value - center)) for value in values)

            group[0].regularizer = Written()
        fit(model, optimizer=keras.optimizers.SGD(0.1))
        return [ops.convert_to_numpy(k.value) for k in kernels(model)]

    for tied_kernel, written in zip(train(True), train(False), strict=True):
        np.testing.assert_allclose(tied_kernel, written, rtol=1e-5, atol=1e-6)


def test_a_soft_tie_to_a_constant_pulls_to_it_in_every_step_and_does_not_move_it():
    # L2-SP of Li, Grandvalet and Davoine (2018): of two, MeanL2 is factor / 2 · ‖w − pretrained‖².
    model = towers(1)
    (kernel,) = kernels(model)
    before = ops.convert_to_numpy(kernel.value).astype("float64")
    pretrained = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    registry = equalize.GroupRegistry()
    group = registry.tie("prior", [kernel, pretrained], MeanL2(factor=0.4))
    penalty = float(ops.convert_to_numpy(registry.penalty()))
    assert penalty == pytest.approx(0.5 * 0.4 * np.sum((before - pretrained) ** 2), rel=1e-5)
    watch = fit(model, optimizer=keras.optimizers.SGD(0.1), loss=no_loss)
    expected = pretrained + (before - pretrained) * (1 - 0.1 * 0.4) ** watch.steps
    np.testing.assert_allclose(ops.convert_to_numpy(kernel.value), expected, rtol=1e-5, atol=1e-6)
    assert bits(group.members[1].variable) == pretrained.tobytes()


def test_inner_regularizer_goes_on_being_added():
    model = towers(2, regularizer=lambda: MeanL2("g", 0.0, inner=keras.regularizers.L2(0.5)))
    equalize.GroupRegistry().link(model)
    expected = sum(0.5 * np.sum(ops.convert_to_numpy(k) ** 2) for k in kernels(model))
    assert float(sum(ops.convert_to_numpy(loss) for loss in model.losses)) == pytest.approx(expected, rel=1e-5)


def test_a_variable_may_be_in_two_soft_groups():
    model = towers(3)
    first, second, third = kernels(model)
    registry = equalize.GroupRegistry()
    registry.tie("left", [first, second], MeanL2(factor=0.3))
    registry.tie("right", [second, third], MeanL2(factor=0.7))
    values = [ops.convert_to_numpy(k) for k in (first, second, third)]
    expected = mean_l2(values[:2], 0.3) + mean_l2(values[1:], 0.7)
    assert float(sum(ops.convert_to_numpy(loss) for loss in model.losses)) == pytest.approx(expected, rel=1e-5)
    registry.untie("left")
    expected = mean_l2(values[1:], 0.7)
    assert float(sum(ops.convert_to_numpy(loss) for loss in model.losses)) == pytest.approx(expected, rel=1e-5)
    registry.untie("right")
    assert second.regularizer is None


def test_hard_and_soft_on_one_variable():
    model = towers(4)
    ks = kernels(model)
    registry = equalize.GroupRegistry()
    registry.tie("first", ks[:2], equalize.constraints.Equal())
    registry.tie("second", ks[2:], equalize.constraints.Equal())
    registry.tie("all", ks, MeanL2(factor=5.0))
    before = registry["all"].spread()
    fit(model, registry, optimizer=keras.optimizers.SGD(0.05), epochs=5)
    assert registry["all"].spread() < before


def test_unlinked_rule_is_an_error_in_training_and_not_in_predicting():
    x, y = data()
    model = towers(2, regularizer=lambda: MeanL2("g"))
    model.predict(x, verbose=0)
    model.compile("sgd", "mse")
    with pytest.raises(NotLinkedError, match=r"GroupRegistry\(\).link\(model\)"):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("rule", RULES)
def test_config_round_trip(rule):
    original = rule("g", 0.25, inner=keras.regularizers.L1(0.1))
    config = keras.saving.serialize_keras_object(original)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is rule
    assert copy.get_config() == original.get_config()
    assert isinstance(copy.inner, keras.regularizers.L1)
    assert keras.regularizers.get(config).get_config() == original.get_config()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group": 3}, TypeError, "`group` must be a string"),
        ({"group": " "}, EqualizeError, "`group` must not be empty"),
        ({"factor": -1.0}, EqualizeError, r"`factor` must be a finite number in \[0, inf\)"),
        ({"factor": float("nan")}, EqualizeError, "`factor` must be a finite number"),
        ({"factor": "0.1"}, TypeError, "`factor` must be a number"),
        ({"inner": "no such thing"}, EqualizeError, "`inner` must be a Keras regularizer"),
        ({"view": 1}, TypeError, "`view` must be a view"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MeanL2(**arguments)


def test_training_one_model_leaves_another_with_the_same_group_name_alone():
    models = [towers(2, regularizer=lambda: MeanL2("g", 1.0)) for _ in range(2)]
    for model in models:
        equalize.GroupRegistry().link(model)
    before = [bits(k) for k in kernels(models[1])]
    fit(models[0])
    assert [bits(k) for k in kernels(models[1])] == before


def test_soft_rules_inside_of_each_other_are_all_linked_whatever_their_order():
    rules = [
        MeanL2("a", 0.5, inner=MeanL2("b", 0.25, inner="l2")),
        MeanL2("b", 0.25, inner=MeanL2("a", 0.5, inner="l2")),
    ]
    layers = [keras.layers.Dense(2, kernel_regularizer=rule) for rule in rules]
    entrance = keras.Input((3,))
    model = keras.Model(entrance, [layer(entrance) for layer in layers])
    registry = equalize.GroupRegistry().link(model)
    first, second = (ops.convert_to_numpy(layer.kernel.value) for layer in layers)
    own = 0.01 * (np.sum(first**2) + np.sum(second**2))
    expected = own + 0.75 * 0.5 * np.sum((first - second) ** 2)
    assert sum(float(ops.convert_to_numpy(loss)) for loss in model.losses) == pytest.approx(expected, rel=1e-5)
    registry.untie("a")
    expected = own + 0.25 * 0.5 * np.sum((first - second) ** 2)
    assert sum(float(ops.convert_to_numpy(loss)) for loss in model.losses) == pytest.approx(expected, rel=1e-5)
    registry.untie()
    assert all(layer.get_config()["kernel_regularizer"]["class_name"] == "L2" for layer in layers)
