"""Proximal rules: members that meet are equal bit for bit, and all are at the minimizer."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import equalize
from equalize._math import proximal
from equalize.callbacks import FactorSchedule
from equalize.constraints import ProximalPairwiseL1, ProximalPairwiseNorm
from equalize.errors import GroupMismatchError
from equalize.saving import load_model, save_model
from equalize.views import Transpose
from tests import strategies
from tests.bare import random_gradients, stepper
from tests.conftest import BACKEND, MODES, bitwise_equal


def array(x):
    return ops.convert_to_numpy(x)


RULES = (ProximalPairwiseL1, ProximalPairwiseNorm)
STEPS = (proximal.pairwise_l1, proximal.pairwise_norm)


def minimizer(w, factor, step=proximal.pairwise_l1):
    moved = step([ops.convert_to_tensor(row) for row in w], factor)
    return np.stack([array(row) for row in moved])


def violation(p, w, factor):
    """How far a point is from having 0 among the subgradients, relative to the values: 0 at the minimizer only.

    Members that are equal in a coordinate form a block, which moves as one; in it any pull within `factor` balances.
    """
    worst, p, w = 0.0, p.astype("float64"), w.astype("float64")
    for values, starts in zip(p.T, w.T, strict=True):
        for value in np.unique(values):
            block = values == value
            pull = factor * np.sign(value - values[~block]).sum()
            worst = max(worst, abs((starts[block] - value).sum() - block.sum() * pull))
            rest = np.sort(starts[block] - value - pull)  # what the members of the block must balance among themselves
            n = block.sum()
            bound = factor * np.cumsum(np.arange(n - 1, -n, -2))
            worst = max(worst, np.max(np.cumsum(rest[::-1]) - bound, initial=0.0))
    return worst


@settings(max_examples=10 if BACKEND == "jax" else 50)  # op by op, JAX takes a second for each
@given(strategies.arrays((5, 3), bound=100.0), st.sampled_from([0.0, 0.01, 0.5, 3.0, 1000.0]))
def test_it_is_the_minimizer(w, factor):
    p = minimizer(w, factor)
    size = np.abs(w).max(initial=0.0) + factor
    assert violation(p, w, factor) <= 1e-4 * (size + 1e-30)


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_members_that_meet_are_bitwise_equal(n):
    w = np.random.default_rng(n).normal(size=(n, 50)).astype("float32")
    for factor in (0.01, 0.1, 1.0):
        p = minimizer(w, factor)
        assert violation(p, w, factor) <= 1e-5 * n
        ascending = np.sort(p, axis=0)
        gaps = np.diff(ascending, axis=0)
        assert not np.any((gaps > 0) & (gaps <= 4e-7))  # equal, or apart
    if n > 1:
        assert len(np.unique(minimizer(w, 10.0)[:, 0])) == 1


def objective(p, w, factor):
    """What the proximal step of the norm minimizes."""
    first, second = np.triu_indices(len(w), 1)
    p, w = p.astype("float64"), w.astype("float64")
    of_pairs = np.broadcast_to(factor, (len(w),) * 2)[first, second]
    return 0.5 * np.sum((p - w) ** 2) + np.sum(of_pairs * np.linalg.norm(p[first] - p[second], axis=1))


def clustered(w, factor):
    """The same minimizer by the alternating direction method of multipliers, and which pairs have met.

    Chi and Lange, Splitting methods for convex clustering (2015), algorithm 1.
    """
    w = w.astype("float64")
    n = len(w)
    first, second = np.triu_indices(n, 1)
    apart = w[first] - w[second]
    dual = np.zeros_like(apart)
    factor = np.broadcast_to(factor, (n, n))[first, second][:, None]
    for _ in range(3000):
        pulled = w.copy()
        np.add.at(pulled, first, apart - dual)
        np.add.at(pulled, second, dual - apart)
        p = (pulled + pulled.sum(axis=0)) / (1 + n)
        wanted = p[first] - p[second] + dual
        norms = np.linalg.norm(wanted, axis=1, keepdims=True)
        apart = wanted * np.maximum(0.0, 1.0 - factor / np.maximum(norms, 1e-300))
        dual = wanted - apart
    return p, np.all(apart == 0.0, axis=1)


@pytest.mark.parametrize(("n", "size", "factor"), [(2, 1, 0.1), (3, 2, 0.3), (8, 3, 0.1), (8, 3, 0.3), (12, 30, 0.6)])
def test_whole_members_meet_where_the_minimizer_has_them_meet(n, size, factor):
    random = np.random.default_rng(0)
    w = 2.0 * random.normal(size=(3, size))[random.integers(3, size=n)] + 0.2 * random.normal(size=(n, size))
    for scale in (1.0, 1e-12, 1e12):
        scaled = (scale * w).astype("float32")
        p = minimizer(scaled, scale * factor, proximal.pairwise_norm)
        expected, met = clustered(w, factor)
        first, second = np.triu_indices(n, 1)
        assert np.array_equal(np.all(p[first] == p[second], axis=1), met)
        assert objective(p / scale, w, factor) <= objective(expected, w, factor) * (1 + 1e-5)


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
def test_every_pair_may_have_its_own_factor(strength):
    """Near neighbors pull each other, and one member nobody: it stays, wherever the others go."""
    random = np.random.default_rng(1)
    w = (3.0 * random.normal(size=(3, 4))[np.arange(9) % 3] + 0.5 * random.normal(size=(9, 4))).astype("float32")
    far = np.linalg.norm(w[:, None] - w[None], axis=2)
    near = (far <= np.sort(far, axis=1)[:, 3:4]) * np.exp(-far / 3)
    factor = strength * np.maximum(near, near.T) * ~np.eye(9, dtype=bool)
    factor[4] = factor[:, 4] = 0.0
    p = minimizer(w, factor, proximal.pairwise_norm)
    expected, met = clustered(w, factor)
    first, second = np.triu_indices(9, 1)
    together = np.all(p[first] == p[second], axis=1)
    linked = factor[first, second] > 0
    assert np.array_equal(together[linked], met[linked])
    assert objective(p, w, factor) <= objective(expected, w, factor) * (1 + 1e-5)
    np.testing.assert_allclose(p[4], w[4], rtol=1e-6)


def test_a_matrix_of_factors_ties_and_is_saved(tmp_path):
    layers = [keras.layers.Dense(3, use_bias=False) for _ in range(3)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    registry = equalize.GroupRegistry()
    rule = ProximalPairwiseNorm(factor=[[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    registry.tie("layers", [layer.kernel for layer in layers], rule)
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    model.fit(x, x, batch_size=4, verbose=0)
    assert bitwise_equal(layers[0].kernel, layers[1].kernel)
    assert not bitwise_equal(layers[0].kernel, layers[2].kernel)
    save_model(model, tmp_path / "model.keras", registry)
    _, again = load_model(tmp_path / "model.keras")
    assert again["layers"].rule.factor == rule.factor
    with pytest.raises(GroupMismatchError, match="3"):
        registry.replace("layers", ProximalPairwiseNorm(factor=np.ones((2, 2))))


@pytest.mark.parametrize("n", [3, 20])
def test_members_that_are_close_meet_among_others_that_are_far(n):
    """Distances of 1e-4 beside one of 100, which a product of matrices could not tell from 0."""
    random = np.random.default_rng(0)
    w = (1e-4 * random.normal(size=(n, 40))).astype("float32")
    w[-1] += 100.0
    assert len(np.unique(minimizer(w, 1e-6, proximal.pairwise_norm), axis=0)) == n
    strong = minimizer(w, 1e-3, proximal.pairwise_norm)
    assert len(np.unique(strong, axis=0)) == 2
    assert np.array_equal(strong[0], strong[-2])


@pytest.mark.parametrize("step", STEPS)
def test_what_is_no_number_shows(step):
    w = np.ones((3, 4), "float32")
    w[1, 2] = np.nan
    assert np.isnan(minimizer(w, 0.1, step)[1, 2])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_equal_and_what_is_not_pulled_changes_no_bit(dtype, step):
    row = ops.cast(np.random.default_rng(0).normal(size=20), dtype)
    same = step([row, row, row], 0.3)
    assert all(array(ops.cast(x, "float32")).tobytes() == array(ops.cast(row, "float32")).tobytes() for x in same)
    others = [ops.cast(np.random.default_rng(i).normal(size=20), dtype) for i in range(3)]
    for x, other in zip(step(others, 0.0), others, strict=True):
        assert array(ops.cast(x, "float32")).tobytes() == array(ops.cast(other, "float32")).tobytes()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_steps_of_gradient_descent_reach_exact_clusters(mode, rule):
    """Four members with targets in two pairs: at the minimizer of the penalized loss each pair is one value."""
    targets = np.array([[1.0], [1.1], [4.0], [4.1]], "float32")
    members = [keras.Variable(np.full((1, 1), i, "float32")) for i in range(4)]
    registry = equalize.GroupRegistry()
    rate, factor = 0.5, 0.1
    shown = [members[0], members[1], (members[2], Transpose()), members[3]]
    registry.tie("tasks", shown, rule(factor=rate * factor))
    step = stepper(keras.optimizers.SGD(rate), members, mode)
    for _ in range(30):
        step([ops.convert_to_tensor(array(m.value) - target[None]) for m, target in zip(members, targets, strict=True)])
    assert bitwise_equal(*members[:2])
    assert bitwise_equal(*members[2:])
    expected = [1.05 + 2 * factor, 4.05 - 2 * factor]
    np.testing.assert_allclose([array(members[i].value).item() for i in (0, 2)], expected, rtol=1e-5)
    groups = registry.split("tasks", atol=0.0)
    assert [len(group.members) for group in groups] == [2, 2]
    assert all(group.hard for group in groups)


@pytest.mark.parametrize("rule", RULES)
def test_it_is_saved_scheduled_and_found_under_accumulation(tmp_path, rule):
    layers = [keras.layers.Dense(3) for _ in range(3)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    registry = equalize.GroupRegistry()
    registry.tie("layers", layers, rule(factor=0.01))
    model.compile(keras.optimizers.SGD(0.01, gradient_accumulation_steps=2), "mse")
    assert {finding.kind for finding in registry.diagnose(model)} == {"accumulation"}
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    model.compile("sgd", "mse")
    apart = registry["layers/kernel"].spread()
    schedule = FactorSchedule(registry, "layers", lambda epoch: 0.1 * epoch)
    model.fit(x, x, batch_size=4, epochs=3, verbose=0, callbacks=[schedule])
    assert registry["layers/kernel"].spread() < apart
    save_model(model, tmp_path / "model.keras", registry)
    _, again = load_model(tmp_path / "model.keras")
    assert again["layers/kernel"].rule.factor == pytest.approx(0.2)
    registry.check()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_members_are_equal_after_every_step(mode, rule):
    members = [keras.Variable(np.random.default_rng(i).normal(size=(4, 3)).astype("float32")) for i in range(5)]
    registry = equalize.GroupRegistry()
    registry.tie("g", members, rule(factor=5.0))
    step = stepper(keras.optimizers.Adam(0.01), members, mode)
    for arrays in random_gradients(3, *[(4, 3)] * 5):
        step([ops.convert_to_tensor(x) for x in arrays])
        assert bitwise_equal(*members)
