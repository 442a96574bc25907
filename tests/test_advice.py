import keras
import numpy as np
import pytest

import equalize
from equalize.constraints import Equal
from equalize.errors import EqualizeError
from equalize.regularizers import MeanL2
from equalize.views import Transpose
from tests.conftest import bits, data, kernels, towers


def linear_heads(targets, rule=None, *, frozen=()):
    """One linear head a target, which its least-squares weights fit, each pulled by its own target."""
    entrance = keras.Input((2,))
    heads = [keras.layers.Dense(1, use_bias=False, name=f"head_{i}") for i in range(len(targets))]
    model = keras.Model(entrance, [head(entrance) for head in heads])
    for i in frozen:
        heads[i].trainable = False
    registry = equalize.GroupRegistry()
    registry.tie("heads", [head.kernel for head in heads], rule or MeanL2(factor=0.0))
    model.compile("sgd", ["mse"] * len(targets))
    x = np.random.default_rng(0).normal(size=(64, 2)).astype("float32")
    return model, registry, [head.kernel for head in heads], x, [x @ np.float32(t).reshape(2, 1) for t in targets]


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
        assert advice.rise == 0.0


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


def test_distance_and_rise_are_those_of_the_members_as_they_are_and_nothing_changes():
    model, registry, heads, x, y = linear_heads([[1, 2], [3, -2]], MeanL2(factor=5.0))
    for head, target in zip(heads, ([1, 2], [3, -2]), strict=True):
        head.assign(np.float32(target).reshape(2, 1))  # each fits its own target
    before = [bits(head) for head in heads]
    regularizers = [head.regularizer for head in heads]
    advice = registry.advise(model, x, y, print_fn=lambda text: None)["heads"]
    assert [bits(head) for head in heads] == before
    assert [head.regularizer for head in heads] == regularizers
    assert advice.loss == pytest.approx(0.0, abs=1e-10)
    expected = np.mean((x @ np.float32([1, -2])) ** 2) * 2  # both miss by (±1, ∓2)
    assert advice.tied_loss == advice.rise == pytest.approx(expected, rel=1e-5)
    assert advice.distance == pytest.approx(np.sqrt((5 + 5) / (5 + 13)))


def test_the_penalty_is_left_out_and_other_regularizers_are_not():
    model = towers(2)
    for kernel in kernels(model):
        kernel.regularizer = keras.regularizers.L2(0.5)
    registry = equalize.GroupRegistry()
    model.compile("sgd", "mse")
    x, y = data()
    loss = model.evaluate(x, y, verbose=0)
    registry.tie("towers", kernels(model), MeanL2(factor=3.0))
    advice = registry.advise(model, x, y, print_fn=lambda text: None)["towers"]
    assert advice.loss == pytest.approx(loss, rel=1e-5)


def test_views_anchors_and_a_member_without_a_gradient():
    model, registry, heads, x, y = linear_heads([[1, 2], [1, 2], [5, 5]], Equal(rate=0.5), frozen=(2,))
    advice = registry.advise(model, x, y, print_fn=lambda text: None)["heads"]
    assert advice.cosine > 0.0
    registry.untie()
    constant = np.ones((1, 2), "float32")
    registry.tie("prior", [heads[0], (constant, Transpose())], MeanL2(factor=0.1))
    advice = registry.advise(model, x, y, print_fn=lambda text: None)["prior"]
    assert np.isnan(advice.cosine)
    assert advice.rise != 0.0


def test_the_table_names_every_group_and_fits_a_log():
    model, registry, _, x, y = linear_heads([[1, 2], [2, 4]])
    printed = []
    registry.advise(model, x, y, print_fn=printed.append)
    (text,) = printed
    assert "heads" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_groups_are_asked_for_by_name_and_metrics_keep_what_they_held():
    model, registry, heads, x, y = linear_heads([[1, 2], [2, 4]])
    registry.tie("apart", [heads[0], np.zeros((2, 1)), np.ones((2, 1))], MeanL2(factor=1.0))
    model.evaluate(x, y, verbose=0)
    before = [bits(variable) for variable in model.metrics_variables]
    assert list(registry.advise(model, x, y, names=["heads"], print_fn=lambda text: None)) == ["heads"]
    advice = registry.advise(model, x, y, print_fn=lambda text: None)["apart"]
    assert np.isnan(advice.tied_loss)  # two anchors that differ cannot be made equal
    assert [bits(variable) for variable in model.metrics_variables] == before


def test_what_it_cannot_judge_is_an_error():
    model, registry, _, x, y = linear_heads([[1, 2], [2, 4]])
    for some_x, some_y in ((x[:0], [part[:0] for part in y]), (x, [part[:5] for part in y]), (x, None)):
        with pytest.raises(EqualizeError, match="needs inputs and targets with one number of samples"):
            registry.advise(model, some_x, some_y)
    other, _, _, _, _ = linear_heads([[1, 2], [2, 4]])
    with pytest.raises(EqualizeError, match=r"its member .head_0/kernel. .* is no variable"):
        registry.advise(other, x, y)
    with pytest.raises(EqualizeError, match=r"Call `model.compile\(optimizer, loss\)` first"):
        registry.advise(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), x, y)
