"""One variable in several layers, and how two variables are related."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from equalize import _backend as backend
from equalize._backend import attributes, keras_private, living
from equalize._inputs.arguments import received
from equalize._linking import pairing, validation
from equalize._ties import effects
from equalize._ties.bound import group_of, rule_of, ties_on, without
from equalize._ties.tied_group import TiedGroup
from equalize.errors import GroupMismatchError


def share(*variables_or_layers: Any) -> Any:
    """Puts the first variable into the layers that own the others: one variable in several layers.

    The classic way to make weights equal, for layers that are built already. Afterwards
    `left.kernel is right.kernel`; the optimizer sees one variable, whose gradient is the sum over its uses. The
    variables that are replaced are gone, with the values they had.

    Layers are paired weight by weight, by the place of each trainable weight inside the layer, and each keeps what is
    not trainable for itself (the moving statistics of a `BatchNormalization`, for instance).

    Layers are searched for what they replace in their attributes, and in lists, tuples and dictionaries there; a second
    reference that some other object holds is not found. Share before `compile`. Saving stores the value once a layer,
    in files that any model of that structure can load, and what is loaded is not shared until `share` is called again.
    `clone_model` makes separate variables, too.

    Args:
        *variables_or_layers: Two or more `keras.Variable`s of one shape and dtype, or built layers (models, nested
            blocks) of one structure. The first variable may be one that no layer owns.

    Returns:
        The variable that all have now, or the list of them where layers were given.

    Raises:
        TypeError: Something else than variables, or than layers, is given.
        NotLinkedError: A layer has no weights yet.
        GroupMismatchError: Shapes, dtypes, trainability, constraints, regularizers or structures differ; a variable
            belongs to no layer or is tied; two variables belong to one layer.

    Example:
    >>> import keras, equalize
    >>> left, right = keras.layers.Dense(2), keras.layers.Dense(2)
    >>> model = keras.Sequential([keras.Input((2,)), left, right])
    >>> kernel = equalize.share(left.kernel, right.kernel)
    >>> left.kernel is right.kernel, len(model.trainable_variables)
    (True, 3)
    """
    given = list(variables_or_layers)
    if len(given) < 2:
        raise GroupMismatchError(f"`share` needs at least two variables or layers. Received: {len(given)}.")
    if all(isinstance(item, keras.Layer) for item in given):
        groups = list(pairing.paired_weights("Cannot share the weights of layers", given).values())
        _replacement([(variables, None) for variables in groups])()
        return [variables[0] for variables in groups]
    for item in given:
        if not backend.is_variable(item):
            raise TypeError(
                "`share` expects `keras.Variable`s (for instance `layer.kernel`), or layers, and not both. "
                f"Received: {received(item)}."
            )
    _replacement([(given, None)])()
    return given[0]


def relation(a: Any, b: Any) -> str | dict[str, str]:
    """How two variables are related: `"same"` variable, `"equal"` values, or `"different"`.

    Equal values are not a shared variable: training moves two variables apart, and one not. `==` on variables
    compares values, `is` tells whether there is one variable.

    Args:
        a: A `keras.Variable`, or a built layer or model.
        b: Another of the same kind.

    Returns:
        For variables one of

        - `"same"`: they are one variable;
        - `"equal"`: they are two, with the same shape, dtype and bits;
        - `"different"`: anything else.

        For layers and models a dictionary with one of these for each weight, by the weight's place inside the layer.

    Raises:
        TypeError: The arguments are not both variables, nor both layers.
        NotLinkedError: A layer has no weights yet.
        GroupMismatchError: The structures of the layers differ.

    Example:
    >>> import keras, equalize
    >>> left, right = (keras.layers.Dense(2, kernel_initializer="ones", name=name) for name in ("left", "right"))
    >>> model = keras.Sequential([keras.Input((2,)), left, right])
    >>> equalize.relation(left.kernel, right.kernel)
    'equal'
    >>> variable = equalize.share(left.kernel, right.kernel)
    >>> equalize.relation(left, right)
    {'kernel': 'same', 'bias': 'equal'}
    """
    if isinstance(a, keras.Layer) and isinstance(b, keras.Layer):
        paired = pairing.paired_weights("Cannot compare layers", [a, b], pairing.every_weight)
        return {place: _relation(*variables) for place, variables in paired.items()}
    if backend.is_variable(a) and backend.is_variable(b):
        return _relation(a, b)
    raise TypeError(
        f"`relation` expects two `keras.Variable`s, or two layers. Received: {received(a)} and {received(b)}."
    )


def _relation(a: keras.Variable, b: keras.Variable) -> str:
    if a is b:
        return "same"
    if tuple(a.shape) != tuple(b.shape) or backend.dtype(a) != backend.dtype(b):
        return "different"
    one, two = (backend.array(variable.value) for variable in (a, b))
    return "equal" if one.tobytes() == two.tobytes() else "different"


def replacement_of(groups: Sequence[TiedGroup]) -> Callable[[], None]:
    """Prepares one variable in the place of the members of each group, for when the groups are dissolved.

    Returns:
        A function that replaces all but the first member of each group. Everything is checked before.

    Raises:
        GroupMismatchError: A group is not hard, its members do not show the common value as it is, or one variable
            cannot stand for all of them.
        TieBrokenError: The members of a group are not equal.
    """
    for group in groups:
        if not group.hard:
            raise GroupMismatchError(
                f"Cannot share group '{group.name}': its rule {group.describe()} does not keep its members equal. "
                f"Expected: a hard group. Call `registry.replace({group.name!r}, equalize.constraints.Equal())` first."
            )
        apart = [member for member in group.members if member.view is not None or member.constant]
        if apart:
            raise GroupMismatchError(
                f"Cannot share group '{group.name}': {apart[0]} does not show the common value as a variable of its "
                f"own that is equal to the others, so one variable cannot stand for all. Expected: members without "
                "views, and no constants. Share the others by name; what has a view stays a variable, and takes its "
                f"{math.prod(apart[0].variable.shape):,} numbers in every file."
            )
        validation.require_equal(group)
    return _replacement([([member.variable for member in group.members], group) for group in groups])


def _replacement(shared: Sequence[tuple[list[keras.Variable], TiedGroup | None]]) -> Callable[[], None]:
    """A function that puts the first of some variables in the place of the others; everything is checked before.

    Args:
        shared: Variables, with the group that they are the members of until then.
    """
    groups = [variables for variables, _ in shared]
    for (kept, *others), group in shared:
        for old in others:
            if old is not kept:
                _require_alike(kept, old, group)
    layers = living.objects_of(keras.Layer)
    replacements = []
    replaced = {id(old) for kept, *others in groups for old in others if old is not kept}
    for kept, *_ in groups:
        if id(kept) in replaced:
            raise GroupMismatchError(
                f"Cannot share '{kept.path}': it would stay in one layer and be replaced in another. Expected: layers "
                "that do not hold each other's weights, or hold them in the same order."
            )
    for kept, *others in groups:
        for old in others:
            if old is kept:
                continue
            owners = [layer for layer in layers if _owns(layer, old)]
            if not owners:
                raise GroupMismatchError(
                    f"Cannot share '{kept.path}': no layer owns '{old.path}', so there is nowhere to put it. Expected: "
                    "variables of built layers; only the first may be one that no layer owns."
                )
            for owner in owners:
                _require_replaceable(owner, kept, old, others)
            replacements.append((old, kept, owners))

    def replace() -> None:
        for old, kept, owners in replacements:
            for owner in owners:
                _replace(owner, old, kept)
            for layer in layers:
                backend.replace_parameter(layer, old, kept)
        living.retrace(kept for kept, *_ in groups)

    return replace


def _require_alike(kept: keras.Variable, old: keras.Variable, group: TiedGroup | None) -> None:
    """Raises unless one variable can stand for two, when they have left their group."""
    for variable in (kept, old):
        tie = next((tie for tie in ties_on(variable) if group is None or group_of(tie) is not group), None)
        if tie is not None:
            rule = rule_of(tie)
            raise GroupMismatchError(
                f"Cannot share '{variable.path}': it has the rule {rule.describe()} of group '{rule.group}'. Expected: "
                "variables that are not tied. Call `registry.untie(...)`, or leave the rule out of the layer."
            )
    for what, expected, found in (
        ("shape", tuple(kept.shape), tuple(old.shape)),
        ("dtype", backend.dtype(kept), backend.dtype(old)),
        ("trainable", kept.trainable, old.trainable),
    ):
        if expected != found:
            raise _misfit(kept, old, what, expected, found)
    values = [backend.array(kept.value), backend.array(old.value)]
    for what in ("constraint", "regularizer"):
        expected, found = (without(getattr(variable, what), group) for variable in (kept, old))
        if not effects.same(effects.Effect(expected), effects.Effect(found), values):
            raise _misfit(kept, old, what, effects.described(expected), effects.described(found))


def _misfit(kept: keras.Variable, old: keras.Variable, what: str, expected: Any, found: Any) -> GroupMismatchError:
    return GroupMismatchError(
        f"Cannot share '{kept.path}' with the owner of '{old.path}': expected {what} {expected}, received {found}. One "
        f"variable has one {what}: make the two agree first."
    )


def _require_replaceable(
    owner: keras.Layer, kept: keras.Variable, old: keras.Variable, others: list[keras.Variable]
) -> None:
    if _owns(owner, kept) or sum(_owns(owner, other) for other in others) > 1:
        raise GroupMismatchError(
            f"Cannot share '{kept.path}' with '{old.path}' inside layer '{owner.name}': expected variables of "
            "different layers; received two of one, which Keras saves and loads by their number. Tie them with "
            "`equalize.constraints.Equal` instead."
        )
    if not any(part is old for value in attributes.attributes(owner).values() for part in attributes.objects(value)):
        raise GroupMismatchError(
            f"Cannot share '{kept.path}' with layer '{owner.name}': it tracks '{old.path}' but holds it in none of its "
            "attributes, nor in a list, tuple or dictionary there. Expected: an attribute that can be set."
        )


def _owns(layer: keras.Layer, variable: keras.Variable) -> bool:
    return any(own is variable for store in keras_private.own_variables(layer) for own in store)


def _replace(layer: keras.Layer, old: keras.Variable, new: keras.Variable) -> None:
    """Puts `new` in the place of `old`."""
    keras_private.replace_variable(layer, old, new)
    attributes.exchange(layer, old, new)
