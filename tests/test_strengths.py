"""A matrix of factors: who pulls whom, and how strongly."""

import gc
import json

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.regularizers import MeanL2, PairwiseL1, PairwiseL2, PairwiseNorm
from tests import references
from tests.conftest import gradients, kernels, towers

RULES = {PairwiseL2: references.pairwise_l2, PairwiseNorm: references.pairwise_norm}
MATRIX = np.array([[9.0, 1.0, 0.0, 0.5], [1.0, 0.0, 2.0, 0.0], [0.0, 2.0, 0.0, 0.25], [0.5, 0.0, 0.25, 0.0]])
VALUES = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")


def number(tensor):
    return float(ops.convert_to_numpy(tensor))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("matrix", [MATRIX, MATRIX.tolist(), ops.convert_to_tensor(MATRIX.astype("float32"))])
def test_each_pair_has_its_factor_in_the_order_of_the_members(rule, matrix):
    variables = [keras.Variable(value) for value in VALUES]
    registry = equalize.GroupRegistry()
    registry.tie("g", variables, rule(factor=matrix))
    expected, slopes = RULES[rule](VALUES.astype("float64"), MATRIX)
    assert number(registry.penalty()) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradients(registry.penalty, variables), slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_constants_and_frozen_members_have_their_rows(rule):
    variables = [keras.Variable(value, trainable=i != 2) for i, value in enumerate(VALUES[:3])]
    registry = equalize.GroupRegistry()
    registry.tie("g", [*variables, VALUES[3]], rule(factor=MATRIX))
    expected, slopes = RULES[rule](VALUES.astype("float64"), MATRIX)
    assert number(registry.penalty()) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradients(registry.penalty, variables[:2]), slopes[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_matrix_of_one_number_is_that_number(rule):
    penalties = []
    for factor in (0.3, np.full((4, 4), 0.3)):
        variables = [keras.Variable(value) for value in VALUES]
        registry = equalize.GroupRegistry()
        registry.tie("g", variables, rule(factor=factor))
        penalties.append(number(registry.penalty()))
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_layers_declare_a_matrix_and_it_is_saved_with_them(rule, tmp_path):
    model = towers(4, regularizer=lambda: rule("g", MATRIX))
    before = number(equalize.GroupRegistry().link(model).penalty())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    registry = equalize.GroupRegistry().link(loaded)
    values = np.stack([ops.convert_to_numpy(kernel.value) for kernel in kernels(model)])
    assert before == pytest.approx(RULES[rule](values.astype("float64"), MATRIX)[0], rel=1e-5)
    assert number(registry.penalty()) == pytest.approx(before)
    assert registry["g"].rule.factor == tuple(map(tuple, MATRIX.tolist()))


def test_the_config_of_a_registry_is_plain_data():
    model = towers(4)
    registry = equalize.GroupRegistry()
    registry.tie("g", kernels(model), PairwiseNorm(factor=MATRIX))
    config = json.loads(json.dumps(registry.get_config()))
    assert config["groups"][0]["rule"]["config"]["factor"] == MATRIX.tolist()
    before = number(registry.penalty())
    registry.untie()
    assert number(equalize.GroupRegistry.from_config(config).link(model).penalty()) == pytest.approx(before)


def test_the_rows_of_members_that_are_gone_go_with_them():
    variables = [keras.Variable(value, name=f"w{i}") for i, value in enumerate(VALUES)]
    registry = equalize.GroupRegistry()
    registry.tie("g", variables, PairwiseL2(factor=MATRIX))
    del variables[1]
    gc.collect()
    kept = [0, 2, 3]
    expected, slopes = references.pairwise_l2(VALUES[kept].astype("float64"), MATRIX[np.ix_(kept, kept)])
    assert number(registry.penalty()) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradients(registry.penalty, variables), slopes, rtol=1e-4, atol=1e-5)
    assert len(registry.get_config()["groups"][0]["rule"]["config"]["factor"]) == 3


def test_rounding_does_not_make_a_matrix_asymmetric():
    rounded = MATRIX * (1 + 1e-7 * np.triu(np.ones((4, 4))))
    factor = np.asarray(PairwiseL2(factor=rounded).factor)
    assert np.array_equal(factor, factor.T)


def test_a_table_shows_the_size_of_a_matrix():
    assert PairwiseL2(factor=MATRIX).describe() == "PairwiseL2(factor=<4×4 matrix>)"


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (MATRIX[:3], EqualizeError, r"Received an array of shape \(3, 4\)"),
        (MATRIX[0], EqualizeError, r"Received an array of shape \(4,\)"),
        ([[]], EqualizeError, r"Received an array of shape \(1, 0\)"),
        ([[0, 1], [1]], EqualizeError, "Received rows of different lengths"),
        ([[0, 1], [2, 0]], EqualizeError, "received 1 in row 0 and column 1, and 2 in row 1 and column 0"),
        ([[0, -1], [-1, 0]], EqualizeError, "not negative; received -1 in row 0 and column 1"),
        ([[0, np.nan], [np.nan, 0]], EqualizeError, "finite numbers.*received nan in row 0"),
        ([[0, np.inf], [np.inf, 0]], EqualizeError, "finite numbers.*received inf in row 0"),
        ([["a", "b"], ["c", "d"]], TypeError, "`factor` must be a number, or a symmetric matrix"),
        ("0.1", TypeError, "`factor` must be a number"),
        (-1.0, EqualizeError, r"`factor` must be a finite number in \[0, inf\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES)
def test_bad_matrices(rule, factor, error, message):
    with pytest.raises(error, match=message):
        rule(factor=factor)


@pytest.mark.parametrize("rule", [MeanL2, PairwiseL1])
def test_other_rules_take_one_number(rule):
    with pytest.raises(TypeError, match="`factor` must be a number"):
        rule(factor=MATRIX)


def test_a_matrix_of_another_size_names_the_group_and_its_members_and_changes_nothing():
    model = towers(3)
    with pytest.raises(
        GroupMismatchError, match=r"(?s)group 'g': expected 4 members, as PairwiseL2.*received 3.*'tower_0/k"
    ):
        equalize.GroupRegistry().tie("g", kernels(model), PairwiseL2(factor=MATRIX))
    assert all(kernel.regularizer is None for kernel in kernels(model))
    with pytest.raises(GroupMismatchError, match=r"(?s)group 'h'.*expected 4 members.*received 3.*'tower_2/kernel'"):
        equalize.GroupRegistry().link(towers(3, regularizer=lambda: PairwiseNorm("h", MATRIX)))


def test_rules_with_different_matrices_disagree():
    factors = iter([MATRIX, MATRIX, 2 * MATRIX, MATRIX])
    model = towers(4, regularizer=lambda: PairwiseL2("g", next(factors)))
    with pytest.raises(GroupMismatchError, match="The rules of group 'g' disagree"):
        equalize.GroupRegistry().link(model)
