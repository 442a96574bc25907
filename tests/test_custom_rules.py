"""Custom rules, those of docs/custom-rules.md and more, on `GroupConstraint` and `GroupRegularizer`."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.callbacks import TieMonitor
from equalize.constraints import Equal, GroupConstraint
from equalize.errors import EqualizeError, GroupMismatchError, TieBrokenError
from equalize.regularizers import GroupRegularizer
from equalize.views import Scale, Transpose
from tests.conftest import BACKEND, MODES, data, no_loss


@keras.saving.register_keras_serializable("own")
class SumToZero(GroupConstraint):
    """Members that sum to zero, such as effects around a mean."""

    def project(self, values):
        mean = sum(values) / len(values)
        return [value - mean for value in values]


@keras.saving.register_keras_serializable("own")
class Orthogonal(GroupConstraint):
    """Two matrices whose columns are orthogonal to each other's, W₁ᵀ·W₂ = 0: the nearer part of each is taken off."""

    def project(self, values):
        first, second = values
        q, _ = ops.qr(first)
        return [first, second - q @ (ops.transpose(q) @ second)]


@keras.saving.register_keras_serializable("own")
class Ascending(GroupConstraint):
    """A monotone chain w₁ ≤ w₂ ≤ … in each entry: isotonic regression, by the max-min formula."""

    def project(self, values):
        n, sums = len(values), [ops.zeros_like(values[0])]
        for value in values:
            sums.append(sums[-1] + value)

        def mean(i, j):
            return (sums[j + 1] - sums[i]) / (j + 1 - i)

        def lowest(i, k):
            return ops.min(ops.stack([mean(i, j) for j in range(k, n)]), axis=0)

        return [ops.max(ops.stack([lowest(i, k) for i in range(k + 1)]), axis=0) for k in range(n)]


@keras.saving.register_keras_serializable("own")
class JointNorm(GroupConstraint):
    """A kernel and a bias whose joint norm is at most 1: members of unlike shapes."""

    same_shape = False

    def project(self, values):
        norm = ops.sqrt(sum(ops.sum(ops.square(value)) for value in values))
        return [value / ops.maximum(norm, 1.0) for value in values]


@keras.saving.register_keras_serializable("own")
class Median(Equal):
    """Each member becomes the median, or is pulled towards it."""

    def common_value(self, values):
        return ops.median(ops.stack(values), axis=0)


@keras.saving.register_keras_serializable("own")
class Longest(Equal):
    """Members become the one of the largest norm to a power, which looks at all of its entries."""

    def __init__(self, group=None, *, power=1.0, rate=1.0, weight=1.0, view=None, inner=None):
        super().__init__(group, rate=rate, weight=weight, view=view, inner=inner)
        self.power = power

    def common_value(self, values):
        stacked = ops.stack(values)
        norms = ops.sum(ops.square(stacked), axis=tuple(range(1, len(stacked.shape))))
        return stacked[ops.argmax(self.power * norms)]

    def get_config(self):
        return super().get_config() | {"power": self.power}


@keras.saving.register_keras_serializable("own")
class EWC(GroupRegularizer):
    """½ · Σ F · (w − w₀)², with the diagonal F of a Fisher matrix; w₀ is the second member, an anchor.

    Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks (2017), equation 3.
    """

    def __init__(self, group=None, factor=1.0, *, fisher, view=None, inner=None):
        super().__init__(group, factor, view=view, inner=inner)
        self.fisher = np.asarray(fisher, "float32").tolist()

    def penalty(self, values):
        return 0.5 * ops.sum(ops.convert_to_tensor(self.fisher) * ops.square(values[0] - values[1]))

    def get_config(self):
        return super().get_config() | {"fisher": self.fisher}


def array(variable):
    return ops.convert_to_numpy(variable.value)


def kernels(count=3, shape=(4, 2)):
    random = np.random.default_rng(0)
    return [keras.Variable(random.normal(size=shape).astype("float32"), name=f"w{i}") for i in range(count)]


def sums_to_zero(values):
    return np.abs(sum(values)).max() < 1e-5


def orthogonal(values):
    return np.abs(values[0].T @ values[1]).max() < 1e-5


def ascending(values):
    return min((b - a).min() for a, b in itertools.pairwise(values)) >= -1e-6


def within_one(values):
    return sum((value**2).sum() for value in values) <= 1.0 + 1e-5


RECIPES = {
    "sum to zero": (SumToZero, 3, sums_to_zero),
    "orthogonal": (Orthogonal, 2, orthogonal),
    "ascending": (Ascending, 4, ascending),
    "joint norm": (JointNorm, 3, within_one),
}


@pytest.mark.parametrize("name", RECIPES)
def test_after_every_step_the_members_are_as_the_rule_has_them(name):
    rule, count, holds = RECIPES[name]
    members = kernels(count)
    registry = equalize.GroupRegistry()
    registry.tie("own", members, rule())
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(members)
    random = np.random.default_rng(1)
    for _ in range(5):
        before = [array(member) for member in members]
        optimizer.apply([ops.convert_to_tensor(random.normal(size=(4, 2)).astype("float32")) for _ in members], members)
        assert holds([array(member) for member in members])
        assert any((array(member) != old).any() for member, old in zip(members, before, strict=True))
    registry.check()
    assert registry.spread()["own"] == 0.0
    members[-1].assign(array(members[-1]) * 2.0 - 3.0)
    with pytest.raises(TieBrokenError, match="'own'"):
        registry.check(atol=1e-3)
    registry.sync("first", "own")
    registry.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_a_declared_rule_is_trained_monitored_saved_and_linked_again(mode, tmp_path):
    entrance = keras.Input((5,))
    heads = [keras.layers.Dense(4, kernel_constraint=SumToZero("heads"), name=f"head_{i}") for i in range(3)]
    model = keras.Model(entrance, keras.layers.Concatenate()([head(entrance) for head in heads]))
    registry = equalize.GroupRegistry().link(model)
    assert not registry["heads"].hard
    assert registry["heads"].projects
    model.compile(keras.optimizers.SGD(0.1), "mse", **MODES[mode])
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 5)).astype("float32"), random.normal(size=(8, 12)).astype("float32")
    logs = model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[TieMonitor(registry)]).history
    assert max(logs["spread/heads"]) < 1e-5
    assert sums_to_zero([array(head.kernel) for head in heads])
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    again = equalize.GroupRegistry().link(loaded)
    loaded.fit(x, y, batch_size=4, verbose=0)
    again.check(atol=1e-5)
    registry.untie()
    assert all(head.kernel.constraint is None and head.kernel_constraint is None for head in heads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_another_value_than_the_mean(mode, rate, tmp_path):
    x, y = data()
    layers = [keras.layers.Dense(2) for _ in range(3)]
    inputs = keras.Input((x.shape[1],))
    model = keras.Model(inputs, keras.layers.add([layer(inputs) for layer in layers]))
    registry = equalize.GroupRegistry()
    registry.tie("heads", layers, Median(rate=rate))
    model.compile("adam", no_loss, **MODES[mode])
    kernels = [layer.kernel for layer in layers]
    if rate == 1.0:
        assert len({array(kernel).tobytes() for kernel in kernels}) == 1
    for place, kernel in enumerate(kernels):
        kernel.assign(np.full(kernel.shape, [0.0, 1.0, 5.0][place], "float32"))
    model.fit(x, y, batch_size=len(x), verbose=0, callbacks=[TieMonitor(registry)])  # without gradients
    expected = [rate * 1.0, 1.0, 5.0 - 4.0 * rate]
    for kernel, value in zip(kernels, expected, strict=True):
        np.testing.assert_array_equal(array(kernel), np.full(kernel.shape, value, "float32"))
    registry.check()
    equalize.saving.save_model(model, tmp_path / "median.keras", registry)
    _, ties = equalize.saving.load_model(tmp_path / "median.keras", compile=False)
    assert ties["heads/kernel"].rule.describe() == Median(rate=rate).describe()


def test_a_subclass_of_equal_is_projected_group_by_group():
    groups = [kernels(2, (3,)) for _ in range(2)]
    registry = equalize.GroupRegistry()
    for place, group in enumerate(groups):
        registry.tie(f"group {place}", group, Longest(power=(1.0, -1.0)[place]))
    optimizer = keras.optimizers.SGD(1.0)
    variables = [variable for group in groups for variable in group]
    optimizer.build(variables)
    for one, two in groups:
        one.assign([1.0, 1.0, 1.0])
        two.assign([0.0, 3.0, 0.0])
    optimizer.apply([ops.zeros_like(variable.value) for variable in variables], variables)
    assert [array(variable).tolist() for variable in variables] == [[0, 3, 0], [0, 3, 0], [1, 1, 1], [1, 1, 1]]


def test_a_multiple_of_another_member_is_a_tie_with_a_view():
    first, second = kernels(2)
    registry = equalize.GroupRegistry()
    registry.tie("triple", [first, (second, Scale(3))], Equal())
    np.testing.assert_array_equal(array(second), 3 * array(first))


def test_values_are_seen_through_views_and_anchors_stay():
    first, second = kernels(2)[0], kernels(1, (2, 4))[0]
    anchor = np.full((4, 2), 0.5, "float32")
    registry = equalize.GroupRegistry()
    seen = []

    class Watched(SumToZero):
        def project(self, values):
            seen.append((self.fixed, self.weights, [tuple(value.shape) for value in values]))
            return super().project(values)

    group = registry.tie("own", [first, (second, Transpose()), anchor], Watched())
    registry.project()
    assert seen[-1] == ((False, False, True), (1.0, 1.0, 1.0), [(4, 2)] * 3)
    np.testing.assert_array_equal(array(group.members[2].variable), anchor)


def test_an_inner_constraint_holds_for_each_projected_value():
    members = kernels(3)
    registry = equalize.GroupRegistry()
    registry.tie("own", members, SumToZero(inner="non_neg"))
    registry.project()
    assert all((array(member) >= 0).all() for member in members)


def test_members_of_unlike_shapes_need_a_rule_that_says_so():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    layer.bias.assign([1.0, 2.0, 3.0])
    registry = equalize.GroupRegistry()
    with pytest.raises(GroupMismatchError, match="expected shape"):
        registry.tie("joint", [layer.kernel, layer.bias], SumToZero())
    registry.tie("joint", [layer.kernel, layer.bias], JointNorm())
    assert within_one([array(layer.kernel), array(layer.bias)])  # projected when it was tied
    assert registry.spread()["joint"] < 1e-6
    with pytest.raises(EqualizeError, match="no common value"):
        _ = registry["joint"].value
    registry.summary(print_fn=len)
    assert registry.diagnose() == []


def test_a_custom_penalty_pulls_with_its_gradient_and_is_counted_once(tmp_path):
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    model = keras.Sequential([keras.Input((3,)), layer])
    start = array(layer.kernel).copy()
    fisher = np.arange(6, dtype="float32").reshape(3, 2)
    registry = equalize.GroupRegistry()
    registry.tie("ewc", [layer.kernel, start], EWC(factor=0.5, fisher=fisher))
    layer.kernel.assign(start + 1.0)
    expected = 0.5 * 0.5 * fisher.sum()
    assert float(ops.convert_to_numpy(registry.penalty())) == pytest.approx(expected)
    assert sum(float(ops.convert_to_numpy(loss)) for loss in model.losses) == pytest.approx(expected)
    clone = keras.models.clone_model(model)
    model.compile(keras.optimizers.SGD(1.0), no_loss)
    model.fit(np.zeros((1, 3), "float32"), np.zeros((1, 2), "float32"), verbose=0)
    np.testing.assert_allclose(array(layer.kernel), start + 1.0 - 0.5 * fisher, rtol=1e-5)
    copied = equalize.GroupRegistry.from_config(registry.get_config()).link(clone)
    assert copied["ewc"].rule.get_config() == registry["ewc"].rule.get_config()
    assert registry["ewc"].describe() == "EWC(factor=0.5, fisher=<3×2 matrix>)"


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.sampled
def test_under_mirrored_strategy(jit):
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        entrance = keras.Input((5,))
        heads = [keras.layers.Dense(4, kernel_constraint=SumToZero("heads")) for _ in range(3)]
        model = keras.Model(entrance, keras.layers.Add()([head(entrance) for head in heads]))
        model.compile("sgd", "mse", jit_compile=jit)
    registry = equalize.GroupRegistry().link(model)
    model.fit(*data(), verbose=0)
    registry.check(atol=1e-5)


class Unchanged(GroupConstraint):
    """Leaves the members as they are."""

    def project(self, values):
        return values


class Finite(GroupConstraint):
    """Puts zeros in the place of what is not a number."""

    def project(self, values):
        return [ops.where(value != value, ops.zeros_like(value), value) for value in values]


@pytest.mark.parametrize(("rule", "spread"), [(Unchanged(), 0.0), (Finite(), float("inf"))], ids=str)
def test_what_is_not_a_number_is_as_the_rule_has_it_or_far_from_it(rule, spread):
    variables = [keras.Variable([1.0, 2.0, 3.0]) for _ in range(2)]
    group = equalize.GroupRegistry().tie("pair", variables, rule)
    variables[0].assign([1.0, 2.0, float("nan")])
    assert group.spread() == spread


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1.0), ("float32", 1e-3), ("float16", 1.0)])
def test_what_a_custom_rule_still_changes_counts_unless_it_is_rounding(dtype, size):
    unit = float(np.finfo(dtype).eps) * size
    for off, known in ((4 * unit, False), (64 * unit, True)):
        members = [keras.Variable(np.array(sign * size + (sign > 0) * off), dtype=dtype) for sign in (1, -1)]
        group = equalize.GroupRegistry().tie("zero", members, SumToZero())
        members[0].assign(np.array(size + off, dtype))
        members[1].assign(np.array(-size, dtype))
        assert (group.spread() > 0.0) == known


@pytest.mark.parametrize("rule", [Equal(), SumToZero()])
def test_members_without_entries_are_as_they_should_be(rule):
    members = [keras.Variable(np.ones((0, 2))) for _ in range(2)]
    assert equalize.GroupRegistry().tie("empty", members, rule).spread() == 0.0


@keras.saving.register_keras_serializable(package="tests")
class Swapped(GroupConstraint):
    """Gives each of two members what the other held."""

    def project(self, values):
        return values[::-1]


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_rule_may_return_what_it_was_given_in_another_order(by_hand):
    first, second = keras.Variable(np.float32([1.0])), keras.Variable(np.float32([2.0]))
    registry = equalize.GroupRegistry()
    registry.tie("pair", [first, second], Swapped())
    before = [float(array(variable)[0]) for variable in (first, second)]
    if by_hand:
        registry.project("pair")
    else:
        keras.optimizers.SGD(0.0).apply([ops.ones(1)] * 2, [first, second])
    assert [float(array(variable)[0]) for variable in (second, first)] == before


def test_rules_never_change():
    rule = EWC(fisher=[[1.0]])
    for name in ("factor", "fisher", "anything"):
        with pytest.raises(EqualizeError, match=r"Call `registry.replace\(name, rule\)`"):
            setattr(rule, name, 1.0)
    assert rule.factor == 1.0


def test_the_bases_are_abstract():
    for base in (GroupConstraint, GroupRegularizer):
        with pytest.raises(TypeError, match="abstract"):
            base("g")  # type: ignore[abstract]
