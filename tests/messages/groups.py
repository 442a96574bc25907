"""What groups and registries say."""

import keras
import numpy as np

import equalize
from equalize.callbacks import TieMonitor
from equalize.constraints import Equal
from equalize.regularizers import MeanL2
from tests.messages import Columns, Nothing, OfUnlikeShapes, OneForAll, compiled, message, tied, variable


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
    Group 'pair' has no penalty: its rule is Equal(). Expected: names of groups tied by a regularizer.
    """
)
def penalty_of_a_hard_group():
    registry, _layers = tied()
    registry.penalty("pair")


@message(
    """
    Group 'pair' cannot be projected: its rule is MeanL2(factor=0.01). Expected: names of groups tied by
    `equalize.constraints.Equal`.
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
    `penalty` of Columns() must return a scalar, the whole penalty of the group. Received: a tensor of
    shape (3,).
    """
)
def penalty_of_columns():
    registry, _layers = tied(Columns())
    registry.penalty()


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
