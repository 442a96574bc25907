"""Is it worth tying? What data say about the members of a group."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import backend
from equalize.arguments import received
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.groups import Group, pulled_arrays
from equalize.progress import bar
from equalize.rules import Rule


@dataclass(frozen=True)
class Advice:
    """What data say about tying one group.

    Attributes:
        group: Name of the group.
        cosine: The mean cosine of the angle between two members' gradients, in [−1, 1]. Near 1 the data pull all
            members the same way, and one update serves them all; near 0 they have nothing to do with each other;
            below 0 they pull apart. Not a number where fewer than two members have a gradient.
        distance: How far apart the members are against their size, √(Σ‖w_i − mean‖² / Σ‖w_i‖²): 0 where they are
            equal, near 1 for independent random values.
        loss: The loss on the data as it is.
        tied_loss: The loss if the members were made equal now, and nothing else changed. Not a number where two
            anchors differ, since then they cannot be.

    Example:
    >>> from equalize.advice import Advice
    >>> advice = Advice("heads", cosine=0.9, distance=0.1, loss=1.0, tied_loss=1.25)
    >>> advice.rise
    0.25
    """

    group: str
    cosine: float
    distance: float
    loss: float
    tied_loss: float

    @property
    def rise(self) -> float:
        """By how much the loss would rise if the group were tied now."""
        return self.tied_loss - self.loss


def advise(groups: Sequence[Group], model: keras.Model, x: Any, y: Any, batch_size: int) -> list[Advice]:
    """What the data say about each group, the penalties of the groups themselves left out.

    Raises:
        EqualizeError: The model is not compiled, a member is none of its variables, the data do not fit together, or
            the loss cannot be computed.
        TypeError: The model is none.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: {received(model)}.")
    if not getattr(model, "compiled", False):
        raise EqualizeError(
            f"`advise` needs the loss of a model. Expected: a compiled model. Received: '{model.name}', which is not "
            "compiled. Call `model.compile(optimizer, loss)` first."
        )
    _require_members(groups, model)
    batches = list(_batches(x, y, batch_size))
    passes = 1 + 2 * len(groups)
    with _without_penalties(groups), _metrics_as_they_are(model), bar("Asking the data", passes * len(batches)) as step:
        loss = _loss(model, batches, step)
        return [_advice(group, model, batches, loss, step) for group in groups]


def _advice(group: Group, model: keras.Model, batches: Sequence[Any], loss: float, step: Callable[[], None]) -> Advice:
    moving = [member for member in group.members if not member.anchor]
    sums: list[Any] = [0.0] * len(moving)
    for batch, size in batches:
        found = backend.gradients(_loss_of(model, *batch), [member.variable for member in moving])
        for i, gradient in enumerate(found):
            if gradient is not None:
                pulled = backend.array(moving[i].pull_gradient(gradient)).astype("float64")
                sums[i] = sums[i] + size * pulled
        step()
    try:
        group.require_anchors_agree()
    except GroupMismatchError:
        tied_loss = float("nan")
    else:
        with _equal(group):
            tied_loss = _loss(model, batches, step)
    return Advice(group.name, _cosine(sums), _distance(group), loss, tied_loss)


def _distance(group: Group) -> float:
    values = [value.astype("float64") for value in pulled_arrays(group.members)]
    mean = sum(values) / len(values)
    size = sum(np.sum(value**2) for value in values)
    return float(np.sqrt(sum(np.sum((value - mean) ** 2) for value in values) / size)) if size else 0.0


def _cosine(gradients: Sequence[Any]) -> float:
    """The mean cosine over all pairs, from the sum of the unit vectors and without forming a pair."""
    norms = [float(np.linalg.norm(np.ravel(gradient))) for gradient in gradients]
    units = [gradient / norm for gradient, norm in zip(gradients, norms, strict=True) if norm > 0.0]
    n = len(units)
    return float((np.sum(np.sum(units, axis=0) ** 2) - n) / (n * (n - 1))) if n > 1 else float("nan")


def _loss(model: keras.Model, batches: Sequence[Any], step: Callable[[], None]) -> float:
    total = 0.0
    for batch, size in batches:
        total += size * float(ops.convert_to_numpy(_loss_of(model, *batch)()))
        step()
    return total / sum(size for _, size in batches)


def _loss_of(model: keras.Model, x: Any, y: Any) -> Callable[[], Any]:
    def loss() -> Any:
        try:
            return model.compute_loss(x=x, y=y, y_pred=model(x, training=False))
        except Exception as error:  # whatever layers, losses and backends raise about data that do not suit them
            raise EqualizeError(
                f"`advise` cannot compute the loss of '{model.name}' on these data: expected inputs and targets as for "
                f"`model.evaluate(x, y)`, which must run; received what led to {type(error).__name__}: "
                f"{str(error).rstrip('.')}."
            ) from error

    return loss


def _batches(x: Any, y: Any, batch_size: int) -> Iterator[Any]:
    """Pairs of `(x, y)` and the number of their samples."""
    try:
        counts, problem = [_samples(part) for part in keras.tree.flatten((x, y))], None
    except Exception as error:  # a list that holds itself, a shape that is none
        counts, problem = [0], error
    count = max(counts, default=0)
    if count == 0 or min(counts) < count:
        found = f"arrays with {counts} samples" if count else f"{received(x)} and {received(y)}"
        raise EqualizeError(
            "`advise` needs inputs and targets with one number of samples, at least one: arrays, or structures of "
            f"them. Received: {found}."
        ) from problem
    for start in range(0, count, batch_size):
        batch = keras.tree.map_structure(
            lambda part, start=start: ops.convert_to_tensor(part[start : start + batch_size]), (x, y)
        )
        yield batch, min(batch_size, count - start)


def _samples(part: Any) -> int:
    """How many samples an array holds; 0 for what is none."""
    shape = tuple(getattr(part, "shape", ()))
    return shape[0] if shape and isinstance(shape[0], int) else 0


def _require_members(groups: Sequence[Group], model: keras.Model) -> None:
    own = {id(variable) for variable in model.variables}
    for group in groups:
        for member in group.members:
            if not member.constant and id(member.variable) not in own:
                raise EqualizeError(
                    f"`advise` cannot judge group '{group.name}' by '{model.name}': its member {member} is no variable "
                    "of that model. Expected: a model that all members belong to, or the names of groups that it has."
                )


@contextlib.contextmanager
def _without_penalties(groups: Sequence[Group]) -> Iterator[None]:
    """While open, members have no regularizer that ties, so that the loss is that of the untied model."""
    kept = {id(m.variable): (m.variable, m.variable.regularizer) for group in groups for m in group.members}.values()
    for variable, regularizer in kept:
        while isinstance(regularizer, Rule):
            regularizer = regularizer.inner
        variable.regularizer = regularizer
    try:
        yield
    finally:
        for variable, regularizer in kept:
            variable.regularizer = regularizer


@contextlib.contextmanager
def _metrics_as_they_are(model: keras.Model) -> Iterator[None]:
    """Gives a model's metrics back what they held; computing a loss updates some of them."""
    kept = [(variable, ops.convert_to_numpy(variable.value).copy()) for variable in model.metrics_variables]
    try:
        yield
    finally:
        for variable, value in kept:
            variable.assign(value)


@contextlib.contextmanager
def _equal(group: Group) -> Iterator[None]:
    """While open, the members are equal, to their mean or their anchor."""
    kept = [(member.variable, backend.array(member.variable.value).copy()) for member in group.members]
    group.sync("mean")
    try:
        yield
    finally:
        for variable, value in kept:
            variable.assign(value)
