"""Reductions: weights of the uses' gradients from their Gram matrix, in every way to run a step."""

import functools
import json

import keras
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from keras import layers, ops

import equalize
from equalize import _backend as backend
from equalize.callbacks import TieMonitor
from equalize.constraints import Equal
from equalize.errors import EqualizeError
from equalize.optimizers import TiedOptimizer
from equalize.reductions import MGDA, PCGrad, Reduction, UPGrad
from equalize.saving import load_model, save_model
from equalize.views import Transpose
from tests.bare import random_gradients, stepper
from tests.conftest import BACKEND, MODES, bitwise_equal, two_towers

ALL = (PCGrad(seed=3), MGDA(), UPGrad())


@keras.saving.register_keras_serializable(package="tests")
class Proportions(Reduction):
    """A user's own: fixed proportions."""

    def weights(self, gramian):
        return ops.arange(1, gramian.shape[0] + 1, dtype="float32")


def weights(reduction, gramian, step=0):
    reduction.step = ops.cast(step, "int32")
    return ops.convert_to_numpy(reduction.weights(ops.convert_to_tensor(np.asarray(gramian, "float32"))))


def conflicting(n, size, seed):
    """Gradients of which some point against others, of lengths that differ by orders of magnitude."""
    random = np.random.default_rng(seed)
    return random.normal(size=(n, size)) * 10.0 ** random.uniform(-1, 1, size=(n, 1))


many = pytest.mark.parametrize(
    ("n", "size", "seed"), [(2, 1, 0), (2, 5, 1), (3, 2, 2), (5, 3, 3), (5, 40, 4), (17, 9, 5)]
)


@many
def test_mgda_is_the_shortest_convex_combination(n, size, seed):
    g = conflicting(n, size, seed)
    gramian = g @ g.T
    found = weights(MGDA(), gramian).astype("float64")
    assert found.min() >= 0.0
    assert found.sum() == pytest.approx(1.0, abs=1e-5)
    # Optimal if and only if no gradient has a smaller inner product with the combination than the combination has.
    along = gramian @ found
    assert along.min() - found @ along >= -1e-4 * np.trace(gramian) / n


@many
def test_upgrad_is_the_mean_of_the_projections_onto_the_dual_cone(n, size, seed):
    g = conflicting(n, size, seed)
    gramian = g @ g.T
    found = weights(UPGrad(), gramian)
    regular = gramian / np.trace(gramian) + 1e-4 * np.eye(n)
    root = np.linalg.cholesky(regular)
    more = [scipy.optimize.nnls(root.T, -np.linalg.solve(root, regular[i]))[0] for i in range(n)]  # beyond eᵢ
    exact = (1.0 + np.sum(more, axis=0)) / n
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)
    assert np.all(gramian @ found >= -1e-3 * np.trace(gramian))  # no use loses, but for what regularity costs


@many
def test_pcgrad_is_its_algorithm_on_the_gradients(n, size, seed):
    g = conflicting(n, size, seed)
    for step in (0, 7):
        orders = np.argsort(
            ops.convert_to_numpy(backend.stateless_uniform((n, n), 11, ops.cast(step, "int32"))), axis=1
        )
        total = np.zeros(size)
        for i in range(n):
            projected = g[i].copy()
            for j in orders[i]:
                if j != i and projected @ g[j] < 0:
                    projected -= projected @ g[j] / (g[j] @ g[j]) * g[j]
            total += projected
        found = weights(PCGrad(seed=11), g @ g.T, step)
        np.testing.assert_allclose(found @ g, total, rtol=1e-3, atol=1e-3 * np.abs(g).max())


def test_orders_of_pcgrad_are_permutations_and_change_with_the_step():
    draws = [ops.convert_to_numpy(backend.stateless_uniform((6, 6), 1, ops.cast(step, "int32"))) for step in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert min(draw.min() for draw in draws) >= 0.0
    assert max(draw.max() for draw in draws) < 1.0
    keras.utils.set_random_seed(4)
    first = PCGrad().seed
    keras.utils.set_random_seed(4)
    assert PCGrad().seed == first
    assert PCGrad().seed != first


@pytest.mark.parametrize("n", [2, 4, 9])
def test_the_authors_of_torchjd_compute_the_same(n):
    torchjd = pytest.importorskip("torchjd.aggregation")
    torch = pytest.importorskip("torch")
    for seed in range(20):
        g = conflicting(n, 12, seed)
        gramian = torch.from_numpy(g @ g.T)
        theirs = {
            "upgrad": torchjd.UPGradWeighting()(gramian).numpy(),
            "mgda": torchjd.MGDAWeighting(epsilon=1e-12, max_iters=3000)(gramian).numpy(),
        }
        np.testing.assert_allclose(weights(UPGrad(), g @ g.T), theirs["upgrad"], rtol=1e-4, atol=1e-4)
        ours = weights(MGDA(), g @ g.T)  # whose weights agree where the combination is not all but zero
        assert np.linalg.norm(ours @ g) <= np.linalg.norm(theirs["mgda"] @ g) + 1e-4 * np.abs(g).max()
        if n == 2:  # where there is one order only
            theirs_pcgrad = torchjd.PCGradWeighting()(gramian).numpy()
            np.testing.assert_allclose(weights(PCGrad(seed=0), g @ g.T), theirs_pcgrad, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([1e-15, 1.0, 1e15]))
def test_weights_are_finite_and_do_not_depend_on_the_scale(n, seed, scale):
    g = conflicting(n, 2, seed)
    g[seed % n] *= seed % 3  # some are zero
    for reduction in ALL:
        found = weights(reduction, g @ g.T)
        assert np.all(np.isfinite(found))
        scaled = weights(reduction, scale * (g @ g.T))  # several weights may have one sum
        np.testing.assert_allclose(scaled @ g, found @ g, atol=2e-3 * np.abs(g).max(initial=1e-9))
        assert np.all(np.isfinite(weights(reduction, np.full((n, n), np.nan))))


def trunk(*shapes, uses=3):
    """Variables of several groups of one tie of layers, and a registry; with a variable of its own for each use."""
    tied = [[keras.Variable(np.ones(shape, "float32")) for shape in shapes] for _ in range(uses)]
    towers = []
    for variables in tied:
        tower = layers.Layer()
        for variable in variables:
            tower._track_variable(variable)
        tower.built = True
        towers.append(tower)
    registry = equalize.GroupRegistry()
    registry.tie("trunk", towers, Equal())
    return tied, registry


@pytest.mark.parametrize("reduction", [*ALL, Proportions()], ids=lambda reduction: type(reduction).__name__)
@pytest.mark.parametrize("mode", MODES)
def test_the_update_is_the_weighted_sum_over_the_whole_tie(mode, reduction, monkeypatch):
    """After every step: two groups of a tie have the same weights, and another tie has its own."""

    def uniform(shape, seed, step):  # TensorFlow's own has other numbers under XLA
        return ops.cos(
            ops.reshape(ops.arange(shape[0] * shape[1], dtype="float32"), shape) * (1.0 + ops.cast(step, "float32"))
        )

    monkeypatch.setattr(backend, "stateless_uniform", uniform)
    tied, registry = trunk((4, 3), (3,))
    alone = [keras.Variable(np.ones(shape, "float32")) for shape in ((2, 5), (5, 2))]
    registry.tie("pair", [alone[0], (alone[1], Transpose())], Equal())
    free = keras.Variable(np.ones(6, "float32"))
    variables = [variable for use in tied for variable in use] + [*alone, free]
    optimizer = TiedOptimizer(keras.optimizers.SGD(0.125), registry, reduction=reduction)
    step = stepper(optimizer, variables, mode)
    expected = [ops.convert_to_numpy(variable.value) for variable in variables]
    for number, gradients in enumerate(random_gradients(3, *[v.shape for v in variables])):
        step([ops.convert_to_tensor(gradient) for gradient in gradients])
        g = np.stack([np.concatenate([x.ravel() for x in gradients[2 * i : 2 * i + 2]]) for i in range(3)])
        total = weights(reduction, g @ g.T, number) @ g
        pair = np.stack([gradients[6].ravel(), gradients[7].T.ravel()])
        joined = (weights(reduction, pair @ pair.T, number) @ pair).reshape(2, 5)
        changes = [total[:12].reshape(4, 3), total[12:]] * 3 + [joined, joined.T, gradients[8]]
        expected = [value - 0.125 * change for value, change in zip(expected, changes, strict=True)]
        for variable, value in zip(variables, expected, strict=True):
            np.testing.assert_allclose(ops.convert_to_numpy(variable.value), value, rtol=1e-4, atol=2e-5)
        for parts in zip(*tied, strict=True):
            assert bitwise_equal(*parts)


@pytest.mark.parametrize("reduction", ALL, ids=lambda reduction: type(reduction).__name__)
def test_uses_without_gradients_are_left_out(reduction):
    tied, registry = trunk((4,), (3,))
    variables = [variable for use in tied for variable in use]
    optimizer = TiedOptimizer(keras.optimizers.SGD(1.0), registry, reduction=reduction)
    optimizer.build(variables)
    random = np.random.default_rng(0)
    first, third = random.normal(size=7).astype("float32"), random.normal(size=4).astype("float32")
    # Use 1 has no gradient at all, and use 2 none for its second weight, which counts as zero there.
    gradients = [first[:4], first[4:], None, None, third, None]
    optimizer.apply([None if x is None else ops.convert_to_tensor(x) for x in gradients], variables)
    g = np.stack([first, np.concatenate([third, np.zeros(3)])])
    total = weights(reduction, g @ g.T) @ g
    np.testing.assert_allclose(ops.convert_to_numpy(tied[1][0].value), 1.0 - total[:4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(tied[1][1].value), 1.0 - total[4:], rtol=1e-4, atol=1e-5)
    optimizer.apply([None] * 4 + [ops.convert_to_tensor(third), ops.zeros(3)], variables)  # one use alone
    if not isinstance(reduction, Proportions):
        total = total[:4] + third
        np.testing.assert_allclose(ops.convert_to_numpy(tied[0][0].value), 1.0 - total, rtol=1e-4, atol=1e-5)


def test_a_use_that_is_no_number_shows_in_the_whole_tie_and_nowhere_else():
    tied, registry = trunk((4,))
    other = keras.Variable(np.ones(2, "float32"))
    variables = [*(use[0] for use in tied), other]
    for reduction in ALL:
        optimizer = TiedOptimizer(keras.optimizers.SGD(1.0), registry, reduction=reduction)
        optimizer.build(variables)
        gradients = [ops.ones(4), ops.full((4,), float("nan")), ops.ones(4), ops.ones(2)]
        optimizer.apply(gradients, variables)
        assert np.all(np.isnan(ops.convert_to_numpy(tied[0][0].value)))
        assert np.all(np.isfinite(ops.convert_to_numpy(other.value)))
        for variable in variables:
            variable.assign(ops.ones(variable.shape))


@pytest.mark.parametrize("mode", MODES)
def test_loss_scaling_does_not_change_what_a_reduction_sees(mode):
    """A user's own may depend on the size of the gradients; and a step that overflows is skipped, as ever."""
    if BACKEND == "jax" and mode == "eager":
        pytest.skip("a LossScaleOptimizer leaks what it traces there (Keras 3.15)")

    @keras.saving.register_keras_serializable(package="tests")
    class Squares(Reduction):
        def weights(self, gramian):
            return ops.diagonal(gramian)

    results = []
    for scaled in (False, True):
        tied, registry = trunk((3,), uses=2)
        variables = [use[0] for use in tied]
        inner = keras.optimizers.SGD(0.5)
        inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0) if scaled else inner
        step = stepper(TiedOptimizer(inner, registry, reduction=Squares()), variables, mode)
        times = 8.0 if scaled else 1.0
        step([ops.convert_to_tensor(times * np.arange(1.0, 4.0, dtype="float32") / i) for i in (2, 3)])
        results.append(ops.convert_to_numpy(variables[0].value))
        if scaled:
            step([ops.ones(3), ops.full((3,), float("inf"))])
            assert np.array_equal(ops.convert_to_numpy(variables[0].value), results[-1])
    np.testing.assert_allclose(*results, rtol=1e-6)


def _sparse_step(optimizer, tables, sparse, parts):
    import tensorflow as tf

    gradients = [tf.IndexedSlices(values, rows, (5, 3)) for values, rows in parts]
    optimizer.apply([g if sparse else tf.convert_to_tensor(g) for g in gradients], tables)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="sparse gradients are TensorFlow's")
@pytest.mark.parametrize("mode", MODES)
def test_sparse_gradients_have_the_inner_products_of_dense_ones(mode):
    import tensorflow as tf

    random = np.random.default_rng(0)
    found = []
    for sparse in (True, False):
        tables = [keras.Variable(np.ones((5, 3), "float32")) for _ in range(2)]
        registry = equalize.GroupRegistry()
        registry.tie("tables", tables, Equal())
        optimizer = TiedOptimizer(keras.optimizers.SGD(0.5), registry, reduction=UPGrad())
        optimizer.build(tables)
        random = np.random.default_rng(0)
        parts = [
            (tf.constant(random.normal(size=(4, 3)).astype("float32")), tf.constant(random.integers(5, size=4)))
            for _ in tables
        ]

        step = functools.partial(_sparse_step, optimizer, tables, sparse)
        (step if mode == "eager" else tf.function(step, autograph=False, jit_compile=mode == "jit"))(parts)
        found.append(tables[1].numpy())
    np.testing.assert_allclose(*found, rtol=1e-5)


def opposed():
    random = np.random.default_rng(0)
    x = random.normal(size=(24, 4)).astype("float32")
    y = x @ random.normal(size=(4, 3)).astype("float32")
    return x, [y, -3.0 * y + 0.1]


@pytest.mark.parametrize("reduction", [*ALL, Proportions()], ids=lambda reduction: type(reduction).__name__)
def test_a_run_goes_on_after_saving_and_loading(tmp_path, reduction):
    x, y = opposed()
    model, registry = two_towers()
    inner = keras.optimizers.Adam(0.01, clipnorm=1.0, gradient_accumulation_steps=2)
    model.compile(TiedOptimizer(inner, registry, reduction=reduction), ["mse", "mse"])
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    save_model(model, tmp_path / "model.keras", registry)
    loaded, _ = load_model(tmp_path / "model.keras")
    assert loaded.optimizer.reduction.get_config() == reduction.get_config()
    assert json.dumps(loaded.optimizer.get_config())
    for each in (model, loaded):
        each.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    for before, after in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(before), ops.convert_to_numpy(after), rtol=1e-6)
    assert bitwise_equal(*(layer.kernel for layer in loaded.layers[1:]))


@pytest.mark.skipif(BACKEND != "torch", reason="torchjd is a library for PyTorch")
def test_a_whole_run_is_that_of_torchjd():
    torch = pytest.importorskip("torch")
    torchjd = pytest.importorskip("torchjd.aggregation")
    x, y = opposed()
    for reduction, aggregator in ((UPGrad(), torchjd.UPGrad()), (PCGrad(seed=0), torchjd.PCGrad())):
        model, registry = two_towers()
        start = model.layers[1].kernel.value.detach().clone(), model.layers[1].bias.value.detach().clone()
        model.compile(TiedOptimizer(keras.optimizers.SGD(0.05), registry, reduction=reduction), ["mse", "mse"])
        model.fit(x, y, batch_size=8, epochs=5, shuffle=False, verbose=0)
        theirs = [value.requires_grad_() for value in start]
        for step in range(15):
            rows = slice(step % 3 * 8, step % 3 * 8 + 8)
            prediction = torch.from_numpy(x[rows]) @ theirs[0] + theirs[1]
            jacobian = []
            for target in y:
                loss = torch.mean((prediction - torch.from_numpy(target[rows])) ** 2)
                gradients = torch.autograd.grad(loss, theirs, retain_graph=True)
                jacobian.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            update = aggregator(torch.stack(jacobian))
            with torch.no_grad():
                theirs[0] -= 0.05 * update[:12].reshape(4, 3)
                theirs[1] -= 0.05 * update[12:]
        for ours, value in zip((model.layers[1].kernel, model.layers[2].bias), theirs, strict=True):
            np.testing.assert_allclose(ops.convert_to_numpy(ours), value.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_what_is_no_weight_for_each_use_is_an_error():
    class One(Reduction):
        def weights(self, gramian):
            return ops.ones(1)

    tied, registry = trunk((3,))
    variables = [use[0] for use in tied]
    optimizer = TiedOptimizer("sgd", registry, reduction=One())
    optimizer.build(variables)
    with pytest.raises(EqualizeError, match=r"`weights` of One must return one number for each of 3 uses, of shape"):
        optimizer.apply([ops.ones(3)] * 3, variables)


@pytest.mark.sampled
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean", MGDA()], ids=str)
def test_conflicts_are_logged_without_changing_a_bit(mode, reduction):
    x, y = opposed()
    y = [30.0 * target for target in y]  # so that all steps conflict
    kernels = []
    for gradients in (False, True):
        model, registry = two_towers()
        model.compile(TiedOptimizer("sgd", registry, reduction=reduction), ["mse", "mse"], **MODES[mode])
        monitor = TieMonitor(registry, gradients=gradients)
        callbacks = [monitor] if gradients else []
        run = model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        kernels.append(ops.convert_to_numpy(model.layers[1].kernel))
    if reduction in ("sum", "mean"):
        assert np.array_equal(*kernels)
    conflicts = monitor.conflicts["towers"]
    assert [found["steps"] for found in conflicts] == [12, 12]
    assert run.history["conflict/towers"] == [found["cosine"] for found in conflicts]
    assert run.history["gradient/towers"] == [found["norm"] for found in conflicts]
    assert all(-1.0 <= found["cosine"] <= found["largest"] < 0.0 for found in conflicts), conflicts
    (finding,) = registry.diagnose(model)
    assert finding.kind == "conflict"
    assert "PCGrad" in finding.fix


def test_the_smallest_cosine_and_the_norm_are_those_of_the_gradients():
    tied, registry = trunk((4,), (3,))
    variables = [variable for use in tied for variable in use]
    optimizer = TiedOptimizer(keras.optimizers.SGD(0.1), registry, reduction="mean")
    step = stepper(optimizer, variables)
    assert optimizer.conflicts() == {}
    assert optimizer.watch_conflicts()
    assert not optimizer.watch_conflicts()
    step = stepper(optimizer, variables)
    smallest, norms = [], []
    for gradients in random_gradients(3, *[v.shape for v in variables]):
        step([ops.convert_to_tensor(gradient) for gradient in gradients])
        g = np.stack([np.concatenate(gradients[2 * i : 2 * i + 2]) for i in range(3)])
        lengths = np.linalg.norm(g, axis=1)
        cosines = g @ g.T / np.outer(lengths, lengths)
        smallest.append(cosines[np.triu_indices(3, 1)].min())
        norms.append(np.linalg.norm(g.mean(axis=0)))
    found = optimizer.conflicts()["trunk"]
    assert found == {
        "steps": 3,
        "cosine": pytest.approx(np.mean(smallest), rel=1e-4),
        "largest": pytest.approx(np.max(smallest), rel=1e-4),
        "norm": pytest.approx(np.mean(norms), rel=1e-4),
    }
    assert optimizer.conflicts() == {}


def test_gradients_are_seen_under_a_tied_optimizer_only():
    x, y = opposed()
    model, registry = two_towers()
    model.compile("sgd", ["mse", "mse"])
    with pytest.raises(EqualizeError, match="TieMonitor cannot see gradients in the model"):
        model.fit(x, y, verbose=0, callbacks=[TieMonitor(registry, gradients=True)])
