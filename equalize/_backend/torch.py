"""The backend's functions on PyTorch, which runs eagerly."""

import functools
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import torch
from keras import ops

from equalize._backend.common import current_scope, is_variable
from equalize._backend.keras_private import held_value, in_symbolic_scope, replace_torch_parameter
from equalize._backend.tensors import (
    Columns,
    Computation,
    Tensor,
    WriteTracker,
    inner_products_of_rows,
    mix_in_passes,
    track_one_by_one,
    unstacked,
    write_one_by_one,
)

_COPY = getattr(torch, "_foreach_copy_")  # noqa: B009 - PyTorch lists it for no type checker
_LERP = getattr(torch, "_foreach_lerp")  # noqa: B009 - PyTorch lists it for no type checker
_VERSION = operator.attrgetter("_version")
_DEREFERENCE = weakref.ref.__call__


# So many entries of each tensor are computed with at a time, where that is many operations.
_BLOCK = 2**16

# So many rows are multiplied with each other as they are; more of them are faster as a matrix, which is a copy.
_FEW_ROWS = 6


def is_raw_variable(x: Any) -> bool:
    return False


def tensor(x: Any) -> Tensor:
    return x.value if is_variable(x) else x


def read(variable: keras.Variable) -> Tensor:
    return variable.value.detach()


def read_live(variable: keras.Variable) -> Tensor:
    return read(variable)


def concrete(variable: keras.Variable) -> np.ndarray | None:
    value = held_value(variable)
    return None if value is None else array(value)


def array(value: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(value)


def own_copy(value: Tensor) -> Tensor:
    return value


def is_tracing() -> bool:
    return False


def is_traced(value: Tensor) -> bool:
    return False


def computes_later() -> bool:
    return in_symbolic_scope()


def perhaps_traced(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    return []  # what `torch.compile` compiled looks at attributes itself


def forget_traces(function: Callable[..., Any]) -> None:
    pass


def eagerly() -> AbstractContextManager[None]:
    return nullcontext()


def after(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


def adjustable(number: float) -> Any:
    return None


def scope_of(variable: keras.Variable) -> Any:
    return nullcontext()


def compiled_by_xla(value: Tensor) -> bool:
    return False


def computed_once(value: Tensor) -> Tensor:
    return value


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def tree_of_mixes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def in_blocks(values: Sequence[Tensor], *others: Any) -> Tensor:
        columns_of = columns(values)
        if isinstance(columns_of, _Blocks):
            _, (result,) = columns_of.compute(lambda rows: (0.0, [function(rows, *others, mix=_mix_in_few_passes)]))
            if _is_finite(result):  # what overflows in a mix stays infinite, or is no number, in those above it
                return result
        return function(values, *others, mix=mix)

    return in_blocks


def gradients(function: Callable[[], Tensor], variables: Sequence[keras.Variable]) -> list[Tensor | None]:
    values = [variable.value for variable in variables]
    return list(torch.autograd.grad(function(), values, allow_unused=True)) if values else []


def value_and_gradients(
    function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    if not torch.is_grad_enabled():  # nobody will ask for them
        return function(tensors), [torch.zeros((), dtype=x.dtype, device=x.device) for x in tensors]
    leaves = [x.detach().requires_grad_() for x in tensors]
    value = function(leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


class _WithGradients(torch.autograd.Function):
    """A value, whose gradients with respect to some tensors are given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors_and_gradients[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,), gradients = grad_outputs, ctx.saved_tensors
        if scale.device.type != "cpu" or scale != 1.0:  # as it is where losses are added up
            gradients = [scale * gradient for gradient in gradients]
        return None, None, *gradients, *[None] * len(gradients)


def with_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    return _WithGradients.apply(value, len(tensors), *tensors, *gradients)


def add_gradients(gradients: Sequence[Tensor]) -> Tensor:
    # Backpropagation adds up the uses of one variable from the last to the first. The gradients stay as they are.
    last, *others = reversed(gradients)
    total = last + others[0] if others else last
    for gradient in others[1:]:
        total.add_(gradient)
    return total


def scale_gradient(gradient: Tensor, factor: float | Tensor) -> Tensor:
    return gradient * factor


def weighted_gradients(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    (first, *others), (weight, *further) = gradients, weights
    total = first * weight
    for gradient, more in zip(others, further, strict=True):
        total.addcmul_(gradient, more)  # in one pass
    return total


def inner_products(tensors: Sequence[Tensor]) -> Tensor:
    n = len(tensors)
    if n > _FEW_ROWS:
        return inner_products_of_rows(columns(tensors).map(stack), product)
    flat = [x.reshape(-1) for x in tensors]
    products = torch.stack([torch.dot(flat[i], flat[j]) for i in range(n) for j in range(i + 1)])
    i, j = torch.tril_indices(n, n)
    gramian = products.new_zeros((n, n))
    gramian[i, j] = gramian[j, i] = products
    return gramian


def dense_gradients(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    return gradients


def over_replicas(gradients: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
    return gradients, 1


def stateless_uniform(shape: Sequence[int], seed: int, step: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed((seed << 32) + int(step))
    return ops.convert_to_tensor(torch.rand(tuple(shape), generator=generator))  # on the device of the others


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    flat = [x.reshape(-1) for x in tensors]
    return functools.reduce(operator.add, [torch.dot(x, x) for x in flat])  # one pass over memory


def columns(tensors: Sequence[Tensor]) -> Columns:
    first = tensors[0]
    whole = first.numel() <= _BLOCK or first.device.type != "cpu" or torch.compiler.is_compiling()
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return Columns(tensors) if whole or differentiated else _Blocks(tensors)


class _Blocks(Columns):
    """Blocks of columns that a processor's caches hold, one after the other."""

    def __init__(self, tensors: Sequence[Tensor], prepare: Callable[[Any], Any] = list):
        self._tensors, self._prepare = tensors, prepare

    def map(self, function: Callable[[Any], Any]) -> Columns:
        return _Blocks(self._tensors, lambda rows: function(self._prepare(rows)))

    def compute(self, function: Computation) -> tuple[Tensor, list[Tensor]]:
        total, results, places = None, [], []
        for number, block in enumerate(zip(*map(_split_in_blocks, self._tensors), strict=True)):
            more, rows = function(self._prepare(block))
            total = more if total is None else total + more
            if not number:
                results = [torch.empty(self._tensors[0].shape, dtype=r.dtype) for r in unstacked(rows)]
                places = list(map(_split_in_blocks, results))
            for place, row in zip(places, unstacked(rows), strict=True):
                place[number].copy_(row)
        return total, results


def _split_in_blocks(x: Tensor) -> Sequence[Tensor]:
    return torch.split(x.reshape(-1), _BLOCK)


def product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors))


def join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def split(joined: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    parts = torch.split(joined, [math.prod(shape) for shape in shapes])
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def mix(left: Tensor, right: Tensor, share: float | Tensor) -> Tensor:
    """In one or two passes over memory, where the operations' formulas are known and nothing overflows."""
    if left.device.type != "cpu" or not isinstance(share, float) or torch.compiler.is_compiling():
        return mix_in_passes(left, right, share)
    mixed = _mix_in_few_passes(left, right, share)
    return mixed if _is_finite(mixed) else mix_in_passes(left, right, share)


def _is_finite(x: Tensor) -> bool:
    """Whether no entry is infinite or not a number; in one pass, which may say no where their sum is infinite."""
    return bool(torch.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))))


def _mix_in_few_passes(left: Tensor, right: Tensor, share: float) -> Tensor:
    """`mix`, or infinite or not a number where something overflows.

    (w + w)·½ is w. `torch.lerp(w, v, s)` for s ≥ ½ is v − (v − w)·(1 − s), which is v where w is v, −0.0 as well.
    """
    if share == 0.5:
        return torch.add(left, right).mul_(0.5)
    return torch.lerp(left, right, share) if share > 0.5 else torch.lerp(right, left, 1.0 - share)


def approach(values: Sequence[Tensor], targets: Sequence[Tensor], rate: float) -> list[Tensor]:
    return list(_LERP(list(values), list(targets), rate))


def replace_parameter(layer: keras.Layer, old: keras.Variable, new: keras.Variable) -> None:
    replace_torch_parameter(layer, old, new)


def write(variables: Sequence[keras.Variable], values: Sequence[Tensor]) -> list[Tensor]:
    if current_scope() is not None:
        write_one_by_one(variables, values)
    elif variables:
        with torch.no_grad():
            _COPY([variable.value for variable in variables], list(values))
    return [variable.value for variable in variables]  # which Keras copies onto itself for nothing


def track_writes(variable: keras.Variable, value: Tensor, *, awaited: bool = False) -> WriteTracker:
    """Every write in place counts up the tensor's version; Keras's own of an awaited value by one at most."""
    tensor, version = weakref.ref(variable.value), variable.value._version

    def versioned(variable: keras.Variable) -> Tensor | None:
        unwritten = variable.value is tensor() and 0 <= variable.value._version - version <= int(awaited)
        return read(variable) if unwritten else None

    return versioned


def track_all(variables: Sequence[keras.Variable]) -> Callable[[], bool]:
    if current_scope() is not None:
        return track_one_by_one(track_writes, read, variables)
    tensors = list(map(held_value, variables))
    versions, references = list(map(_VERSION, tensors)), list(map(weakref.ref, tensors))

    def none_written() -> bool:
        """In loops that Python itself runs, since each member of a group asks once a step.

        A variable holds one tensor as long as it lives (Keras 3.15).
        """
        try:
            return current_scope() is None and list(map(_VERSION, map(_DEREFERENCE, references))) == versions
        except AttributeError:  # None has no version
            return False

    return none_written
