import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from equalize._math import symmetry
from equalize.constraints import Invariant
from equalize.errors import EqualizeError
from equalize.views import Chain, Flip, Rotate90, Scale, Slice, Transpose
from tests import strategies
from tests.conftest import BACKEND, MODES, bits, compile_quickly

ROTATIONS = [Rotate90(1), Rotate90(2), Rotate90(3)]
GROUPS = {
    "symmetric": [Flip(0)],
    "antisymmetric": [Chain(Flip(0), Scale(-1))],
    "transposed": [Transpose((1, 0, 2, 3))],
    "rotations": ROTATIONS,
    "rotations with signs": [Chain(Rotate90(1), Scale(-1)), Rotate90(2), Chain(Rotate90(3), Scale(-1))],
    "square": [*ROTATIONS, Flip(0), Flip(1), Transpose((1, 0, 2, 3)), Chain(Transpose((1, 0, 2, 3)), Rotate90(2))],
    "with the identity": [Rotate90(0), Flip((0, 1))],
}


def array(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@given(st.data())
def test_the_result_is_bitwise_invariant_idempotent_and_the_mean(kind, dtype, data):
    w = data.draw(strategies.arrays((3, 3, 1, 2), dtype, bound=100.0))
    invariant = Invariant(GROUPS[kind])
    once = invariant(ops.convert_to_tensor(w))
    for view in GROUPS[kind]:
        assert np.array_equal(array(view.forward(once)), array(once))
    assert array(invariant(once)).tobytes() == array(once).tobytes()
    views = [view for view in GROUPS[kind] if view != Rotate90(0)]
    wide = [w.astype("float64"), *(array(v.forward(ops.convert_to_tensor(w))).astype("float64") for v in views)]
    slack = {"float32": 1e-5, "float16": 0.1, "bfloat16": 1.0}[dtype]
    np.testing.assert_allclose(array(once).astype("float64"), np.mean(wide, axis=0), atol=slack)


def test_by_hand():
    w = ops.convert_to_tensor(np.float32([1.0, 2.0, 6.0]))
    assert array(Invariant([Flip(0)])(w)).tolist() == [3.5, 2.0, 3.5]
    assert array(Invariant([Chain(Flip(0), Scale(-1))])(w)).tolist() == [-2.5, 0.0, 2.5]


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([Rotate90(1)], r"do not form a group: Rotate90\(k=1.*followed by"),
        ([Flip(0), Flip(1)], "do not form a group"),
        ([Scale(2)], "changes more than the order and signs"),
        ([Slice((0, 0), (2, 2))], "takes a variable of shape"),
    ],
)
def test_views_that_form_no_group(views, message):
    with pytest.raises(EqualizeError, match=message):
        Invariant(views)(ops.zeros((3, 3)))


def test_views_that_turn_a_rectangle():
    with pytest.raises(EqualizeError, match="another shape"):
        Invariant(ROTATIONS)(ops.zeros((3, 5)))


def test_bad_arguments():
    with pytest.raises(EqualizeError, match="at least one view"):
        Invariant([])
    with pytest.raises(TypeError, match="must be a list of views"):
        Invariant(Flip(0))
    with pytest.raises(TypeError, match="must be a view"):
        Invariant(["Flip"])


def test_config_round_trip():
    invariant = Invariant(GROUPS["antisymmetric"], inner=keras.constraints.MaxNorm(2.0))
    config = keras.saving.serialize_keras_object(invariant)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == invariant.get_config()
    assert copy.views == invariant.views


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_filters_stay_invariant_in_training(mode, tmp_path):
    symmetry._orbits.cache_clear()  # so that the first to ask is the step
    symmetry._signed_permutations.cache_clear()
    entrance = keras.Input((6, 6, 1))
    filters = {
        kind: keras.layers.Conv2D(2, 3, kernel_constraint=Invariant(views), name=kind.replace(" ", "_"))
        for kind, views in GROUPS.items()
    }
    flat = [keras.layers.Flatten()(layer(entrance)) for layer in filters.values()]
    model = keras.Model(entrance, keras.layers.Dense(1)(keras.layers.Concatenate()(flat)))
    random = np.random.default_rng(0)
    x, y = random.normal(size=(16, 6, 6, 1)).astype("float32"), random.normal(size=(16, 1)).astype("float32")
    seen = {kind: {bits(layer.kernel)} for kind, layer in filters.items()}

    class Check(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if BACKEND == "jax":
                self.model.jax_state_sync()
            for kind, layer in filters.items():
                kernel = ops.convert_to_tensor(array(layer.kernel.value))
                assert all(np.array_equal(array(v.forward(kernel)), array(kernel)) for v in GROUPS[kind]), kind
                seen[kind].add(bits(layer.kernel))

    compile_quickly(model, keras.optimizers.SGD(0.01, momentum=0.9), "mse", **MODES[mode])
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[Check()])
    assert [len(values) for values in seen.values()] == [9] * len(GROUPS)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for kind, layer in filters.items():
        constraint = loaded.get_layer(layer.name).kernel.constraint
        assert isinstance(constraint, Invariant)
        assert constraint.views == tuple(GROUPS[kind])
