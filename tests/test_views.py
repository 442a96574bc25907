import itertools
import json

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

import equalize
from equalize.constraints import Equal, Invariant
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.regularizers import MeanL2
from equalize.views import Chain, Flip, Pattern, Rotate90, Scale, Slice, Transpose
from tests import strategies
from tests.conftest import MODES, QUICK, XLA, EveryStep, bits, compile_quickly, fit, no_loss


@st.composite
def shaped_views(draw, shape):
    """A view that fits members of a shape."""
    rank = len(shape)
    kinds = [
        st.just(Transpose()),
        st.permutations(range(rank)).map(Transpose),
        st.sampled_from([-2.0, 0.5, 3.0]).map(Scale),
    ]
    kinds.append(st.sets(st.integers(-rank, -1), min_size=1).map(lambda axes: Flip(sorted(axes))))
    if rank > 1:
        kinds.append(
            st.tuples(st.integers(-5, 5), st.permutations(range(rank))).map(lambda t: Rotate90(t[0], t[1][:2]))
        )
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    lengths = [draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True)]
    kinds.append(st.just(Slice(starts, lengths)))
    used, indices = np.unique(
        draw(st.lists(st.integers(0, 3), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))),
        return_inverse=True,
    )
    kinds.append(st.just(Pattern(indices.reshape(shape), (used.size,))))
    return draw(st.one_of(kinds))


@st.composite
def views_and_arrays(draw):
    """A view, possibly a chain, a member that it fits, and a common value."""
    shape = draw(strategies.shapes)
    chain, at = [], shape
    for _ in range(draw(st.integers(1, 3))):
        view = draw(shaped_views(at))
        if isinstance(view, Slice) and any(isinstance(later, Pattern) for later in chain):
            continue  # which would repeat what the slice leaves free
        at = view.common_shape(at)
        chain.insert(0, view)
    view = chain[0] if len(chain) == 1 else Chain(*chain or [Transpose()])
    at = view.common_shape(shape)
    w = draw(strategies.arrays(shape, bound=100.0))
    common = draw(strategies.arrays(at, bound=100.0))
    return view, w, common


def array(tensor):
    return ops.convert_to_numpy(tensor)


@given(views_and_arrays())
def test_adjoint_identity_multiplicity_and_pull(case):
    view, w, common = case
    assert view.common_shape(w.shape) == common.shape
    empty = ops.zeros(w.shape)
    shown = array(view.forward(ops.convert_to_tensor(common), empty)).astype("float64")
    adjoint = array(view.adjoint(ops.convert_to_tensor(w))).astype("float64")
    assert shown.shape == w.shape
    assert adjoint.shape == common.shape
    size = np.sqrt(np.max(view.multiplicity(w.shape))) * (1.0 + np.linalg.norm(w) * np.linalg.norm(common))
    assert abs(np.sum(shown * w) - np.sum(common * adjoint)) <= 1e-5 * size
    stretched = np.sqrt(np.broadcast_to(view.multiplicity(w.shape), common.shape)) * common
    assert np.linalg.norm(shown) == pytest.approx(np.linalg.norm(stretched), rel=1e-5, abs=1e-30)
    back = array(view.least_squares(ops.convert_to_tensor(shown.astype("float32"))))
    np.testing.assert_allclose(back, common, rtol=1e-5, atol=1e-30)


@given(views_and_arrays())
def test_forward_keeps_what_the_view_does_not_cover(case):
    view, w, common = case
    member, value = ops.convert_to_tensor(w), ops.convert_to_tensor(common)
    kept = array(view.forward(view.least_squares(member), member))
    if not view.repeats:
        np.testing.assert_allclose(kept, w, rtol=1e-5, atol=1e-30)
    covered = array(view.forward(ops.ones(common.shape), ops.zeros(w.shape))) != 0
    assert np.array_equal(array(view.forward(value, member))[~covered], w[~covered])
    assert np.array_equal(kept[~covered], w[~covered])
    assert covered.sum() == pytest.approx(
        np.broadcast_to(view.multiplicity(w.shape), common.shape).sum() / view.scale**2
    )
    assert covered.all() == view.covers(w.shape)


@given(views_and_arrays())
def test_the_pull_is_the_nearest_common_value_and_returns_what_is_shown_bit_for_bit(case):
    """Least squares: the residual is orthogonal to all that the view can show."""
    view, w, common = case
    member = ops.convert_to_tensor(w)
    pulled = view.least_squares(member)
    residual = array(view.forward(pulled, member)).astype("float64") - w
    shown = array(view.forward(ops.convert_to_tensor(common), ops.zeros(w.shape))).astype("float64")
    assert abs(np.sum(residual * shown)) <= 1e-4 * (1.0 + np.abs(w).sum() * np.abs(shown).max(initial=0.0))
    again = view.least_squares(view.forward(pulled, member))
    if view.scale == 1.0:
        assert array(again).tobytes() == array(pulled).tobytes()
    low, high = (np.stack([array(part) for part in view.bounds(member, member)])[i] for i in (0, 1))
    low, high = np.minimum(low, high), np.maximum(low, high)
    between = (low <= array(pulled) * (1 + 1e-5) + 1e-30) & (array(pulled) <= high * (1 + 1e-5) + 1e-30)
    assert (between | (np.abs(array(pulled) - low) <= 1e-4 * np.abs(w).max(initial=0.0))).all()


@given(views_and_arrays())
def test_config_round_trip_through_json(case):
    view, _, _ = case
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(view)))
    assert keras.saving.deserialize_keras_object(config) == view
    assert hash(keras.saving.deserialize_keras_object(config)) == hash(view)


@given(strategies.shapes.filter(lambda shape: len(shape) > 1), st.integers(-5, 5))
def test_rotation_is_that_of_numpy(shape, k):
    w = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    assert np.array_equal(array(Rotate90(k).forward(ops.convert_to_tensor(w))), np.rot90(w, k))


def test_views_by_hand():
    w = ops.convert_to_tensor(np.float32([[1, 2, 3], [4, 5, 6]]))
    assert array(Transpose().forward(w)).tolist() == [[1, 4], [2, 5], [3, 6]]
    assert array(Flip((0, 1)).forward(w)).tolist() == [[6, 5, 4], [3, 2, 1]]
    assert array(Scale(2).forward(w)).tolist() == [[2, 4, 6], [8, 10, 12]]
    assert array(Slice((0, 1), (2, 2)).adjoint(w)).tolist() == [[2, 3], [5, 6]]
    assert array(Chain(Transpose(), Flip(0)).forward(w)).tolist() == [[3, 6], [2, 5], [1, 4]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Transpose((0, 2)), EqualizeError, "permutation"),
        (lambda: Transpose("ab"), TypeError, "`axes` must be integers"),
        (lambda: Flip(()), EqualizeError, "`axes` must name axes once"),
        (lambda: Flip((0, 0)), EqualizeError, "`axes` must name axes once"),
        (lambda: Rotate90(1, (0, 0)), EqualizeError, "two different axes"),
        (lambda: Rotate90(0.5), TypeError, "`k` must be an integer"),
        (lambda: Scale(0), EqualizeError, "not 0"),
        (lambda: Scale(float("inf")), EqualizeError, "finite"),
        (lambda: Scale("2"), TypeError, "must be a number"),
        (lambda: Slice((0,), (1, 2)), EqualizeError, "one for each axis"),
        (lambda: Slice((-1,), (1,)), EqualizeError, "non-negative"),
        (lambda: Chain(), EqualizeError, "needs a view"),
        (lambda: Chain(1), TypeError, "must be views"),
        (lambda: Equal("g", view="Transpose"), TypeError, "must be a view"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_views_that_do_not_fit_are_an_error_with_both_shapes():
    one, two = (
        keras.Variable(np.zeros((4, 3), "float32"), name="one"),
        keras.Variable(np.zeros((3, 4), "float32"), name="two"),
    )
    registry = equalize.GroupRegistry()
    with pytest.raises(
        GroupMismatchError, match=r"expected shape \(4, 3\), set by 'one'; received \(3, 4\).*Transpose"
    ):
        registry.tie("g", [one, two], Equal())
    with pytest.raises(GroupMismatchError, match=r"'two'.*Slice.*does not fit a variable of shape \(3, 4\)"):
        registry.tie("g", [one, (two, Slice((0, 0), (4, 3)))], Equal())
    with pytest.raises(GroupMismatchError, match="expected 3 axes"):
        registry.tie("g", [one, (two, Transpose((0, 2, 1)))], Equal())
    with pytest.raises(TypeError, match="a pair of a variable and a view"):
        registry.tie("g", [one, (two, "Transpose")], Equal())
    registry.tie("g", [one, (two, Transpose())], Equal())


def test_a_weight_that_the_square_of_a_scale_makes_infinite_is_refused():
    layers = [keras.layers.Dense(2, kernel_constraint=Equal("g", weight=1e290, view=Scale(1e10))) for _ in range(2)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    with pytest.raises(GroupMismatchError, match="weights of the members whose mean can be computed"):
        equalize.GroupRegistry().link(model)


def test_the_common_value_is_the_least_squares_one():
    rows = [np.float32([1.0, 4.0]), np.float32([6.0, 8.0]), np.float32([-1.0, 1.0])]
    variables = [keras.Variable(row) for row in rows]
    factors = [1.0, 3.0, -2.0]
    registry = equalize.GroupRegistry()
    members = [(v, Scale(s)) for v, s in zip(variables, factors, strict=True)]
    registry.tie("g", members, Equal(rate=0.5))
    expected = sum(s * row for s, row in zip(factors, rows, strict=True)) / sum(s * s for s in factors)
    np.testing.assert_allclose(array(registry["g"].value), expected, rtol=1e-6)


MEMBER_VIEWS = {
    "transpose": [None, Transpose()],
    "flip": [None, Flip(0), Flip((0, 1))],
    "rotate": [None, Rotate90(1), Rotate90(2), Rotate90(-1)],
    "minus": [None, Scale(-1)],
    "scale": [None, Scale(3), Scale(0.7)],
    "all scaled": [Scale(3), Scale(7)],
    "slice": [None, Slice((1, 2), (4, 4))],
    "chain": [None, Chain(Transpose(), Flip(1), Scale(-4)), Chain(Slice((2, 0), (4, 4)), Transpose())],
    "factors": [None, Chain(Scale(0.7), Scale(0.1))],
}


def model_of(member_views):
    """Layers whose kernels show a 4×4 common value through views."""
    entrance = keras.Input((5,))
    narrow, wide = (keras.layers.Dense(width, name=f"in_{width}")(entrance) for width in (4, 6))
    layers, outputs = [], []
    for i, view in enumerate(member_views):
        sliced = any(isinstance(part, Slice) for part in (view.views if isinstance(view, Chain) else [view]))
        layers.append(keras.layers.Dense(6 if sliced else 4, activation="tanh", use_bias=False, name=f"shown_{i}"))
        outputs.append(layers[-1](wide if sliced else narrow))
    return keras.Model(entrance, keras.layers.Dense(1)(keras.layers.Concatenate()(outputs))), layers


def tie(rule, kinds=tuple(MEMBER_VIEWS)):
    """A model whose layers are tied through the views of each kind: the model, its registry, layers by kind."""
    model, made = model_of([view for kind in kinds for view in MEMBER_VIEWS[kind]])
    registry, layers = equalize.GroupRegistry(), {}
    for kind in kinds:
        layers[kind] = [made.pop(0) for _ in MEMBER_VIEWS[kind]]
        pairs = zip(layers[kind], MEMBER_VIEWS[kind], strict=True)
        registry.tie(kind, [layer.kernel if view is None else (layer.kernel, view) for layer, view in pairs], rule)
    return model, registry, layers


def regression():
    x = np.random.default_rng(0).normal(size=(32, 5)).astype("float32")
    return x, x[:, :1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_hard_ties_hold_through_views_after_every_step(mode):
    model, registry, layers = tie(Equal())
    assert set(registry.spread().values()) == {0.0}
    before = {kind: bits(shown[1].kernel) for kind, shown in layers.items()}
    x, y = regression()
    watch = fit(model, registry, x=x, y=y, **MODES[mode])
    assert watch.steps == 8
    for kind, shown in layers.items():
        assert bits(shown[1].kernel) != before[kind], kind
        for member, view in zip(shown, MEMBER_VIEWS[kind], strict=True):
            if kind in ("transpose", "flip", "rotate", "minus", "slice", "chain"):
                common, value = (ops.convert_to_tensor(array(layer.kernel.value)) for layer in (shown[0], member))
                expected = common if view is None else view.forward(common, value)
                assert array(expected).tobytes() == array(value).tobytes(), kind


class Values(keras.callbacks.Callback):
    """Keeps what the kernels of layers hold before training and after every step."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers
        self.steps = [self._read()]

    def on_train_batch_end(self, batch, logs=None):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        self.steps.append(self._read())

    def _read(self):
        return [array(layer.kernel.value).copy() for layer in self.layers]


def values_under(rule):
    """What only the tie does to members that start apart: for each kind, their values after each step of a `fit`."""
    model, registry, layers = tie(rule)
    every = [layer for shown in layers.values() for layer in shown]
    x, y = regression()
    values = Values(every)
    compile_quickly(model, keras.optimizers.SGD(0.05), no_loss, **MODES[QUICK])
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[values])
    assert len(values.steps) == 5
    for kind, shown in layers.items():
        places = [every.index(layer) for layer in shown]
        yield registry[kind].members, [[step[place] for place in places] for step in values.steps]


def pulled(member, value):
    return array(member.least_squares(ops.convert_to_tensor(value))).astype("float64")


def covered(member, common):
    """The change of a member for a change of the common value; nothing where the view does not cover it."""
    zeros = ops.zeros(member.variable.shape)
    common = ops.convert_to_tensor(common.astype("float32"))
    return array(common if member.view is None else member.view.forward(common, zeros))


def test_soft_ties_pull_through_views_by_the_gradient_of_the_penalty_in_every_step():
    for members, steps in values_under(MeanL2(factor=0.3)):
        for before, after in itertools.pairwise(steps):
            common = [pulled(member, value) for member, value in zip(members, before, strict=True)]
            for member, old, new, own in zip(members, before, after, common, strict=True):
                gradient = 2 * 0.3 * covered(member, own - np.mean(common, axis=0)) / member.scale**2
                assert np.any(new != old)
                np.testing.assert_allclose(new, old - 0.05 * gradient, rtol=1e-5, atol=1e-6)
                free = covered(member, np.ones_like(own)) == 0
                assert np.array_equal(new[free], old[free])


def test_partial_ties_pull_through_views_by_their_rate_in_every_step():
    for members, steps in values_under(Equal(rate=0.25)):
        squares = [member.scale**2 for member in members]
        start = [pulled(member, value) for member, value in zip(members, steps[0], strict=True)]
        mean = np.average(start, axis=0, weights=squares)
        for i, after in enumerate(steps):
            for member, first, value in zip(members, steps[0], after, strict=True):
                expected = mean + (pulled(member, first) - mean) * 0.75**i
                np.testing.assert_allclose(pulled(member, value), expected, rtol=1e-5, atol=1e-5)
                free = covered(member, np.ones_like(expected)) == 0
                assert np.array_equal(value[free], first[free])


@keras.saving.register_keras_serializable(package="tests")
class Ceiling(keras.constraints.Constraint):
    """A user's own constraint."""

    def __call__(self, w):
        return ops.minimum(w, 0.1)


INNER = {
    "NonNeg": (keras.constraints.NonNeg(), lambda common: np.all(common >= 0.0)),
    "MaxNorm": (keras.constraints.MaxNorm(0.5), lambda common: np.all(np.linalg.norm(common, axis=0) <= 0.5 + 1e-5)),
    "UnitNorm": (keras.constraints.UnitNorm(), lambda common: np.allclose(np.linalg.norm(common, axis=0), 1.0)),
    "Invariant": (Invariant([Flip(0)]), lambda common: np.array_equal(common, common[::-1])),
    "the user's own": (Ceiling(), lambda common: np.all(common <= np.float32(0.1))),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.sampled
def test_a_compiled_step_gives_all_members_one_value(optimizer):
    """XLA would compute it anew for each, and round it differently (JAX 0.12 on CPUs)."""
    entrance = keras.Input((4,))
    layers = [keras.layers.Dense(4, activation="tanh") for _ in range(3)]
    model = keras.Model(entrance, keras.layers.Add()([layer(entrance) for layer in layers]))
    first, second, third = (layer.kernel for layer in layers)
    registry = equalize.GroupRegistry()
    registry.tie("g", [(first, Scale(-1)), second, (third, Transpose())], Equal(inner=Ceiling()))
    model.compile(
        keras.optimizers.get({"class_name": optimizer, "config": {"learning_rate": 0.1}}), "mse", **MODES[XLA]
    )
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    watch = EveryStep(registry)
    model.fit(x, np.roll(x, 1, 1), batch_size=8, epochs=2, verbose=0, callbacks=[watch])
    assert watch.steps == 16


def test_an_inner_constraint_holds_for_the_common_value_behind_views_after_every_step():
    cases = [(name, kind) for name in INNER for kind in ("transpose", "minus", "slice")]
    model, made = model_of([view for _, kind in cases for view in MEMBER_VIEWS[kind]])
    registry = equalize.GroupRegistry()
    firsts, seconds = made[::2], made[1::2]
    for (name, kind), first, second in zip(cases, firsts, seconds, strict=True):
        members = [first.kernel, (second.kernel, MEMBER_VIEWS[kind][1])]
        registry.tie(f"{name}, {kind}", members, Equal(inner=INNER[name][0]))
    x, y = regression()
    values, watch = Values(firsts), EveryStep(registry)  # the first members show the common values as they are
    compile_quickly(model, keras.optimizers.SGD(0.2), "mse", **MODES[QUICK])
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[watch, values])
    assert watch.steps == 4
    for case, commons in zip(cases, zip(*values.steps[1:], strict=True), strict=True):
        _, holds = INNER[case[0]]
        assert all(holds(common) for common in commons), case
        assert len({common.tobytes() for common in commons}) == 4, case


def test_projecting_again_changes_no_bit_through_views():
    _model, registry, layers = tie(Equal())
    kernels = [layer.kernel for shown in layers.values() for layer in shown]
    registry.project()
    once = [bits(kernel) for kernel in kernels]
    for _ in range(3):
        registry.project()
        assert [bits(kernel) for kernel in kernels] == once


def test_the_free_part_of_a_sliced_member_trains_alone():
    model, (whole, sliced) = model_of(MEMBER_VIEWS["slice"])
    registry = equalize.GroupRegistry()
    registry.tie("g", [whole.kernel, (sliced.kernel, Slice((1, 2), (4, 4)))], Equal())
    before = array(sliced.kernel.value).copy()
    x = np.random.default_rng(0).normal(size=(32, 5)).astype("float32")
    fit(model, x=x, y=x[:, :1])
    after = array(sliced.kernel.value)
    free = np.ones((6, 6), bool)
    free[1:5, 2:6] = False
    assert np.all(after[free] != before[free])
    assert np.array_equal(after[1:5, 2:6], array(whole.kernel.value))


def test_views_in_layers_and_in_configs():
    entrance = keras.Input((4,))
    encoder = keras.layers.Dense(3, kernel_constraint=Equal("ae"))
    decoder = keras.layers.Dense(4, kernel_constraint=Equal("ae", view=Transpose()))
    model = keras.Model(entrance, decoder(encoder(entrance)))
    clone = keras.models.clone_model(model)
    for each in (model, clone):
        registry = equalize.GroupRegistry().link(each)
        x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
        fit(each, x=x, y=x)
        one, two = (array(layer.kernel.value) for layer in each.layers[1:])
        assert np.array_equal(one, two.T)
        registry.check()


def test_soft_ties_through_views():
    one, two = keras.Variable(np.float32([[1.0, 2.0, 3.0]])), keras.Variable(np.float32([[5.0], [2.0], [1.0]]))
    registry = equalize.GroupRegistry()
    registry.tie("g", [one, (two, Transpose())], MeanL2(factor=1.0))
    assert float(array(registry.penalty())) == pytest.approx((16 + 0 + 4) / 2)
    assert registry.spread() == {"g": 4.0}
    registry.sync("first", "g")
    assert array(two.value).tolist() == [[1.0], [2.0], [3.0]]


def test_a_frozen_member_holds_the_others_through_its_view():
    model, layers = model_of([None, Chain(Transpose(), Scale(2))])
    layers[1].trainable = False
    frozen = array(layers[1].kernel.value).copy()
    registry = equalize.GroupRegistry()
    registry.tie("g", [layers[0].kernel, (layers[1].kernel, Chain(Transpose(), Scale(2)))], Equal())
    x = np.random.default_rng(0).normal(size=(32, 5)).astype("float32")
    fit(model, x=x, y=x[:, :1])
    assert np.array_equal(array(layers[1].kernel.value), frozen)
    assert np.array_equal(array(layers[0].kernel.value), frozen.T / 2)


# ---- chains


def test_a_chain_multiplies_its_factors_once():
    chain = Chain(Scale(0.7), Flip(0), Chain(Scale(0.1), Transpose()), Scale(3.0))
    assert chain.factor == pytest.approx(0.21)
    assert [type(view) for view in chain.moves] == [Flip, Transpose]
    x = np.float32([[1.1, -2.3], [0.3, 7.7], [5.9, 0.1]])
    expected = (x * np.float32(chain.factor))[::-1].T
    assert np.array_equal(array(chain.forward(ops.convert_to_tensor(x))), expected)
    assert Chain.from_config(chain.get_config()) == chain
    assert Chain(Scale(0.5), Scale(2.0)).forward(x) is x


@given(st.data())
def test_entries_that_a_chain_leaves_free_keep_every_bit(data):
    dtype = data.draw(st.sampled_from(list(strategies.DTYPES)))
    moves = st.sampled_from([Flip(0), Flip(1), Rotate90(2), Scale(0.7), Scale(-3.0), Scale(1e-3)])
    before, after = data.draw(st.lists(moves, max_size=2)), data.draw(st.lists(moves, max_size=2))
    chain = Chain(*before, Slice((1, 0), (2, 3)), *after)
    member = data.draw(strategies.arrays((4, 5), dtype, specials=True))
    held = ops.convert_to_tensor(member)
    shown = array(chain.forward(ops.zeros((2, 3), dtype), held))
    free = array(chain.forward(ops.ones((2, 3)), ops.zeros((4, 5)))) == 0.0
    assert free.sum() == 14
    assert shown[free].tobytes() == array(held)[free].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_move_the_free_entries_of_a_chain_as_if_untied(dtype):
    values = np.array([[100.0, 1.1, 3.3], [0.7, 65000.0, 1e-3]])
    tied, member, untied = (keras.Variable(v, dtype=dtype) for v in (np.ones((2, 2)), values, values))
    view = Chain(Slice((0, 0), (2, 2)), Scale(1e-3))
    equalize.GroupRegistry().tie("g", [tied, (member, view)], Equal())
    optimizer = keras.optimizers.SGD(0.1)
    for _ in range(3):
        optimizer.apply([ops.ones(v.shape, dtype) for v in (tied, member, untied)], [tied, member, untied])
        assert array(member.value)[:, 2].tobytes() == array(untied.value)[:, 2].tobytes()
