"""What damaged configs meet with."""

import keras

import equalize
from equalize.constraints import Equal
from equalize.regularizers import MeanL2
from equalize.views import Flip
from tests.messages import damaged, dense, message, model_of, tied


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
    The config of group 'pair' cannot be used. Expected at least two members. Received: {'view': None,
    'weight': 1.0, 'path': 'left/kernel', 'shape': [4, 3], 'dtype': 'float32', 'places':
    [['63f71ab85682d262', 0, 'vars/0']]} of type <class 'dict'>.
    """
)
def config_with_one_member():
    damaged(lambda config: config["groups"][0]["members"].pop() and None)


@message(
    """
    This is not the config of a registry: expected members in group 'pair'; received [] of type <class
    'list'>. Use what `registry.get_config()` returned, unchanged.
    """
)
def config_without_members():
    damaged(lambda config: config["groups"][0]["members"].clear())


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
    The config of group 'pair' cannot be used. Expected the config of a rule of equalize, of a class
    that is registered with `keras.saving.register_keras_serializable`. Received: {'module':
    'equalize.constraints', 'class_name': 'Equal', 'config': {'group': None, 'view': None, 'inner':
    None, 'rate': 1.0, 'weight': 1.0}, 'registered_name': 'other>Equal'} of type <class 'dict'>. Nothing
    is registered as 'other>Equal': decorate the class, or import its module.
    """
)
def config_with_the_rule_of_somebody_else():
    damaged(lambda config: config["groups"][0]["rule"].update(registered_name="other>Equal"))


@message(
    """
    The config of group 'pair' cannot be used. The config of a rule of equalize is damaged: `rate` must
    be a number. Received: 'half' of type <class 'str'>. Expected: arguments that its class takes.
    Received: {'module': 'equalize.constraints', 'class_name': 'Equal', 'config': {'rate': 'half'},
    'registered_name': 'equalize>Equal'} of type <class 'dict'>.
    """
)
def config_with_a_rule_that_cannot_be_made():
    damaged(lambda config: config["groups"][0]["rule"].update(config={"rate": "half"}))


@message(
    """
    The config of group 'pair' cannot be used. Expected the config of a rule of equalize, of a class
    that is registered with `keras.saving.register_keras_serializable`. Received: {'module':
    'equalize.views', 'class_name': 'Flip', 'config': {'axes': [0]}, 'registered_name': 'equalize>Flip'}
    of type <class 'dict'>.
    """
)
def config_with_a_view_in_place_of_a_rule():
    damaged(lambda config: config["groups"][0].update(rule=keras.saving.serialize_keras_object(Flip(0))))


@message(
    """
    The config of group 'pair' cannot be used. Expected the config of a view, of a class that is
    registered with `keras.saving.register_keras_serializable`. Received: {'registered_name':
    'other>Flip'} of type <class 'dict'>. Nothing is registered as 'other>Flip': decorate the class, or
    import its module.
    """
)
def config_with_the_view_of_somebody_else():
    damaged(lambda config: config["groups"][0]["members"][0].update(view={"registered_name": "other>Flip"}))


@message(
    """
    The config of group 'pair' cannot be used. The config of a view is damaged: Flip.__init__() missing
    1 required positional argument: 'axes'. Expected: arguments that its class takes. Received:
    {'module': 'equalize.views', 'class_name': 'Flip', 'config': {}, 'registered_name': 'equalize>Flip'}
    of type <class 'dict'>.
    """
)
def config_with_a_view_that_cannot_be_made():
    flip = keras.saving.serialize_keras_object(Flip(0)) | {"config": {}}
    damaged(lambda config: config["groups"][0]["members"][0].update(view=flip))


def _with_a_bad_constant(config):
    config["groups"][0]["members"][0] = {"view": None, "weight": 1.0, "constant": {"values": "none"}}


@message(
    """
    The config of group 'pair' cannot be used. Expected a constant with values, a list of numbers, and a
    dtype. Received: {'values': 'none'} of type <class 'dict'>.
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
    projects an entry. Name all members in one group, give parts that do not overlap, as
    equalize.views.Slice, or give layers that do not hold each other's weights.
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


@message(
    """
    Cannot find the member 'right/dense/kernel' of group 'pair': the group has members in several models
    of one structure. Expected: at least 2 of them in one call, `link(model_1, model_2)`; received 1.
    Give all models, or tie the variables again with `tie`.
    """
)
def config_of_several_models_for_one_of_them():
    names = ("left", "right")
    nets = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="dense")], name=name) for name in names]
    registry = equalize.GroupRegistry()
    registry.tie("pair", [net.weights[0] for net in nets], Equal())
    clone = keras.models.clone_model(nets[0])
    equalize.GroupRegistry.from_config(registry.get_config()).link(clone)
