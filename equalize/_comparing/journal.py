"""The file of a comparison that may be interrupted: a line of JSON for the settings, and one for each finished run."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from equalize._comparing.runs import Record
from equalize._comparing.ways import Members, Way
from equalize.errors import EqualizeError


class Journal:
    """The runs that are finished. A line that was cut off is left out.

    Args:
        path: The file; None to keep nothing.
        settings: What all runs depend on.

    Raises:
        EqualizeError: The file is of other settings, or none of these.
    """

    def __init__(self, path: str | None, settings: Mapping[str, Any]):
        self._path = path
        self._done: dict[str, Record] = {}
        if path is None:
            return
        if os.path.exists(path) and os.path.getsize(path):
            lines = _lines(path) or [None]
            self._require_settings(lines[0], json.loads(json.dumps(settings)))
            self._done = {line["key"]: line["record"] for line in lines[1:]}
        whole = [dict(settings), *({"key": key, "record": record} for key, record in self._done.items())]
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in whole))
        os.replace(f"{path}.new", path)

    def find(self, way: Way, strength: float | None, seed: int) -> Record | None:
        """The record of a run, where it is finished."""
        record = self._done.get(_key(way, strength, seed))
        if record is None:
            return None
        return {key: math.nan if value is None and key in _NUMBERS else value for key, value in record.items()}

    def add(self, way: Way, record: Record) -> None:
        """Writes a run down. One that failed is tried again the next time."""
        if self._path is not None and record["error"] is None:
            line = {"key": _key(way, record["strength"], record["seed"]), "record": plain(record)}
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _require_settings(self, found: Any, expected: dict[str, Any]) -> None:
        if found == expected:
            return
        known = isinstance(found, dict) and set(found) == set(expected)
        other = ", ".join(key for key in expected if found[key] != expected[key]) if known else ""
        raise EqualizeError(
            f"`path` is a file of {f'a comparison with another {other}' if known else 'something else'}: "
            f"{self._path!r}. Expected: a file of a comparison with these settings, or none. Give another `path`, or "
            "remove it to begin anew. Ways, strengths and seeds may be added; strengths only where some way had "
            "several from the start, or `fit` has a `validation_split`."
        )


_NUMBERS = ("score", "choice_score", "step_seconds", "spread", "loss")


def plain(record: Record) -> Record:
    """A record as JSON has it, where there is nothing but finite numbers."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def described(value: Any) -> Any:
    """A setting as data that are the same in the next process."""
    try:
        return _described(value)
    except Exception:  # a list that holds itself, an object that fails: training will say what is wrong
        return _kind(value)


def _described(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _described(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(each) for each in value]
    if isinstance(value, (np.integer, np.floating)):
        return value.item()
    if isinstance(value, int) and abs(value) >= 2**63:
        return _kind(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    config = {}
    if hasattr(value, "get_config") and not isinstance(value, type):
        config = {key: each for key, each in value.get_config().items() if key != "name"}
    named = value if hasattr(value, "__qualname__") else type(value)
    return [f"{named.__module__}.{named.__qualname__}", json.dumps(config, sort_keys=True, default=_kind)]


def described_model(model: keras.Model, members: Members) -> Any:
    """The weights of a model and what is tied in it, without names, which are others in the next process."""
    places = {id(weight): place for place, weight in enumerate(model.weights)}

    def place(member: Any) -> Any:
        if isinstance(member, tuple):
            return [place(member[0]), *map(repr, member[1:])]
        if isinstance(member, keras.Layer):
            return [places.get(id(weight)) for weight in member.weights]
        return places.get(id(member), type(member).__name__)

    shapes = [f"{tuple(weight.shape)} {weight.dtype}" for weight in model.weights]
    return [shapes, {str(name): [place(member) for member in given] for name, given in members.items()}]


def _kind(value: Any) -> str:
    return type(value).__name__


def _key(way: Way, strength: float | None, seed: int) -> str:
    return json.dumps([way.identity, strength, seed])


def _lines(path: str) -> list[Any]:
    """The lines of a file, without one that was cut off."""
    lines: list[Any] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines
