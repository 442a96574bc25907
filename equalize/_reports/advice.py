"""Is it worth tying? What held-out data say about the members of a group."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._inputs import arguments
from equalize._inputs.arguments import received
from equalize._math import means
from equalize._reports.progress import bar
from equalize._ties.bound import without_penalties
from equalize._ties.spread import pulled_arrays
from equalize._ties.tied_group import TiedGroup
from equalize.errors import EqualizeError, GroupMismatchError

FRACTIONS = (0.0, 0.1, 0.25, 0.5, 1.0)
"""How far members are moved to their mean, to see what the loss says."""


@dataclass(frozen=True)
class Advice:
    """What held-out data say about tying one group.

    Attributes:
        group: Name of the group.
        losses: The loss if the members moved a part of the way to their mean (or to their anchor) and nothing else
            changed, by that part: 0.0 (the loss as it is), 0.1, 0.25, 0.5 and 1.0 (all members equal). Above 0.0 not a
            number where two anchors differ, since then there is no value to move to.
        cosine: The mean cosine of the angle between two members' gradients, in [−1, 1]: whether the next step would
            move the members the same way. That does not say whether tying helps. At the minimum of the loss of tied
            members their gradients cancel, so that it is at or below 0 where tying is right. Not a number where fewer
            than two members have a gradient.
        distance: How far apart the members are against their size, √(Σ‖w_i − mean‖² / Σ‖w_i‖²): 0 where they are
            equal, near 1 for independent random values.

    Example:
    >>> from equalize.registry import Advice
    >>> advice = Advice("heads", losses={0.0: 1.0, 0.1: 0.9, 0.25: 0.8, 0.5: 0.85, 1.0: 1.5}, cosine=-0.2, distance=0.1)
    >>> advice.best
    0.25
    """

    group: str
    losses: Mapping[float, float] = field(hash=False)
    cosine: float
    distance: float

    @property
    def best(self) -> float:
        """The part of the way with the lowest loss; of several the largest, which leaves fewest weights free."""
        known = {fraction: loss for fraction, loss in self.losses.items() if loss == loss}
        return max(known, key=lambda fraction: (-known[fraction], fraction), default=0.0)


def advise(groups: Sequence[TiedGroup], model: keras.Model, x: Any, y: Any, batch_size: int) -> list[Advice]:
    """What the data say about each group, by the loss without the penalties on weights.

    Raises:
        EqualizeError: The model is not compiled, a member is not one of its variables, the data do not fit together, or
            the loss cannot be computed.
        TypeError: `model` is not a Keras model.
    """
    arguments.model("model", model)
    if not getattr(model, "compiled", False):
        raise EqualizeError(
            f"`advise` needs the loss of a model. Expected: a compiled model. Received: '{model.name}', which is not "
            "compiled. Call `model.compile(optimizer, loss)` first."
        )
    _require_members(groups, model)
    batches = list(_batches(x, y, batch_size))
    passes = 1 + len(FRACTIONS) * len(groups)
    with without_penalties(model), _as_it_is(model), bar("Asking the data", passes * len(batches)) as step:
        loss = _loss(model, batches, step)
        return [_advice(group, model, batches, loss, step) for group in groups]


def _advice(
    group: TiedGroup, model: keras.Model, batches: Sequence[Any], loss: float, step: Callable[[], None]
) -> Advice:
    moving = [member for member in group.members if not member.anchor]
    sums: list[Any] = [0.0] * len(moving)
    variables = {id(member.variable): member.variable for member in moving}
    for batch, size in batches:
        found = backend.gradients(_loss_of(model, *batch), list(variables.values()))
        by_variable = dict(zip(variables, found, strict=True))
        for i, member in enumerate(moving):
            gradient = by_variable[id(member.variable)]
            if gradient is not None:
                pulled = backend.array(moving[i].adjoint(gradient)).astype("float64")
                sums[i] = sums[i] + size * pulled
        step()
    losses = {FRACTIONS[0]: loss}
    for fraction in FRACTIONS[1:]:
        with _moved(group, fraction) as possible:
            losses[fraction] = _loss(model, batches, step) if possible else math.nan
    return Advice(group.name, losses, _cosine(sums), _distance(group))


def _distance(group: TiedGroup) -> float:
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


def _require_members(groups: Sequence[TiedGroup], model: keras.Model) -> None:
    own = {id(variable) for variable in model.variables}
    for group in groups:
        for member in group.members:
            if not member.constant and id(member.variable) not in own:
                raise EqualizeError(
                    f"`advise` cannot judge group '{group.name}' by '{model.name}': its member {member} is not a "
                    "variable of that model. Expected: a model that all members belong to, or the names of groups that "
                    "it has."
                )


@contextlib.contextmanager
def _as_it_is(model: keras.Model) -> Iterator[None]:
    """Gives a model back what layers and metrics update while a loss is computed."""
    with _kept([*model.non_trainable_variables, *model.metrics_variables]):
        yield


@contextlib.contextmanager
def _moved(group: TiedGroup, fraction: float) -> Iterator[bool]:
    """While open, the members have moved a part of the way to the common value; says whether there is one."""
    moving = [member for member in group.members if not member.anchor]
    try:
        group.require_anchors_agree()
    except GroupMismatchError:
        yield False
        return
    with _kept([member.variable for member in moving]):
        common = group.value
        for member in moving:
            (value,) = means.relax([backend.read(member.variable)], member.apply(common), fraction)
            member.variable.assign(backend.own_copy(value))
        yield True


@contextlib.contextmanager
def _kept(variables: Sequence[keras.Variable]) -> Iterator[None]:
    """Gives variables back what they held, bit for bit, also after an error."""
    kept = [(variable, backend.array(variable.value).copy()) for variable in variables]
    try:
        yield
    finally:
        for variable, value in kept:
            variable.assign(value)
