"""What users give: numbers, integers, names, choices, functions, variables and paths, checked before use."""

import math
import numbers
import operator
import os
from collections.abc import Collection, Sequence
from typing import Any

import keras
import numpy as np

from equalize import _backend as backend
from equalize.errors import EqualizeError

_LONGEST = 400
_PICTURES = (".png", ".svg", ".pdf")


def received(value: Any) -> str:
    """A value and its type as messages print them; cut where it is long, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # an object whose `repr` fails, or an integer with more digits than Python prints
        text = "an object that cannot be printed"
    return f"{text if len(text) <= _LONGEST else text[:_LONGEST] + '...'} of type {type(value)}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number of things, as in "1 group" and "2 groups"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, low_open: bool = False) -> float:
    """A real number within its range.

    Raises:
        TypeError: It is not a number.
        EqualizeError: It is not finite, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number. Received: {received(value)}.")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted) or converted > high or converted < low or (low_open and converted == low):
        left = "(" if low_open or low == -math.inf else "["
        interval = f"{left}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
        raise EqualizeError(f"`{name}` must be a finite number in {interval}. Received: {received(value)}.")
    return converted


def positive_numbers(name: str, values: Any) -> list[float]:
    """A list of positive numbers.

    Raises:
        TypeError: It is not a list, a tuple or an array, or something in it is not a number.
        EqualizeError: A number is not positive and finite.
    """
    if not isinstance(values, (list, tuple, np.ndarray)) or (isinstance(values, np.ndarray) and values.ndim != 1):
        raise TypeError(f"`{name}` must be a list of numbers. Received: {received(values)}.")
    return [number(name, value, low=0.0, low_open=True) for value in values]


def integers(name: str, values: Any) -> tuple[int, ...]:
    """An integer, or a list of them, as a tuple.

    Raises:
        TypeError: Something else is given, a bool for instance.
        EqualizeError: An integer has more than 32 bits.
    """
    return _integers(name, values, "integers", several=True)


def integer(name: str, value: Any, *, low: int = -(2**31)) -> int:
    """One integer, at least `low`.

    Raises:
        TypeError: It is not an integer, or there are several.
        EqualizeError: It is too small, or has more than 32 bits.
    """
    return _integers(name, value, "an integer", several=False, low=low)[0]


def integer_array(name: str, values: Any) -> np.ndarray:
    """Integers in an array of any shape, as a new array.

    Raises:
        TypeError: Something else is given, bools for instance, or lists of different lengths.
    """
    problem = None
    try:
        array = np.array(values)
    except Exception as error:  # NumPy about lists of different lengths, a backend about its own tensors
        array, problem = np.asarray(None), error
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"`{name}` must be an array of integers. Received: {received(values)}.") from problem
    return array.astype("int64")


def _integers(name: str, values: Any, what: str, *, several: bool, low: int = -(2**31)) -> tuple[int, ...]:
    problem = None
    try:
        given: list[Any] = [values] if np.ndim(values) == 0 else _listed(values) if several else [None]
        found = [operator.index(value) for value in given if not isinstance(value, (bool, np.bool_))]
    except Exception as error:  # NumPy about lists of different lengths, a backend about its own tensors
        given, found, problem = [None], [], error
    if len(found) < len(given):
        raise TypeError(f"`{name}` must be {what}. Received: {received(values)}.") from problem
    if not all(low <= value < 2**31 for value in found):
        raise EqualizeError(f"`{name}` must be {what} in [{low}, {2**31}). Received: {received(values)}.")
    return tuple(found)


def _listed(values: Any) -> list[Any]:
    """A collection as a list; `[None]` for a variable, which is none, and whose items never end on JAX (Keras 3.15)."""
    return [None] if backend.is_variable(values) else list(values)


def option(name: str, value: Any, options: Sequence[str]) -> str:
    """One of several words.

    Raises:
        EqualizeError: It is another.
    """
    if not isinstance(value, str) or value not in options:
        raise EqualizeError(f"`{name}` must be one of {list(options)}. Received: {received(value)}.")
    return value


def text(name: str, value: Any, meaning: str) -> str:
    """A string that is not blank.

    Raises:
        TypeError: It is not a string.
        EqualizeError: It is blank.
    """
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, {meaning}. Received: {received(value)}.")
    if not value.strip():
        raise EqualizeError(f"`{name}` must not be empty. Expected {meaning}. Received: {received(value)}.")
    return value


def names(name: str, value: Any) -> list[str]:
    """The name of a group, or several, as a list.

    Raises:
        TypeError: Something else is given.
    """
    listed: list[Any] = [value] if isinstance(value, str) else list(value) if isinstance(value, Collection) else [None]
    if not all(isinstance(each, str) for each in listed):
        raise TypeError(f"`{name}` must be the name of a group, or a list of them. Received: {received(value)}.")
    return listed


def flag(name: str, value: Any) -> bool:
    """An argument that is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False. Received: {received(value)}.")
    return value


def function(name: str, value: Any, meaning: str) -> Any:
    """Something that can be called.

    Raises:
        TypeError: It cannot.
    """
    if not callable(value):
        raise TypeError(f"`{name}` must be a function {meaning}. Received: {received(value)}.")
    return value


def variables(name: str, value: Any, *, raw: bool = False) -> list[keras.Variable]:
    """Variables, as a list; with `raw` also TensorFlow's own, which Keras's optimizers take.

    Raises:
        TypeError: Something else is given.
    """
    try:
        found, problem = _listed(value), None
    except Exception as error:  # a symbolic tensor raises what is no `TypeError`
        found, problem = [value], error
    if not all(backend.is_variable(each) or (raw and backend.is_raw_variable(each)) for each in found):
        raise TypeError(f"`{name}` must be a list of `keras.Variable`s. Received: {received(value)}.") from problem
    return found


def model(name: str, value: Any) -> keras.Model:
    """A Keras model."""
    if not isinstance(value, keras.Model):
        raise TypeError(f"`{name}` must be a Keras model. Received: {received(value)}.")
    return value


def path(name: str, value: Any) -> str:
    """The path of a file."""
    try:
        found, problem = os.fspath(value), None
    except Exception as error:  # also what a path of somebody else raises
        found, problem = None, error
    if not isinstance(found, str):
        raise TypeError(f"`{name}` must be the path of a file. Received: {received(value)}.") from problem
    return found


def file(name: str, value: Any, endings: Sequence[str]) -> str:
    """The path of a file on a local disk whose name has one of some endings."""
    found = path(name, value)
    if not found.endswith(tuple(endings)) or "://" in found:
        raise EqualizeError(
            f"`{name}` must be on a local disk and end in {' or '.join(map(repr, endings))}. Received: {found!r}."
        )
    return found


def picture(name: str, value: Any) -> str:
    """The file that a picture is written to.

    Raises:
        TypeError: It is not a path.
        EqualizeError: Its suffix is not one of a picture, or its folder does not exist.
    """
    found = path(name, value)
    folder, base = os.path.split(found)
    if os.path.splitext(base)[1].lower() not in _PICTURES or not os.path.isdir(folder or "."):
        raise EqualizeError(
            f"`{name}` must be a file that ends with {', '.join(_PICTURES)}, in a folder that exists. Received: "
            f"{received(value)}."
        )
    return found
