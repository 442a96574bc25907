"""Ties as plain data: what a registry writes into its config, and how the members are found again."""

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._inputs import arguments, configs
from equalize._inputs.arguments import received
from equalize._linking import discovery, places
from equalize._ties import rules
from equalize._ties.member import Member
from equalize._ties.rules import Rule
from equalize._ties.tied_group import TiedGroup
from equalize.errors import EqualizeError, GroupMismatchError

_GROUP_KEYS = {"name", "rule", "members"}
_OF_LAYERS = {"tie", "statistics"}  # of what a tie of layers made


def group_configs(groups: Sequence[TiedGroup]) -> list[dict[str, Any]]:
    """Groups as JSON-serializable data: their rules, and their members by place, or by value for constants.

    A group that ties nothing, since fewer than two members are left, is left out.
    """
    groups = [group for group in groups if len(group.members) > 1 or any(m.repeats for m in group.members)]
    members = {id(member.variable): member for group in groups for member in group.members if not member.constant}
    found = places.places_of([member.variable for member in members.values()]) if members else []
    return [_group_config(group, dict(zip(members, found, strict=True))) for group in groups]


def _group_config(group: TiedGroup, found: Mapping[int, places.Places]) -> dict[str, Any]:
    members = []
    for member in group.members:
        entry: dict[str, Any] = {"view": rules.view_config(member.view), "weight": member.weight}
        if member.constant:
            value = ops.convert_to_numpy(member.variable.value)
            entry["constant"] = {
                "values": value.astype("float64").tolist(),
                "dtype": backend.dtype(member.variable),
            }
        else:
            variable = member.variable
            entry |= {"path": member.path, "shape": list(variable.shape), "dtype": backend.dtype(variable)}
            entry["places"] = [list(place) for place in found[id(variable)]]
        members.append(entry)
    rule = None
    if group.rule is not None:
        rule = keras.saving.serialize_keras_object(group.present_rule)  # what else is on the variables is found there
    entry = {"name": group.name, "rule": rule, "members": members}
    entry |= {} if group.tie is None else {"tie": group.tie}
    return entry | ({"statistics": True} if group.of_statistics else {})


def checked_config(config: Any) -> list[dict[str, Any]]:
    """The groups of a registry's config, checked to be what `group_config` writes, as a copy.

    Raises:
        EqualizeError: The config is truncated, or has been changed into something else.
    """
    if not isinstance(config, dict) or set(config) != {"groups"} or not isinstance(config["groups"], list):
        raise _damaged("a dictionary with one entry 'groups', a list", config)
    seen: set[str] = set()
    for entry in config["groups"]:
        if not isinstance(entry, dict) or set(entry) - _OF_LAYERS != _GROUP_KEYS:
            raise _damaged(f"groups with the entries {sorted(_GROUP_KEYS)}", entry)
        if not isinstance(entry["name"], str) or not isinstance(entry.get("tie", ""), str):
            raise _damaged("names that are strings", [entry["name"], entry.get("tie")])
        if entry.get("statistics", True) is not True or ("statistics" in entry and "tie" not in entry):
            raise _damaged(f"moving statistics of a tie in '{entry['name']}'", entry["statistics"])
        if not isinstance(entry["members"], list) or not entry["members"]:
            raise _damaged(f"members in group '{entry['name']}'", entry["members"])
        for member in entry["members"]:
            if not isinstance(member, dict) or not _is_whole(member):
                raise _damaged(
                    f"members with their places or a constant, a view and a weight in '{entry['name']}'", member
                )
        if entry["name"] in seen:
            raise _damaged("a name of its own for each group", entry["name"])
        seen.add(entry["name"])
        try:
            discovery.required_rule(entry["name"], rule_of(entry))
            for member in entry["members"]:
                _weight_of(member)
                view = rules.checked_view(member["view"])
                if len(entry["members"]) == 1 and (view is None or not view.repeats):
                    raise EqualizeError(f"Expected at least two members. Received: {received(member)}.")
                if "constant" in member:
                    _array_of(member["constant"])
        except (EqualizeError, TypeError) as error:
            raise EqualizeError(f"The config of group '{entry['name']}' cannot be used. {error}") from error
        rule = rule_of(entry)
        if "statistics" in entry and not (rule.hard or rule.directed or rule.slot is None):
            raise _damaged(f"a hard tie of the moving statistics '{entry['name']}'", entry["rule"])
    return copy.deepcopy(config["groups"])


def rule_of(entry: dict[str, Any]) -> Rule:
    """The rule of a group's config."""
    return rules.Free() if entry["rule"] is None else configs.restored(entry["rule"], Rule, "a rule of equalize")


def members_of(
    entry: dict[str, Any], models: Sequence[Mapping[str, keras.Variable]], owners: Mapping[int, keras.Layer]
) -> list[Member]:
    """The members of a group's config among the weights of models, each given by place.

    Args:
        entry: The config of a group.
        models: The weights of models, by place.
        owners: The layers that update moving statistics, by the ids of these.

    Raises:
        GroupMismatchError: A member is gone, does not fit, or cannot be told from others.
    """
    _require_models(entry, models)
    members = []
    for member in entry["members"]:
        constant = "constant" in member
        variable = (
            keras.Variable(**_array_of(member["constant"]), trainable=False, name="constant")
            if constant
            else _found(entry["name"], member, models)
        )
        view, weight = rules.checked_view(member["view"]), _weight_of(member)
        owner = owners.get(id(variable)) if "statistics" in entry else None
        members.append(Member(variable, view=view, weight=weight, constant=constant, owner=owner))
    return members


def _require_models(entry: dict[str, Any], models: Sequence[Mapping[str, keras.Variable]]) -> None:
    """Raises where a group of several models of one structure would be looked for in fewer of them."""
    given = [places.digest(weights) for weights in models]
    members = [member for member in entry["members"] if "places" in member]
    held = [{(key, number) for key, number, _ in member["places"]} for member in members]
    if not held or set.intersection(*held):
        return
    for member, known in zip(members, held, strict=True):
        alike = [(number, given.count(key)) for key, number in known if key in given]
        if alike and all(number >= count for number, count in alike):
            raise GroupMismatchError(
                f"Cannot find the member '{member['path']}' of group '{entry['name']}': the group has members in "
                f"several models of one structure. Expected: at least {max(n for n, _ in alike) + 1} of them in one "
                f"call, `link(model_1, model_2)`; received {max(count for _, count in alike)}. Give all models, or tie "
                "the variables again with `tie`."
            )


def _found(name: str, member: dict[str, Any], models: Sequence[Mapping[str, keras.Variable]]) -> keras.Variable:
    """The weight at the place of a member; where the models have another structure, place and path must agree."""
    of_path = {id(weight): weight for weights in models for weight in weights.values() if weight.path == member["path"]}
    found, certain = places.weights_at([tuple(place) for place in member["places"]], models)
    if len(found) > 1:
        found = [weight for weight in found if id(weight) in of_path] or found
    if not certain:
        if len(of_path) == 1 and (len(found) != 1 or not _fits(member, found[0])):
            found = list(of_path.values())
        elif len(found) == 1 and of_path and id(found[0]) not in of_path and _fits(member, found[0]):
            raise _lost(name, member, "its place and its path belong to two weights", models)
    if len(found) != 1:
        problem = f"{len(found)} weights could be it" if found else "no weight has its place or its path"
        raise _lost(name, member, problem, models)
    if not _fits(member, found[0]):
        received = f"{tuple(found[0].shape)} {backend.dtype(found[0])}"
        raise _lost(name, member, f"the weight at its place, '{found[0].path}', is {received}", models)
    return found[0]


def _fits(member: dict[str, Any], weight: keras.Variable) -> bool:
    return list(weight.shape) == member["shape"] and backend.dtype(weight) == member["dtype"]


def _lost(
    name: str, member: dict[str, Any], problem: str, models: Sequence[Mapping[str, keras.Variable]]
) -> GroupMismatchError:
    paths = list(dict.fromkeys(weight.path for weights in models for weight in weights.values()))
    near = difflib.get_close_matches(member["path"], paths, n=3, cutoff=0.0)
    return GroupMismatchError(
        f"Cannot find the member '{member['path']}' {tuple(member['shape'])} {member['dtype']} of group '{name}': "
        f"{problem}. Expected: the model that the tie was made with, or one of its structure. Nearest weights: "
        f"{', '.join(map(repr, near)) or 'none'}. Tie the variables of this model again with `tie`."
    )


def _is_whole(member: dict[str, Any]) -> bool:
    """Whether the entries of a member are those that `_group_config` writes."""
    if set(member) == {"view", "weight", "constant"}:
        return True
    return (
        set(member) == {"view", "weight", "path", "shape", "dtype", "places"}
        and isinstance(member["path"], str)
        and isinstance(member["dtype"], str)
        and isinstance(member["shape"], list)
        and all(type(size) is int for size in member["shape"])
        and isinstance(member["places"], list)
        and all(
            isinstance(place, list) and len(place) == 3 and [type(part) for part in place] == [str, int, str]
            for place in member["places"]
        )
        and all(place[1] >= 0 for place in member["places"])
    )


def _array_of(constant: Any) -> dict[str, Any]:
    """The value and the dtype of a constant."""
    try:
        dtype = keras.backend.standardize_dtype(constant["dtype"])
        array = np.asarray(constant["values"], dtype="float64")
    except Exception as error:  # whatever NumPy and Keras raise about values and names that are none
        raise EqualizeError(
            f"Expected a constant with values, a list of numbers, and a dtype. Received: {received(constant)}."
        ) from error
    return {"initializer": array, "dtype": dtype}


def _weight_of(member: dict[str, Any]) -> float:
    return arguments.number("weight", member["weight"], low=0.0, low_open=True)


def _damaged(expected: str, value: Any) -> EqualizeError:
    return EqualizeError(
        f"This is not the config of a registry: expected {expected}; received {received(value)}. Use what "
        "`registry.get_config()` returned, unchanged."
    )
