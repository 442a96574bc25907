"""What `GroupRegistry.link` refuses."""

import keras

import equalize
from equalize.constraints import Equal
from tests.messages import dense, message, model_of, variable


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
    Cannot link 'model': it has no weights for 'inside' yet, since it is not built. Expected: a built
    model. Give it an `Input`, call `model.build(input_shape)`, or call it once on data.
    """
)
def link_of_a_model_that_is_not_built():
    equalize.GroupRegistry().link(
        keras.Sequential([keras.layers.Dense(2, name="inside", kernel_constraint=Equal("pair"))], name="model")
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
