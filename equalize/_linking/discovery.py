"""Who is meant: the rules that models carry, and the members that a user names."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import attributes, keras_private, living
from equalize._inputs import arguments
from equalize._inputs.arguments import received
from equalize._linking import pairing
from equalize._ties.bound import group_of, rule_of, ties_on
from equalize._ties.member import Member, listing
from equalize._ties.rules import Free, Rule
from equalize._ties.tied_group import TiedGroup
from equalize.errors import EqualizeError, GroupMismatchError, NotLinkedError
from equalize.views import View

Entries: TypeAlias = "list[tuple[keras.Variable, Rule, TiedGroup | None]]"
"""The variables of a group, with the rule on each, and the group that it is bound to already."""


def find_groups(models: Sequence[keras.Layer], *, ruleless: bool = False) -> dict[str, Entries]:
    """The variables with a rule in the order of the models' weights, by the name of the group.

    Args:
        models: Built models.
        ruleless: Whether a model without rules is in order, since its ties come from elsewhere.

    Returns:
        For each group, its entries.

    Raises:
        NotLinkedError: A model is not built, or carries no rule.
        EqualizeError: A rule has no group name.
        TypeError: Something else than a model or layer is given.
    """
    if not models:
        raise EqualizeError("`link` needs a model. Expected: `link(model)`. Received: nothing.")
    found: dict[str, Entries] = {}
    seen: set[int] = set()
    for model in models:
        rules = 0
        for variable in weights_of(model):
            for tie in ties_on(variable):
                rule = rule_of(tie)
                rules += 1
                if rule.group is None:
                    raise EqualizeError(
                        f"The rule {rule.describe()} on '{variable.path}' has no group name, so it ties nothing. "
                        f'Expected: a name shared by all members, as in {type(rule).__name__}("towers").'
                    )
                if id(variable) not in seen:
                    found.setdefault(rule.group, []).append((variable, rule, group_of(tie)))
            seen.add(id(variable))
        if not rules and not ruleless:
            raise NotLinkedError(
                f"No rule was found in '{model.name}', so there is nothing to link. Expected: layers with, for "
                'instance, `kernel_constraint=equalize.constraints.Equal("towers")`. To tie layers that are built '
                "already, use `registry.tie(name, [layer_1, layer_2], equalize.constraints.Equal())`."
            )
    return found


def existing_group(name: str, entries: Entries, known: TiedGroup | None) -> TiedGroup | None:
    """The group that the entries belong to already, or that they extend; None where they found a new one.

    Raises:
        GroupMismatchError: A group of this name lives elsewhere.
    """
    bound = {id(group): group for _, _, group in entries if group is not None}
    groups = [*bound.values(), *([known] if known is not None and id(known) not in bound else [])]
    if not groups:
        return None
    offered = {id(variable) for variable, _, _ in entries}
    complete = all(group is groups[0] for _, _, group in entries)
    extends = {id(member.variable) for member in groups[0].members} <= offered
    if len(groups) == 1 and (complete or extends):
        return groups[0]
    elsewhere = [member for group in groups for member in group.members if id(member.variable) not in offered]
    raise GroupMismatchError(
        f"Group '{name}' has members elsewhere already, and the models given name others for it. If one group over "
        "all of them is meant, link all models in one call: `GroupRegistry().link(model_1, model_2)`. If each model "
        "is to have a group of its own (a clone, a second copy), give each a registry of its own: "
        f"`GroupRegistry().link(model_2)`.\nMembers elsewhere:{_lines(elsewhere)}\n"
        f"Members in the models given:{_lines([Member(variable) for variable, _, _ in entries])}"
    )


def required_rule(name: str, rule: Any) -> Rule:
    """The argument `rule` of what ties the group `name`.

    Raises:
        TypeError: It is not a rule.
        EqualizeError: It names another group, or brings one.
    """
    arguments.text("name", name, "the name of the group")
    if rule is None:
        return Free()
    if not isinstance(rule, Rule):
        raise TypeError(
            "`rule` must be a constraint or regularizer of equalize, as an object: `equalize.constraints.Equal()` or "
            f"`equalize.regularizers.MeanL2(factor=0.01)`; or None. Received: {received(rule)}."
        )
    if isinstance(rule.inner, Rule):
        raise EqualizeError(
            f"`tie` makes one group, and the rule brings another as `inner`: {received(rule.inner)}. Expected: a rule "
            "without. Tie the two groups one after the other; both rules are then on the variables."
        )
    if rule.group not in (None, name):
        raise EqualizeError(
            f"`tie` was given the name '{name}' and a rule of group '{rule.group}'. Expected: one name. Leave the "
            f"group out of the rule: {rule.describe()}."
        )
    return rule


def statistics_of(name: str, layers: Sequence[Any]) -> dict[str, list[Member]]:
    """The moving statistics of layers, side by side, by the names of their groups; none where they have none.

    Raises:
        GroupMismatchError: The layers do not have the same ones.
    """
    if not any(isinstance(layer, keras.Layer) and pairing.has_weights(layer, pairing.statistics) for layer in layers):
        return {}
    task = f"Cannot tie the moving statistics of layers into group '{name}'"
    paired = pairing.paired_weights(task, layers, pairing.statistics)
    known = owners(layers)
    return {
        f"{name}/{place}": [Member(variable, owner=known[id(variable)]) for variable in variables]
        for place, variables in paired.items()
    }


def checked_weights(name: str, weights: Any, rule: Rule, count: int) -> list[float]:
    """How much each member, or layer, counts in a mean.

    Raises:
        EqualizeError: They are not positive, or not one for each; or the rule has a weight, which is for layers that
            declare it.
        TypeError: They are not numbers.
    """
    if rule.weight != 1.0:
        raise EqualizeError(
            f"The rule of group '{name}' has the weight {rule.weight:g}, which says nothing of many members. Expected: "
            f"`weights=[...]`, a number for each member. Received: {received(rule)}."
        )
    if weights is None:
        return [1.0] * count
    given = arguments.positive_numbers("weights", weights)
    if len(given) != count:
        raise EqualizeError(
            f"`weights` of '{name}' must have a number for each of {arguments.counted(count, 'member')}. Received: "
            f"{received(weights)}."
        )
    return given


def members_to_add(name: str, members: Any, groups: Sequence[TiedGroup]) -> dict[str, list[Member]]:
    """The members that join each group of a tie, by the groups' names.

    Raises:
        EqualizeError: Layers declare a group.
        GroupMismatchError: There are none, or layers have another structure.
        NotLinkedError: A layer is not built.
        TypeError: A member is of no known type.
    """
    declared = next((group for group in groups if group.declared), None)
    if declared is not None:
        raise EqualizeError(
            f"Group '{declared.name}' is declared by its layers, and a member that is added would not be in their "
            f"configs. Expected: a layer with {declared.tying.having(group=declared.name)!r} in it, and "
            "`registry.link(model)` once more."
        )
    if groups[0].tie is None:
        if not isinstance(members, (list, tuple)) or any(isinstance(member, keras.Layer) for member in members):
            raise TypeError(
                f"`members` of '{name}' must be a list of variables or arrays, as its members are. Received: "
                f"{received(members)}."
            )
        return {name: members_of(name, members)[0][name]}
    if not isinstance(members, (list, tuple)) or not all(isinstance(member, keras.Layer) for member in members):
        raise TypeError(f"`members` of '{name}' must be a list of layers. Received: {received(members)}.")
    task = f"Cannot add layers to the tie '{name}'"
    added: dict[str, list[Member]] = {}
    for part, own in ((False, pairing.made_trainable), (True, pairing.statistics)):
        names = [group.name for group in groups if group.of_statistics == part]
        paired = pairing.paired_weights(task, members, own) if names else {}
        known = owners(members) if part else {}
        if len(paired) != len(names):
            raise GroupMismatchError(
                f"{task}: their structures differ. Expected: {arguments.counted(len(names), 'weight')}, "
                f"{', '.join(names)}; received {', '.join(paired) or 'none'}. Take layers of one structure."
            )
        for group, variables in zip(names, paired.values(), strict=True):
            added[group] = [Member(variable, owner=known.get(id(variable))) for variable in variables]
    return added


def anchored(name: str, layers: Any, values: Any) -> dict[str, list[Member]]:
    """The trainable weights of layers, each with a constant, by the names of their groups.

    Raises:
        NotLinkedError: A layer has no trainable weights.
        EqualizeError: `values` are not one for each weight.
        TypeError: Something else than layers is given, or `values` are not a list.
    """
    several = isinstance(layers, (list, tuple))
    listed = list(layers) if several else [layers]
    if not listed or not all(isinstance(layer, keras.Layer) for layer in listed):
        raise TypeError(f"`layers` of '{name}' must be a layer, or a list of them. Received: {received(layers)}.")
    found: dict[str, keras.Variable] = {}
    listed = list(dict.fromkeys(listed))
    for number, layer in enumerate(listed):
        prefix = f"{name}/{number}" if several else name
        task = f"Cannot anchor the weights of '{name}'"
        paired = pairing.paired_weights(task, [layer])
        trainable = {f"{prefix}/{place}": weights[0] for place, weights in paired.items() if weights[0].trainable}
        if not trainable:
            raise NotLinkedError(
                f"{task}: layer '{layer.name}' has none that is trainable. Expected: a layer that trains. Set "
                "`trainable = True`, or leave it out."
            )
        found |= trainable
    order: dict[int, int] = {}
    for weight in (weight for layer in listed for weight in layer.trainable_weights):
        order.setdefault(id(weight), len(order))
    if values is not None and not isinstance(values, (list, tuple)):
        raise TypeError(f"`values` of '{name}' must be a list of arrays. Received: {received(values)}.")
    if values is not None and len(values) != len(order):
        raise EqualizeError(
            f"`values` of '{name}' must be one array for each trainable weight. Expected: {len(order)}, as "
            f"`[weight.numpy() for weight in layer.trainable_weights]` gives them; received {len(values)}."
        )
    arrays = {key: weight if values is None else values[order[id(weight)]] for key, weight in found.items()}
    return {
        key: [Member(weight), _member(name, _as_array(arrays[key]), backend.dtype(weight))]
        for key, weight in found.items()
    }


def _as_array(value: Any) -> Any:
    return backend.array(value.value).copy() if backend.is_variable(value) else value


def owners(layers: Sequence[keras.Layer]) -> dict[int, keras.Layer]:
    """The layers that update moving statistics, among some and those inside them, by the ids of the statistics."""
    flat = [each for layer in layers for each in keras_private.flattened(layer)]
    return {id(variable): layer for layer in flat for variable in pairing.statistics(layer)}


def members_of(name: str, members: Any) -> tuple[dict[str, list[Member]], bool]:
    """The members of each group that a `tie` makes, and whether layers were given.

    Raises:
        TypeError: A member is of no known type, or layers are mixed with others.
    """
    if not isinstance(members, (list, tuple)):
        raise TypeError(
            f"`members` of '{name}' must be a list of variables, arrays or layers. Received: {received(members)}."
        )
    layers = [member for member in members if isinstance(member, keras.Layer)]
    if layers and len(layers) == len(members):
        if len(layers) == 1:
            raise GroupMismatchError(
                f"Group '{name}' has one member: layer '{layers[0].name}'. Expected: at least two layers. To tie "
                "weights inside one layer, name its variables."
            )
        paired = pairing.paired_weights(f"Cannot tie layers into group '{name}'", layers)
        return {f"{name}/{place}": [Member(v) for v in variables] for place, variables in paired.items()}, True
    if layers:
        other = next(member for member in members if not isinstance(member, keras.Layer))
        kind = "variable" if backend.is_variable(other) else type(other).__name__
        raise TypeError(
            f"Cannot tie '{name}': expected either layers or variables; received the layer "
            f"'{layers[0].name}' and a {kind}. {_by_variables(layers[0])}"
        )
    if not members:
        raise GroupMismatchError(
            f"Group '{name}' has no members. Expected: at least two variables, arrays or layers. Received: {members!r}."
        )
    named: list[Any] = [member[0] if isinstance(member, tuple) and member else member for member in members]
    variables = [member for member in named if backend.is_variable(member)]
    dtype = backend.dtype(variables[0]) if variables else None
    return {name: [_member(name, member, dtype) for member in members]}, False


def _member(name: str, member: Any, dtype: str | None) -> Member:
    view = None
    if isinstance(member, tuple):
        if len(member) != 2 or not isinstance(member[1], View):
            raise TypeError(
                f"Cannot tie a member into group '{name}': expected a variable or a pair of a variable and a view, "
                f"for instance `(layer.kernel, equalize.views.Transpose())`; received {received(member)}."
            )
        member, view = member
    if backend.is_variable(member):
        return Member(member, view=view)
    native = hasattr(member, "assign") or (hasattr(member, "requires_grad_") and type(member).__name__ == "Parameter")
    if native or not (isinstance(member, np.ndarray) or ops.is_tensor(member)):
        raise TypeError(
            f"Cannot tie a member into group '{name}': expected a `keras.Variable` (for instance `layer.kernel`), a "
            f"built layer, or an array; received {received(member)}.{_of_keras_2(member)}"
        )
    return Member(_constant(name, member, dtype), view=view, constant=True)


def _constant(name: str, array: Any, dtype: str | None) -> keras.Variable:
    """A variable for an array that was given, in the dtype of the members that are variables."""
    try:
        values = ops.convert_to_numpy(array)
        given = keras.backend.standardize_dtype(values.dtype)
    except Exception as error:  # what Keras and the backends raise about an array of something else than numbers
        values, given, problem = None, "bool", error
    else:
        problem = None
    if not (keras.backend.is_float_dtype(given) or keras.backend.is_int_dtype(given)):
        raise TypeError(
            f"Cannot tie an array into group '{name}': expected real numbers; received {received(array)}."
        ) from problem
    return keras.Variable(values, dtype=dtype, trainable=False, name="constant")


def weights_of(model: Any) -> list[keras.Variable]:
    """The weights of a built model.

    Raises:
        NotLinkedError: It is not built.
        TypeError: It is not a model.
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(
            f"`link` expects Keras models or layers. Received: {received(model)}. Variables are tied "
            f"with `tie(name, [variable_1, variable_2], rule)`.{_of_keras_2(model)}"
        )
    unbuilt = [layer for layer in keras_private.flattened(model) if not layer.built and _carries_rule(layer)]
    if not model.built or unbuilt:
        names = ", ".join(f"'{layer.name}'" for layer in unbuilt) or f"'{model.name}'"
        raise NotLinkedError(
            f"Cannot link '{model.name}': it has no weights for {names} yet, since it is not built. Expected: a "
            "built model. Give it an `Input`, call `model.build(input_shape)`, or call it once on data."
        )
    return list(model.weights)


def _by_variables(layer: keras.Layer) -> str:
    """How to name the variables of a layer, by something that it has."""
    if not layer.weights:
        return "Build the layer and name its variables."
    weight = layer.weights[0]
    place = weight.name if getattr(layer, weight.name, None) is weight else "weights[0]"
    return f"Name the variables of the layer, for instance `{layer.name}.{place}`."


def _of_keras_2(x: Any) -> str:
    if type(x).__module__.split(".")[0] != "tf_keras":
        return ""
    return " It is of Keras 2 (`tf_keras`), which equalize does not know: make the model with Keras 3 (`import keras`)."


def _carries_rule(layer: keras.Layer) -> bool:
    return any(isinstance(value, Rule) for value in vars(layer).values())


def _lines(members: Sequence[Member]) -> str:
    return listing(members).removeprefix("\nMembers:")


def undeclare(groups: Sequence[TiedGroup]) -> None:
    """Takes the rules of groups that layers declare out of the layers, so that their configs are plain Keras's.

    A layer that only passes a rule on, as `MultiHeadAttention` does to the layers inside it, has it in its config, too.
    """
    declared = {group.name: {id(member.variable) for member in group.members} for group in groups if group.declared}
    for layer in living.objects_of(keras.Layer) if declared else ():
        for rule in [part for value in vars(layer).values() for part in attributes.objects(value)]:
            if isinstance(rule, Rule):
                left = _undeclared(rule, layer, declared)
                if left is not rule:
                    attributes.exchange(layer, rule, left)


def _undeclared(rule: Any, layer: keras.Layer, declared: Mapping[str, set[int]]) -> Any:
    """What is left of a rule that a layer holds when groups are dissolved, each given by its variables."""
    if not isinstance(rule, Rule):
        return rule
    inner = _undeclared(rule.inner, layer, declared)
    if any(id(weight) in declared.get(rule.group or "", ()) for weight in layer.weights):
        return inner
    return rule if inner is rule.inner else rule.having(inner=inner)
