import contextlib

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize._reports import summary
from equalize.constraints import Equal
from equalize.errors import EqualizeError
from equalize.registry import Advice
from equalize.regularizers import MeanL2
from equalize.views import Flip, Transpose
from tests.conftest import bits, data, kernels, towers


def linear_heads(targets, rule=None, *, frozen=()):
    """One linear head a target, which its least-squares weights fit, each pulled by its own target."""
    inputs = np.shape(targets)[1]
    entrance = keras.Input((inputs,))
    heads = [keras.layers.Dense(1, use_bias=False, name=f"head_{i}") for i in range(len(targets))]
    model = keras.Model(entrance, [head(entrance) for head in heads])
    for i in frozen:
        heads[i].trainable = False
    registry = equalize.GroupRegistry()
    registry.tie("heads", [head.kernel for head in heads], rule or MeanL2(factor=0.0))
    model.compile("sgd", ["mse"] * len(targets))
    x = np.random.default_rng(0).normal(size=(64, inputs)).astype("float32")
    y = [x @ np.float32(target).reshape(inputs, 1) for target in targets]
    return model, registry, [head.kernel for head in heads], x, y


def test_gradients_that_agree_oppose_and_have_nothing_to_do_with_each_other():
    # x is whitened, so the gradient at zero is −2·target.
    for targets, expected in (([[1, 2], [2, 4]], 1.0), ([[1, 2], [-1, -2]], -1.0), ([[1, 0], [0, 1]], 0.0)):
        model, registry, heads, x, _ = linear_heads(targets)
        x = np.linalg.qr(x)[0].astype("float32")
        y = [x @ np.float32(t).reshape(2, 1) for t in targets]
        for head in heads:
            head.assign(np.zeros((2, 1)))
        advice = registry.advise(model, x, y, print_fn=lambda text: None)["heads"]
        assert advice.cosine == pytest.approx(expected, abs=1e-5)
        assert advice.distance == 0.0
        assert set(advice.losses.values()) == {advice.losses[0.0]}  # what is equal moves nowhere
        assert advice.best == 1.0  # so that to stay tied costs nothing


@pytest.mark.slow
def test_the_mean_over_all_pairs_is_that_of_all_pairs():
    targets = np.random.default_rng(1).normal(size=(5, 2))
    model, registry, heads, x, y = linear_heads(targets)
    for head in heads:
        head.assign(np.zeros((2, 1)))
    gradients = [-2 * np.mean(x * (x @ np.float32(t).reshape(2, 1)), axis=0) for t in targets]
    units = [g / np.linalg.norm(g) for g in gradients]
    expected = np.mean([units[i] @ units[j] for i in range(5) for j in range(5) if i != j])
    for batch_size in (64, 7):
        advice = registry.advise(model, x, y, batch_size=batch_size, print_fn=lambda text: None)["heads"]
        assert advice.cosine == pytest.approx(expected, abs=1e-5)


def test_distance_and_losses_are_those_of_the_members_as_they_are_and_nothing_changes():
    model, registry, heads, x, y = linear_heads([[1, 2], [3, -2]], MeanL2(factor=5.0))
    for head, target in zip(heads, ([1, 2], [3, -2]), strict=True):
        head.assign(np.float32(target).reshape(2, 1))  # each fits its own target
    before = [bits(head) for head in heads]
    regularizers = [head.regularizer for head in heads]
    advice = registry.advise(model, x, y, print_fn=lambda text: None)["heads"]
    assert [bits(head) for head in heads] == before
    assert [head.regularizer for head in heads] == regularizers
    tied = np.mean((x @ np.float32([1, -2])) ** 2) * 2  # both miss by (±1, ∓2)
    assert advice.losses == pytest.approx({t: t**2 * tied for t in (0.0, 0.1, 0.25, 0.5, 1.0)}, rel=1e-4, abs=1e-10)
    assert advice.best == 0.0
    assert advice.distance == pytest.approx(np.sqrt((5 + 5) / (5 + 13)))


def fitted_apart(apart, samples):
    """The advice of held-out data on two linear heads, each fitted to samples of its own of truths so far apart."""
    random = np.random.default_rng(0)
    truth, other = random.normal(size=(2, 20, 1))
    truths = [truth, truth + apart * other]
    model, registry, heads, _, _ = linear_heads(truths)

    def drawn(samples, truth):
        x = random.normal(size=(samples, 20)).astype("float32")
        return x, x @ truth + random.normal(size=(samples, 1))

    for head, truth in zip(heads, truths, strict=True):
        head.assign(np.linalg.lstsq(*drawn(samples, truth), rcond=None)[0])
    x, _ = drawn(400, truth)
    y = [x @ truth + random.normal(size=(400, 1)) for truth in truths]
    return registry.advise(model, x, y, print_fn=lambda text: None)["heads"]


def test_held_out_data_say_whether_tying_is_right():
    assert fitted_apart(0.0, samples=24).best == 1.0  # one truth, few data
    assert fitted_apart(1.0, samples=200).best == 0.0  # two truths, enough data
    assert fitted_apart(1.0, samples=30).best in (0.25, 0.5)  # the same, few data: tie softly


def test_where_tied_members_fit_best_their_gradients_cancel_and_that_is_no_advice_against():
    truths, random = [[1, 2], [1, 2]], np.random.default_rng(0)
    model, registry, heads, x, y = linear_heads(truths)
    y = [part + random.normal(size=part.shape) for part in y]
    best = np.linalg.lstsq(np.concatenate([x, x]), np.concatenate(y))[0]
    for head in heads:
        head.assign(best)
    assert registry.advise(model, x, y, print_fn=lambda text: None)["heads"].cosine < -0.9
    text = []
    registry.advise(model, x, y, print_fn=text.append)
    assert "does not say whether tying helps" in " ".join(text[0].split())


FIRST, SECOND = np.float32([[4], [-4]]), np.float32([[-2], [2]])


@pytest.mark.parametrize(
    ("rule", "view", "constant", "goals"),
    [
        (MeanL2(factor=1.0), None, None, [[1, -1], [1, -1]]),
        (Equal(rate=0.5, inner=keras.constraints.NonNeg()), None, None, [[1, 0], [1, 0]]),
        (MeanL2(factor=1.0), Flip(0), None, [[3, -3], [-3, 3]]),
        (MeanL2(factor=1.0), None, np.float32([[8], [8]]), [[8, 8], [8, 8]]),
    ],
    ids=["mean", "inner", "view", "anchor"],
)
def test_members_move_as_their_rule_would_have_them(rule, view, constant, goals):
    model, registry, heads, x, y = linear_heads([[0, 0], [0, 0]])
    registry.untie()
    members = [heads[0], heads[1] if view is None else (heads[1], view), *([] if constant is None else [constant])]
    registry.tie("heads", members, rule)
    for head, value in zip(heads, (FIRST, SECOND), strict=True):
        head.assign(value)
    losses = registry.advise(model, x, y, print_fn=lambda text: None)["heads"].losses
    for fraction, loss in losses.items():
        moved = [
            value + fraction * (np.reshape(goal, (2, 1)) - value)
            for value, goal in zip((FIRST, SECOND), goals, strict=True)
        ]
        assert loss == pytest.approx(sum(np.mean((x @ value) ** 2) for value in moved), rel=1e-4)


def test_penalties_on_weights_are_left_out_those_of_other_groups_too():
    model = towers(2)
    model.compile("sgd", "mse")
    x, y = data()
    model.layers[1].bias.assign(np.ones(4))
    loss = model.evaluate(x, y, verbose=0)
    for kernel in kernels(model):
        kernel.regularizer = keras.regularizers.L2(0.5)
    registry = equalize.GroupRegistry()
    registry.tie("towers", kernels(model), MeanL2(factor=3.0))
    registry.tie("biases", [layer.bias for layer in model.layers[1:3]], MeanL2(factor=3.0))
    assert sum(ops.convert_to_numpy(penalty) for penalty in model.losses) > 1.0
    advice = registry.advise(model, x, y, names=["towers"], print_fn=lambda text: None)["towers"]
    assert advice.losses[0.0] == pytest.approx(loss, rel=1e-5)


class Interrupted(keras.layers.Layer):
    """Counts how often it is called, changes what it keeps, and stops at a call that is told."""

    def __init__(self, stop):
        super().__init__()
        self.stop, self.calls = stop, 0
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls += 1
        self.seen.assign_add(1.0)
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize("stop", [0, 2, 4, 6])
def test_everything_is_given_back_bit_for_bit_also_after_an_interruption(stop):
    entrance = keras.Input((2,))
    heads = [keras.layers.Dense(1, use_bias=False, kernel_regularizer="l2") for _ in range(2)]
    counter = Interrupted(0)
    middle = counter(entrance)
    model = keras.Model(entrance, [head(middle) for head in heads])
    model.compile("sgd", ["mse"] * 2)
    registry = equalize.GroupRegistry()
    registry.tie("heads", [head.kernel for head in heads], Equal(rate=0.5))
    heads[0].kernel.assign([[np.nan], [1e-30]])
    before = [(bits(v), getattr(v, "regularizer", None)) for v in model.variables]
    counter.calls, counter.stop = 0, stop
    with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
        registry.advise(model, np.ones((4, 2)), [np.ones((4, 1))] * 2, print_fn=lambda text: None)
    assert [(bits(v), getattr(v, "regularizer", None)) for v in model.variables] == before
    assert counter.calls == (stop or 6)  # as it is, a gradient, and four ways to move


def test_views_anchors_and_a_member_without_a_gradient():
    model, registry, heads, x, y = linear_heads([[1, 2], [1, 2], [5, 5]], Equal(rate=0.5), frozen=(2,))
    advice = registry.advise(model, x, y, print_fn=lambda text: None)["heads"]
    assert advice.cosine > 0.0
    registry.untie()
    constant = np.ones((1, 2), "float32")
    registry.tie("prior", [heads[0], (constant, Transpose())], MeanL2(factor=0.1))
    advice = registry.advise(model, x, y, print_fn=lambda text: None)["prior"]
    assert np.isnan(advice.cosine)
    assert advice.losses[1.0] != advice.losses[0.0]


def test_the_table_names_every_group_and_fits_a_log():
    model, registry, _, x, y = linear_heads([[1, 2], [2, 4]])
    printed = []
    registry.advise(model, x, y, print_fn=printed.append)
    (text,) = printed
    assert all(part in text for part in ("heads", "10%", "25%", "50%", "100%", "Best"))
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80


def test_the_table_fits_a_log_whatever_the_numbers():
    for number in (1.2345e-300, -1.2345e-30, np.nan, np.inf, 123456.0):
        advice = Advice("a/name/of/a/group", dict.fromkeys((0.0, 0.1, 0.25, 0.5, 1.0), number), -1.0, 1.0)
        lines = []
        summary.print_advice([advice], lines.append)
        assert lines[0].isascii()
        assert max(map(len, lines[0].splitlines())) <= 80


def test_groups_are_asked_for_by_name_and_metrics_keep_what_they_held():
    model, registry, heads, x, y = linear_heads([[1, 2], [2, 4]])
    registry.tie("apart", [heads[0], np.zeros((2, 1)), np.ones((2, 1))], MeanL2(factor=1.0))
    model.evaluate(x, y, verbose=0)
    before = [bits(variable) for variable in model.metrics_variables]
    assert list(registry.advise(model, x, y, names=["heads"], print_fn=lambda text: None)) == ["heads"]
    advice = registry.advise(model, x, y, print_fn=lambda text: None)["apart"]
    assert [np.isnan(loss) for loss in advice.losses.values()] == [False] + [True] * 4  # two anchors that differ
    assert advice.best == 0.0
    assert [bits(variable) for variable in model.metrics_variables] == before


def test_what_it_cannot_judge_is_an_error():
    model, registry, _, x, y = linear_heads([[1, 2], [2, 4]])
    for some_x, some_y in ((x[:0], [part[:0] for part in y]), (x, [part[:5] for part in y]), (x, None)):
        with pytest.raises(EqualizeError, match="needs inputs and targets with one number of samples"):
            registry.advise(model, some_x, some_y)
    other, _, _, _, _ = linear_heads([[1, 2], [2, 4]])
    with pytest.raises(EqualizeError, match=r"its member .head_0/kernel. .* is not a variable"):
        registry.advise(other, x, y)
    with pytest.raises(EqualizeError, match=r"Call `model.compile\(optimizer, loss\)` first"):
        registry.advise(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), x, y)
