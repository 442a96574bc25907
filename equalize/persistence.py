"""Ties as plain data: what a registry writes into its config, and how the members are found again."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import rules
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.groups import Group
from equalize.members import Member
from equalize.rules import Rule

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
                "dtype": keras.backend.standardize_dtype(member.variable.dtype),
            }
        else:
            entry["path"] = member.path
        members.append(entry)
    return {"name": group.name, "rule": keras.saving.serialize_keras_object(group.present_rule), "members": members}


def checked_config(config: Any) -> list[dict[str, Any]]:
    """The groups of a registry's config, checked to be what `group_config` writes.

    Raises:
        EqualizeError: The config is truncated, or has been changed into something else.
    """
    if not isinstance(config, dict) or set(config) != {"groups"} or not isinstance(config["groups"], list):
        raise _damaged("a dictionary with one entry 'groups', a list", config)
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
        rule_of(entry)
        for member in entry["members"]:
            _view_of(entry["name"], member)
    return config["groups"]


def rule_of(entry: dict[str, Any]) -> Rule:
    """The rule of a group's config. Only rules of equalize are made, so that data stays data."""
    registered = entry["rule"].get("registered_name") if isinstance(entry["rule"], dict) else None
    if not isinstance(registered, str) or not registered.startswith("equalize>"):
        raise _damaged(f"a rule of equalize for group '{entry['name']}'", entry["rule"])
    try:
        rule = keras.saving.deserialize_keras_object(entry["rule"])
    except Exception as error:  # whatever Keras raises about a config that is not one
        raise _damaged(f"the config of a rule for group '{entry['name']}'", entry["rule"]) from error
    if not isinstance(rule, Rule):
        raise _damaged(f"a rule of equalize for group '{entry['name']}'", entry["rule"])
    return rule


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
        view = _view_of(entry["name"], member)
        if "constant" in member:
            members.append(Member(_constant_of(entry["name"], member["constant"]), view=view, constant=True))
        else:
            members.append(Member(_found(entry["name"], member["path"], by_path), view=view))
        members[-1].weight = rules.checked_number("weight", member["weight"], low=0.0, high=float("inf"), low_open=True)
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


def _constant_of(name: str, constant: Any) -> keras.Variable:
    try:
        values = np.asarray(constant["values"], dtype="float64")
        return keras.Variable(values, dtype=constant["dtype"], trainable=False, name="constant")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(f"a constant of group '{name}' with values and a dtype", constant) from error


def _view_of(name: str, member: dict[str, Any]) -> Any:
    view = member["view"]
    registered = view.get("registered_name") if isinstance(view, dict) else "equalize>"
    if not isinstance(registered, str) or not registered.startswith("equalize>"):
        raise _damaged(f"a view of equalize in group '{name}'", view)
    try:
        return rules.checked_view(view)
    except Exception as error:  # whatever Keras raises about a config that is not one
        raise _damaged(f"the config of a view in group '{name}'", view) from error


def _damaged(expected: str, received: Any) -> EqualizeError:
    return EqualizeError(
        f"This is no config of a registry: expected {expected}; received {_some([repr(received)])}. "
        "Use what `registry.get_config()` returned, unchanged."
    )


def _some(parts: Sequence[str]) -> str:
    text = ", ".join(parts)
    return text if len(text) <= 400 else f"{text[:400]}..."
