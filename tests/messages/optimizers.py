"""What optimizers and callbacks say."""

import keras
import numpy as np
from keras import ops

import equalize
from equalize.callbacks import FactorSchedule, PeriodicSync, TieMonitor, TieSchedule
from equalize.constraints import Equal, Follow
from equalize.optimizers import TiedOptimizer
from equalize.reductions import Reduction
from equalize.regularizers import MeanL2, PairwiseL2
from tests.messages import compiled, dense, kernels, message, model_of, tied


@message(
    """
    `reduction` must be one of ['sum', 'mean']. Received: 'max' of type <class 'str'>.
    """
)
def unknown_reduction():
    TiedOptimizer("sgd", equalize.GroupRegistry(), reduction="max")


@message(
    """
    `reduction` must be one of ['sum', 'mean'], or an object of a class of `equalize.reductions`.
    Received: 3 of type <class 'int'>.
    """
)
def reduction_of_another_type():
    TiedOptimizer("sgd", equalize.GroupRegistry(), reduction=3)


@message(
    """
    `weights` of One must return one number for each of 2 uses, of shape (2,). Received: shape (1,).
    """
)
def reduction_that_gives_one_weight():
    class One(Reduction):
        def weights(self, gramian):
            return ops.ones(1)

    registry, layers = tied()
    optimizer = TiedOptimizer("sgd", registry, reduction=One())
    optimizer.apply([ops.ones((4, 3))] * 2, [layer.kernel for layer in layers])


@message(
    """
    TieMonitor cannot see gradients in the model 'model': expected that it is compiled with a
    TiedOptimizer for this registry, received SGD. Compile with
    `equalize.optimizers.TiedOptimizer(optimizer, registry)`, or leave `gradients` out.
    """
)
def gradients_without_a_tied_optimizer():
    registry, layers = tied()
    model = model_of(*layers)
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0, callbacks=[TieMonitor(registry, gradients=True)])


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
    `registry.link(model)`, or `registry.tie(...)`. After `untie` or `share`, compile with another
    optimizer.
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


@message(
    """
    An outer optimizer needs the change of the mean. Expected: `method="mean"`. Received: 'first'.
    """
)
def outer_optimizer_of_the_first():
    PeriodicSync(equalize.GroupRegistry(), every=2, method="first", outer_optimizer="sgd")


@message(
    """
    PeriodicSync has nothing to synchronize in the model 'model': expected groups with a member there,
    received ['pair']. Give it the registry of this model.
    """
)
def synchronization_of_another_model():
    _, model = compiled()
    registry, _ = tied()
    model.fit(np.ones((2, 4)), [np.ones((2, 3))] * 2, verbose=0, callbacks=[PeriodicSync(registry, every=2)])


@message(
    """
    Group 'pair' cannot move 'right/kernel' (4, 3) float32, which follows: on JAX an optimizer changes
    only what it trains. Expected: `fit(..., callbacks=[equalize.callbacks.PeriodicSync(registry,
    every=1)])`, which has members follow after each batch; in a loop of your own, an `apply` inside one
    `keras.StatelessScope` that is given the variables of all members. Received: a step of an optimizer
    alone.
    """,
    on="jax",
)
def follower_that_jax_does_not_train():
    layers = [keras.layers.Dense(3, name=name) for name in ("left", "right")]
    model = model_of(*layers)
    layers[1].trainable = False
    equalize.GroupRegistry().tie("pair", [layer.kernel for layer in layers], Follow())
    model.compile("sgd", ["mse", "mse"])
    model.fit(np.ones((2, 4)), [np.ones((2, 3))] * 2, verbose=0)


@message(
    """
    The outer optimizer of PeriodicSync was built for the groups ['pair']. Expected: the same ones;
    received: ['pair', 'biases']. Make a new PeriodicSync with an optimizer of its own.
    """
)
def outer_optimizer_of_other_groups():
    registry, model = compiled(MeanL2(factor=0.0))
    sync = PeriodicSync(registry, every=2, outer_optimizer="sgd")
    data = np.ones((2, 4)), [np.ones((2, 3))] * 2
    model.fit(*data, verbose=0, callbacks=[sync])
    biases = [layer.bias for layer in model.layers if layer.weights]
    registry.tie("biases", biases, None)
    model.fit(*data, verbose=0, callbacks=[sync])


@message(
    """
    `rules` must be a mapping from integers to rules, or None. Received: [<Equal() of group None>] of
    type <class 'list'>.
    """
)
def rules_that_are_no_mapping():
    TieSchedule(equalize.GroupRegistry(), "pair", [Equal()])  # type: ignore[arg-type]


@message(
    """
    `rules` must have at least one rule. Received: {} of type <class 'dict'>.
    """
)
def no_rules():
    TieSchedule(equalize.GroupRegistry(), "pair", {})


@message(
    """
    TieSchedule has nothing to change in the model 'model': group 'pair' has no member there. Expected:
    the registry that this model is linked by.
    """
)
def schedule_of_another_model():
    registry, _layers = tied()
    model = model_of(*dense("third"))
    model.compile("sgd", "mse")
    schedule = TieSchedule(registry, "pair", {0: None})
    model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0, callbacks=[schedule])


class Replacing(keras.callbacks.Callback):
    def __init__(self, registry):
        super().__init__()
        self.registry = registry

    def on_train_batch_end(self, batch, logs=None):
        self.registry.replace("pair", None)


@message(
    """
    TiedOptimizer cannot hand slots over: while `fit` runs on JAX they are in the compiled step.
    Expected: a model that has taken its state back. Call `model.jax_state_sync()` first, as
    `equalize.callbacks.TieSchedule` does.
    """,
    on="jax",
)
def slots_that_are_in_the_compiled_step():
    registry, model = compiled()
    model.compile(TiedOptimizer("adam", registry), ["mse", "mse"])
    model.fit(np.ones((2, 4)), [np.ones((2, 3))] * 2, verbose=0, callbacks=[Replacing(registry)])
