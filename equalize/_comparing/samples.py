"""Samples as arrays, of which parts can be taken: inputs, targets, and weights of samples where there are any."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize._inputs.arguments import received
from equalize.errors import EqualizeError

_KEYS = ("x", "y", "sample_weight")
_INFINITE = -1  # `tf.data.INFINITE_CARDINALITY`


class Samples:
    """Samples that a model can be trained on.

    Args:
        parts: Structures of arrays, under the names of arguments of `model.fit`.

    Attributes:
        parts: Likewise.
        count: How many samples there are.
    """

    def __init__(self, parts: Mapping[str, Any]):
        self.parts = dict(parts)
        self.count = len(keras.tree.flatten(self.parts)[0])

    def take(self, places: np.ndarray) -> "Samples":
        """Some of the samples."""
        return Samples({key: keras.tree.map_structure(lambda a: a[places], part) for key, part in self.parts.items()})

    def split(self, seed: int, fractions: Sequence[float]) -> list["Samples"]:
        """Random parts of these sizes, and before them what is left; each keeps the order of its samples.

        Raises:
            EqualizeError: There is no sample for some part.
        """
        if not fractions:
            return [self]
        sizes = [max(1, round(self.count * fraction)) for fraction in fractions]
        if sum(sizes) >= self.count:
            raise EqualizeError(
                f"`x` has too few samples to hold some out: expected more than {sum(sizes)}, received {self.count}. "
                "Give `validation_data`, or ways without strengths to choose."
            )
        order = np.random.default_rng(seed).permutation(self.count)
        *held, rest = np.split(order, np.cumsum(sizes))
        return [self.take(np.sort(places)) for places in (rest, *held)]

    def digest(self) -> str:
        """A number that other samples do not have."""
        found = hashlib.sha256()
        for key, part in self.parts.items():
            for array in keras.tree.flatten(part):
                found.update(f"{key} {array.dtype} {array.shape} ".encode())
                found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:16]


def samples(name: str, x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Samples, int | None]:
    """The samples that a user gives as `name`, and the size of the batches that a `tf.data.Dataset` has.

    Raises:
        TypeError: They are of a kind that cannot be split, a generator for instance.
        EqualizeError: There are none, their numbers differ, or a data set has no end or no batches.
    """
    if _is_dataset(x):
        if y is not None or sample_weight is not None:
            raise TypeError(
                f"`{name}` is a `tf.data.Dataset`, which has the targets. Expected: no `y` and no weights beside it. "
                f"Received: {received(y if y is not None else sample_weight)}."
            )
        return _of_dataset(name, x)
    parts = {key: part for key, part in zip(_KEYS, (x, y, sample_weight), strict=True) if part is not None}
    return Samples(_require_samples(name, {key: _arrays(name, part) for key, part in parts.items()})), None


def validation(given: Any) -> Samples | None:
    """The argument `validation_data`: as `model.fit` takes it, or None."""
    if given is None or _is_dataset(given):
        return None if given is None else samples("validation_data", given)[0]
    if not isinstance(given, (list, tuple)) or len(given) not in (2, 3):
        raise TypeError(
            "`validation_data` must be `(x, y)`, `(x, y, sample_weight)`, a `tf.data.Dataset`, or None. Received: "
            f"{received(given)}."
        )
    return samples("validation_data", *given)[0]


def _is_dataset(x: Any) -> bool:
    return hasattr(x, "element_spec") and hasattr(x, "as_numpy_iterator")


def _of_dataset(name: str, dataset: Any) -> tuple[Samples, int]:
    """All batches of a data set, one after the other: every way sees the same ones, shuffled or not."""
    batches: list[Any] = []
    if int(dataset.cardinality()) != _INFINITE:
        batches = [batch if isinstance(batch, tuple) else (batch,) for batch in dataset.as_numpy_iterator()]
    first = keras.tree.flatten(batches[0]) if batches else []
    if not first or not all(np.ndim(part) for part in first):
        raise EqualizeError(
            f"`{name}` is a `tf.data.Dataset` that cannot be split. Expected: one that ends and has batches, as "
            f"`dataset.batch(32)` makes them; they are read into memory. Received: {received(dataset)}."
        )
    joined = [
        keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts) for parts in zip(*batches, strict=True)
    ]
    made = _require_samples(name, dict(zip(_KEYS, joined, strict=False)))
    return Samples(made), len(first[0])


def _arrays(name: str, part: Any) -> Any:
    """A structure of arrays, each as NumPy has it."""
    try:
        arrays, problem = keras.tree.map_structure(_array, part), None
    except Exception as error:  # a list that holds itself, a tensor without a value
        arrays, problem = None, error
    if not all(isinstance(array, np.ndarray) for array in keras.tree.flatten(arrays)):
        raise TypeError(
            f"`{name}` must be arrays, or structures of them, or a `tf.data.Dataset`: `compare` trains many models on "
            f"the same samples, and holds some out. Received: {received(part)}. Read a generator into arrays first."
        ) from problem
    return arrays


def _array(part: Any) -> Any:
    if ops.is_tensor(part):
        return ops.convert_to_numpy(part)
    return part.to_numpy() if hasattr(part, "to_numpy") else part  # of pandas


def _require_samples(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """Raises unless all arrays have one number of samples."""
    counts = [len(array) if array.ndim else 0 for array in keras.tree.flatten(parts)]
    if not counts or min(counts) == 0 or len(set(counts)) > 1:
        raise EqualizeError(
            f"`{name}` must have one number of samples, at least one, in its inputs, targets and weights. Received: "
            f"arrays with {counts} samples."
        )
    return parts
