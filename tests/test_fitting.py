"""Ties beside what else people use: each tool in earnest, where it is installed."""

import shutil

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from equalize.views import Transpose
from tests.conftest import bitwise_equal, data, fit, kernels, towers


def tied():
    model = towers(2, constraint=lambda: Equal("towers"))
    return model, equalize.GroupRegistry().link(model)


def test_the_summary_of_a_model_counts_every_member():
    model, registry = tied()
    lines = []
    model.summary(print_fn=lambda text, **kwargs: lines.append(text))
    assert f"Total params: {towers(2).count_params()}" in "\n".join(lines)
    registry.check()


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_a_picture_of_a_tied_model(tmp_path):
    pytest.importorskip("pydot")
    model, _registry = tied()
    keras.utils.plot_model(model, tmp_path / "model.png", show_shapes=True)
    assert (tmp_path / "model.png").stat().st_size > 0


@pytest.mark.slow
def test_tensorboard_writes_histograms_of_a_tied_model(tmp_path):
    pytest.importorskip("tensorboard")
    model, registry = tied()
    model.compile("adam", "mse")
    callbacks = [equalize.callbacks.TieMonitor(registry), keras.callbacks.TensorBoard(tmp_path, histogram_freq=1)]
    model.fit(*data(), validation_data=data(), verbose=0, callbacks=callbacks)
    assert list(tmp_path.rglob("events.*"))
    registry.check()


# Keras Tuner logs hyperparameters with TensorBoard, whose modules use deprecated parts of others.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_keras_tuner_makes_and_links_a_model_for_each_trial(tmp_path):
    keras_tuner = pytest.importorskip("keras_tuner")
    pytest.importorskip("tensorboard")
    registries = []

    def build(hyperparameters):
        model, registry = tied()
        exact = hyperparameters.Boolean("exact")
        model.compile(TiedOptimizer("sgd", registry) if exact else "sgd", "mse")
        registries.append(registry)
        return model

    tuner = keras_tuner.GridSearch(build, objective="val_loss", directory=tmp_path, project_name="trials")
    tuner.search(*data(), validation_data=data(), epochs=1, verbose=0)
    assert len(tuner.oracle.trials) == 2
    assert bitwise_equal(*kernels(tuner.get_best_models()[0]))
    registries[-1].check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_blocks_of_keras_hub_are_tied_like_layers():
    keras_hub = pytest.importorskip("keras_hub")
    entrance = keras.Input((3, 8))
    blocks = [keras_hub.layers.TransformerEncoder(8, 2, name=name) for name in ("first", "second")]
    model = keras.Model(entrance, blocks[1](blocks[0](entrance)))
    registry = equalize.GroupRegistry()
    assert len(registry.tie("blocks", blocks, Equal())) == 16
    x = np.random.default_rng(0).normal(size=(8, 3, 8)).astype("float32")
    fit(model, registry, x=x, y=x, optimizer=TiedOptimizer("sgd", registry))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_both_tables_of_a_reversible_embedding_of_keras_hub():
    keras_hub = pytest.importorskip("keras_hub")
    words = keras_hub.layers.ReversibleEmbedding(9, 4, tie_weights=False)
    entrance = keras.Input((5,), dtype="int32")
    model = keras.Model(entrance, words(words(entrance), reverse=True))
    registry = equalize.GroupRegistry()
    registry.tie("words", [words.embeddings, (words.reverse_embeddings, Transpose())], Equal())
    x = np.random.default_rng(0).integers(0, 9, (16, 5))
    fit(model, registry, x=x, y=x, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))


class Pruned(keras.constraints.Constraint):
    """A user's constraint: half of the weights are zero, the smallest ones."""

    def __call__(self, w):
        size = ops.abs(w)
        return w * ops.cast(size >= ops.median(size), w.dtype)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.sampled
def test_a_constraint_of_ones_own_holds_for_the_common_value(inner, exact):
    model = towers(2, constraint=(lambda: Equal("towers", inner=Pruned())) if inner else Pruned)
    registry = equalize.GroupRegistry()
    _ = registry.link(model) if inner else registry.tie("towers", kernels(model), Equal())
    fit(model, registry, optimizer=TiedOptimizer("rmsprop", registry) if exact else None)
    zeros = ops.convert_to_numpy(kernels(model)[0].value) == 0.0
    assert zeros.sum() == zeros.size // 2


@pytest.mark.filterwarnings("ignore")
def test_tensorflow_model_optimization_knows_no_models_of_keras_3():
    optimization = pytest.importorskip("tensorflow_model_optimization")
    for model in (towers(2), tied()[0]):
        with pytest.raises(ValueError, match="can only prune an object of the following types"):
            optimization.sparsity.keras.prune_low_magnitude(model)
