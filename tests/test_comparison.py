"""`compare` on small models and data of which the best way to tie is known, and what a `Comparison` shows."""

import csv
import gc
import json
import math
import random
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize import Comparison, compare
from equalize._reports.results import rows
from equalize.callbacks import PeriodicSync, TieMonitor
from equalize.constraints import Equal
from equalize.errors import EqualizeError
from equalize.optimizers import TiedOptimizer
from equalize.reductions import MGDA
from equalize.regularizers import MeanL2, PairwiseNorm, TraceNorm
from equalize.views import Transpose
from tests.conftest import BACKEND, MODES

QUICKLY = {"run_eagerly": True}  # each run would compile a model, for a few steps


def heads(tasks=3, inputs=4, **arguments):
    """A function that makes one linear model a task, and one that says what to tie."""

    def make():
        entrances = [keras.Input((inputs,)) for _ in range(tasks)]
        return keras.Model(entrances, [keras.layers.Dense(1, use_bias=False, **arguments)(x) for x in entrances])

    return make, lambda model: {"heads": [layer.kernel for layer in model.layers[tasks:]]}


def drawn(truths, samples, noise=0.0, seed=0):
    """Inputs and targets of tasks, each with weights of its own."""
    generator = np.random.default_rng(seed)
    x = [generator.normal(size=(samples, len(truth))).astype("float32") for truth in truths]
    y = [part @ np.reshape(truth, (-1, 1)) for part, truth in zip(x, truths, strict=True)]
    return x, [part + noise * generator.normal(size=part.shape) for part in y]


def settings(optimizer="sgd", tasks=3, rate=0.05, **fit):
    """Arguments of `compare` for such models."""
    optimizer = keras.optimizers.SGD(rate) if optimizer == "sgd" else optimizer
    return {
        "compile": {"optimizer": optimizer, "loss": ["mse"] * tasks, **QUICKLY},
        "fit": {"epochs": 2, "batch_size": 8, **fit},
    }


def towers(dropout=0.3):
    entrance = keras.Input((4,))
    parts = [keras.layers.Dense(4, activation="tanh", name=name)(entrance) for name in ("left", "right")]
    hidden = keras.layers.Dropout(dropout)(keras.layers.concatenate([parts[0], -parts[1]]))
    return keras.Model(entrance, keras.layers.Dense(2, activation="softmax")(hidden))


def both(model):
    return {"towers": [model.get_layer("left"), model.get_layer("right")]}


def classified(samples=48):
    x = np.random.default_rng(0).normal(size=(samples, 4)).astype("float32")
    return x, (x[:, 0] > 0).astype("int32")


CLASSIFY = {
    "compile": {"optimizer": "adam", "loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"], **QUICKLY},
    "fit": {"epochs": 2, "batch_size": 8},
}


def by_way(comparison, key="score"):
    return {(record["way"], record["strength"], record["seed"]): record[key] for record in comparison.records}


# ---- what is compared


@pytest.mark.sampled
@pytest.mark.parametrize("mode", MODES)
def test_all_ways_of_a_seed_have_one_start_and_the_same_batches(mode):
    arguments = CLASSIFY | {"compile": CLASSIFY["compile"] | {"run_eagerly": False} | MODES[mode]}
    comparison = compare(towers, both, *classified(), ways=["untied", "exact", "shared", "hard"], seeds=2, **arguments)
    scores = by_way(comparison)
    for seed in range(2):
        assert scores["exact", None, seed] == pytest.approx(scores["shared", None, seed], rel=1e-5)
        assert scores["exact", None, seed] != pytest.approx(scores["hard", None, seed], rel=1e-5)
    assert scores["exact", None, 0] != scores["exact", None, 1]
    again = compare(towers, both, *classified(), ways=["exact"], seeds=[1], **arguments)
    assert by_way(again).items() <= scores.items()


def test_batches_are_the_same_whatever_random_numbers_a_way_draws():
    def drawing(model, registry, members):
        np.random.normal()
        random.random()
        keras.random.normal((2,))
        if BACKEND == "torch":
            import torch

            torch.rand(2)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            tf.random.normal((2,))
        return keras.callbacks.TerminateOnNaN()

    scores = by_way(compare(towers, both, *classified(), ways=["untied", drawing], seeds=1, **CLASSIFY))
    assert scores["untied", None, 0] == scores["drawing", None, 0]


def test_a_run_is_that_of_a_loop_by_hand():
    x, y = classified()
    held = classified(20)
    comparison = compare(towers, both, x, y, ways=["untied"], seeds=1, validation_data=held, **CLASSIFY)
    keras.utils.set_random_seed(0)
    model = towers()
    keras.utils.set_random_seed(0)
    model.compile(**CLASSIFY["compile"])
    model.fit(x, y, verbose=0, **CLASSIFY["fit"])
    assert comparison.records[0]["score"] == model.evaluate(*held, batch_size=8, verbose=0)[0]


def test_tasks_that_are_one_are_best_tied_and_others_best_free():
    one = np.random.default_rng(1).normal(size=10)
    unlike = np.random.default_rng(2).normal(size=(3, 10))
    for truths, samples, noise, expected in (([one] * 3, 14, 1.0, "hard"), (unlike, 60, 0.0, "untied")):
        x, y = drawn(truths, samples, noise)
        held = drawn(truths, 100, seed=3)
        arguments = settings(rate=0.2, epochs=8, batch_size=60)
        ways = ["untied", "hard"]
        comparison = compare(*heads(inputs=10), x, y, ways=ways, seeds=2, validation_data=held, **arguments)
        assert comparison.best == (expected, None)


def test_strengths_are_chosen_on_a_part_of_the_training_data_and_never_on_the_validation_data():
    x, y = drawn([np.ones(10)] * 3, 20, noise=1.0)
    ways, arguments = [("soft", [0.0, 1.0])], settings(rate=0.2, epochs=10, batch_size=20)
    found = []
    for truths in (np.ones((3, 10)), 9 * np.eye(10)[:3]):
        held = drawn(truths, 50)
        found.append(compare(*heads(inputs=10), x, y, ways=ways, seeds=2, validation_data=held, **arguments))
    assert by_way(found[0], "choice_score") == by_way(found[1], "choice_score")
    assert by_way(found[0]) != by_way(found[1])
    choices = by_way(found[0], "choice_score")
    assert all(choices["soft", 1.0, seed] < choices["soft", 0.0, seed] for seed in range(2))
    assert [comparison.best for comparison in found] == [("soft", 1.0)] * 2


def test_penalties_do_not_count():
    make, members = heads(kernel_regularizer=keras.regularizers.L2(10.0))
    x, y = drawn(np.eye(4)[:3], 20)
    arguments = settings()
    arguments["compile"]["metrics"] = [["mse"]] * 3
    ways = ["untied", "hard", MeanL2(factor=5.0)]
    seen = {}

    class Watch(keras.callbacks.Callback):  # with callbacks, the model is evaluated in `fit` already
        def on_epoch_end(self, epoch, logs=None):
            seen["val_loss"] = (logs or {})["val_loss"]

    arguments["fit"] |= {"callbacks": [Watch()], "validation_split": 0.2}
    comparison = compare(make, members, x, y, ways=ways, seeds=1, validation_data=(x, y), **arguments)
    for record in comparison.records:
        assert 0.0 < record["score"] < seen["val_loss"]  # which has the penalties
    names = [f"{layer.name}_mse" for layer in make().layers[3:]]
    assert len(names) == 3
    free, (x, y) = heads()[0], drawn(np.eye(4)[:3], 20)
    keras.utils.set_random_seed(0)
    model = free()
    model.compile("sgd", ["mse"] * 3)
    loss = compare(make, members, x, y, ways=["untied"], seeds=1, validation_data=(x, y), **settings(rate=0.0)).records[
        0
    ]["score"]
    assert loss == pytest.approx(model.evaluate(x, y, verbose=0)[0], rel=1e-5)


def test_metrics_by_name_and_which_direction_is_better():
    x, y = classified()
    comparison = compare(towers, both, x, y, ways=["untied", "exact"], seeds=1, metric="accuracy", **CLASSIFY)
    assert comparison.mode == "max"
    best, other = (r["score"] for r in sorted(comparison.records, key=lambda r: r["way"] != comparison.best[0]))
    assert best >= other
    assert all(0.0 <= r["score"] <= 1.0 < r["loss"] + 1.0 for r in comparison.records)
    other_way = compare(towers, both, x, y, ways=["untied"], seeds=1, metric="accuracy", mode="min", **CLASSIFY)
    assert other_way.mode == "min"
    with pytest.raises(EqualizeError, match=r"one of \['accuracy', 'loss'\]. Received: 'auc'"):
        compare(towers, both, x, y, ways=["untied"], metric="auc", **CLASSIFY)
    for name in ("quality", "error_score"):
        with pytest.raises(EqualizeError, match="cannot be told from the name"):
            compare(towers, both, x, y, metric=name, **CLASSIFY)


# ---- ways


def test_rules_grids_and_functions_are_ways():
    def synchronized(model, registry, members):
        for name, each in members.items():
            registry.tie(name, each, None)
            registry.sync("first", name)
        return PeriodicSync(registry, every=1)

    def reduced(model, registry, members, strength):
        for name, each in members.items():
            registry.tie(name, each, Equal())
        monitor = TieMonitor(registry)
        return [monitor, lambda optimizer: TiedOptimizer(optimizer, registry, reduction="mean"), None]

    def still(model, registry, members):
        return keras.optimizers.SGD(0.0)

    ways = [
        "untied",
        "hard",
        synchronized,
        (reduced, [1.0]),
        still,
        MeanL2(factor=0.3),
        (PairwiseNorm, [0.5]),
        (TraceNorm(inner="l2"), [0.1, 0.2]),
        PairwiseNorm(factor=np.ones((3, 3))),
        MGDA(),
    ]
    x, y = drawn(np.eye(4)[:3], 24)
    comparison = compare(*heads(), x, y, ways=ways, seeds=1, **settings())
    assert [r["error"] for r in comparison.records] == [None] * 11
    scores = by_way(comparison)
    assert scores["synchronized", None, 0] == pytest.approx(scores["hard", None, 0], rel=1e-5)  # SGD, one step each
    assert scores["reduced", 1.0, 0] == pytest.approx(scores["hard", None, 0], rel=1e-5)
    assert len({round(scores[name, None, 0], 5) for name in ("untied", "hard", "still")}) == 3
    assert ("MeanL2", 0.3, 0) in scores
    assert ("PairwiseNorm", 0.5, 0) in scores
    assert any(name.startswith("PairwiseNorm(") for name, *_ in scores)
    assert len([r for r in comparison.records if r["way"].startswith("TraceNorm")]) == 2
    spread = by_way(comparison, "spread")
    assert (
        spread["hard", None, 0]
        == spread["reduced", 1.0, 0]
        == spread["exact, MGDA()", None, 0]
        == 0.0
        < spread["untied", None, 0]
    )
    free = by_way(comparison, "free_weights")
    assert (free["untied", None, 0], free["hard", None, 0], free["MeanL2", 0.3, 0]) == (12, 4, 12)


def test_all_ways_are_tried_by_default():
    comparison = compare(*heads(2), *drawn(np.eye(4)[:2], 20), seeds=1, **settings(tasks=2))
    assert list(dict.fromkeys(r["way"] for r in comparison.records)) == [
        "untied",
        "shared",
        "exact",
        "hard",
        "partial",
        "soft",
    ]
    assert [r["error"] for r in comparison.records] == [None] * 11


def test_what_fails_in_one_way_is_a_row_and_the_others_go_on():
    def unlike():
        entrance = keras.Input((4,))
        outputs = [keras.layers.Dense(units)(entrance) for units in (1, 2)]
        return keras.Model(entrance, keras.layers.concatenate(outputs))

    def far(model, registry, members):
        return keras.optimizers.SGD(1e30)

    x, y = np.ones((20, 4), "float32"), np.ones((20, 3), "float32")
    arguments = {"compile": {"loss": "mse", **QUICKLY}, "fit": {"epochs": 4}}
    ways = ["hard", far, "untied"]
    comparison = compare(unlike, lambda m: {"pair": m.layers[1:3]}, x, y, ways=ways, seeds=1, **arguments)
    assert comparison.best == ("untied", None)
    errors = by_way(comparison, "error")
    assert errors["hard", None, 0].startswith("GroupMismatchError: Cannot tie")
    assert errors["far", None, 0] is None
    assert not math.isfinite(by_way(comparison)["far", None, 0])
    text = []
    comparison.summary(print_fn=text.append)
    assert "hard: GroupMismatchError" in text[0]
    assert "far: diverged" in text[0]


def test_where_no_way_can_be_trained_that_is_an_error():
    x, y = classified()
    with pytest.raises(EqualizeError, match=r"(?s)No way could be trained.*untied: ValueError") as caught:
        compare(towers, both, x[:, :3], y, seeds=1, **CLASSIFY)
    assert isinstance(caught.value.__cause__, ValueError)


def test_transposed_views():
    def autoencoder():
        entrance = keras.Input((6,))
        code = keras.layers.Dense(2, name="encoder")(entrance)
        return keras.Model(entrance, keras.layers.Dense(6, name="decoder")(code))

    def pair(model):
        return {"ae": [model.get_layer("encoder").kernel, (model.get_layer("decoder").kernel, Transpose())]}

    x = np.random.default_rng(0).random((40, 6)).astype("float32")
    arguments = {"compile": {"optimizer": "sgd", "loss": "mse", **QUICKLY}, "fit": {"epochs": 2}}
    comparison = compare(autoencoder, pair, x, x, ways=["untied", "exact", "hard", "shared"], seeds=1, **arguments)
    errors = by_way(comparison, "error")
    assert [errors[name, None, 0] for name in ("untied", "exact", "hard")] == [None] * 3
    assert "'shared' does not suit group 'ae'" in errors["shared", None, 0]
    assert by_way(comparison, "free_weights")["exact", None, 0] == 12 + 8


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = [keras.layers.Dense(3) for _ in range(2)]

    def call(self, inputs):
        return ops.concatenate([part(inputs[key]) for part, key in zip(self.parts, "ab", strict=True)], axis=-1)


def test_subclassed_models_and_structures_of_inputs():
    x = {key: np.random.default_rng(0).normal(size=(20, 4)).astype("float32") for key in "ab"}
    y = np.concatenate([x["a"][:, :3], x["b"][:, :3]], axis=1)

    def make():
        model = Subclassed()
        model(x)
        return model

    arguments = {"compile": {"optimizer": "sgd", "loss": "mse", **QUICKLY}, "fit": {"epochs": 1}}
    comparison = compare(make, lambda m: {"parts": m.parts}, x, y, ways=["untied", "exact"], seeds=1, **arguments)
    assert [record["error"] for record in comparison.records] == [None] * 2
    assert math.isnan(comparison.records[0]["step_seconds"])  # the one epoch compiles
    with pytest.raises(EqualizeError, match="which is not built"):
        compare(Subclassed, lambda m: {"parts": m.parts}, x, y, seeds=1, **arguments)


class CountingSteps(keras.Sequential):
    """Counts how often its training step runs, or is traced."""

    steps = 0

    def train_step(self, *arguments, **named):
        CountingSteps.steps += 1
        return super().train_step(*arguments, **named)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends build all before they trace")
def test_a_step_is_traced_once():
    def make():
        return CountingSteps([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(4)])

    arguments = {
        "compile": {"optimizer": "adam", "loss": "mse", "metrics": ["mae"]},
        "fit": {"epochs": 2, "batch_size": 8},
    }
    x = np.ones((32, 4), "float32")
    ways = ["untied", "exact", "hard", "soft", "shared"]
    CountingSteps.steps = 0
    comparison = compare(make, lambda model: {"layers": model.layers}, x, x, ways=ways, seeds=1, **arguments)
    assert [record["error"] for record in comparison.records] == [None] * len(comparison.records)
    assert CountingSteps.steps == len(comparison.records)


class OwnSteps(keras.Sequential):
    """Its metrics need what its steps note."""

    def train_step(self, data):
        self.noted = True
        return super().train_step(data)

    def test_step(self, data):
        self.noted = True
        return super().test_step(data)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        assert self.noted
        return super().compute_metrics(x, y, y_pred, sample_weight)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="on other backends Keras asks for metrics before its steps")
def test_what_cannot_be_built_before_training_is_built_by_it():
    arguments = {"compile": {"optimizer": "adam", "loss": "mse", "metrics": ["mae"]}, "fit": {"epochs": 1}}
    x = np.ones((8, 4), "float32")

    def make():
        return OwnSteps([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(4)])

    comparison = compare(make, lambda model: {"layers": model.layers}, x, x, ways=["hard"], seeds=1, **arguments)
    assert comparison.records[0]["error"] is None


# ---- what users give


def refusing(*_):
    raise RuntimeError("no such thing")


def test_functions_of_the_user_that_fail_or_return_something_else_are_errors():
    x, y = classified()
    model = towers()
    tied = towers()
    equalize.GroupRegistry().tie("towers", both(tied)["towers"], Equal())
    for make, members, message in (
        (refusing, both, r"`make_model` failed: .* RuntimeError: no such thing"),
        (lambda: 3, both, "must return a new model"),
        (lambda: model, both, "the model of before"),
        (lambda: tied, both, r"not tied. Received: .* '\w+/kernel' has a rule"),
        (towers, refusing, r"`members` failed: .* RuntimeError"),
        (towers, lambda m: m.layers, "must return what to tie by the names of groups"),
        (towers, lambda m: {}, "must return what to tie by the names of groups"),
    ):
        with pytest.raises(EqualizeError, match=message):
            compare(make, members, x, y, ways=["untied"], seeds=2, **CLASSIFY)


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.05, momentum=0.5),
        keras.optimizers.serialize(keras.optimizers.SGD(0.05, momentum=0.5)),
        lambda: keras.optimizers.SGD(0.05, momentum=0.5),
    ],
    ids=["object", "config", "function"],
)
def test_each_run_has_a_new_optimizer(optimizer):
    x, y = drawn(np.eye(4)[:3], 20)
    comparison = compare(*heads(), x, y, ways=["untied"], seeds=[1, 0], **settings(optimizer))
    alone = compare(*heads(), x, y, ways=["untied"], seeds=[0], **settings(optimizer))
    assert by_way(alone).items() <= by_way(comparison).items()
    if isinstance(optimizer, keras.optimizers.Optimizer):
        assert not optimizer.built


def test_a_function_compiles():
    x, y = drawn(np.eye(4)[:3], 20)
    arguments = settings()
    by_dict = compare(*heads(), x, y, ways=["untied", "exact"], seeds=1, **arguments)

    def compiled(model):
        model.compile(keras.optimizers.SGD(0.05), **{k: v for k, v in arguments["compile"].items() if k != "optimizer"})

    by_function = compare(*heads(), x, y, ways=["untied", "exact"], seeds=1, **(arguments | {"compile": compiled}))
    assert by_way(by_function) == by_way(by_dict)


def test_callbacks_see_results_on_the_part_that_strengths_are_chosen_on():
    x, y = drawn(np.eye(4)[:3], 20)
    made = []

    def stopping():
        made.append(keras.callbacks.EarlyStopping("val_loss", min_delta=1e9, patience=1))
        return made[-1:]

    arguments = settings(epochs=9, callbacks=stopping)
    compare(*heads(), x, y, ways=[("soft", [0.0, 1.0])], seeds=1, **arguments)
    assert [callback.stopped_epoch for callback in made] == [1, 1]


def test_averages_of_weights_are_tied_too():
    x, y = drawn(np.eye(4)[:3], 20)
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)
    comparison = compare(*heads(), x, y, ways=["hard", "exact"], seeds=1, **settings(optimizer))
    assert [record["spread"] for record in comparison.records] == [0.0, 0.0]


def dataset(*arrays, batch=8):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch)


def test_data_sets_of_tensorflow_are_arrays_with_a_size_of_batches():
    x, y = classified()
    weights = np.linspace(0.0, 2.0, len(x)).astype("float32")
    held = classified(24)
    arguments = {"compile": CLASSIFY["compile"], "fit": {"epochs": 2}}
    ways = {"ways": [("soft", [0.0, 1.0])], "seeds": 1}
    of_set = compare(towers, both, dataset(x, y, weights), **ways, validation_data=dataset(*held), **arguments)
    arguments["fit"] |= {"batch_size": 8, "sample_weight": weights}
    of_arrays = compare(towers, both, x, y, **ways, validation_data=held, **arguments)
    assert by_way(of_set) == by_way(of_arrays)
    assert by_way(of_set, "choice_score") == by_way(of_arrays, "choice_score")


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return classified(4)


def test_other_data_are_a_clear_error():
    x, y = classified()
    pairs = dataset(x, y)
    unbatched = pairs.unbatch()
    for data, error, message in (
        (((x, y) for _ in range(3)), TypeError, "Read a generator into arrays first"),
        (Sequence(), TypeError, "must be arrays, or structures of them"),
        (pairs.repeat(), EqualizeError, "one that ends and has batches"),
        (unbatched.map(lambda x, y: (x[0], y)), EqualizeError, "one that ends and has batches"),
        (pairs.take(0), EqualizeError, "one that ends and has batches"),
        (x[:0], EqualizeError, "one number of samples, at least one"),
        (x[:2], EqualizeError, "too few samples"),
    ):
        with pytest.raises(error, match=message):
            compare(towers, both, data, seeds=1, **CLASSIFY)
    with pytest.raises(TypeError, match="which has the targets"):
        compare(towers, both, pairs, y, seeds=1, **CLASSIFY)
    with pytest.raises(EqualizeError, match=r"arrays with \[48, 47\] samples"):
        compare(towers, both, x, y[1:], seeds=1, **CLASSIFY)
    for held in (x, [x], "xy"):
        with pytest.raises((TypeError, EqualizeError), match="validation_data"):
            compare(towers, both, x, y, validation_data=held, seeds=1, **CLASSIFY)


def test_parts_of_the_data_do_not_overlap(monkeypatch):
    seen = []
    x = np.arange(60, dtype="float32").reshape(60, 1)

    class Seen(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = keras.layers.Dense(1)
            self.other = keras.layers.Dense(1)

        def call(self, inputs):
            return self.layer(inputs) + self.other(inputs)

        def fit(self, x, y, **arguments):
            seen.append(x)
            return super().fit(x, y, **arguments)

        def evaluate(self, x, y, **arguments):
            seen.append(x)
            return super().evaluate(x, y, **arguments)

    def make():
        model = Seen()
        model(x)
        return model

    ways = [("soft", [0.0, 1.0])]
    arguments = {"compile": {"loss": "mse", **QUICKLY}, "fit": {"epochs": 1, "validation_split": 0.25}}
    comparison = compare(make, lambda m: {"pair": [m.layer, m.other]}, x, x, ways=ways, seeds=2, **arguments)
    assert [len(part) for part in seen[:3]] == [33, 12, 15]
    for train, test, choice in (seen[:3], seen[-3:]):
        assert sorted(np.concatenate([train, test, choice]).ravel()) == list(range(60))
    assert not np.array_equal(seen[1], seen[-2])  # another part for another seed
    text = []
    comparison.summary(print_fn=text.append)
    flat = " ".join(text[0].split())
    assert "Trained on 33 samples; compared on 12, held out, without `validation_data`." in flat
    assert "Strengths chosen on 15 others" in flat


# ---- interrupted runs


class Stopping:
    """Makes models, and is interrupted at one of them."""

    def __init__(self, make, stop):
        self.make, self.stop, self.made = make, stop, 0

    def __call__(self):
        self.made += 1
        if self.made == self.stop:
            raise KeyboardInterrupt
        return self.make()


def test_an_interrupted_comparison_goes_on(tmp_path):
    x, y = drawn(np.eye(4)[:3], 20)
    make, members = heads()
    arguments = settings() | {"ways": ["untied", ("soft", [0.1, 1.0])], "seeds": 2}
    whole = compare(make, members, x, y, **arguments)
    file = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare(Stopping(make, 5), members, x, y, path=file, **arguments)  # one model more for the settings
    lines = file.read_text().splitlines()
    assert len(lines) == 4
    file.write_text("\n".join(lines) + '\n{"key": "cut o')
    rest = Stopping(make, None)
    resumed = compare(rest, members, x, y, path=file, **arguments)
    assert rest.made == 1 + 3
    assert by_way(resumed) == by_way(whole)
    assert math.isnan(by_way(resumed, "choice_score")["untied", None, 0])
    more = Stopping(make, None)
    compare(more, members, x, y, path=file, **(arguments | {"ways": ["untied", ("soft", [0.1, 1.0, 2.0])]}))
    assert more.made == 1 + 2
    for changed, what in (
        ({"fit": {"epochs": 3, "batch_size": 8}}, "fit"),
        ({"compile": settings(rate=0.1)["compile"]}, "compile"),
        ({"validation_data": (x, y)}, "validation_data"),
    ):
        with pytest.raises(EqualizeError, match=f"a comparison with another {what}: .* Give another `path`"):
            compare(make, members, x, y, path=file, **(arguments | changed))
    with pytest.raises(EqualizeError, match="another data"):
        compare(make, members, x, [part + 1 for part in y], path=file, **arguments)
    with pytest.raises(EqualizeError, match="another model"):
        compare(make, lambda m: {"heads": members(m)["heads"][:2]}, x, y, path=file, **arguments)
    file.write_text("somebody's notes")
    with pytest.raises(EqualizeError, match="something else"):
        compare(make, members, x, y, path=file, **arguments)
    assert file.read_text() == "somebody's notes"


def test_what_failed_is_tried_again(tmp_path):
    calls = []

    def fails_once(model, registry, members):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("once")

    x, y = drawn(np.eye(4)[:3], 20)
    arguments = settings() | {"ways": ["untied", fails_once], "seeds": 1, "path": tmp_path / "runs.jsonl"}
    errors = [compare(*heads(), x, y, **arguments).records[1]["error"] for _ in range(2)]
    assert errors == ["RuntimeError: once", None]


# ---- memory


def test_models_are_let_go():
    x, y = drawn(np.eye(4)[:3], 20)
    make, members = heads()
    alive = []

    def watched():
        model = make()
        alive.append(weakref.ref(model))
        return model

    comparison = compare(watched, members, x, y, ways=["untied", "exact", "soft"], seeds=1, **settings())
    gc.collect()
    assert len(alive) == len(comparison.records) == 6
    assert [reference for reference in alive if reference() is not None] == []


# ---- what is shown


def record(way, strength, seed, score, choice=math.nan, **more):
    made = {"way": way, "strength": strength, "seed": seed, "score": score, "choice_score": choice, "loss": score}
    return made | {"step_seconds": 0.5, "spread": 0.0, "free_weights": 7, "seconds": 1.0, "error": None} | more


RECORDS = [
    *(record("untied", None, seed, score, step_seconds=0.25) for seed, score in enumerate((3.0, 4.0, 5.0))),
    *(record("soft", 0.1, seed, 2.0 + seed, choice=1.0) for seed in range(3)),
    *(record("soft", 1.0, seed, 1.0 + seed, choice=2.0) for seed in range(3)),
    *(record("exact", None, seed, score) for seed, score in enumerate((2.1, 2.8, 4.2))),
    *(record("hard", None, seed, math.nan, error="ValueError: [no]") for seed in range(3)),
    *(record("wild", None, seed, score) for seed, score in enumerate((2.0, 3.0, 4e9))),
]


def test_rows_are_sorted_chosen_and_marked():
    found = rows(RECORDS, lower=True)
    assert [row.way for row in found] == ["soft", "exact", "untied", "wild", "hard"]
    soft, exact, untied, wild, hard = found
    assert (soft.strength, soft.score, soft.at_end) == (0.1, 3.0, True)  # 1.0 is better by what it was not chosen by
    assert soft.error == pytest.approx(1 / math.sqrt(3))
    assert [row.close for row in found] == [False, True, False, False, False]
    assert (soft.step, untied.step) == (2.0, 1.0)
    assert (hard.problem, hard.scores) == ("ValueError: [no]", ())
    assert wild.problem is exact.problem is None
    assert [row.way for row in rows(RECORDS, lower=False)][:2] == ["wild", "untied"]
    (alone,) = rows([record("untied", None, 0, 1.0)], lower=True)
    assert math.isnan(alone.error)


def test_the_table_is_plain_and_fits_a_log():
    comparison = Comparison(RECORDS, "loss", "min", ["[A note]."])
    text = []
    comparison.summary(print_fn=text.append)
    lines = text[0].splitlines()
    assert text[0].isascii()
    assert max(map(len, lines)) <= 80
    for part in ("3 +- 0.58", "~", "2.00x", "failed", "hard: ValueError: [no]", "[A note].", "lower is better"):
        assert part in text[0]
    assert "At an end of the strengths that were tried: 'soft' at 0.1." in " ".join(text[0].split())
    assert repr(comparison) == "<Comparison of 5 ways by 'loss': soft at 0.1 is best>"


def test_the_table_is_printed_by_default(capsys):
    Comparison(RECORDS, "loss", "min", []).summary()
    assert "soft" in capsys.readouterr().out


def test_records_are_saved(tmp_path):
    comparison = Comparison(RECORDS, "loss", "min", ["note"])
    comparison.save(tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["best"], found["metric"], found["notes"]) == (["soft", 0.1], "loss", ["note"])
    assert found["records"][0] == RECORDS[0] | {"choice_score": None}
    comparison.save(str(tmp_path / "found.csv"))
    with open(tmp_path / "found.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(RECORDS)
    assert (lines[3]["way"], float(lines[3]["strength"]), float(lines[3]["score"])) == ("soft", 0.1, 2.0)
    for name in ("found.txt", "nowhere/found.csv"):
        with pytest.raises(EqualizeError, match="`path` must be"):
            comparison.save(tmp_path / name)


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:3], RECORDS[3:9]], ids=["all", "no strengths", "only strengths"])
def test_the_picture_has_a_panel_for_each_way_with_strengths(tmp_path, records, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    savefig = figure_class.savefig
    monkeypatch.setattr(figure_class, "savefig", lambda f, *a, **k: (figures.append(f), savefig(f, *a, **k)))
    Comparison(records, "loss", "min", []).plot(tmp_path / "found.png")
    (axes,) = figures[0].axes
    marks = [label.get_text() for label in axes.get_xticklabels()]
    ways = {r["way"] for r in records}
    assert marks == [
        *(["untied"] if "untied" in ways else []),
        *(["0.1", "1"] if "soft" in ways else []),
        *(["exact", "wild"] if "exact" in ways else []),
    ]
    assert axes.get_yscale() == ("log" if "wild" in ways else "linear")
