"""What `compare` refuses."""

import functools
import pathlib
import tempfile

import keras
import numpy as np
import pytest

import equalize
from equalize.constraints import Equal
from equalize.views import Transpose
from tests.messages import Nothing, message, refusing

X = np.ones((12, 4), "float32")
COMPILE = {"optimizer": "sgd", "loss": "mse", "run_eagerly": True}


def model():
    inputs = keras.Input((4,), name="inputs")
    layers = [keras.layers.Dense(4, name=name) for name in ("left", "right")]
    return keras.Model(inputs, keras.layers.add([layer(inputs) for layer in layers], name="sum"), name="model")


def pair(model):
    return {"pair": [model.get_layer("left"), model.get_layer("right")]}


def compare(make_model=model, members=pair, x=X, y=X, **changes):
    arguments = {"ways": ["untied"], "compile": COMPILE, "fit": {"epochs": 1}, "seeds": 1, "validation_data": (X, X)}
    return equalize.compare(make_model, members, x, y, **(arguments | changes))


class FewBatches:
    """As a `tf.data.Dataset` without an end."""

    element_spec = as_numpy_iterator = None

    def cardinality(self):
        return -1

    def __repr__(self):
        return "<dataset>"


def tied_model():
    made = model()
    equalize.GroupRegistry().tie("pair", [layer.kernel for layer in made.layers[1:3]], Equal())
    return made


def returning(model, registry, members):
    return 3


@message(
    """
    `make_model` failed: expected a function that returns a built model; received what led to
    RuntimeError: no.
    """
)
def models_that_fail():
    compare(functools.partial(refusing, 0))


@message(
    """
    `make_model` must return a new model at each call, and build it (a subclassed model by a call on
    some data). Received: 'model', which is not built.
    """
)
def models_that_are_not_built():
    compare(lambda: keras.Sequential([keras.layers.Dense(4)], name="model"))


@message(
    """
    `make_model` must return a model that is not tied. Received: 'model', where 'left/kernel' has a
    rule. Leave the rules out of its layers; `compare` ties what `members` says.
    """
)
def models_that_are_tied():
    compare(tied_model)


@message(
    """
    `members` must return what to tie by the names of groups, as `registry.tie(name, members, rule)`
    takes it: {"towers": [left, right]}. Received: 'left' of type <class 'str'>.
    """
)
def members_that_are_no_mapping():
    compare(members=lambda model: "left")


@message(
    """
    `ways` must be a list of ways to tie, or None for all. Expected: 'untied', 'shared', 'exact',
    'hard', 'partial', 'soft', a rule, a reduction, a function of `(model, registry, members)`, or a
    pair of one of these and a list of strengths, as in `("soft", [0.1, 1.0])`. Received: 'soft' of type
    <class 'str'>.
    """
)
def ways_that_are_no_list():
    compare(ways="soft")


@message(
    """
    `ways` has something that is no way to tie. Expected: 'untied', 'shared', 'exact', 'hard',
    'partial', 'soft', a rule, a reduction, a function of `(model, registry, members)`, or a pair of one
    of these and a list of strengths, as in `("soft", [0.1, 1.0])`. Received: 3 of type <class 'int'>.
    """
)
def ways_of_another_kind():
    compare(ways=["untied", 3])


@message(
    """
    `ways` has 'soft' twice. Expected: each way once, with all its strengths, for instance `("soft",
    [0.1, 1.0])`. Received: ['soft', 'soft'].
    """
)
def a_way_twice():
    compare(ways=[("soft", [0.1]), "soft"])


@message(
    """
    The way 'hard' has no strength. Expected: `'hard'` alone. Received: ('hard', [0.1]) of type <class
    'tuple'>.
    """
)
def strengths_of_a_way_without():
    compare(ways=[("hard", [0.1])])


@message(
    """
    The rule Nothing() has no strength. Expected: the rule alone. Received: <Nothing() of group None> of
    type <class 'tests.messages.Nothing'>.
    """
)
def strengths_of_a_rule_without():
    compare(ways=[(Nothing(), [0.1])])


@message(
    """
    The strengths of a way must be a list of numbers. Received: 0.1 of type <class 'float'>.
    """
)
def strengths_that_are_no_list():
    compare(ways=[("soft", 0.1)])


@message(
    """
    No way could be trained to a finite result. Expected: a model, data and arguments that
    `make_model()`, `compile` and `fit` take as they do without `compare`. Received:
        shared: GroupMismatchError: 'shared' does not suit group 'pair': a member with a view needs a
    variable of its own. Expected: layers, or variables without views. 'exact' gives the numbers of one
    shared variable.
    """
)
def shared_members_with_views():
    compare(
        members=lambda model: {"pair": [model.layers[1].kernel, (model.layers[2].kernel, Transpose())]}, ways=["shared"]
    )


@message(
    """
    No way could be trained to a finite result. Expected: a model, data and arguments that
    `make_model()`, `compile` and `fit` take as they do without `compare`. Received:
        returning: TypeError: A way must return nothing, callbacks, an optimizer, a function from the
    optimizer of `compile` to another one, or a list of these. Received: 3 of type <class 'int'>.
    """
)
def a_way_that_returns_something_else():
    compare(ways=[returning])


@message(
    """
    `compile["optimizer"]` failed: expected a function that returns an optimizer; received what led to
    RuntimeError: no.
    """
)
def an_optimizer_that_cannot_be_made():
    compare(compile={"optimizer": functools.partial(refusing, 0)})


@message(
    """
    `metric` must be the name of a result of `model.evaluate`: one of ['loss']. Received: 'accuracy'.
    Add it to the `metrics` that the model is compiled with.
    """
)
def a_metric_that_there_is_not():
    compare(metric="accuracy")


@message(
    """
    Whether lower or higher is better cannot be told from the name 'quality'. Expected: `mode="min"` or
    `mode="max"` beside it.
    """
)
def a_metric_without_a_direction():
    compare(metric="quality")


@message(
    """
    `compile` must be a dictionary with the arguments of `model.compile`, or a function that compiles a
    model. Received: 'adam' of type <class 'str'>.
    """
)
def arguments_of_compile_that_are_no_dictionary():
    compare(compile="adam")


@message(
    """
    `fit` must be a dictionary with the arguments of `model.fit`, for instance {'epochs': 10}. Received:
    3 of type <class 'int'>.
    """
)
def arguments_of_fit_that_are_no_dictionary():
    compare(fit=3)


@message(
    """
    `fit` must hold the arguments of `model.fit` but for the data, which `compare` has. Received: ['x'].
    """
)
def data_among_the_arguments_of_fit():
    compare(fit={"x": X})


@message(
    """
    `seeds` must be different numbers, none negative. Received: [1, 1] of type <class 'list'>.
    """
)
def seeds_twice():
    compare(seeds=[1, 1])


@message(
    """
    `validation_split` is 0, and strengths are chosen on that part of the training data. Expected: a
    part above 0, or ways with one strength each.
    """
)
def nothing_to_choose_strengths_on():
    compare(ways=["soft"], fit={"validation_split": 0.0})


@message(
    """
    `x` has too few samples to hold some out: expected more than 1, received 1. Give `validation_data`,
    or ways without strengths to choose.
    """
)
def too_few_samples_to_hold_some_out():
    compare(x=X[:1], y=X[:1], ways=["soft"])


@message(
    """
    `x` must have one number of samples, at least one, in its inputs, targets and weights. Received:
    arrays with [12, 11] samples.
    """
)
def samples_of_different_numbers():
    compare(y=X[1:])


@message(
    """
    `x` must be arrays, or structures of them, or a `tf.data.Dataset`: `compare` trains many models on
    the same samples, and holds some out. Received: 'generator' of type <class 'str'>. Read a generator
    into arrays first.
    """
)
def samples_from_a_generator():
    compare(x="generator", y=None)


@message(
    """
    `validation_data` must be `(x, y)`, `(x, y, sample_weight)`, a `tf.data.Dataset`, or None. Received:
    'x' of type <class 'str'>.
    """
)
def validation_data_without_targets():
    compare(validation_data="x")


@message(
    """
    `x` is a `tf.data.Dataset` that cannot be split. Expected: one that ends and has batches, as
    `dataset.batch(32)` makes them; they are read into memory. Received: <dataset> of type <class
    'tests.messages.comparison.FewBatches'>.
    """
)
def data_sets_without_batches():
    compare(x=FewBatches(), y=None)


@message(
    """
    `x` is a `tf.data.Dataset`, which has the targets. Expected: no `y` and no weights beside it.
    Received: 'y' of type <class 'str'>.
    """
)
def data_sets_with_targets_beside():
    compare(x=FewBatches(), y="y")


@message(
    """
    `path` must be in a folder that exists. Received: 'nowhere/runs.jsonl'.
    """
)
def a_file_in_no_folder():
    compare(path="nowhere/runs.jsonl")


@message(
    """
    `path` is a file of something else: 'runs.jsonl'. Expected: a file of a comparison with these
    settings, or none. Give another `path`, or remove it to begin anew. Ways, strengths and seeds may be
    added; strengths only where some way had several from the start, or `fit` has a `validation_split`.
    """
)
def a_file_of_another_comparison():
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pathlib.Path("runs.jsonl").write_text("notes")
        compare(path="runs.jsonl")
