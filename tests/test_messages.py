"""Every message that equalize raises, provoked, printed and pinned, to be read as one text.

Each function below does what a user may do wrong. What it raises is pinned above it, wrapped at 100 columns. A place in
equalize that raises and that none of them reaches fails `test_every_place_that_raises_is_reached`.
"""

import ast
import copy
import functools
import pathlib
import re
import sys
import textwrap
import traceback
from collections import Counter
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.callbacks import FactorSchedule, TieMonitor
from equalize.constraints import Equal, GroupConstraint, Invariant
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2, PairwiseL2
from equalize.views import Chain, Flip, Rotate90, Scale, Slice, Transpose
from tests.conftest import BACKEND

FOLDER = pathlib.Path(equalize.__file__).parent
CASES = {}

# Places that only a step on JAX reaches, by file and function.
ON_JAX = {("_ties/tied_group.py", name) for name in ("_anchored_value", "_require_reach", "_require_values")}


def message(pinned, *, on=BACKEND):
    """Registers a provocation with the message that is expected of it; `on` names the backend that it takes."""

    def register(provoke):
        assert provoke.__name__ not in CASES
        CASES[provoke.__name__] = (provoke, textwrap.dedent(pinned).strip("\n"), on)
        return provoke

    return register


def wrapped(text):
    lines = text.split("\n")
    inner = [textwrap.wrap(line, 100, break_long_words=False, break_on_hyphens=False) for line in lines]
    return "\n".join("\n".join(parts) for parts in inner)


@functools.cache
def raised(provoke):
    """What a provocation raises. Several tests ask, and some provocations train a model."""
    with pytest.raises((equalize.errors.EqualizeError, TypeError, KeyError, ImportError, UserWarning)) as caught:
        provoke()
    return caught.value


def said(error):
    return error.args[0] if isinstance(error, KeyError) else str(error)


def named(file):
    """A file of equalize by its path below the package."""
    return pathlib.Path(file).relative_to(FOLDER).as_posix()


def places_that_raise():
    """File, first and last line, and function of every `raise` and warning with a message."""
    places = []
    for file in sorted(FOLDER.rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            warns = isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
            raises = isinstance(node, ast.Raise) and ast.unparse(node) not in ("raise NotImplementedError", "raise")
            if warns or raises:
                inside = [f.name for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                if not inside:
                    continue  # at the import, in a process of its own: tests/test_package.py
                places.append((named(file), node.lineno, node.end_lineno, inside[-1]))
    return places


def places_of(error):
    """Where equalize raised the error, and those of its causes whose text it repeats: files and lines."""
    text, places = said(error), []
    while error is not None:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if FOLDER in pathlib.Path(frame.filename).parents
        ]
        if frames and str(said(error)).rstrip(".") in text:
            places.append((named(frames[-1].filename), frames[-1].lineno))
        error = error.__cause__
    return places


def here(case):
    return CASES[case][2] == BACKEND


class OneForAll(GroupConstraint):
    """A custom rule that returns one tensor in the place of one a member."""

    def project(self, values):
        return [values[0][0], values[1]]


class OfUnlikeShapes(GroupConstraint):
    """A custom rule for a kernel and its bias."""

    same_shape = False

    def project(self, values):
        return values


class Nothing(GroupConstraint):
    """Another, which returns nothing."""

    def project(self, values) -> Any:
        return "nothing"


# ---- what the provocations share


def dense(*names, units=3, inputs=4, **arguments):
    """Built layers."""
    layers = [keras.layers.Dense(units, name=name, **arguments) for name in names]
    for layer in layers:
        layer.build((None, inputs))
    return layers


def kernels(*names, **arguments):
    return [layer.kernel for layer in dense(*names, **arguments)]


def variable(shape, name, dtype="float32", trainable=True, value=0.0):
    return keras.Variable(np.full(shape, value), name=name, dtype=dtype, trainable=trainable)


def tied(rule=None, **arguments):
    """A registry with a group of two kernels, and what holds them."""
    layers = dense("left", "right", **arguments)
    registry = equalize.GroupRegistry()
    registry.tie("pair", [layer.kernel for layer in layers], Equal() if rule is None else rule)
    return registry, layers


def model_of(*layers):
    inputs = keras.Input((4,), name="inputs")
    return keras.Model(inputs, [layer(inputs) for layer in layers], name="model")


def compiled(rule=None):
    layers = [keras.layers.Dense(3, name=name) for name in ("left", "right")]
    model = model_of(*layers)
    registry = equalize.GroupRegistry()
    registry.tie("pair", [layer.kernel for layer in layers], Equal() if rule is None else rule)
    model.compile("sgd", ["mse", "mse"])
    return registry, model


def damaged(change):
    registry, _layers = tied()
    config = copy.deepcopy(registry.get_config())
    changed = change(config)
    return equalize.GroupRegistry.from_config(config if changed is None else changed)


# ---- rules


@message(
    """
    `group` must not be empty. Expected the name of a group. Received: '' of type <class 'str'>.
    """
)
def empty_group():
    Equal("")


@message(
    """
    `group` must be a string, the name of a group (the rate goes by name: `Equal(rate=...)`). Received:
    0.1 of type <class 'float'>.
    """
)
def rate_in_the_place_of_the_group():
    Equal(0.1)


@message(
    """
    `group` must be a string, the name of a group (the factor goes by name: `MeanL2(factor=...)`).
    Received: 0.1 of type <class 'float'>.
    """
)
def factor_in_the_place_of_the_group():
    MeanL2(0.1)


@message(
    """
    `rate` must be a finite number in (0, 1]. Received: 2.0 of type <class 'float'>.
    """
)
def rate_out_of_range():
    Equal("pair", rate=2.0)


@message(
    """
    `factor` must be a finite number in [0, inf). Received: -1.0 of type <class 'float'>.
    """
)
def factor_out_of_range():
    MeanL2("pair", -1.0)


@message(
    """
    `rate` must be a number. Received: 'half' of type <class 'str'>.
    """
)
def rate_of_another_type():
    Equal("pair", rate="half")


@message(
    """
    `view` must be a view of `equalize.views`, for instance `Transpose()`. Received: 'Transpose' of type
    <class 'str'>.
    """
)
def view_of_another_type():
    Equal("pair", view="Transpose")


@message(
    """
    `inner` must be a Keras constraint, its config or its name. Received: 'no such constraint' of type
    <class 'str'>.
    """
)
def inner_that_is_none():
    Equal("pair", inner="no such constraint")


@message(
    """
    `inner` must not tie: a variable belongs to one hard group. Received: <Equal() of group 'other'> of
    type <class 'equalize.constraints.Equal'>. Give all members one group name.
    """
)
def inner_that_ties():
    Equal("pair", inner=Equal("other"))


@message(
    """
    Equal(group='pair') on 'left/kernel' has never been linked, so it ties nothing. Expected: a registry
    that knows the model before training starts. Call `equalize.GroupRegistry().link(model)` once the
    model is built (and again after loading or cloning it).
    """
)
def rule_that_was_never_linked():
    (kernel,) = kernels("left")
    Equal("pair")(kernel)


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Received rows of different lengths: [[0, 1], [1]] of type <class 'list'>.
    """
)
def matrix_with_rows_of_different_lengths():
    PairwiseL2(factor=[[0, 1], [1]])


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Received: [['a', 'b'], ['b', 'a']] of type <class 'list'>.
    """
)
def matrix_of_another_type():
    PairwiseL2(factor=[["a", "b"], ["b", "a"]])


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Received an array of shape (2, 3).
    """
)
def matrix_that_is_not_square():
    PairwiseL2(factor=[[0, 1, 2], [1, 0, 2]])


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Expected what the transposed entry is; received 1 in row 0 and column 1, and 2 in row 1 and column
    0.
    """
)
def matrix_that_is_not_symmetric():
    PairwiseL2(factor=[[0, 1], [2, 0]])


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Expected finite numbers that are not negative; received -1 in row 0 and column 1, and -1 in row 1
    and column 0.
    """
)
def matrix_with_a_negative_entry():
    PairwiseL2(factor=[[0, -1], [-1, 0]])


@message(
    """
    `views` must be a list of views. Received: Flip(axes=[0]) of type <class 'equalize.views.Flip'>.
    """
)
def views_that_are_no_list():
    Invariant(Flip(0))


@message(
    """
    `views` must hold at least one view. Received: [] of type <class 'list'>.
    """
)
def no_views():
    Invariant([])


@message(
    """
    `views` must be a list of views. Received: [Flip(axes=[0]), None] of type <class 'list'>.
    """
)
def views_that_hold_none():
    Invariant([Flip(0), None])


@message(
    """
    `inner` must be a Keras regularizer, its config or its name. Received: <built-in function print> of
    type <class 'builtin_function_or_method'>.
    """
)
def inner_of_another_type():
    MeanL2("pair", inner=print)


# ---- views


@message(
    """
    `axes` must be a permutation of 0, 1, ..., n − 1. Received: (0, 2) of type <class 'tuple'>.
    """
)
def transpose_by_no_permutation():
    Transpose((0, 2))


@message(
    """
    `axes` must name axes once each, and at least one. Received: () of type <class 'tuple'>.
    """
)
def flip_of_no_axis():
    Flip(())


@message(
    """
    `axes` must be integers. Received: 'rows' of type <class 'str'>.
    """
)
def axes_of_another_type():
    Flip("rows")


@message(
    """
    `axes` must be integers. Received: [0, True] of type <class 'list'>.
    """
)
def axes_among_which_there_is_a_bool():
    Flip([0, True])


@message(
    """
    `axes` must be integers in [-2147483648, 2147483648). Received: 1099511627776 of type <class 'int'>.
    """
)
def axes_that_are_too_large():
    Flip(2**40)


@message(
    """
    `k` must be an integer. Received: 0.5 of type <class 'float'>.
    """
)
def turns_of_another_type():
    Rotate90(0.5)


@message(
    """
    `k` must be an integer. Received: [1] of type <class 'list'>.
    """
)
def turns_in_a_list():
    Rotate90([1])


@message(
    """
    `axes` must be two different axes. Received: (0, 0) of type <class 'tuple'>.
    """
)
def rotation_in_no_plane():
    Rotate90(1, (0, 0))


@message(
    """
    `factor` must be a number. Received: '2' of type <class 'str'>.
    """
)
def scale_of_another_type():
    Scale("2")


@message(
    """
    `factor` must be finite and not 0. Received: 0 of type <class 'int'>. Expected a factor between
    1.1e-19 and 1.8e19 in size.
    """
)
def scale_by_nothing():
    Scale(0)


@message(
    """
    `start_indices` must be non-negative and `shape` positive, with one for each axis. Received:
    start_indices=(0, 0) of type <class 'tuple'>, shape=(4,) of type <class 'tuple'>.
    """
)
def slice_of_nothing():
    Slice((0, 0), (4,))


@message(
    """
    `views` must be views of equalize. Received: 'Transpose' of type <class 'str'>.
    """
)
def chain_of_other_things():
    Chain("Transpose")


@message(
    """
    `Chain` needs a view. Expected: one or more. Received: none.
    """
)
def chain_of_nothing():
    Chain()


@message(
    """
    Cannot tie 'two' into group 'pair': The view Transpose(axes=[0, 2, 1]) does not fit a variable of
    shape (4, 3): expected 3 axes. Change the view, or give it to another variable.
    """
)
def transpose_that_does_not_fit():
    equalize.GroupRegistry().tie(
        "pair", [variable((4, 3), "one"), (variable((4, 3), "two"), Transpose((0, 2, 1)))], Equal()
    )


@message(
    """
    The view Transpose(axes=[0, 2, 1]) does not fit a variable of shape (4, 3): expected 3 axes. Change
    the view, or give it to another variable.
    """
)
def transpose_of_another_number_of_axes():
    Transpose((0, 2, 1)).common_shape((4, 3))


@message(
    """
    The view Flip(axes=[2]) does not fit a variable of shape (4, 3): expected one with the different
    axes [2]. Change the view, or give it to another variable.
    """
)
def flip_that_does_not_fit():
    Flip(2).common_shape((4, 3))


@message(
    """
    The view Rotate90(k=1, axes=[0, 1]) does not fit a variable of shape (4,): expected one with the
    axes [0, 1]. Change the view, or give it to another variable.
    """
)
def rotation_that_does_not_fit():
    Rotate90().common_shape((4,))


@message(
    """
    The view Slice(start_indices=[0, 2], shape=[4, 3]) does not fit a variable of shape (4, 4): expected
    a shape of at least (4, 5). Change the view, or give it to another variable.
    """
)
def slice_that_does_not_fit():
    Slice((0, 2), (4, 3)).common_shape((4, 4))


@message(
    """
    A symmetry of a variable of shape (16777216,) is too large: expected fewer than 2**24 entries,
    received 16777216. Constrain a smaller variable.
    """
)
def symmetry_of_too_much():
    Invariant([Flip(0)])(ops.zeros((2**24,)))


@message(
    """
    The view Transpose(axes=None) takes a variable of shape (4, 3) to another shape, so it is not a
    symmetry of it. Expected: views that keep the shape.
    """
)
def symmetry_that_changes_the_shape():
    Invariant([Transpose()])(ops.zeros((4, 3)))


@message(
    """
    The view Scale(factor=2.0) changes more than the order and signs of entries, so no finite group has
    it. Expected: `Transpose`, `Flip`, `Rotate90`, `Scale(-1)`, or a `Chain` of them.
    """
)
def symmetry_that_changes_values():
    Invariant([Scale(2)])(ops.zeros((4,)))


@message(
    """
    The views [Rotate90(k=1, axes=[0, 1])] do not form a group: Rotate90(k=1, axes=[0, 1]) followed by
    Rotate90(k=1, axes=[0, 1]) is not one of them. Expected: with any two views also the one that they
    make together. Add it.
    """
)
def views_that_form_no_group():
    Invariant([Rotate90(1)])(ops.zeros((3, 3)))


@message(
    """
    Expected the config of a `Chain`, with a list 'views'. Received: {'views': 'Flip'} of type <class
    'dict'>.
    """
)
def chain_from_something_else():
    Chain.from_config({"views": "Flip"})


@message(
    """
    Expected the config of a view, of a class that is registered with
    `keras.saving.register_keras_serializable`. Received: {'class_name': 'Flip'} of type <class 'dict'>.
    """
)
def view_from_something_else():
    Equal("pair", view={"class_name": "Flip"})


@message(
    """
    The config of a view is damaged: Flip.__init__() missing 1 required positional argument: 'axes'.
    Expected: arguments that its class takes. Received: {'module': 'equalize.views', 'class_name':
    'Flip', 'config': {}, 'registered_name': 'equalize>Flip'} of type <class 'dict'>.
    """
)
def view_that_cannot_be_made():
    Equal("pair", view=keras.saving.serialize_keras_object(Flip(0)) | {"config": {}})


# ---- link


@message(
    """
    `link` needs a model. Expected: `link(model)`. Received: nothing.
    """
)
def link_of_nothing():
    equalize.GroupRegistry().link()


@message(
    """
    `link` expects Keras models or layers. Received: 'model' of type <class 'str'>. Variables are tied
    with `tie(name, [variable_1, variable_2], rule)`.
    """
)
def link_of_another_type():
    equalize.GroupRegistry().link("model")


@message(
    """
    `link` expects Keras models or layers. Received: <Dense> of type <class
    'tf_keras.src.layers.Dense'>. Variables are tied with `tie(name, [variable_1, variable_2], rule)`.
    It is of Keras 2 (`tf_keras`), which equalize does not know: make the model with Keras 3 (`import
    keras`).
    """
)
def link_of_keras_2():
    legacy = type("Dense", (), {"__module__": "tf_keras.src.layers", "__repr__": lambda self: "<Dense>"})
    equalize.GroupRegistry().link(legacy())


@message(
    """
    Cannot link 'model': it has no weights for 'dense' yet, since it is not built. Expected: a built
    model. Give it an `Input`, call `model.build(input_shape)`, or call it once on data.
    """
)
def link_of_a_model_that_is_not_built():
    equalize.GroupRegistry().link(
        keras.Sequential([keras.layers.Dense(2, kernel_constraint=Equal("pair"))], name="model")
    )


@message(
    """
    No rule was found in 'model', so there is nothing to link. Expected: layers with, for instance,
    `kernel_constraint=equalize.constraints.Equal("towers")`. To tie layers that are built already, use
    `registry.tie(name, [layer_1, layer_2], equalize.constraints.Equal())`.
    """
)
def link_without_a_rule():
    equalize.GroupRegistry().link(model_of(*dense("left", "right")))


@message(
    """
    The rule Equal() on 'left/kernel' has no group name, so it ties nothing. Expected: a name shared by
    all members, as in Equal("towers").
    """
)
def rule_without_a_name():
    equalize.GroupRegistry().link(model_of(*dense("left", "right", kernel_constraint=Equal())))


@message(
    """
    Group 'twoers' has one member: 'odd/kernel' (4, 3) float32. Expected: at least two. The nearest
    other group is 'towers': is one of the two misspelt? Give another variable the same group name, or
    take the rule away.
    """
)
def misspelt_name():
    left, right = dense("left", "right", kernel_constraint=Equal("towers"))
    (odd,) = dense("odd", kernel_constraint=Equal("twoers"))
    equalize.GroupRegistry().link(model_of(left, right, odd))


@message(
    """
    Group 'towers' has one member: 'left/kernel' (4, 3) float32. Expected: at least two. There is no
    other group. Give another variable the same group name, or take the rule away.
    """
)
def only_group_with_one_member():
    equalize.GroupRegistry().link(model_of(*dense("left", kernel_constraint=Equal("towers"))))


@message(
    """
    Group 'pair' has members elsewhere already, and the models given name others for it. If one group
    over all of them is meant, link all models in one call: `GroupRegistry().link(model_1, model_2)`. If
    each model is to have a group of its own (a clone, a second copy), give each a registry of its own:
    `GroupRegistry().link(model_2)`.
    Members elsewhere:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    Members in the models given:
        'other_left/kernel' (4, 3) float32
        'other_right/kernel' (4, 3) float32
    """
)
def group_that_lives_elsewhere():
    registry = equalize.GroupRegistry()
    first = model_of(*dense("left", "right", kernel_constraint=Equal("pair")))
    registry.link(first)
    registry.link(model_of(*dense("other_left", "other_right", kernel_constraint=Equal("pair"))))


@message(
    """
    The rules of group 'pair' disagree: expected Equal(rate=1.0, inner=none), set by 'left/kernel';
    received Equal(rate=0.5, inner=none) from 'right/kernel'. Give all members the same rule, or another
    group name.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def rules_that_disagree():
    (left,) = dense("left", kernel_constraint=Equal("pair"))
    (right,) = dense("right", kernel_constraint=Equal("pair", rate=0.5))
    equalize.GroupRegistry().link(model_of(left, right))


@message(
    """
    `initial` must be one of ['first', 'mean', 'strict']. Received: 'last' of type <class 'str'>.
    """
)
def unknown_initial():
    equalize.GroupRegistry().link(model_of(*dense("left", "right", kernel_constraint=Equal("pair"))), initial="last")


@message(
    """
    The members of group 'pair' are not equal: expected a spread of 0, received 1.
        'one' (2,) float32: the first
        'two' (2,) float32: differs from the first by up to 1
    Link with initial="first" or initial="mean" to make them equal, call `registry.sync()`, or load
    weights that are.
    """
)
def strict_start_of_unequal_members():
    one, two = variable((2,), "one"), variable((2,), "two", value=1.0)
    equalize.GroupRegistry().tie("pair", [one, two], Equal(), initial="strict")


# ---- tie


@message(
    """
    `name` must be a string, the name of the group. Received: 3 of type <class 'int'>.
    """
)
def name_of_another_type():
    equalize.GroupRegistry().tie(3, kernels("left", "right"), Equal())


@message(
    """
    `name` must not be empty. Expected the name of the group. Received: ' ' of type <class 'str'>.
    """
)
def empty_name():
    equalize.GroupRegistry().tie(" ", kernels("left", "right"), Equal())


@message(
    """
    `rule` must be a constraint or regularizer of equalize, as an object: `equalize.constraints.Equal()`
    or `equalize.regularizers.MeanL2(factor=0.01)`. Received: 'Equal' of type <class 'str'>.
    """
)
def class_in_place_of_a_rule():
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), "Equal")


@message(
    """
    `tie` was given the name 'pair' and a rule of group 'towers'. Expected: one name. Leave the group
    out of the rule: Equal().
    """
)
def two_names():
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), Equal("towers"))


@message(
    """
    There is a group 'pair' already: <Group 'pair': Equal(), 2 members>. Expected: a new name. Call
    `untie('pair')` first, or choose another name.
    """
)
def name_that_is_taken():
    registry, layers = tied()
    registry.tie("pair", [layer.bias for layer in layers], Equal())


@message(
    """
    `members` of 'pair' must be a list of variables, arrays or layers. Received: 'left, right' of type
    <class 'str'>.
    """
)
def members_that_are_no_list():
    equalize.GroupRegistry().tie("pair", "left, right", Equal())


@message(
    """
    Group 'pair' has no members. Expected: at least two variables, arrays or layers. Received: [].
    """
)
def no_members():
    equalize.GroupRegistry().tie("pair", [], Equal())


@message(
    """
    Group 'pair' has one member: layer 'left'. Expected: at least two layers. To tie weights inside one
    layer, name its variables.
    """
)
def one_layer():
    equalize.GroupRegistry().tie("pair", dense("left"), Equal())


@message(
    """
    Cannot tie 'pair': expected either layers or variables; received the layer 'left' and a variable.
    Name the variables of the layer, for instance `left.kernel`.
    """
)
def layers_and_variables():
    left, right = dense("left", "right")
    equalize.GroupRegistry().tie("pair", [left, right.kernel], Equal())


@message(
    """
    Cannot tie 'pair': expected either layers or variables; received the layer 'model' and a list. Name
    the variables of the layer, for instance `model.weights[0]`.
    """
)
def a_model_and_its_weights():
    model = model_of(*dense("left"))
    equalize.GroupRegistry().tie("pair", [model, model.get_weights()], MeanL2())


@message(
    """
    Cannot tie 'pair': expected either layers or variables; received the layer 'left' and a ndarray.
    Build the layer and name its variables.
    """
)
def an_unbuilt_layer_and_an_array():
    equalize.GroupRegistry().tie("pair", [keras.layers.Dense(3, name="left"), np.ones((4, 3))], MeanL2())


@message(
    """
    Cannot tie a member into group 'pair': expected a variable or a pair of a variable and a view, for
    instance `(layer.kernel, equalize.views.Transpose())`; received ('right', 'Transpose') of type
    <class 'tuple'>.
    """
)
def pair_without_a_view():
    (left,) = kernels("left")
    equalize.GroupRegistry().tie("pair", [left, ("right", "Transpose")], Equal())


@message(
    """
    Cannot tie a member into group 'pair': expected a `keras.Variable` (for instance `layer.kernel`), a
    built layer, or an array; received 'right' of type <class 'str'>.
    """
)
def member_of_another_type():
    equalize.GroupRegistry().tie("pair", [*kernels("left"), "right"], Equal())


@message(
    """
    Cannot tie layers into group 'pair': layer 'right' has no weights, since it is not built. Expected:
    a built layer with weights. Build it, or call it once, before.
    """
)
def layer_without_weights():
    left, right = dense("left"), [keras.layers.Dense(3, name="right")]
    equalize.GroupRegistry().tie("pair", [*left, *right], Equal())


@message(
    """
    Cannot tie layers into group 'pair': their structures differ.
    Expected, set by 'left' (Dense):
        kernel (4, 3)
        bias (3,)
    Received 'right' (Dense):
        kernel (4, 3)
    Take layers of one structure, or their variables one by one.
    """
)
def layers_of_different_structure():
    left, right = dense("left"), dense("right", use_bias=False)
    equalize.GroupRegistry().tie("pair", [*left, *right], Equal())


@message(
    """
    Cannot tie 'decoder' into group 'autoencoder': expected shape (784, 64), set by 'encoder'; received
    (64, 784). Give it a view, for instance equalize.views.Transpose().
    Members:
        'encoder' (784, 64) float32
        'decoder' (64, 784) float32
    """
)
def shapes_that_are_transposed():
    equalize.GroupRegistry().tie(
        "autoencoder", [variable((784, 64), "encoder"), variable((64, 784), "decoder")], Equal()
    )


@message(
    """
    Cannot tie 'two' into group 'pair': expected shape (4, 3), set by 'one'; received (4, 2). Tie
    variables of one shape.
    Members:
        'one' (4, 3) float32
        'two' (4, 2) float32
    """
)
def shapes_that_differ():
    equalize.GroupRegistry().tie("pair", [variable((4, 3), "one"), variable((4, 2), "two")], Equal())


@message(
    """
    Cannot tie 'two' into group 'pair': expected dtype float32, set by 'one'; received float16. Tie
    variables of one dtype.
    Members:
        'one' (2,) float32
        'two' (2,) float16
    """
)
def dtypes_that_differ():
    equalize.GroupRegistry().tie("pair", [variable((2,), "one"), variable((2,), "two", "float16")], Equal())


@message(
    """
    Cannot tie group 'pair': expected variables of a floating dtype; received int32. A mean of such
    values is no such value. Tie trainable weights.
    Members:
        'one' (2,) int32
        'two' (2,) int32
    """
)
def integers():
    equalize.GroupRegistry().tie(
        "pair", [variable((2,), name, "int32", trainable=False) for name in ("one", "two")], Equal()
    )


@message(
    """
    Cannot tie group 'pair': 'left/kernel' (4, 3) float32 was given more than once. Expected: separate
    variables; one variable in two layers is equal to itself without a tie.
    Members:
        'left/kernel' (4, 3) float32
        'left/kernel' (4, 3) float32
    """
)
def one_variable_twice():
    (left,) = kernels("left")
    equalize.GroupRegistry().tie("pair", [left, left], Equal())


@message(
    """
    Cannot tie group 'pair': expected at least one variable; received only constants.
    Members:
        'constant' (2,) float32
        'constant' (2,) float32
    """
)
def only_constants():
    equalize.GroupRegistry().tie("pair", [np.zeros(2, "float32"), np.zeros(2, "float32")], MeanL2())


@message(
    """
    Cannot tie group 'three': expected 2 members, as PairwiseL2(factor=<2×2 matrix>) has; received 3.
    Give `factor` a row and a column for each member, in this order.
    Members:
        'a/kernel' (4, 3) float32
        'b/kernel' (4, 3) float32
        'c/kernel' (4, 3) float32
    """
)
def matrix_of_another_size():
    equalize.GroupRegistry().tie("three", kernels("a", "b", "c"), PairwiseL2(factor=[[0, 1], [1, 0]]))


@message(
    """
    Cannot tie 'left/kernel' into group 'other': it belongs to group 'pair' already (Equal()), and a
    variable can be projected by one group only. Name all members in one group, or call `untie('pair')`
    first.
    Members:
        'left/kernel' (4, 3) float32
        'third/kernel' (4, 3) float32
    """
)
def second_hard_group():
    registry, layers = tied()
    (third,) = dense("third")
    registry.tie("other", [layers[0].kernel, third.kernel], Equal())


@message(
    """
    Group 'pair' cannot be made equal: 'one' (2,) float32 and 'two' (2,) float32 do not move (they are
    not trainable, or constants) and differ by up to 1. Expected: at most one value among the members
    that do not move. Set the two to one value, or make one of them trainable.
    """
)
def two_anchors():
    held = [variable((2,), name, trainable=False, value=value) for name, value in (("one", 0.0), ("two", 1.0))]
    equalize.GroupRegistry().tie("pair", held, Equal())


@message(
    """
    Cannot tie 'left/kernel' into group 'pair': it has the constraint NonNeg already, and the rule
    brings MaxNorm(max_value=2, axis=0) as `inner`. Expected: one of the two. Leave `inner` out to keep
    what the variable has, or set `variable.constraint = None` first.
    """
)
def constraint_beside_an_inner_one():
    left, right = kernels("left", "right", kernel_constraint="non_neg")
    equalize.GroupRegistry().tie("pair", [left, right], Equal(inner=keras.constraints.MaxNorm(2)))


@message(
    """
    Cannot tie 'right/kernel' into group 'pair': expected a constraint that does what NonNeg of the
    first member does; received none, which does something else to the common value. One common value
    can obey one constraint: give all members the same, as their views show it, or none.
    Members:
        'left/kernel' (4, 3) float32: NonNeg
        'right/kernel' (4, 3) float32: none
    """
)
def constraints_that_differ():
    (left,), (right,) = kernels("left", kernel_constraint="non_neg"), kernels("right")
    equalize.GroupRegistry().tie("pair", [left, right], Equal())


@message(
    """
    `tie` makes one group, and the rule brings another as `inner`: <MeanL2(factor=0.01) of group None>
    of type <class 'equalize.regularizers.MeanL2'>. Expected: a rule without. Tie the two groups one
    after the other; both rules are then on the variables.
    """
)
def rule_inside_a_rule():
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), MeanL2(inner=MeanL2()))


@message(
    """
    Cannot tie an array into group 'pair': expected real numbers; received array(['a', 'b'],
    dtype='<U1') of type <class 'numpy.ndarray'>.
    """
)
def array_of_words():
    equalize.GroupRegistry().tie("pair", [*kernels("left"), np.array(["a", "b"])], Equal())


@message(
    """
    Cannot tie group 'pair': expected weights of the members whose mean can be computed; received
    [1e+308, 1e+308]. Give weights nearer to 1.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def weights_without_a_mean():
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), Equal(weight=1e308))


def total(value):
    return ops.sum(value)


@message(
    """
    Cannot tie group 'pair': its rule has the `inner` total, which cannot be applied to the common
    value. Expected: a constraint that returns a tensor of shape (4, 3). Received: a tensor of shape ().
    Take another, or none.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def inner_that_changes_the_shape():
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), Equal(inner=total))


def refusing(value):
    raise RuntimeError("no")


@message(
    """
    Cannot tie group 'pair': its rule has the `inner` refusing, which cannot be applied to the common
    value. Expected: a constraint that returns a tensor of shape (4, 3). Received: RuntimeError('no').
    Take another, or none.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def inner_that_cannot_be_applied():
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), Equal(inner=refusing))


@message(
    """
    `variable` must be a `keras.Variable`. Received: 'left/kernel' of type <class 'str'>.
    """
)
def member_that_is_no_variable():
    equalize.Member("left/kernel")


@message(
    """
    `view` must be a view of `equalize.views`, or None. Received: 'Transpose' of type <class 'str'>.
    """
)
def member_with_another_view():
    equalize.Member(*kernels("left"), view="Transpose")


# ---- groups and registries


@message(
    """
    There is no group 'pari'. Expected one of: ['pair'].
    """
)
def group_that_there_is_not():
    registry, _layers = tied()
    _ = registry["pari"]


@message(
    """
    There is no group 'pair'. Expected: a name that was linked or tied; there is none yet.
    """
)
def group_of_an_empty_registry():
    equalize.GroupRegistry().untie("pair")


@message(
    """
    Hard groups that are not equal: 1 of 1; expected a spread of at most 0, received:
        'pair': spread 1, members 'left/kernel' (4, 3) float32, 'right/kernel' (4, 3) float32
    After averaging of weights (`use_ema`) call `registry.sync("mean")`, which is exact. After loading
    weights that differ call `registry.sync()`, which gives every member the value of the first.
    """
)
def unequal_members():
    registry, layers = tied()
    layers[0].kernel.assign(np.zeros((4, 3)))
    layers[1].kernel.assign(np.ones((4, 3)))
    registry.check()


@message(
    """
    Group 'pair' has no penalty: its rule is Equal(), a projection. Expected: names of groups tied by a
    regularizer.
    """
)
def penalty_of_a_hard_group():
    registry, _layers = tied()
    registry.penalty("pair")


@message(
    """
    Group 'pair' cannot be projected: its rule is MeanL2(factor=0.01), a penalty. Expected: names of
    groups tied by `equalize.constraints.Equal`.
    """
)
def projection_of_a_soft_group():
    registry, _layers = tied(MeanL2())
    registry.project("pair")


@message(
    """
    The new rule of group 'pair' has the view None and the weight 2, and the members have theirs
    already. Expected: a rule without, Equal().
    """
)
def new_rule_with_a_weight():
    registry, _layers = tied()
    registry.replace("pair", Equal(weight=2.0))


@message(
    """
    The rule of group 'pair' cannot be assigned. Expected: `registry.replace('pair', rule)`. Received:
    <MeanL2(factor=0.01) of group None> of type <class 'equalize.regularizers.MeanL2'>.
    """
)
def rule_that_is_assigned():
    registry, _layers = tied()
    registry["pair"].rule = MeanL2()


@message(
    """
    A rule does not change once it is made: cannot set `rate` of Equal(). Expected: a new rule in its
    place. Call `registry.replace(name, rule)`.
    """
)
def rule_that_is_changed():
    registry, _layers = tied()
    registry["pair"].rule.rate = 0.5


@message(
    """
    Group 'joint' has no common value: its rule OfUnlikeShapes() takes members of unlike shapes.
    Expected: a group of members of one shape. Read them one by one, from `group.members`.
    """
)
def common_value_of_unlike_shapes():
    kernel, bias = variable((2, 2), "kernel"), variable((2,), "bias")
    registry = equalize.GroupRegistry()
    registry.tie("joint", [kernel, bias], OfUnlikeShapes())
    _ = registry["joint"].value


@message(
    """
    `project` of OneForAll must return a list of tensors, one for each of the 2 members of group 'pair',
    of shapes [(4, 3), (4, 3)]. Received: shapes [(3,), (4, 3)].
    """
)
def projection_to_other_shapes():
    registry, _layers = tied(OneForAll())
    registry.project()


@message(
    """
    `project` of Nothing must return a list of tensors, one for each of the 2 members of group 'pair',
    of shapes [(2,), (2,)]. Received: 'nothing' of type <class 'str'>.
    """
)
def projection_to_no_list():
    one, two = variable((2,), "one"), variable((2,), "two")
    registry = equalize.GroupRegistry()
    registry.tie("pair", [one, two], Nothing())
    registry.project()


@message(
    """
    The variable 'one' no longer exists: its model has been deleted. Expected: a member of a model that
    is kept. Read the members again from the registry, `registry[name].members`: it lists those that
    exist.
    """
)
def member_of_a_deleted_model():
    one, two = variable((2,), "one"), variable((2,), "two")
    member = equalize.GroupRegistry().tie("pair", [one, two], MeanL2()).members[0]
    one.regularizer = two.regularizer = None
    del one, two
    _ = member.variable


@message(
    """
    `registry` must be an `equalize.GroupRegistry`. Received: 'registry' of type <class 'str'>.
    """
)
def something_else_than_a_registry():
    TieMonitor("registry")


@message(
    """
    Group 'pair' cannot reach its member 'right/kernel' (4, 3) float32 in this step. Expected: a step
    over all members; it sees: 'left/kernel' (4, 3) float32. A stateless step of an optimizer or a loss
    carries only the variables that it was given, and a change of any other is lost. Train all members
    with one optimizer in one model, or apply the optimizers inside one `keras.StatelessScope` that is
    given the variables of all.
    """,
    on="jax",
)
def member_that_a_step_does_not_reach():
    _registry, layers = tied()
    optimizer = keras.optimizers.SGD()
    optimizer.build([layers[0].kernel])
    values = [layers[0].kernel.value]
    optimizer.stateless_apply([v.value for v in optimizer.variables], values, values)


@message(
    """
    Group 'pair' cannot take the value of 'right/kernel', which is not trainable: a stateless step sees
    only what it is given. Expected: a step that computes the losses of the model, as `fit` and
    `model.stateless_call(..., return_losses=True)` do, and then applies the optimizer; or one that runs
    the optimizer in a `keras.StatelessScope` over all variables of the model.
    """,
    on="jax",
)
def frozen_member_that_a_step_does_not_see():
    _registry, layers = tied()
    layers[1].trainable = False
    optimizer = keras.optimizers.SGD()
    optimizer.build([layers[0].kernel])
    values = [layers[0].kernel.value]
    optimizer.stateless_apply([v.value for v in optimizer.variables], values, values)


class Reading(keras.callbacks.Callback):
    def __init__(self, registry):
        super().__init__()
        self.registry = registry

    def on_train_batch_end(self, batch, logs=None):
        self.registry.spread()


@message(
    """
    Group 'pair' cannot read its member 'left/kernel' (4, 3) float32: while `fit` runs on JAX its value
    is in the compiled step. Expected: a model that has taken its values back. Call
    `model.jax_state_sync()` first, as `equalize.callbacks.TieMonitor` does.
    """,
    on="jax",
)
def values_that_are_in_the_compiled_step():
    registry, model = compiled()
    model.fit(np.ones((2, 4)), [np.ones((2, 3))] * 2, verbose=0, callbacks=[Reading(registry)])


# ---- configs


@message(
    """
    This is not the config of a registry: expected a dictionary with one entry 'groups', a list;
    received {'groups': 3} of type <class 'dict'>. Use what `registry.get_config()` returned, unchanged.
    """
)
def config_of_something_else():
    damaged(lambda config: {"groups": 3})


@message(
    """
    This is not the config of a registry: expected groups with the entries ['members', 'name', 'rule'];
    received {'name': 'pair', 'members': [{'view': None, 'weight': 1.0, 'path': 'left/kernel', 'shape':
    [4, 3], 'dtype': 'float32', 'places': [['63f71ab85682d262', 0, 'vars/0']]}, {'view': None, 'weight':
    1.0, 'path': 'right/kernel', 'shape': [4, 3], 'dtype': 'float32', 'places': [['63f71ab85682d262', 1,
    'vars/0']]}]} of type <class 'dict'>. Use what `registry.get_config()` returned, unchanged.
    """
)
def config_of_half_a_group():
    damaged(lambda config: config["groups"][0].pop("rule") and None)


@message(
    """
    This is not the config of a registry: expected at least two members in group 'pair'; received
    [{'view': None, 'weight': 1.0, 'path': 'left/kernel', 'shape': [4, 3], 'dtype': 'float32', 'places':
    [['63f71ab85682d262', 0, 'vars/0']]}] of type <class 'list'>. Use what `registry.get_config()`
    returned, unchanged.
    """
)
def config_with_one_member():
    damaged(lambda config: config["groups"][0]["members"].pop() and None)


@message(
    """
    This is not the config of a registry: expected members with their places or a constant, a view and a
    weight in 'pair'; received {'view': None, 'weight': 1.0, 'shape': [4, 3], 'dtype': 'float32',
    'places': [['63f71ab85682d262', 0, 'vars/0']]} of type <class 'dict'>. Use what
    `registry.get_config()` returned, unchanged.
    """
)
def config_with_a_member_without_a_path():
    damaged(lambda config: config["groups"][0]["members"][0].pop("path") and None)


@message(
    """
    The config of group 'pair' is damaged. Expected the config of a rule of equalize, of a class that is
    registered with `keras.saving.register_keras_serializable`. Received: {'module':
    'equalize.constraints', 'class_name': 'Equal', 'config': {'group': None, 'view': None, 'inner':
    None, 'rate': 1.0, 'weight': 1.0}, 'registered_name': 'other>Equal'} of type <class 'dict'>. Use
    what `registry.get_config()` returned, unchanged.
    """
)
def config_with_the_rule_of_somebody_else():
    damaged(lambda config: config["groups"][0]["rule"].update(registered_name="other>Equal"))


@message(
    """
    The config of group 'pair' is damaged. The config of a rule of equalize is damaged: `rate` must be a
    number. Received: 'half' of type <class 'str'>. Expected: arguments that its class takes. Received:
    {'module': 'equalize.constraints', 'class_name': 'Equal', 'config': {'rate': 'half'},
    'registered_name': 'equalize>Equal'} of type <class 'dict'>. Use what `registry.get_config()`
    returned, unchanged.
    """
)
def config_with_a_rule_that_cannot_be_made():
    damaged(lambda config: config["groups"][0]["rule"].update(config={"rate": "half"}))


@message(
    """
    The config of group 'pair' is damaged. Expected the config of a rule of equalize, of a class that is
    registered with `keras.saving.register_keras_serializable`. Received: {'module': 'equalize.views',
    'class_name': 'Flip', 'config': {'axes': [0]}, 'registered_name': 'equalize>Flip'} of type <class
    'dict'>. Use what `registry.get_config()` returned, unchanged.
    """
)
def config_with_a_view_in_place_of_a_rule():
    damaged(lambda config: config["groups"][0].update(rule=keras.saving.serialize_keras_object(Flip(0))))


@message(
    """
    The config of group 'pair' is damaged. Expected the config of a view, of a class that is registered
    with `keras.saving.register_keras_serializable`. Received: {'registered_name': 'other>Flip'} of type
    <class 'dict'>. Use what `registry.get_config()` returned, unchanged.
    """
)
def config_with_the_view_of_somebody_else():
    damaged(lambda config: config["groups"][0]["members"][0].update(view={"registered_name": "other>Flip"}))


@message(
    """
    The config of group 'pair' is damaged. The config of a view is damaged: Flip.__init__() missing 1
    required positional argument: 'axes'. Expected: arguments that its class takes. Received: {'module':
    'equalize.views', 'class_name': 'Flip', 'config': {}, 'registered_name': 'equalize>Flip'} of type
    <class 'dict'>. Use what `registry.get_config()` returned, unchanged.
    """
)
def config_with_a_view_that_cannot_be_made():
    flip = keras.saving.serialize_keras_object(Flip(0)) | {"config": {}}
    damaged(lambda config: config["groups"][0]["members"][0].update(view=flip))


def _with_a_bad_constant(config):
    config["groups"][0]["members"][0] = {"view": None, "weight": 1.0, "constant": {"values": "none"}}


@message(
    """
    The config of group 'pair' is damaged. Expected a constant with values, a list of numbers, and a
    dtype. Received: {'values': 'none'} of type <class 'dict'>. Use what `registry.get_config()`
    returned, unchanged.
    """
)
def config_with_a_bad_constant():
    damaged(_with_a_bad_constant).link(model_of(*dense("left", "right")))


@message(
    """
    Cannot find the member 'right/kernel' (4, 3) float32 of group 'pair': no weight has its place or its
    path. Expected: the model that the tie was made with, or one of its structure. Nearest weights:
    'left/kernel', 'third/kernel', 'other/kernel'. Tie the variables of this model again with `tie`.
    """
)
def config_for_another_model():
    damaged(lambda config: None).link(model_of(*dense("left", "other"), *dense("third")))


@message(
    """
    Cannot find the member 'gone' (4, 7) float32 of group 'pair': the weight at its place,
    'left/kernel', is (4, 3) float32. Expected: the model that the tie was made with, or one of its
    structure. Nearest weights: 'right/kernel', 'left/kernel', 'left/bias'. Tie the variables of this
    model again with `tie`.
    """
)
def config_with_a_weight_of_another_shape_at_the_place():
    registry = damaged(lambda config: config["groups"][0]["members"][0].update(path="gone", shape=[4, 7]))
    registry.link(*dense("left", "right"))


@message(
    """
    Cannot find the member 'left/kernel' (4, 3) float32 of group 'pair': its place and its path belong
    to two weights. Expected: the model that the tie was made with, or one of its structure. Nearest
    weights: 'left/kernel', 'third/kernel', 'right/kernel'. Tie the variables of this model again with
    `tie`.
    """
)
def config_whose_place_and_path_contradict_each_other():
    registry, (left, right) = tied()
    model = model_of(left, right)
    restored = equalize.GroupRegistry.from_config(registry.get_config())
    del model
    restored.link(model_of(*dense("right", "left", "third")))


@message(
    """
    This is not the config of a registry: expected a name of its own for each group; received 'pair' of
    type <class 'str'>. Use what `registry.get_config()` returned, unchanged.
    """
)
def config_with_one_name_twice():
    damaged(lambda config: {"groups": config["groups"] * 2})


@message(
    """
    Two groups that are made together have the name 'pair'. Expected: a name for each. Rename one, in
    the layers or in the config of the registry.
    """
)
def config_with_the_name_of_a_declared_group():
    damaged(lambda config: None).link(model_of(*dense("left", "right", kernel_regularizer=MeanL2("pair"))))


def twice(rule):
    """A registry with two groups over the same variables, as no `tie` makes them."""
    registry, layers = tied(rule)
    (group,) = registry.get_config()["groups"]
    registry = equalize.GroupRegistry.from_config({"groups": [group, group | {"name": "other"}]})
    for layer in layers:
        layer.kernel.constraint = layer.kernel.regularizer = None
    return registry.link(model_of(*layers))


@message(
    """
    Cannot tie 'left/kernel' into group 'other': group 'pair' has it as well. Expected: one group that
    projects a variable. Name all members in one group, or give layers that do not hold each other's
    weights.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def config_with_two_hard_groups_of_one_variable():
    twice(Equal())


@message(
    """
    Cannot tie 'left/kernel' into group 'other': another group that is made with it has the variable,
    and the rule brings L2 as `inner`. Expected: one of the two. Leave `inner` out.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def config_with_two_inner_regularizers_of_one_variable():
    twice(MeanL2(inner="l2"))


# ---- optimizers and callbacks


@message(
    """
    `reduction` must be one of ['sum', 'mean']. Received: 'max' of type <class 'str'>.
    """
)
def unknown_reduction():
    TiedOptimizer("sgd", equalize.GroupRegistry(), reduction="max")


@message(
    """
    `inner_optimizer` must be a Keras optimizer, its name or its config (of a class that is registered
    with `keras.saving.register_keras_serializable`). Received: 'no such optimizer' of type <class
    'str'>.
    """
)
def unknown_optimizer():
    TiedOptimizer("no such optimizer", equalize.GroupRegistry())


@message(
    """
    `inner_optimizer` must not be a TiedOptimizer itself. Received: the TiedOptimizer 'inside'. Give one
    of them a registry with all groups.
    """
)
def optimizer_inside_its_like():
    registry = equalize.GroupRegistry()
    TiedOptimizer(TiedOptimizer("sgd", registry, name="inside"), registry)


@message(
    """
    TiedOptimizer has nothing to tie: expected a registry with a hard group among the variables that are
    trained; received <GroupRegistry: no groups>. Link or tie the model's layers before training:
    `registry.link(model)`, or `registry.tie(...)`.
    """
)
def optimizer_without_ties():
    TiedOptimizer("sgd", equalize.GroupRegistry()).build(kernels("left", "right"))


@message(
    """
    TiedOptimizer is given a part of group 'pair': expected all 2 members that may move, received 1,
    without 'right/kernel' (4, 3) float32. Give it the variables of all members; where optimizers differ
    by variable, wrap them: `TiedOptimizer(MultiOptimizer(...), registry)`.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def optimizer_of_a_part_of_a_group():
    registry, (left, _right) = tied()
    TiedOptimizer("sgd", registry).build([left.kernel])


@message(
    """
    TiedOptimizer cannot train group 'pair' as one variable: the optimizer treats 'left/kernel' and
    'right/kernel' differently. Expected: one weight decay; received False and True. Call
    `exclude_from_weight_decay(var_list=[...])` with all members, or with none.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def optimizer_with_settings_that_differ():
    registry, (left, right) = tied()
    inner = keras.optimizers.AdamW(weight_decay=0.1)
    inner.exclude_from_weight_decay(var_list=[left.kernel])
    TiedOptimizer(inner, registry).build([left.kernel, right.kernel])


@message(
    """
    `tie` was called while Keras infers shapes or traces a step, where variables have no values.
    Expected: a model that is built. Call `tie` after `model.build(...)`, or after the first call on
    data.
    """
)
def tie_where_shapes_are_inferred():
    from keras.src.backend.common.symbolic_scope import SymbolicScope

    registry, (left, right) = tied()
    with SymbolicScope():
        registry.tie("other", [left.bias, right.bias], Equal())


@message(
    """
    `apply` was given gradients without variables, and the optimizer is not built. Expected:
    `apply(gradients, variables)`, or `build(variables)` before.
    """
)
def gradients_without_variables():
    registry, _layers = tied()
    TiedOptimizer("sgd", registry).apply([ops.ones((4, 3))] * 2)


@message(
    """
    `stateless_apply` needs an optimizer that is built. Received: one that is not. Call
    `build(variables)` before.
    """
)
def stateless_step_before_build():
    registry, (left, _right) = tied()
    TiedOptimizer("sgd", registry).stateless_apply([], [ops.ones((4, 3))], [left.kernel.value])


@message(
    """
    `updated` must be a list of indices, ascending, or None. Received: 'all' of type <class 'str'>.
    """
)
def slots_of_another_type():
    registry, _layers = tied()
    TiedOptimizer.from_config(TiedOptimizer("sgd", registry).get_config() | {"updated": "all"})


@message(
    """
    Ties have changed since the optimizer was built: group 'biases' was not hard then. Expected: the
    groups that it was built with; received <GroupRegistry: <Group 'pair': Equal(), 2 members>, <Group
    'biases': Equal(), 2 members>>. Make a new TiedOptimizer and compile with it (after
    `registry.sync("mean")`, where members are not equal yet).
    """
)
def ties_that_changed_after_slots_were_made():
    registry, layers = tied()
    variables = [weight for layer in layers for weight in layer.trainable_weights]
    optimizer = TiedOptimizer("sgd", registry)
    optimizer.build(variables)
    registry.tie("biases", [layer.bias for layer in layers], Equal())
    optimizer.apply([ops.zeros(weight.shape) for weight in variables])


@message(
    """
    `name` must not contain '/', which Keras parts names by. Received: 'tied/sgd' of type <class 'str'>.
    """
)
def optimizer_with_a_path_for_a_name():
    TiedOptimizer("sgd", equalize.GroupRegistry(), name="tied/sgd")


@message(
    """
    Expected the config of a TiedOptimizer, with ['inner_optimizer', 'name', 'reduction', 'registry',
    'updated']. Received: {'inner_optimizer': 'sgd'} of type <class 'dict'>.
    """
)
def optimizer_from_half_a_config():
    TiedOptimizer.from_config({"inner_optimizer": "sgd"})


def built():
    """An optimizer over two kernels, and what holds them."""
    registry, layers = tied()
    optimizer = TiedOptimizer("sgd", registry)
    optimizer.build([layer.kernel for layer in layers])
    return optimizer, layers


@message(
    """
    `trainable_variables` must be a list of `keras.Variable`s. Received: 3 of type <class 'int'>.
    """
)
def variables_that_are_no_list():
    built()[0].apply([ops.ones((4, 3))], 3)


@message(
    """
    `apply` needs a gradient, or None, for each variable. Received: 1 for 2 variables. Give None for a
    variable that has none.
    """
)
def one_gradient_for_two_variables():
    optimizer, layers = built()
    optimizer.apply([ops.ones((4, 3))], [layer.kernel for layer in layers])


@message(
    """
    `apply` was given what the optimizer was not built with. Expected: variables of the model that it
    trains. Received: ['left/bias']. Build it with all of them, or make a new TiedOptimizer.
    """
)
def gradients_of_other_variables():
    optimizer, layers = built()
    optimizer.apply([ops.ones(3)], [layers[0].bias])


@message(
    """
    The variables that are trained are not those that the optimizer was built with. Expected: 2
    variables, ['left/kernel', 'right/kernel']. Received: 1. After layers were frozen or thawed make a
    new TiedOptimizer and compile with it.
    """
)
def a_step_of_other_variables():
    optimizer, layers = built()
    optimizer.stateless_apply([], [ops.ones(3)], [layers[0].bias.value])


@message(
    """
    `repair` must be True or False. Received: 'yes' of type <class 'str'>.
    """
)
def repair_of_another_type():
    TieMonitor(equalize.GroupRegistry(), repair="yes")


@message(
    """
    TieMonitor has nothing to watch in the model 'model': expected a registry with a group in it,
    received <GroupRegistry: <Group 'pair': Equal(), 2 members>>. A model that was loaded or cloned has
    ties of its own: call `registry = equalize.GroupRegistry().link(model)` and give the monitor that
    registry.
    """
)
def monitor_of_another_model():
    registry, _layers = tied()
    _, model = compiled()
    model.fit(np.ones((2, 4)), [np.ones((2, 3))] * 2, verbose=0, callbacks=[TieMonitor(registry)])


@message(
    """
    Hard groups that are not equal at the end of training: 1 of 1; expected a spread of at most 0,
    received: 'pair' (spread 1). Averaging of weights (`use_ema`) does this. Give TieMonitor
    `repair=True`, or call `registry.sync("mean")`, which is exact.
    """
)
def averages_without_a_repair():
    registry, model = compiled()
    monitor = TieMonitor(registry, repair=False)
    monitor.set_model(model)
    monitor.on_train_begin()
    for value, layer in enumerate(model.layers[1:]):
        layer.kernel.assign(np.full((4, 3), value))
    monitor.on_train_end()


@message(
    """
    TieMonitor comes before SwapEMAWeights in the list of callbacks. Expected: after it, to give all
    members what that wrote to one member of each group of a TiedOptimizer; received: ['TieMonitor',
    'SwapEMAWeights']. Write `callbacks=[keras.callbacks.SwapEMAWeights(), TieMonitor(registry)]`.
    """
)
def a_monitor_before_a_swap_of_averages():
    registry, model = compiled()
    model.compile(TiedOptimizer(keras.optimizers.SGD(use_ema=True), registry), "mse")
    callbacks = [TieMonitor(registry), keras.callbacks.SwapEMAWeights()]
    keras.callbacks.CallbackList(callbacks, model=model).on_train_begin()


@message(
    """
    Group 'pair': all members take the value of the first, and others, which differ from it, have been
    trained. Expected: others that are new; or `initial="mean"`, which keeps something of each. Members
    that were trained from different initial values are better tied softly at first, for instance by
    `equalize.regularizers.MeanL2`.
    """
)
def a_tie_that_overwrites_what_was_trained():
    layers = dense("left") + dense("right")
    entrance = keras.Input((4,))
    model = keras.Model(entrance, [layer(entrance) for layer in layers])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(1)
    equalize.GroupRegistry().tie("pair", [layer.kernel for layer in layers], Equal())


@message(
    """
    Cannot tie 'attention/attention_output/kernel' into group 'heads': expected shape (4, 2, 3), set by
    'attention/query/kernel'; received (2, 3, 4). One rule was given to several weights, as a
    `MultiHeadAttention` hands its constraint to all its projections. Leave Equal() out of the layer,
    and tie the weights that you mean: `registry.tie('heads', [...], Equal())`.
    Members:
        'attention/query/kernel' (4, 2, 3) float32
        'attention/key/kernel' (4, 2, 3) float32
        'attention/value/kernel' (4, 2, 3) float32
        'attention/attention_output/kernel' (2, 3, 4) float32
    """
)
def a_rule_that_attention_hands_to_weights_of_two_shapes():
    layer = keras.layers.MultiHeadAttention(2, 3, kernel_constraint=Equal("heads"), name="attention")
    entrance = keras.Input((3, 4))
    equalize.GroupRegistry().link(keras.Model(entrance, layer(entrance, entrance)))


@message(
    """
    `names` must be the name of a group, or a list of them. Received: [3] of type <class 'list'>.
    """
)
def names_of_another_type():
    FactorSchedule(equalize.GroupRegistry(), [3], float)


@message(
    """
    `names` must name at least one group. Received: [] of type <class 'list'>.
    """
)
def schedule_of_nothing():
    FactorSchedule(equalize.GroupRegistry(), [], float)


@message(
    """
    `schedule` must be a function of the epoch. Received: 0.5 of type <class 'float'>.
    """
)
def schedule_of_another_type():
    FactorSchedule(equalize.GroupRegistry(), "pair", 0.5)


@message(
    """
    FactorSchedule has nothing to change in the model 'model': none of ['pair'] has a member there.
    Expected: the registry that this model is linked by.
    """
)
def schedule_for_another_model():
    registry, _layers = tied(MeanL2())
    _, model = compiled()
    model.fit(np.ones((2, 4)), [np.ones((2, 3))] * 2, verbose=0, callbacks=[FactorSchedule(registry, "pair", float)])


@message(
    """
    FactorSchedule cannot change the strength of group 'pair': expected a rule with a number for it;
    received PairwiseL2(factor=<2×2 matrix>). Call `registry.replace('pair', rule)` instead.
    """
)
def schedule_of_a_matrix():
    registry, model = compiled(PairwiseL2(factor=[[0, 1], [1, 0]]))
    schedule = FactorSchedule(registry, "pair", float)
    schedule.set_model(model)
    schedule.on_train_begin()


# ---- advice and pictures


@message(
    """
    `diagnose` expects Keras models. Received: 'model' of type <class 'str'>.
    """
)
def diagnosis_of_what_is_no_model():
    equalize.GroupRegistry().diagnose("model")


@message(
    """
    `model` must be a Keras model. Received: 'model' of type <class 'str'>.
    """
)
def advice_about_something_else():
    equalize.GroupRegistry().advise("model", np.ones((2, 4)), np.ones((2, 3)))


@message(
    """
    `batch_size` must be an integer in [1, 2147483648). Received: 0 of type <class 'int'>.
    """
)
def advice_from_batches_of_nothing():
    registry, model = compiled()
    registry.advise(model, np.ones((2, 4)), [np.ones((2, 3))] * 2, batch_size=0)


@message(
    """
    `advise` needs inputs and targets with one number of samples, at least one: arrays, or structures of
    them. Received: 'x' of type <class 'str'> and 'y' of type <class 'str'>.
    """
)
def advice_from_no_arrays():
    registry, model = compiled()
    registry.advise(model, "x", "y")


@message(
    """
    `advise` cannot compute the loss of 'model' on these data: expected inputs and targets as for
    `model.evaluate(x, y)`, which must run; received what led to RuntimeError: no.
    """
)
def advice_from_a_loss_that_fails():
    registry, model = compiled()
    model.compile("sgd", lambda y, y_pred: refusing(y))
    registry.advise(model, np.ones((2, 4)), [np.ones((2, 3))] * 2)


@message(
    """
    `advise` needs the loss of a model. Expected: a compiled model. Received: 'model', which is not
    compiled. Call `model.compile(optimizer, loss)` first.
    """
)
def advice_without_a_loss():
    registry, layers = tied()
    registry.advise(model_of(*layers), np.ones((2, 4)), [np.ones((2, 3))] * 2)


@message(
    """
    `advise` needs inputs and targets with one number of samples, at least one: arrays, or structures of
    them. Received: arrays with [2, 3, 3] samples.
    """
)
def advice_from_different_numbers_of_samples():
    registry, model = compiled()
    registry.advise(model, np.ones((2, 4)), [np.ones((3, 3))] * 2)


@message(
    """
    `advise` cannot judge group 'pair' by 'model': its member 'left/kernel' (4, 3) float32 is not a
    variable of that model. Expected: a model that all members belong to, or the names of groups that it
    has.
    """
)
def advice_from_another_model():
    registry, _layers = tied()
    registry.advise(compiled()[1], np.ones((2, 4)), [np.ones((2, 3))] * 2)


@message(
    """
    `path` must be the path of a file. Received: 3 of type <class 'int'>.
    """
)
def picture_of_another_type():
    equalize.GroupRegistry().plot(3)


@message(
    """
    `path` must be a file that ends with .png, .svg, .pdf, in a folder that exists. Received: 'ties.txt'
    of type <class 'str'>.
    """
)
def picture_in_another_format():
    equalize.GroupRegistry().plot("ties.txt")


@message(
    """
    `plot` has nothing to draw: expected a registry with groups, received one without. Call
    `registry.link(model)` or `registry.tie(...)` first.
    """
)
def picture_of_nothing():
    equalize.GroupRegistry().plot("ties.png")


@message(
    """
    TieMonitor has nothing to draw: expected at least one epoch of training, received none. Call
    `model.fit(..., callbacks=[monitor])` first.
    """
)
def picture_before_training():
    TieMonitor(equalize.GroupRegistry()).plot("spread.png")


@message(
    """
    Drawing needs matplotlib, which is not installed. Expected: the extra `plot` of equalize. Install
    it: pip install "equalize[plot]"
    """
)
def picture_without_matplotlib():
    registry, _layers = tied()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        registry.plot("ties.png")


# ---- sharing


@message(
    """
    `share` needs at least two variables or layers. Received: 1.
    """
)
def sharing_of_one():
    equalize.share(*kernels("left"))


@message(
    """
    `share` expects `keras.Variable`s (for instance `layer.kernel`), or layers, and not both. Received:
    'right' of type <class 'str'>.
    """
)
def sharing_of_other_things():
    equalize.share(*kernels("left"), "right")


@message(
    """
    Cannot share 'left/kernel': it has the rule Equal() of group 'pair'. Expected: variables that are
    not tied. Call `registry.untie(...)`, or leave the rule out of the layer.
    """
)
def sharing_of_tied_variables():
    _registry, (left, right) = tied()
    equalize.share(left.kernel, right.kernel)


@message(
    """
    Cannot share 'one/kernel': it would stay in one layer and be replaced in another. Expected: layers
    that do not hold each other's weights, or hold them in the same order.
    """
)
def sharing_of_layers_that_hold_each_others_weights():
    one, other = keras.layers.Layer(name="one"), keras.layers.Layer(name="other")
    one.first, one.second = (one.add_weight(shape=(4, 3), name="kernel") for _ in range(2))
    other.first, other.second = one.second, one.first
    equalize.share(one, other)


@message(
    """
    Cannot share 'left/kernel' with the owner of 'right/kernel': expected shape (4, 3), received (4, 2).
    One variable has one shape: make the two agree first.
    """
)
def sharing_of_what_differs():
    left, right = dense("left"), dense("right", units=2)
    equalize.share(left[0].kernel, right[0].kernel)


@message(
    """
    Cannot share 'left/kernel' with the owner of 'right/kernel': expected constraint NonNeg, received
    none. One variable has one constraint: make the two agree first.
    """
)
def sharing_under_constraints_that_differ():
    (left,), (right,) = dense("left", kernel_constraint="non_neg"), dense("right")
    equalize.share(left.kernel, right.kernel)


@message(
    """
    Cannot share 'left/kernel': no layer owns 'nobody', so there is nowhere to put it. Expected:
    variables of built layers; only the first may be one that no layer owns.
    """
)
def sharing_with_nobody():
    layers = dense("left")
    equalize.share(layers[0].kernel, variable((4, 3), "nobody"))


@message(
    """
    Cannot share 'layer/first' with 'layer/second' inside layer 'layer': expected variables of different
    layers; received two of one, which Keras saves and loads by their number. Tie them with
    `equalize.constraints.Equal` instead.
    """
)
def sharing_inside_one_layer():
    layer = keras.layers.Layer(name="layer")
    layer.first, layer.second = (layer.add_weight(shape=(4, 3), name=name) for name in ("first", "second"))
    equalize.share(layer.first, layer.second)


@message(
    """
    Cannot share 'left/kernel' with layer 'right': it tracks 'right/kernel' but holds it in none of its
    attributes, nor in a list, tuple or dictionary there. Expected: an attribute that can be set.
    """
)
def sharing_with_a_layer_that_hides_its_weight():
    (left,) = dense("left")
    right = keras.layers.Layer(name="right")
    hidden = right.add_weight(shape=(4, 3), name="kernel")
    equalize.share(left.kernel, hidden)


@message(
    """
    `relation` expects two `keras.Variable`s, or two layers. Received: 'left' of type <class 'str'> and
    'right' of type <class 'str'>.
    """
)
def relation_of_other_things():
    equalize.relation("left", "right")


# ---- the tests


@pytest.mark.parametrize("case", [case for case in CASES if here(case)])
def test_the_message_is_the_one_pinned(case):
    provoke, pinned, _ = CASES[case]
    text = wrapped(said(raised(provoke)))
    print(f"\n{case.replace('_', ' ')}:\n{textwrap.indent(text, '    ')}")
    assert text == pinned


def test_every_place_that_raises_is_reached():
    reached = [place for case in CASES if here(case) for place in places_of(raised(CASES[case][0]))]
    missing = [
        f"{file}:{first}"
        for file, first, last, function in places_that_raise()
        if not any(file == at and first <= line <= last for at, line in reached)
        and (BACKEND == "jax" or (file, function) not in ON_JAX)
    ]
    assert missing == []


def test_messages_say_what_was_expected_and_hold_no_internal_names():
    for case, (_, text, _) in CASES.items():
        assert re.search(r"[Ee]xpect|must|needs|[Cc]all|Install", text), case
        assert not re.search(r"(?<![\w.])_[a-z]\w+|NoneType|equalize\._", text), case
        assert text.endswith((".", ")", '"', "]", "float32", "trained'")) or "Members" in text, case
    assert max(Counter(text for _, text, _ in CASES.values()).values()) == 1
