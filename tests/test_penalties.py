"""The pure functions of `equalize.penalties`, against brute force."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from keras import ops

from equalize import _backend as backend
from equalize._math import penalties
from tests import references, strategies
from tests.conftest import BACKEND, MODES, gradients

NAMES = ["mean_l2", "pairwise_l2", "pairwise_norm", "pairwise_l1", "chain_l2", "trace_norm"]
WEIGHTED = ["pairwise_l2", "pairwise_norm"]
FORMS = {  # in which all pairs are computed
    "products": {"_MANY": 2},
    "rows": {"_MANY": 10**6, "_FEW": 0, "_SORTED": 1},
    "pairs": {"_MANY": 10**6, "_FEW": 10**6},
}
BY_DIFFERENCES = [name for name in NAMES if name != "trace_norm"]


def choose(form, patch):
    for name, value in FORMS[form].items():
        patch.setattr(penalties, name, value)


def evaluated(name, values, *strengths, dtype="float32"):
    """The value of a penalty and its gradients."""
    variables = [keras.Variable(value, dtype=dtype) for value in values]

    def penalty():
        return getattr(penalties, name)([backend.tensor(variable) for variable in variables], *strengths)

    return float(ops.convert_to_numpy(penalty())), np.stack(gradients(penalty, variables))


def close(found, expected, scale=1.0):
    assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-4 * scale)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-3)


def random_strengths(n, seed=0):
    upper = np.triu(np.random.default_rng(seed).uniform(0, 2, (n, n)), 1)
    upper[upper < 0.5] = 0.0
    return upper + upper.T


@pytest.mark.parametrize("name", NAMES)
@given(values=strategies.stacks(max_members=20))
def test_value_and_gradient_are_those_of_brute_force(name, values):
    assume(name != "trace_norm" or references.well_conditioned(values))
    expected = getattr(references, name)(values)
    close(evaluated(name, values), expected, 1.0 + np.sum(values**2))


@pytest.mark.skipif(BACKEND != "torch", reason="about PyTorch, where large tensors are computed with in blocks")
@pytest.mark.parametrize("name", NAMES)
@given(values=strategies.stacks(max_members=20))
def test_in_blocks_of_entries_too(name, values):
    assume(name != "trace_norm" or references.well_conditioned(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend._native, "_BLOCK", 3)
        found = evaluated(name, values)
    close(found, getattr(references, name)(values), 1.0 + np.sum(values**2))


@pytest.mark.parametrize("name", WEIGHTED)
@given(values=strategies.stacks(max_members=20), seed=st.integers(0, 1000))
def test_with_strengths_too(name, values, seed):
    strengths = random_strengths(len(values), seed)
    expected = getattr(references, name)(values, strengths)
    close(evaluated(name, values, strengths), expected, 1.0 + np.sum(values**2))


@pytest.mark.parametrize("name", ["pairwise_l1", "pairwise_norm", "pairwise_l2"])
@pytest.mark.parametrize("form", FORMS)
@given(values=strategies.stacks(max_members=7))
def test_each_form_is_that_of_brute_force_whatever_the_number_of_members(name, form, values):
    strengths = [np.ones((len(values),) * 2)] if name in WEIGHTED else []
    with pytest.MonkeyPatch.context() as patch:
        choose(form, patch)
        found = evaluated(name, values, *strengths)
    close(found, getattr(references, name)(values), 1.0 + np.sum(values**2))


@pytest.mark.parametrize("name", NAMES)
def test_the_references_have_the_gradients_of_their_values(name):
    values = np.random.default_rng(0).normal(size=(5, 2, 2))
    strengths = random_strengths(5) if name in WEIGHTED else None
    penalty = getattr(references, name)
    numeric, step = np.zeros_like(values), 1e-6
    for place in np.ndindex(values.shape):
        shift = np.zeros_like(values)
        shift[place] = step
        numeric[place] = (penalty(values + shift, strengths)[0] - penalty(values - shift, strengths)[0]) / (2 * step)
    np.testing.assert_allclose(penalty(values, strengths)[1], numeric, rtol=1e-5, atol=1e-7)


def written_out(name, values):
    """The penalties as one would write them with `keras.ops`."""
    pairs = [values[i] - values[j] for j in range(len(values)) for i in range(j)]
    return {
        "mean_l2": lambda: ops.sum(ops.square(ops.stack(values) - ops.mean(ops.stack(values), axis=0))),
        "pairwise_l2": lambda: sum(ops.sum(ops.square(pair)) for pair in pairs),
        "pairwise_norm": lambda: sum(ops.sqrt(ops.sum(ops.square(pair))) for pair in pairs),
        "pairwise_l1": lambda: sum(ops.sum(ops.abs(pair)) for pair in pairs),
        "chain_l2": lambda: sum(ops.sum(ops.square(b - a)) for a, b in itertools.pairwise(values)),
        "trace_norm": lambda: ops.sum(
            ops.svd(ops.reshape(ops.stack(values), (len(values), -1)), full_matrices=False)[1]
        ),
    }[name]()


@pytest.mark.parametrize(
    ("name", "n", "form"),
    [
        *((name, n, "products") for name in NAMES for n in (2, 5)),
        ("pairwise_norm", 5, "rows"),
        ("pairwise_l1", 5, "rows"),
    ],
)
def test_gradients_are_those_of_automatic_differentiation(name, n, form, monkeypatch):
    choose(form, monkeypatch)
    values = np.random.default_rng(n).normal(size=(n, 5, 4)).astype("float32")
    variables = [keras.Variable(value) for value in values]
    expected = gradients(lambda: written_out(name, [backend.tensor(v) for v in variables]), variables)
    np.testing.assert_allclose(evaluated(name, values)[1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", BY_DIFFERENCES)
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_nothing_and_no_gradient_at_equality(name, n):
    value = np.random.default_rng(0).normal(size=(3, 2)).astype("float32")
    total, gradient = evaluated(name, [value] * n)
    assert total == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_the_trace_norm_of_equal_members_and_of_none_at_all(n):
    value = np.random.default_rng(0).normal(size=(30, 20)).astype("float32")
    norm = np.linalg.norm(value)
    total, gradient = evaluated("trace_norm", [value] * n)
    assert total == pytest.approx(np.sqrt(n) * norm, rel=1e-5)
    np.testing.assert_allclose(gradient, [value / norm / np.sqrt(n)] * n, rtol=1e-4, atol=1e-6)
    total, gradient = evaluated("trace_norm", [0.0 * value] * n)
    assert (total, gradient.any()) == (0.0, False)


def test_the_trace_norm_does_not_count_what_the_gram_matrix_rounds():
    random = np.random.default_rng(0)
    left, _ = np.linalg.qr(random.normal(size=(6, 6)))
    right, _ = np.linalg.qr(random.normal(size=(50, 6)))
    values = (left * np.array([1.0, 0.5, 0.2, 5e-3, 0.0, 0.0])) @ right.T
    total, gradient = evaluated("trace_norm", values)
    assert total == pytest.approx(1.705, abs=3e-5)
    np.testing.assert_allclose(gradient, left[:, :4] @ right[:, :4].T, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_that_is_close_among_others_far_away_pulls_with_its_full_strength(form, monkeypatch):
    choose(form, monkeypatch)
    values = np.zeros((3, 4), "float32")
    values[1, 0], values[2] = 1e-6, 1e3
    gradient = evaluated("pairwise_norm", values)[1]
    np.testing.assert_allclose(gradient[0], [-1.5, -0.5, -0.5, -0.5], rtol=1e-5)
    np.testing.assert_allclose(gradient[1], [0.5, -0.5, -0.5, -0.5], rtol=1e-5)


@pytest.mark.parametrize("name", ["pairwise_norm", "trace_norm"])
@pytest.mark.parametrize("form", FORMS)
@given(values=strategies.stacks(min_members=2, max_members=4), magnitude=st.floats(-30, 30), seed=st.integers(0, 99))
def test_norms_and_their_gradients_are_right_at_every_magnitude(name, form, values, magnitude, seed):
    assume(name != "trace_norm" or references.well_conditioned(values))
    values = values * 10.0**magnitude
    weighted = [random_strengths(len(values), seed)] if name in WEIGHTED else []
    with pytest.MonkeyPatch.context() as patch:
        choose(form, patch)
        total, gradient = evaluated(name, values, *weighted)
    expected, slopes = getattr(references, name)(values, *weighted)
    assert total == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-3, atol=1e-3)


def compiled(name, mode):
    """From the stacked values of the members to the penalty and its gradient, run as a step of a mode is."""

    def total(values):
        return getattr(penalties, name)(ops.unstack(values))

    if BACKEND == "jax":
        import jax

        return (jax.jit if mode == "jit" else lambda function: function)(jax.value_and_grad(total))
    if BACKEND == "torch":
        import torch

        return lambda values: (total(values), torch.autograd.grad(total(values.requires_grad_()), values)[0])
    import tensorflow as tf

    def step(values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            value = total(values)
        return value, tape.gradient(value, values)

    return step if mode == "eager" else tf.function(step, autograph=False, jit_compile=mode == "jit")


@pytest.mark.parametrize("name", ["pairwise_norm", "trace_norm"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.sampled
def test_a_step_of_every_mode_knows_norms_at_every_magnitude(name, mode, form, monkeypatch):
    choose(form, monkeypatch)
    step = compiled(name, mode)
    for magnitude in (0.0, 1e-30, 1e-25, 3e-20, 1e-8, 1.0, 3e19, 1e22, 1e30, 5e36):
        values = (magnitude * np.random.default_rng(0).normal(size=(3, 4, 2))).astype("float32")
        expected, slopes = getattr(references, name)(values.astype("float64"))
        value, found = (ops.convert_to_numpy(each) for each in step(ops.convert_to_tensor(values)))
        assert value == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(found, slopes, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("name", "form"), [*(("pairwise_norm", form) for form in FORMS), ("trace_norm", "products")])
@pytest.mark.parametrize("magnitude", [1e-250, 1e250])
def test_norms_in_float64_are_right_where_their_squares_are_not(name, form, magnitude, monkeypatch):
    choose(form, monkeypatch)
    values = np.random.default_rng(0).normal(size=(3, 4, 2))
    expected, slopes = getattr(references, name)(values)
    total, found = evaluated(name, magnitude * values, dtype="float64")
    assert total == pytest.approx(magnitude * expected, rel=1e-9)
    np.testing.assert_allclose(found, slopes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_each_pair_pulls_with_its_full_strength_whatever_the_size_of_its_difference(form, monkeypatch):
    choose(form, monkeypatch)
    for size, apart in ((1.0, 1e-30), (1e10, 1e-18), (1e30, 1e2), (1e-10, 1e-30)):
        values = np.full((2, 2), [size, 0.0], "float32")
        values[1, 1] = apart
        total, gradient = evaluated("pairwise_norm", values)
        assert total == pytest.approx(apart, rel=1e-4)
        np.testing.assert_allclose(gradient, [[0.0, -1.0], [0.0, 1.0]], rtol=1e-4)


def spread_out(kind):
    """Eight rows of 300 numbers."""
    random = np.random.default_rng(0)
    normal = lambda count: random.normal(size=(count, 300))  # noqa: E731
    return {
        "random": lambda: normal(8),
        "far from zero": lambda: 1e-2 * normal(8) + 5.0,
        "clusters": lambda: np.repeat(normal(2), 4, axis=0) + 1e-4 * normal(8),
        "one far away": lambda: np.concatenate([1e3 * normal(1), normal(7)]),
        "clusters in clusters": lambda: (
            np.repeat(normal(2), 4, 0) + 1e-3 * np.repeat(normal(4), 2, 0) + 1e-6 * normal(8)
        ),
        "some equal": lambda: np.repeat(normal(4), 2, axis=0),
    }[kind]().astype("float32")


@pytest.mark.parametrize(
    ("kind", "exactly"),
    [
        ("random", False),
        ("far from zero", False),
        ("clusters", False),
        ("one far away", False),
        ("clusters in clusters", True),
        ("some equal", True),
    ],
)
def test_products_are_as_right_as_differences_which_few_need(kind, exactly, monkeypatch):
    used, differences = [], penalties._over_graph
    monkeypatch.setattr(penalties, "_over_graph", lambda *given: used.append(given) or differences(*given))
    values = spread_out(kind)
    total, found = evaluated("pairwise_norm", values)
    expected, slopes = references.pairwise_norm(values.astype("float64"))
    assert total == pytest.approx(expected, rel=1e-5)
    size = np.linalg.norm(slopes, axis=1, keepdims=True)
    np.testing.assert_allclose(found / size, slopes / size, atol=1e-5)
    if BACKEND == "torch":  # which computes one branch, and nothing of the other
        assert bool(used) == exactly


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_what_is_not_finite_shows_and_raises_nothing(name, n, special):
    values = np.random.default_rng(0).normal(size=(n, 2, 3)).astype("float32")
    values[1, 0, 0] = special
    assert not np.isfinite(evaluated(name, values)[0])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="looks at the tensors of a graph of TensorFlow")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [4, 18])
def test_no_tensor_is_larger_than_the_group(name, n):
    import tensorflow as tf

    def total(*values):
        return backend.value_and_gradients(getattr(penalties, name), values)

    graph = tf.function(total, autograph=False).get_concrete_function(*[tf.zeros((30, 20))] * n).graph
    sizes = [output.shape.num_elements() or 0 for operation in graph.get_operations() for output in operation.outputs]
    assert 30 * 20 <= max(sizes) <= 30 * 20 * n


@pytest.mark.skipif(BACKEND != "tensorflow", reason="looks at the operations of a graph of TensorFlow")
@pytest.mark.parametrize("form", ["rows", "pairs"])
def test_no_two_pairs_are_held_at_once(form, monkeypatch):
    import tensorflow as tf

    choose(form, monkeypatch)

    def total(*values):
        return backend.value_and_gradients(penalties.pairwise_norm, values)

    graph = tf.function(total, autograph=False).get_concrete_function(*[tf.zeros((30, 20))] * 6).graph
    members = [each for each in graph.get_operations() if each.type in ("StopGradient", "Unpack")]
    members += [each for each in graph.get_operations() if each.type == "Mul" and each.inputs[0].op in members]
    differences = [
        operation
        for operation in graph.get_operations()
        if operation.type == "Sub" and operation.inputs[0].op in members
    ]
    assert len(differences) == (6 if form == "rows" else 15)
    assert sum(not operation.control_inputs for operation in differences) <= 1


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere all columns are one block")
@pytest.mark.parametrize(
    "penalty",
    [
        penalties.pairwise_norm,
        penalties.pairwise_l1,
        penalties.trace_norm,
        lambda values: penalties.pairwise_l2(values, 1.0 + np.eye(9)),
    ],
    ids=["norm", "l1", "trace", "l2 with a matrix"],
)
@pytest.mark.parametrize(("length", "blocks"), [(2**16, 2), (2**16 - 1, 3), (251 * 257, 1)])
def test_a_compiled_step_sees_large_members_in_blocks_and_computes_the_same(penalty, length, blocks, monkeypatch):
    import jax

    from equalize._backend import jax as native

    assert native._blocks(9, length) == blocks
    values = [ops.convert_to_tensor(row) for row in np.random.default_rng(0).normal(size=(9, length)).astype("float32")]
    total, gradients = jax.jit(jax.value_and_grad(penalty))(values)
    monkeypatch.setattr(native, "_blocks", lambda rows, length: 1)
    expected, slopes = jax.value_and_grad(penalty)(values)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for gradient, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-5 * float(np.abs(slope).max()))
