"""What `share` and `relation` refuse."""

import keras

import equalize
from tests.messages import dense, kernels, message, tied, variable


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


@message(
    """
    Cannot share group 'pair': its rule MeanL2(factor=0.1) does not keep its members equal. Expected: a
    hard group. Call `registry.replace('pair', equalize.constraints.Equal())` first.
    """
)
def sharing_of_a_soft_group():
    registry = equalize.GroupRegistry()
    registry.tie("pair", list(kernels("left", "right")), equalize.regularizers.MeanL2(factor=0.1))
    registry.share("pair")


@message(
    """
    Cannot share group 'pair': 'right/kernel' (3, 4) float32 as Transpose(axes=None) does not show the
    common value as a variable of its own that is equal to the others, so one variable cannot stand for
    all. Expected: members without views, and no constants. Share the others by name; what has a view
    stays a variable, and takes its 12 numbers in every file.
    """
)
def sharing_of_a_transposed_pair():
    left, right = dense("left")[0], dense("right", units=4, inputs=3)[0]
    registry = equalize.GroupRegistry()
    registry.tie("pair", [left.kernel, (right.kernel, equalize.views.Transpose())], equalize.constraints.Equal())
    registry.share("pair")
