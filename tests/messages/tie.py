"""What `GroupRegistry.tie` refuses."""

import keras
import numpy as np
from keras import ops

import equalize
from equalize.constraints import Equal, Follow
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import ChainL2, MeanL2, PairwiseL2
from equalize.views import Pattern, Slice
from tests.messages import dense, kernels, message, model_of, refusing, tied, variable


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
    or `equalize.regularizers.MeanL2(factor=0.01)`; or None. Received: 'Equal' of type <class 'str'>.
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
    Cannot tie 'two' into group 'pair': expected dtype float32, set by 'one'; received float16. The mean
    would be rounded at every step, so Equal() alone takes one dtype. Make an
    `equalize.optimizers.TiedOptimizer` with this registry before you tie: it updates the widest and
    rounds it for the others.
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
    variables, or parts of one that do not overlap; one variable in two layers is equal to itself
    without a tie.
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
    Cannot tie 'left/kernel' into group 'other': it belongs to group 'pair' already (Equal()), and an
    entry can be projected by one group only. Name all members in one group, give parts that do not
    overlap, as equalize.views.Slice, or call `untie('pair')` first.
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
    not trainable, or constants) and differ by up to 1. Expected: at most one value among what does not
    move. Set it to one value, or make one of the members trainable.
    """
)
def two_anchors():
    held = [variable((2,), name, trainable=False, value=value) for name, value in (("one", 0.0), ("two", 1.0))]
    equalize.GroupRegistry().tie("pair", held, Equal())


@message(
    """
    Group 'alone' cannot be made equal: entries that 'one' (2,) float32 as Pattern(<indices of shape
    (2,)>, shape=[1]) repeats cannot move (they are not trainable, or constants) and differ by up to 1.
    Expected: at most one value among what does not move. Set it to one value, or make one of the
    members trainable.
    """
)
def anchor_that_repeats_unequal_entries():
    held = variable((2,), "one", trainable=False)
    held.assign([0.0, 1.0])
    equalize.GroupRegistry().tie("alone", [(held, equalize.views.Pattern([0, 0], (1,)))], Equal())


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
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), Equal(), weights=[1e308, 1e308])


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


@message(
    """
    Cannot tie 'whole/kernel' into group 'other': another group has a part of the variable, and the rule
    brings NonNeg as `inner`. Expected: a rule without. Give the layer the constraint, for all of its
    variable.
    Members:
        'right/kernel' (2, 2) float32 as Slice(start_indices=[0, 0], shape=[1, 2])
        'whole/kernel' (2, 2) float32 as Slice(start_indices=[1, 0], shape=[1, 2])
    """
)
def constraint_for_a_part_beside_another_group():
    whole, left, right = (layer.kernel for layer in dense("whole", "left", "right", units=2, inputs=2))
    registry = equalize.GroupRegistry()
    registry.tie("one", [(left, Slice((0, 0), (1, 2))), (whole, Slice((0, 0), (1, 2)))], Equal())
    other = [(right, Slice((0, 0), (1, 2))), (whole, Slice((1, 0), (1, 2)))]
    registry.tie("other", other, Equal(inner="non_neg"))


@message(
    """
    The rule of group 'pair' has the weight 3, which says nothing of many members. Expected:
    `weights=[...]`, a number for each member. Received: <Equal() of group None> of type <class
    'equalize.constraints.Equal'>.
    """
)
def weight_of_a_rule():
    kept = kernels("left", "right")
    equalize.GroupRegistry().tie("pair", kept, Equal(weight=3))


@message(
    """
    `weights` of 'pair' must have a number for each of 2 members. Received: [1, 2, 3] of type <class
    'list'>.
    """
)
def weights_of_another_number():
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), Equal(), weights=[1, 2, 3])


@message(
    """
    `weights` must be a list of numbers. Received: 3 of type <class 'int'>.
    """
)
def weights_that_are_no_list():
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), Equal(), weights=3)


@message(
    """
    Cannot tie group 'pair': ChainL2(factor=0.01) has no mean in which members could count differently.
    Expected: no weights; received [1.0, 2.0]. Leave them out, or take a rule with a mean, as
    equalize.regularizers.MeanL2.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def weights_for_a_rule_without_a_mean():
    equalize.GroupRegistry().tie("pair", kernels("left", "right"), ChainL2(), weights=[1, 2])


@message(
    """
    Cannot tie 'half' into group 'pair': expected dtype float32, set by 'master'; received bfloat16. The
    mean would be rounded at every step, so Equal() alone takes one dtype. Make an
    `equalize.optimizers.TiedOptimizer` with this registry before you tie: it updates the widest and
    rounds it for the others.
    Members:
        'master' (2,) float32
        'half' (2,) bfloat16
    """
)
def dtypes_that_an_exact_tie_could_have():
    master, half = variable((2,), name="master"), keras.Variable(np.zeros(2), dtype="bfloat16", name="half")
    equalize.GroupRegistry().tie("pair", [master, half], Equal())


@message(
    """
    Group 'pair' has members of several dtypes, and their mean would be rounded at every step: Equal()
    alone cannot keep it. Expected: `equalize.optimizers.TiedOptimizer`, which updates the widest and
    rounds it for the others. Received: another optimizer.
    Members:
        'master' (2,) float32
        'half' (2,) bfloat16
    """
)
def dtypes_that_differ_under_another_optimizer():
    master, half = variable((2,), name="master"), keras.Variable(np.zeros(2), dtype="bfloat16", name="half")
    registry = equalize.GroupRegistry()
    optimizer = TiedOptimizer("sgd", registry)
    registry.tie("pair", [master, half], Equal())
    assert optimizer.registry is registry
    master.constraint(master)


@message(
    """
    Group 'pair' is declared by its layers, and a member that is added would not be in their configs.
    Expected: a layer with <Equal() of group 'pair'> in it, and `registry.link(model)` once more.
    """
)
def extension_of_a_declared_group():
    layers = [keras.layers.Dense(3, kernel_constraint=Equal("pair"), name=name) for name in ("left", "right")]
    model = model_of(*layers)
    registry = equalize.GroupRegistry().link(model)
    registry.extend("pair", kernels("third"))


@message(
    """
    `members` of 'pair' must be a list of variables or arrays, as its members are. Received: [<Dense
    name=third, built=True>] of type <class 'list'>.
    """
)
def extension_of_variables_by_layers():
    registry, _ = tied()
    registry.extend("pair", dense("third"))


@message(
    """
    `members` of 'pair' must be a list of layers. Received: ['third'] of type <class 'list'>.
    """
)
def extension_of_layers_by_variables():
    registry, layers = equalize.GroupRegistry(), dense("left", "right")
    registry.tie("pair", layers, Equal())
    registry.extend("pair", ["third"])


@message(
    """
    Cannot add layers to the tie 'pair': their structures differ. Expected: 2 weights, pair/kernel,
    pair/bias; received kernel. Take layers of one structure.
    """
)
def extension_by_layers_of_another_structure():
    registry, layers = equalize.GroupRegistry(), dense("left", "right")
    registry.tie("pair", layers, Equal())
    registry.extend("pair", dense("third", use_bias=False))


@message(
    """
    Group 'pair' cannot be split: its rule is Equal(). Expected: a soft, a proximal or a free group,
    whose members may lie apart.
    Members:
        'left/kernel' (4, 3) float32
        'right/kernel' (4, 3) float32
    """
)
def split_of_a_hard_group():
    registry, _ = tied()
    registry.split("pair", atol=0.1)


@message(
    """
    The groups of 'pair' cannot be split: some have lost members. Expected: one number of members in
    each; received [2, 3]. Split them one by one.
    """
)
def split_of_groups_that_have_lost_members():
    registry, layers = equalize.GroupRegistry(), dense("left", "right")
    layers += dense("third")
    registry.tie("pair", layers, None)
    kernels = registry["pair/kernel"]
    kernels.adopt(kernels.tying, kernels.members[:2], None)
    registry.split("pair", atol=0.1)


@message(
    """
    Cannot anchor the weights of 'start': layer 'left' has none that is trainable. Expected: a layer
    that trains. Set `trainable = True`, or leave it out.
    """
)
def anchor_of_a_frozen_layer():
    (layer,) = dense("left")
    layer.trainable = False
    equalize.GroupRegistry().anchor("start", layer, MeanL2())


@message(
    """
    `layers` of 'start' must be a layer, or a list of them. Received: 'left' of type <class 'str'>.
    """
)
def anchor_of_a_variable():
    equalize.GroupRegistry().anchor("start", "left", MeanL2())


@message(
    """
    `values` of 'start' must be one array for each trainable weight. Expected: 2, as `[weight.numpy()
    for weight in layer.trainable_weights]` gives them; received 1.
    """
)
def anchor_at_another_number_of_values():
    (layer,) = dense("left")
    equalize.GroupRegistry().anchor("start", layer, MeanL2(), values=[1.0])


@message(
    """
    `values` of 'start' must be a list of arrays. Received: 1.0 of type <class 'float'>.
    """
)
def anchor_at_no_list():
    (layer,) = dense("left")
    equalize.GroupRegistry().anchor("start", layer, MeanL2(), values=1.0)


@message(
    """
    Cannot tie 'two/kernel' into group 'second': it is in group 'first' as well (Follow()), and what
    follows cannot lead. Expected: one leader for all. Name the one that is followed in both groups.
    Members:
        'two/kernel' (4, 3) float32
        'three/kernel' (4, 3) float32
    """
)
def follower_that_leads():
    registry, (one, two, three) = equalize.GroupRegistry(), kernels("one", "two", "three")
    registry.tie("first", [one, two], Follow())
    registry.tie("second", [two, three], Follow())


@message(
    """
    Cannot tie group 'pair': a constant cannot follow. Expected: variables after the first member, which
    leads; received an array. Name the array first, or leave it out.
    Members:
        'left/kernel' (4, 3) float32
        'constant' (4, 3) float32
    """
)
def constant_that_follows():
    equalize.GroupRegistry().tie("pair", [*kernels("left"), np.ones((4, 3))], Follow())


@message(
    """
    Cannot tie group 'repeats': it has a member whose view repeats entries, and MeanL2(factor=0.01)
    leaves these apart. Expected: a rule that makes them equal, as equalize.constraints.Equal() does.
    Take that, or leave the view out.
    Members:
        'pair' (2,) float32 as Pattern(<indices of shape (2,)>, shape=[1])
    """
)
def pattern_under_a_penalty():
    equalize.GroupRegistry().tie("repeats", [(variable((2,), "pair"), Pattern([0, 0], (1,)))], MeanL2())
