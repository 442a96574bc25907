"""Ties in models that people train: autoencoders of digits, and a model of characters with one embedding.

The embedding is that of Press and Wolf, Using the output embedding to improve language models (2017).
"""

import contextlib
import functools
import io
from collections.abc import Callable

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.datasets import load_digits

import equalize
from equalize._ties.rules import Rule
from equalize.constraints import Equal
from equalize.regularizers import MeanL2
from equalize.views import Transpose, View
from tests.conftest import bits, fit

# A rule for a member that shows the common value through a view.
Ruled = Callable[[str, View | None], Rule]


def hard(group: str, view: View | None = None) -> Rule:
    return Equal(group, view=view)


def soft(group: str, view: View | None = None) -> Rule:
    return MeanL2(group, 0.02, view=view)


def on(variable: str, rule: Rule) -> dict[str, Rule]:
    """The argument of a layer that puts the rule on one of its variables, for instance `kernel_constraint`."""
    return {f"{variable}_{rule.slot}": rule}


def array(variable) -> np.ndarray:
    return ops.convert_to_numpy(variable.value)


@contextlib.contextmanager
def tied(rule: Ruled, pairs):
    """A training under the rule: hard pairs end as mirrors of each other, soft ones that began as strangers alike."""

    def likeness():
        return [np.corrcoef(array(one).ravel(), mirror(array(other)).ravel())[0, 1] for one, other, mirror in pairs]

    before = [bits(one) for one, _, _ in pairs]
    assert rule is hard or max(likeness()) < 0.5
    yield
    assert all(bits(one) != old for (one, _, _), old in zip(pairs, before, strict=True))
    assert min(likeness()) > 0.9
    assert all(np.array_equal(array(one), mirror(array(other))) == (rule is hard) for one, other, mirror in pairs)


# ---- autoencoders of 8×8 images


@functools.cache
def digits() -> np.ndarray:
    return (load_digits().images[:1000] / 16.0).astype("float32")


def dense_autoencoder(rule: Ruled):
    """64 → 32 → 16 → 32 → 64, each kernel of the decoder the transpose of one of the encoder."""
    dense = functools.partial(keras.layers.Dense, activation="relu")
    outer, inner = (dense(width, **on("kernel", rule(name))) for width, name in ((32, "outer"), (16, "inner")))
    inner_back = dense(32, **on("kernel", rule("inner", Transpose())))
    outer_back = keras.layers.Dense(64, **on("kernel", rule("outer", Transpose())))
    entrance = keras.Input((8, 8))
    code = inner(outer(keras.layers.Flatten()(entrance)))
    model = keras.Model(entrance, keras.layers.Reshape((8, 8))(outer_back(inner_back(code))))
    return model, [(outer, outer_back), (inner, inner_back)]


def convolutional_autoencoder(rule: Ruled):
    """8×8×1 → 4×4×8 → 2×2×8 and back.

    No view: a `Conv2D` from a to b channels keeps (height, width, a, b), and so does the `Conv2DTranspose` from b to
    a, whose kernel is (height, width, out, in).
    """
    settings = {"kernel_size": 3, "strides": 2, "padding": "same"}
    down = [
        keras.layers.Conv2D(8, activation="relu", **settings, **on("kernel", rule(name))) for name in ("outer", "inner")
    ]
    inner_back = keras.layers.Conv2DTranspose(8, activation="relu", **settings, **on("kernel", rule("inner")))
    outer_back = keras.layers.Conv2DTranspose(1, **settings, **on("kernel", rule("outer")))
    entrance = keras.Input((8, 8))
    code = down[1](down[0](keras.layers.Reshape((8, 8, 1))(entrance)))
    model = keras.Model(entrance, keras.layers.Reshape((8, 8))(outer_back(inner_back(code))))
    return model, [(down[0], outer_back), (down[1], inner_back)]


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (dense_autoencoder, hard),
        (dense_autoencoder, soft),
        (convolutional_autoencoder, hard),
        pytest.param(convolutional_autoencoder, soft, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_tied_autoencoder_learns_to_reproduce_digits(build, rule):
    model, mirrored = build(rule)
    registry = equalize.GroupRegistry().link(model)
    assert sorted(registry) == ["inner", "outer"]
    x = digits()
    mirror = np.transpose if build is dense_autoencoder else np.asarray
    pairs = [(encoder.kernel, decoder.kernel, mirror) for encoder, decoder in mirrored]
    with tied(rule, pairs):
        fit(model, registry, x=x, y=x, epochs=10, batch_size=32, optimizer=keras.optimizers.Adam(0.01))
    error = np.mean(np.square(model.predict(x, verbose=0) - x))
    assert error < 0.5 * np.mean(np.square(x - x.mean(0)))  # the error of the mean image


def test_a_transposed_convolution_with_the_kernel_of_a_convolution_is_its_adjoint():
    settings = {"kernel_size": 3, "strides": 2, "padding": "same", "use_bias": False}
    down, up = keras.layers.Conv2D(5, **settings), keras.layers.Conv2DTranspose(2, **settings)
    random = np.random.default_rng(0)
    image, code = (random.normal(size=shape).astype("float32") for shape in ((1, 8, 8, 2), (1, 4, 4, 5)))
    down.build(image.shape)
    up.build(code.shape)
    assert tuple(down.kernel.shape) == tuple(up.kernel.shape) == (3, 3, 2, 5)
    equalize.GroupRegistry().tie("mirror", [down.kernel, up.kernel], Equal())
    inside = np.sum(ops.convert_to_numpy(down(image)) * code)
    assert inside == pytest.approx(np.sum(image * ops.convert_to_numpy(up(code))), rel=1e-4)


# ---- a model of characters


@functools.cache
def zen() -> tuple[np.ndarray, int]:
    """The Zen of Python, which every Python prints when it is told to `import this`, as numbers of characters."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = "".join(this.d.get(character, character) for character in this.s)
    alphabet = sorted(set(text))
    return np.array([alphabet.index(character) for character in text], "int32"), len(alphabet)


def next_characters(length=8):
    """Pieces of the text, and the character that follows each."""
    text, size = zen()
    pieces = np.lib.stride_tricks.sliding_window_view(text, length + 1)
    return pieces[:, :-1], pieces[:, -1], size


@pytest.mark.parametrize("rule", [hard, pytest.param(soft, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_embedding_of_what_is_read_is_the_embedding_of_what_is_written(rule):
    x, y, size = next_characters()
    width = 16
    embedding = keras.layers.Embedding(size, width, **on("embeddings", rule("characters")))
    logits = keras.layers.Dense(size, **on("kernel", rule("characters", Transpose())))
    entrance = keras.Input(x.shape[1:], dtype="int32")
    hidden = keras.layers.Dense(64, activation="relu")(keras.layers.Flatten()(embedding(entrance)))
    model = keras.Model(entrance, logits(keras.layers.Dense(width)(hidden)))
    registry = equalize.GroupRegistry().link(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with tied(rule, [(embedding.embeddings, logits.kernel, np.transpose)]):
        fit(model, registry, x=x, y=y, epochs=10, batch_size=32, optimizer=keras.optimizers.Adam(0.01), loss=loss)
    share = np.bincount(y, minlength=size) / len(y)
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))  # what one loses who knows the shares and no more
    assert float(ops.convert_to_numpy(loss(y, model.predict(x, verbose=0)))) < 0.5 * entropy
