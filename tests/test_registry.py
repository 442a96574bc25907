import gc
import tracemalloc
import warnings
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize import _backend as backend
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError, NotLinkedError, TieBrokenError
from equalize.regularizers import ChainL2, MeanL2, PairwiseL1, PairwiseL2, PairwiseNorm, TraceNorm
from tests.conftest import BACKEND, bits, bitwise_equal, data, fit, gradients, kernels, towers


def snapshot(model):
    """All that a failed call must leave as it was."""
    return [(bits(w), w.constraint, w.regularizer) for w in model.weights]


def refuses(error, match, model, call):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        call()
    assert snapshot(model) == before


def test_link_finds_checks_and_equalizes():
    model = towers(3, constraint=lambda: Equal("towers"))
    ks = kernels(model)
    first = bits(ks[0])
    assert not bitwise_equal(*ks)
    registry = equalize.GroupRegistry()
    assert registry.link(model) is registry
    assert bitwise_equal(*ks)
    assert bits(ks[2]) == first
    assert list(registry) == ["towers"]
    group = registry["towers"]
    assert isinstance(group, equalize.Group)
    assert [member.variable for member in group.members] == ks
    assert [member.path for member in group.members] == [kernel.path for kernel in ks]
    assert group.name == "towers"
    assert group.hard
    assert np.array_equal(ops.convert_to_numpy(group.value), ops.convert_to_numpy(ks[0].value))


def test_link_leaves_soft_groups_as_they_are():
    model = towers(2, regularizer=lambda: MeanL2("towers"))
    before = [bits(kernel) for kernel in kernels(model)]
    registry = equalize.GroupRegistry().link(model)
    assert [bits(kernel) for kernel in kernels(model)] == before
    assert not registry["towers"].hard


def test_initial_mean_and_strict():
    model = towers(2, constraint=lambda: Equal("towers"))
    ks = kernels(model)
    expected = np.mean([ops.convert_to_numpy(kernel.value) for kernel in ks], axis=0)
    refuses(
        TieBrokenError,
        r"'tower_1/kernel' \(5, 4\) float32: differs from the first by up to",
        model,
        lambda: equalize.GroupRegistry().link(model, initial="strict"),
    )
    equalize.GroupRegistry().link(model, initial="mean")
    np.testing.assert_allclose(ops.convert_to_numpy(ks[0].value), expected, atol=1e-6)
    assert bitwise_equal(*ks)
    again = keras.models.clone_model(model)
    again.set_weights(model.get_weights())
    equalize.GroupRegistry().link(again, initial="strict").check()


def test_linking_twice_changes_nothing():
    model = towers(3, constraint=lambda: Equal("towers"))
    registry = equalize.GroupRegistry().link(model)
    group = registry["towers"]
    kernels(model)[1].assign_add(np.ones((5, 4), "float32"))
    before = snapshot(model)
    assert registry.link(model)["towers"] is group
    assert equalize.GroupRegistry().link(model)["towers"] is group
    assert snapshot(model) == before


def test_link_of_a_part_of_the_model_changes_nothing():
    model = towers(3, constraint=lambda: Equal("towers"))
    registry = equalize.GroupRegistry().link(model)
    part = keras.Model(model.inputs, [model.get_layer("tower_0").output, model.get_layer("tower_1").output])
    before = snapshot(model)
    registry.link(part)
    assert snapshot(model) == before
    assert len(registry["towers"].members) == 3


def test_link_of_a_larger_model_extends_the_group():
    model = towers(3, constraint=lambda: Equal("towers"))
    part = keras.Model(model.inputs, [model.get_layer("tower_0").output, model.get_layer("tower_1").output])
    registry = equalize.GroupRegistry().link(part)
    assert len(registry["towers"].members) == 2
    registry.link(model)
    assert len(registry["towers"].members) == 3
    assert bitwise_equal(*kernels(model))
    fit(model, registry)
    assert bitwise_equal(*kernels(model))


def test_linking_another_model_into_the_same_groups_explains_both_intentions():
    one, two = (towers(2, constraint=lambda: Equal("towers")) for _ in range(2))
    registry = equalize.GroupRegistry().link(one)
    for what in (r"link\(model_1, model_2\)", r"GroupRegistry\(\).link\(model_2\)", "tower_0/kernel"):
        refuses(GroupMismatchError, what, two, lambda: registry.link(two))
    equalize.GroupRegistry().link(two)


def test_several_models_in_one_group():
    if BACKEND == "jax":
        pytest.skip("a step on JAX reaches the variables of one model only")
    one, two = (towers(2, constraint=lambda: Equal("towers")) for _ in range(2))
    registry = equalize.GroupRegistry().link(one, two)
    fit(one, registry)
    fit(two, registry)
    assert bitwise_equal(*kernels(one), *kernels(two))


def test_several_models_in_one_group_on_jax_is_an_error_that_says_why():
    if BACKEND != "jax":
        pytest.skip("about JAX")
    one, two = (towers(2, constraint=lambda: Equal("towers")) for _ in range(2))
    registry = equalize.GroupRegistry().link(one, two)
    with pytest.raises(EqualizeError, match="Train all members with one optimizer in one model"):
        fit(one, registry)


def test_link_errors():
    plain = towers(2)
    refuses(NotLinkedError, "No rule was found", plain, lambda: equalize.GroupRegistry().link(plain))
    with pytest.raises(EqualizeError, match="needs a model"):
        equalize.GroupRegistry().link()
    with pytest.raises(TypeError, match="expects Keras models or layers"):
        equalize.GroupRegistry().link("model")
    unbuilt = keras.Sequential([keras.layers.Dense(2, kernel_constraint=Equal("g"))])
    with pytest.raises(NotLinkedError, match="not built"):
        equalize.GroupRegistry().link(unbuilt)
    nameless = towers(2, constraint=Equal)
    refuses(EqualizeError, "has no group name", nameless, lambda: equalize.GroupRegistry().link(nameless))
    model = towers(2, constraint=lambda: Equal("g"))
    refuses(EqualizeError, "`initial` must be one of", model, lambda: equalize.GroupRegistry().link(model, initial="x"))


@pytest.mark.filterwarnings("ignore:.*not have a .build:UserWarning")
def test_a_layer_that_was_never_built_inside_a_built_model_is_named():
    class Half(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = keras.layers.Dense(2, kernel_constraint=Equal("g"), name="used")
            self.unused = keras.layers.Dense(2, kernel_constraint=Equal("g"), name="unused")

        def call(self, x):
            return self.used(x)

    model = Half()
    model(np.zeros((1, 2), "float32"))
    refuses(NotLinkedError, "'unused'", model, lambda: equalize.GroupRegistry().link(model))


def test_a_group_with_one_member_names_the_nearest_other():
    model = towers(4, constraint=lambda: Equal("towers"))
    kernels(model)[2].constraint = Equal("twoers")
    kernels(model)[3].constraint = Equal("something else")
    refuses(
        GroupMismatchError,
        "Group 'twoers' has one member: 'tower_2/kernel'.*nearest other group is 'towers'",
        model,
        lambda: equalize.GroupRegistry().link(model),
    )


@pytest.mark.parametrize("change", ["rate", "inner", "kind"])
def test_rules_that_disagree(change):
    model = towers(2, constraint=lambda: Equal("towers"))
    second = kernels(model)[1]
    if change == "kind":
        second.constraint, second.regularizer = None, MeanL2("towers")
    else:
        second.constraint = Equal("towers", **{change: 0.5 if change == "rate" else keras.constraints.NonNeg()})
    refuses(GroupMismatchError, "rules of group 'towers' disagree", model, lambda: equalize.GroupRegistry().link(model))


def test_shapes_and_dtypes_that_disagree_name_both():
    model = towers(2, constraint=lambda: Equal("towers"))
    model.get_layer("head").kernel.constraint = Equal("towers")
    refuses(
        GroupMismatchError,
        r"'head/kernel' into group 'towers': expected shape \(5, 4\), set by 'tower_0/kernel'; received \(8, 1\)",
        model,
        lambda: equalize.GroupRegistry().link(model),
    )
    one, two = (keras.Variable(np.zeros(2), dtype=dtype) for dtype in ("float32", "float16"))
    with pytest.raises(GroupMismatchError, match=r"expected dtype float32.*received float16"):
        equalize.GroupRegistry().tie("g", [one, two], Equal())
    counts = [keras.Variable(np.zeros(2), dtype="int32", trainable=False) for _ in range(2)]
    with pytest.raises(GroupMismatchError, match="floating dtype"):
        equalize.GroupRegistry().tie("g", counts, Equal())


def test_two_hard_groups_for_one_variable():
    model = towers(3)
    ks = kernels(model)
    registry = equalize.GroupRegistry()
    registry.tie("left", ks[:2], Equal())
    refuses(
        GroupMismatchError,
        "belongs to group 'left' already",
        model,
        lambda: equalize.GroupRegistry().tie("right", ks[1:], Equal()),
    )
    declared = towers(2, constraint=lambda: Equal("declared"))
    refuses(
        GroupMismatchError,
        "belongs to group 'declared' already",
        declared,
        lambda: equalize.GroupRegistry().tie("g", kernels(declared), Equal()),
    )


def test_frozen_members_that_differ():
    model = towers(3, constraint=lambda: Equal("towers"), frozen=(0, 2))
    refuses(GroupMismatchError, "do not move.*differ by up to", model, lambda: equalize.GroupRegistry().link(model))


def test_frozen_member_prevails_over_the_first():
    model = towers(3, constraint=lambda: Equal("towers"), frozen=(1,))
    frozen = bits(kernels(model)[1])
    equalize.GroupRegistry().link(model)
    assert {bits(kernel) for kernel in kernels(model)} == {frozen}


def test_tie_of_variables_and_constant():
    model = towers(2)
    constant = np.full((5, 4), 0.5, "float32")
    registry = equalize.GroupRegistry()
    group = registry.tie("prior", [*kernels(model), constant], Equal())
    assert [member.constant for member in group.members] == [False, False, True]
    fit(model, registry)
    assert all(np.all(ops.convert_to_numpy(kernel.value) == 0.5) for kernel in kernels(model))


def test_tie_errors():
    model = towers(2)
    one, two = kernels(model)
    registry = equalize.GroupRegistry()
    native = one.value
    for call, error, match in [
        (lambda: registry.tie("g", [one], Equal()), GroupMismatchError, "has one member"),
        (lambda: registry.tie("g", [], Equal()), GroupMismatchError, "no members"),
        (lambda: registry.tie("g", one, Equal()), TypeError, "must be a list"),
        (lambda: registry.tie("g", [one, one], Equal()), GroupMismatchError, "more than once"),
        (lambda: registry.tie("g", [one, "two"], Equal()), TypeError, "expected a `keras.Variable`"),
        (lambda: registry.tie("g", [one, model.get_layer("head")], Equal()), TypeError, "either layers or variables"),
        (lambda: registry.tie("g", [model.get_layer("head")], Equal()), GroupMismatchError, "has one member"),
        (lambda: registry.tie("", [one, two], Equal()), EqualizeError, "must not be empty"),
        (lambda: registry.tie(3, [one, two], Equal()), TypeError, "`name` must be a string"),
        (lambda: registry.tie("g", [one, two], keras.constraints.NonNeg()), TypeError, "`rule` must be"),
        (lambda: registry.tie("g", [one, two], Equal), TypeError, "`rule` must be"),
        (lambda: registry.tie("g", [one, two], Equal("h")), EqualizeError, "rule of group 'h'"),
        (lambda: registry.tie("g", [one, two], MeanL2(inner=MeanL2("h"))), EqualizeError, "brings another as `inner`"),
        (lambda: registry.tie("g", [one, two], Equal(), initial="x"), EqualizeError, "`initial` must be one of"),
        (lambda: registry.tie("g", [np.zeros(2), np.zeros(2)], Equal()), GroupMismatchError, "only constants"),
    ]:
        refuses(error, match, model, call)
    if BACKEND in ("tensorflow", "torch"):
        refuses(TypeError, "expected a `keras.Variable`", model, lambda: registry.tie("g", [one, native], Equal()))
    assert not registry
    registry.tie("g", [one, two], Equal())
    refuses(GroupMismatchError, "There is a group 'g' already", model, lambda: registry.tie("g", [one, two], MeanL2()))


def test_untie_leaves_plain_variables_that_train_alone():
    model = towers(2, constraint=lambda: Equal("towers"))
    registry = equalize.GroupRegistry().link(model)
    fit(model, registry)
    value = bits(kernels(model)[0])
    registry.untie("towers")
    assert not registry
    assert all(kernel.constraint is None and kernel.regularizer is None for kernel in kernels(model))
    assert bits(kernels(model)[1]) == value
    fit(model)
    assert not bitwise_equal(*kernels(model))
    with pytest.raises(EqualizeError, match="There is no group 'towers'"):
        registry.untie("towers")


def test_sync_methods_and_names():
    model = towers(4)
    ks = kernels(model)
    registry = equalize.GroupRegistry()
    registry.tie("hard", ks[:2], Equal())
    registry.tie("soft", ks[2:], MeanL2())
    ks[1].assign_add(np.ones((5, 4), "float32"))
    first, soft = bits(ks[0]), bits(ks[2])
    with pytest.raises(TieBrokenError, match="'hard': spread 1, members 'tower_0/kernel'"):
        registry.check()
    registry.check(atol=1.001)
    registry.sync()
    registry.check()
    assert bits(ks[1]) == first
    assert not bitwise_equal(*ks[2:])
    mean = np.mean([ops.convert_to_numpy(kernel.value) for kernel in ks[2:]], axis=0)
    registry.sync("mean", "soft")
    assert bitwise_equal(*ks[2:])
    assert bits(ks[2]) != soft
    np.testing.assert_allclose(ops.convert_to_numpy(ks[3].value), mean, atol=1e-6)
    with pytest.raises(EqualizeError, match="`method` must be one of"):
        registry.sync("last")


def test_sync_changes_no_group_where_the_anchors_of_another_differ():
    model = towers(4)
    ks = kernels(model)
    registry = equalize.GroupRegistry()
    registry.tie("fine", ks[:2], MeanL2())
    registry.tie("split", ks[2:], MeanL2())
    for layer in model.layers[3:5]:
        layer.trainable = False
    refuses(GroupMismatchError, "'split' cannot be made equal", model, lambda: registry.sync("mean", "fine", "split"))


def test_the_spread_of_many_members_needs_the_memory_of_a_few():
    variables = [keras.Variable(np.full((256, 256), float(i), "float32")) for i in range(16)]
    group = equalize.GroupRegistry().tie("g", variables, MeanL2())
    tracemalloc.start()
    assert group.spread() == 15.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 4 * 256**2


def test_spread_is_the_largest_entry_of_max_minus_min():
    variables = [keras.Variable(np.float32(v)) for v in ([0.0, 5.0], [1.0, 5.0], [-2.0, 4.5])]
    registry = equalize.GroupRegistry()
    registry.tie("g", variables, MeanL2())
    assert registry.spread() == {"g": 3.0}
    variables[0].assign([np.nan, 5.0])
    assert registry.spread() == {"g": float("inf")}
    for variable in variables:
        variable.assign([np.nan, np.inf])
    assert registry.spread() == {"g": 0.0}


def test_project_and_penalty_refuse_groups_of_the_other_kind():
    model = towers(4)
    registry = equalize.GroupRegistry()
    registry.tie("hard", kernels(model)[:2], Equal())
    registry.tie("soft", kernels(model)[2:], MeanL2())
    with pytest.raises(EqualizeError, match="'soft' cannot be projected"):
        registry.project("soft")
    with pytest.raises(EqualizeError, match="'hard' has no penalty"):
        registry.penalty("hard")
    registry.project()
    assert float(ops.convert_to_numpy(registry.penalty())) > 0.0


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("rule", [MeanL2, PairwiseL2, PairwiseNorm, PairwiseL1, ChainL2, TraceNorm])
def test_the_penalty_of_float64_members_is_float64(rule):
    registry = equalize.GroupRegistry()
    values = np.random.default_rng(0).normal(size=(3, 2))
    registry.tie("wide", members := [keras.Variable(value, dtype="float64") for value in values], rule(factor=1.0))
    penalty = registry.penalty()
    assert backend.dtype(penalty) == "float64"
    expected = sum(ops.convert_to_numpy(member.regularizer(member)) for member in members)
    assert ops.convert_to_numpy(penalty) == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("float32", "float64", "float16"), "float64"),
        (("bfloat16", "float16"), "float32"),
        ((), "float32"),
    ],
)
def test_the_penalty_of_groups_of_several_dtypes_has_the_widest(dtypes, expected):
    registry = equalize.GroupRegistry()
    pairs = {dtype: [keras.Variable([value], dtype=dtype) for value in (1.0, 2.0)] for dtype in dtypes}
    for dtype, pair in pairs.items():
        registry.tie(dtype, pair, MeanL2(factor=1.0))
    penalty = registry.penalty()
    assert backend.dtype(penalty) == expected
    assert float(ops.convert_to_numpy(penalty)) == 0.5 * len(dtypes)
    if dtypes:
        found = gradients(registry.penalty, [variable for pair in pairs.values() for variable in pair])
        assert np.array(found, "float64").ravel().tolist() == [-1.0, 1.0] * len(dtypes)


def test_mapping():
    model = towers(2, constraint=lambda: Equal("towers"))
    registry = equalize.GroupRegistry()
    assert len(registry) == 0
    registry.link(model)
    assert "towers" in registry
    assert "others" not in registry
    assert registry.get("others") is None
    assert dict(registry) == {"towers": registry["towers"]}
    with pytest.raises(KeyError):
        registry["others"]
    assert "towers" in repr(registry)


@pytest.mark.parametrize("frozen", [(), (1,)], ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_the_registry_keeps_no_model_alive(train, frozen):
    model = towers(2, constraint=lambda: Equal("towers"), regularizer=lambda: MeanL2("soft"), frozen=frozen)
    registry = equalize.GroupRegistry().link(model)
    prior = registry.tie("prior", [model.get_layer("head").kernel, np.ones((8, 1), "float32")], MeanL2())
    if train:
        fit(model, registry)
        registry.penalty()
        assert registry.spread()
    group, member = registry["towers"], registry["towers"].members[0]
    alive = [weakref.ref(weight) for weight in model.weights]
    alive += [weakref.ref(weight.value) for weight in model.weights]  # the memory itself
    del model
    keras.backend.clear_session()
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)
    assert len(registry) == 0
    assert registry.spread() == {}
    registry.check()
    assert group.members == ()
    assert len(prior.members) == 1  # the constant, which is the group's own
    with pytest.raises(EqualizeError, match="'tower_0/kernel' no longer exists"):
        _ = member.variable


def test_a_registry_that_is_dropped_leaves_the_tie():
    model = towers(2, constraint=lambda: Equal("towers"))
    equalize.GroupRegistry().link(model)
    gc.collect()
    fit(model, equalize.GroupRegistry().link(model))
    assert bitwise_equal(*kernels(model))


def test_clone_and_original_do_not_touch_each_other():
    model = towers(2, constraint=lambda: Equal("towers"))
    registry = equalize.GroupRegistry().link(model)
    clone = keras.models.clone_model(model)
    with pytest.raises(NotLinkedError):
        fit(clone)
    clone = keras.models.clone_model(model)
    other = equalize.GroupRegistry().link(clone)
    before = [bits(weight) for weight in model.weights]
    fit(clone, other)
    assert [bits(weight) for weight in model.weights] == before
    before = [bits(weight) for weight in clone.weights]
    fit(model, registry)
    assert [bits(weight) for weight in clone.weights] == before


def test_save_load_link(tmp_path):
    model = towers(2, constraint=lambda: Equal("towers", rate=1.0), regularizer=lambda: MeanL2("soft", 0.5))
    fit(model, equalize.GroupRegistry().link(model))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    registry = equalize.GroupRegistry().link(loaded, initial="strict")
    assert sorted(registry) == ["soft", "towers"]
    assert registry["soft"].rule.factor == 0.5
    fit(loaded, registry)
    assert bitwise_equal(*kernels(loaded))


def test_objects_of_keras_2_are_refused_with_what_to_do():
    legacy = type("Dense", (), {"__module__": "tf_keras.src.layers.core.dense"})()
    with pytest.raises(TypeError, match=r"`link` expects Keras models.*It is of Keras 2 .*`import keras`"):
        equalize.GroupRegistry().link(legacy)
    with pytest.raises(TypeError, match=r"expected a `keras.Variable`.*It is of Keras 2"):
        equalize.GroupRegistry().tie("legacy", [legacy, legacy], equalize.constraints.Equal())


# ---- anchors that nobody else keeps


RULES = [equalize.regularizers.MeanL2(factor=1.0), Equal(rate=0.5), Equal()]


def step(optimizer, registry, variables):
    soft = any(not group.projects for group in registry.values())
    zeros = [np.zeros(tuple(v.shape), "float32") for v in variables]
    slopes = gradients(registry.penalty, variables) if soft else zeros
    optimizer.apply([ops.convert_to_tensor(slope) for slope in slopes], variables)


@pytest.mark.parametrize("frozen_later", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.describe())
def test_an_anchor_lives_as_long_as_a_member_that_it_holds(rule, frozen_later):
    moving, anchor = (
        keras.Variable(np.full((2,), 5.0), dtype="float32"),
        keras.Variable(np.ones((2,)), dtype="float32", trainable=frozen_later),
    )
    registry = equalize.GroupRegistry()
    registry.tie("pair", [anchor, moving], rule, initial="mean")
    moving.assign([5.0, 5.0])
    anchor.assign([1.0, 1.0])
    optimizer = keras.optimizers.SGD(0.1)
    if frozen_later:
        anchor.trainable = False
        registry.spread()  # a look, or a step, sees that it does not move
    remembered = weakref.ref(anchor)
    del anchor
    gc.collect()
    for _ in range(60):
        step(optimizer, registry, [moving])
    np.testing.assert_allclose(ops.convert_to_numpy(moving.value), 1.0, atol=0.1)
    assert len(registry["pair"].members) == 2
    del moving, optimizer
    gc.collect()
    assert remembered() is None
    assert list(registry) == []


def test_an_anchor_that_is_thawed_or_untied_is_held_no_longer():
    for end in (lambda variable, registry: setattr(variable, "trainable", True), lambda _, registry: registry.untie()):
        moving, anchor = keras.Variable(np.zeros((2,))), keras.Variable(np.ones((2,)), trainable=False)
        registry = equalize.GroupRegistry()
        registry.tie("pair", [moving, anchor], Equal())
        end(anchor, registry)
        registry.project()
        remembered = weakref.ref(anchor)
        del anchor
        gc.collect()
        assert remembered() is None


# ---- where variables have no values


class TiedInBuild(keras.Model):
    """Ties its layers in `build`, which Keras calls in the first `fit` to infer shapes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(4), keras.layers.Dense(4)
        self.groups = equalize.GroupRegistry()

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)
        self.groups.tie("pair", [self.first, self.second], Equal())

    def call(self, x):
        return self.second(self.first(x))


def test_a_tie_in_build_works_with_values_and_is_else_an_error_that_changes_nothing():
    x = np.ones((8, 4), "float32")
    model = TiedInBuild()
    model(x)
    assert len(model.groups) == 2
    fit(model, model.groups, x=x, y=x)
    other = TiedInBuild()
    other.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"where variables have no values|already built"):  # the latter is Keras's own
        other.fit(x, x, verbose=0)
    assert len(other.groups) == 0


# ---- what is equal already


@pytest.mark.parametrize("inner", [keras.constraints.MaxNorm(0.5), keras.constraints.UnitNorm()])
@pytest.mark.parametrize("initial", ["first", "mean", "strict"])
def test_linking_and_syncing_what_is_equal_changes_no_bit_though_an_inner_constraint_would(inner, initial):
    def two(value):
        members = [keras.Variable(value, dtype="float32") for _ in range(2)]
        registry = equalize.GroupRegistry()
        registry.tie("g", members, Equal(inner=inner), initial=initial)
        return members, registry

    members, registry = two(np.random.default_rng(0).normal(size=(5, 7)))
    registry.project()
    projected = ops.convert_to_numpy(members[0].value)
    assert np.any(ops.convert_to_numpy(inner(members[0].value)) != projected)
    (first, _), again = two(projected)
    assert bits(first) == projected.tobytes()
    again.sync("mean")
    again.sync("first")
    assert bits(first) == projected.tobytes()


# ---- ties that overwrite what was trained


def trained_towers():
    model = towers(3)
    model.compile("sgd", "mse")
    x, y = data()
    model.fit(x, y, batch_size=16, epochs=1, verbose=0)
    return model


def test_a_tie_that_overwrites_training_warns_once():
    model = trained_towers()
    layers = [layer for layer in model.layers if layer.name.startswith("tower_")]
    with pytest.warns(
        UserWarning, match=r"'towers/kernel' and 1 more.*have been trained.*`initial=\"mean\"`"
    ) as caught:
        equalize.GroupRegistry().tie("towers", layers, Equal())
    assert [warning.filename for warning in caught if "have been trained" in str(warning.message)] == [__file__]


@pytest.mark.parametrize("way", ["mean", "strict", "soft", "partial", "anchored", "untrained", "new layers"])
def test_a_tie_that_overwrites_no_training_does_not_warn(way):
    model = towers(3) if way == "untrained" else trained_towers()
    members = kernels(model)
    if way == "anchored":
        model.get_layer("tower_2").trainable = False
    if way == "new layers":
        members = [members[0], *kernels(towers(2))]
    rule = {"soft": MeanL2(factor=0.1), "partial": Equal(rate=0.5)}.get(way, Equal())
    initial = way if way in ("mean", "strict") else "first"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if way == "strict":
            with pytest.raises(TieBrokenError):
                equalize.GroupRegistry().tie("towers", members, rule, initial=initial)
        else:
            equalize.GroupRegistry().tie("towers", members, rule, initial=initial)
