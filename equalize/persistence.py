"""Ties as plain data: what a registry writes into its config, and how the members are found again."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import arguments, backend, configs, discovery, rules
from equalize.arguments import received
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.groups import Group
from equalize.members import Member
from equalize.rules import Rule

_UNCHANGED = "Use what `registry.get_config()` returned, unchanged."
_GROUP_KEYS = {"name", "rule", "members"}


def group_config(group: Group) -> dict[str, Any]:
    """A group as JSON-serializable data: its rule, and its members by path, or by value for constants."""
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
            entry["path"] = member.path
        members.append(entry)
    return {"name": group.name, "rule": keras.saving.serialize_keras_object(group.present_rule), "members": members}


def checked_config(config: Any) -> list[dict[str, Any]]:
    """The groups of a registry's config, checked to be what `group_config` writes, as a copy.

    Raises:
        EqualizeError: The config is truncated, or has been changed into something else.
    """
    if not isinstance(config, dict) or set(config) != {"groups"} or not isinstance(config["groups"], list):
        raise _damaged("a dictionary with one entry 'groups', a list", config)
    seen: set[str] = set()
    for entry in config["groups"]:
        if not isinstance(entry, dict) or set(entry) != _GROUP_KEYS or not isinstance(entry["name"], str):
            raise _damaged(f"groups with the entries {sorted(_GROUP_KEYS)}", entry)
        if not isinstance(entry["members"], list) or len(entry["members"]) < 2:
            raise _damaged(f"at least two members in group '{entry['name']}'", entry["members"])
        for member in entry["members"]:
            whole = isinstance(member, dict) and set(member) in (
                {"view", "weight", "path"},
                {"view", "weight", "constant"},
            )
            if not whole or not isinstance(member.get("path", ""), str):
                raise _damaged(f"members with a path or a constant, a view and a weight in '{entry['name']}'", member)
        if entry["name"] in seen:
            raise _damaged("a name of its own for each group", entry["name"])
        seen.add(entry["name"])
        try:
            discovery.require_rule(entry["name"], rule_of(entry))
            for member in entry["members"]:
                _weight_of(member)
                rules.checked_view(member["view"])
                if "constant" in member:
                    _array_of(member["constant"])
        except (EqualizeError, TypeError) as error:
            raise EqualizeError(f"The config of group '{entry['name']}' is damaged. {error} {_UNCHANGED}") from error
    return copy.deepcopy(config["groups"])


def rule_of(entry: dict[str, Any]) -> Rule:
    """The rule of a group's config."""
    return configs.restored(entry["rule"], Rule, "a rule of equalize")


def members_of(entry: dict[str, Any], weights: Iterable[keras.Variable]) -> list[Member]:
    """The members of a group's config among the weights of models.

    Raises:
        GroupMismatchError: A path is gone, or several weights have it.
    """
    by_path: dict[str, list[keras.Variable]] = {}
    for weight in weights:
        if not any(weight is other for other in by_path.get(weight.path, ())):
            by_path.setdefault(weight.path, []).append(weight)
    members = []
    for member in entry["members"]:
        constant = "constant" in member
        variable = (
            keras.Variable(**_array_of(member["constant"]), trainable=False, name="constant")
            if constant
            else _found(entry["name"], member["path"], by_path)
        )
        view, weight = rules.checked_view(member["view"]), _weight_of(member)
        members.append(Member(variable, view=view, weight=weight, constant=constant))
    return members


def _found(name: str, path: str, by_path: dict[str, list[keras.Variable]]) -> keras.Variable:
    found = by_path.get(path, [])
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} weights have this path" if found else "no weight has this path"
    raise GroupMismatchError(
        f"Cannot find the member '{path}' of group '{name}': {problem}. Expected: the layer names that the tie was "
        f"made with. Received a model with: {_some(sorted(by_path))}. Give the layers names of their own when the "
        "model is made, or tie its variables anew with `tie`."
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
        f"This is no config of a registry: expected {expected}; received {received(value)}. {_UNCHANGED}"
    )


def _some(parts: Sequence[str]) -> str:
    text = ", ".join(parts)
    return text if len(text) <= 400 else f"{text[:400]}..."
