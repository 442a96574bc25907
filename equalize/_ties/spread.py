"""How far apart members are, and what each says of the common value."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._math import means
from equalize._ties.member import Member

# The distance of 1 to the next number.
_UNIT = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def spread_of(members: Sequence[Member]) -> float:
    """The largest entry of max − min over members; 0.0 where each shows what one common value would give it."""
    if not members:
        return 0.0
    # One member after the other, so that a large group needs the memory of a few members, not of all.
    pulled = _bounds(members)
    first = low = high = next(pulled)
    alike = np.ones(first.shape, bool)
    for value in pulled:
        alike &= (value == first) | (np.isnan(value) & np.isnan(first))
        low, high = np.minimum(low, value), np.maximum(high, value)
    if alike.all():
        return 0.0
    if not all(member.lossless for member in members):
        member = members[gentlest(members)]
        base = pulled_array(member, backend.array(member.variable.value))
        stored = {member: backend.read(member.variable) for member in members}
        for guess in (base, np.nextafter(base, base + 1), np.nextafter(base, base - 1)):
            alike |= backend.array(shown_by_all(stored, ops.convert_to_tensor(guess)))
    return _largest(high, low, alike)


def change_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest change of an entry from one value of a pair to the other; 0.0 where it is no more than rounding."""
    arrays = [(backend.array(value), backend.array(new)) for value, new in pairs]
    largest = max((float(np.max(np.abs(value), initial=0.0)) for value, _ in arrays), default=0.0)
    change = max((spread_between(value, new) for value, new in arrays), default=0.0)
    return 0.0 if not arrays or change <= 8 * _UNIT[backend.dtype(pairs[0][0])] * largest else change


def spread_between(value: np.ndarray, other: np.ndarray) -> float:
    """The largest difference between two arrays."""
    return _largest(value, other, (value == other) | (np.isnan(value) & np.isnan(other)))


def _largest(high: np.ndarray, low: np.ndarray, alike: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        apart = np.asarray(np.abs(np.subtract(high, low, dtype="float64")))
    apart[alike] = 0.0
    return float(np.max(np.nan_to_num(apart, copy=False, nan=np.inf, posinf=np.inf), initial=0.0))


def gentlest(members: Sequence[Member]) -> int:
    """The index of the member that rounds least: of the widest dtype, and of the view that stretches least."""

    def rounding(i: int) -> tuple[bool, float]:
        return members[i].common_dtype is not None, abs(math.log2(members[i].scale))

    return min(range(len(members)), key=rounding)


def shown_by_all(stored: Mapping[Member, Tensor], common: Tensor) -> Tensor:
    """Where every member holds just what the common value gives it; the scale of a view may have rounded it."""
    same = []
    for member, value in stored.items():
        other = ops.cast(member.apply(common, value) != value, "float32")
        same.append(member.least_squares(other) == 0.0)
    return ops.all(ops.stack(same), axis=0)


def pulled_arrays(members: Iterable[Member]) -> Iterator[np.ndarray]:
    """What each member says of the common value, one after the other, in the dtypes of their variables."""
    return (pulled_array(member, backend.array(member.variable.value)) for member in members)


def _bounds(members: Iterable[Member]) -> Iterator[np.ndarray]:
    """The same, and two arrays for a member that shows entries several times: the least and the greatest of each."""
    for member in members:
        yield from bounds_of(member, backend.array(member.variable.value))


def bounds_of(member: Member, value: np.ndarray) -> list[np.ndarray]:
    """What a member that holds a value says of the common value; where its view repeats, the least and the greatest."""
    if member.view is None or not member.repeats:
        return [pulled_array(member, value)]
    with backend.eagerly():
        tensor = ops.convert_to_tensor(value)
        return [_as_array(bound, value) for bound in member.view.bounds(tensor, tensor)]


def pulled_array(member: Member, value: np.ndarray) -> np.ndarray:
    """What a member that holds a value says of the common value, in the value's dtype."""
    if member.view is None:
        return value
    with backend.eagerly():
        return _as_array(member.least_squares(ops.convert_to_tensor(value)), value)


def _as_array(value: Tensor, like: np.ndarray) -> np.ndarray:
    """A tensor as an array; widened, since TensorFlow cannot give a scalar in half precision back."""
    return ops.convert_to_numpy(means.widen(value)).astype(like.dtype)
