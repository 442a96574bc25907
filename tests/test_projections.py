import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from equalize import _backend as backend
from equalize._math import means
from tests import strategies
from tests.conftest import BACKEND


def to_numpy(tensor):
    return ops.convert_to_numpy(tensor)


def mean(arrays, weights=None):
    return to_numpy(means.mean([ops.convert_to_tensor(array) for array in arrays], weights))


def test_mean_of_two_by_hand():
    assert mean([np.float32([0.0, 1.0]), np.float32([4.0, -1.0])]).tolist() == [2.0, 0.0]


def test_weighted_mean_by_hand():
    assert mean([np.float32([0.0]), np.float32([4.0])], [3.0, 1.0]).tolist() == [1.0]


@given(strategies.groups())
def test_mean_is_the_mean(members):
    expected = np.mean([member.astype("float64") for member in members], axis=0)
    scale = np.max(np.abs(members), axis=0)
    assert np.all(np.abs(mean(members) - expected) <= 1e-6 * scale + 1e-37)


@given(strategies.groups(max_members=5), st.data())
def test_weighted_mean_is_the_weighted_mean(members, data):
    weights = data.draw(st.lists(st.floats(0.1, 10.0), min_size=len(members), max_size=len(members)))
    expected = np.average([member.astype("float64") for member in members], axis=0, weights=weights)
    assert np.all(np.abs(mean(members, weights) - expected) <= 1e-5 * np.max(np.abs(members), axis=0) + 1e-37)


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@given(st.data())
def test_mean_of_equal_members_changes_no_bit(dtype, data):
    array = data.draw(strategies.shapes.flatmap(lambda shape: strategies.arrays(shape, dtype, specials=True)))
    n = data.draw(st.integers(2, 17))
    weights = data.draw(st.none() | st.lists(st.floats(0.01, 100.0), min_size=n, max_size=n))
    result = mean([array] * n, weights)
    number = ~np.isnan(array)
    assert result[number].tobytes() == array[number].tobytes()
    assert np.all(np.isnan(result[~number]))


def test_mean_of_scalars():
    assert mean([np.float32(0.1)] * 3).tobytes() == np.float32(0.1).tobytes()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_mean_of_equal_members_changes_no_bit_in_large_tensors(n, fused):
    array = np.random.default_rng(0).normal(size=(128, 128)).astype("float32")
    array[0, :6] = [np.inf, -np.inf, -0.0, 1e-40, 3.4e38, -3.4e38]
    function = backend.fused(means.mean) if fused else means.mean
    assert to_numpy(function([ops.convert_to_tensor(array)] * n)).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@given(st.data())
def test_mean_lies_between_the_members_and_never_overflows(dtype, data):
    members = data.draw(
        strategies.shapes.flatmap(lambda s: st.lists(strategies.arrays(s, dtype), min_size=2, max_size=9))
    )
    wide = [member.astype("float64") for member in members]
    result = mean(members).astype("float64")
    slack = 1e-6 * np.max(np.abs(wide), axis=0) + 1e-37
    assert np.all(np.isfinite(result))
    assert np.all(result >= np.min(wide, axis=0) - slack)
    assert np.all(result <= np.max(wide, axis=0) + slack)


@pytest.mark.skipif(BACKEND != "torch", reason="about PyTorch, where large tensors are averaged in blocks")
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@given(st.data())
def test_mean_has_the_same_bits_in_blocks(dtype, data):
    members = data.draw(
        strategies.shapes.flatmap(
            lambda s: st.lists(strategies.arrays(s, dtype, specials=True), min_size=2, max_size=9)
        )
    )
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 10.0), min_size=len(members), max_size=len(members)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(means, "SMALL", 0)
        whole = mean(members, weights)
        patch.setattr(backend._native, "_BLOCK", 3)
        assert mean(members, weights).tobytes() == whole.tobytes()


@pytest.mark.parametrize("n", [2, 5])
def test_mean_does_not_overflow_inside_a_tensorflow_graph(n):
    """Grappler factors `a·c + b·c` into `(a + b)·c`, which overflows."""
    if BACKEND != "tensorflow":
        pytest.skip("about TensorFlow graphs")
    import tensorflow as tf

    values = [tf.Variable(np.float32([3.4e38, -3.4e38]) * (1 - 0.01 * i)) for i in range(n)]
    result = tf.function(lambda: means.mean([tf.convert_to_tensor(v) for v in values]))().numpy()
    assert np.all(np.isfinite(result))
    assert result == pytest.approx(np.mean([v.numpy().astype("float64") for v in values], axis=0), rel=1e-6)


def test_mean_of_half_precision_is_rounded_once():
    members = [np.float16([60000.0]), np.float16([60001.0 - 1]), np.float16([65504.0]), np.float16([1.0])]
    expected = np.float16(np.mean(np.asarray(members, "float64")))
    assert mean(members) == expected


def test_order_of_two_members_does_not_matter():
    left, right = (np.random.default_rng(i).normal(size=(50,)).astype("float32") for i in range(2))
    assert mean([left, right]).tobytes() == mean([right, left]).tobytes()


@given(strategies.groups(max_members=4, bound=100.0), st.data())
def test_mean_is_the_nearest_point_and_non_expansive(members, data):
    others = [data.draw(strategies.arrays(member.shape, bound=100.0)) for member in members]
    p, q = mean(members).astype("float64"), mean(others).astype("float64")
    distance = lambda point: sum(np.sum((m - point) ** 2) for m in np.asarray(members, "float64"))  # noqa: E731
    assert distance(p) <= distance(p + 0.01) + 1e-6
    assert distance(p) <= distance(p - 0.01) + 1e-6
    moved = np.sqrt(sum(np.sum((a.astype("float64") - b) ** 2) for a, b in zip(members, others, strict=True)))
    assert np.sqrt(len(members) * np.sum((p - q) ** 2)) <= moved * (1 + 1e-5) + 1e-5


@given(strategies.groups(max_members=2, bound=1e4), st.floats(0.01, 1.0))
def test_relax_is_the_proximal_operator(members, rate):
    value, target = members[0], members[1]
    (result,) = map(to_numpy, means.relax([ops.convert_to_tensor(value)], ops.convert_to_tensor(target), rate))
    expected = (1 - rate) * value.astype("float64") + rate * target.astype("float64")
    assert np.all(np.abs(result - expected) <= 1e-5 * (np.abs(value) + np.abs(target)) + 1e-37)


def test_relax_leaves_what_is_there_already():
    value = ops.convert_to_tensor(np.float32([0.1, -0.0, np.inf, 1e-40]))
    for result in means.relax([value] * 3, value, 0.3):
        assert to_numpy(result).tobytes() == to_numpy(value).tobytes()
