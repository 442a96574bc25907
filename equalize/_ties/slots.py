"""Slots: what an optimizer keeps for each variable, and what becomes of it when other variables are updated."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor, keras_private, wrapping
from equalize._ties.member import Member

Source = Callable[[Mapping[int, Any], keras.Variable, int], "Tensor | None"]
"""From the old slots of one kind, by the ids of variables, a variable and the degree of the kind: its new value."""


def rebuild(optimizer: Any, variables: list[keras.Variable], source: Source) -> None:
    """Builds an optimizer, with all that are inside it, once more for other variables; what it was set to stays.

    Args:
        optimizer: A Keras optimizer that is built.
        variables: What it updates from now on.
        source: What each slot begins with; where it gives None, a slot begins as in a new optimizer.
    """
    nested = wrapping.everything(optimizer)
    before = [(keras_private.slots(each), keras_private.own_values(each), _degrees(each)) for each in nested]
    for each in nested:
        keras_private.unbuild(each)
    with backend.scope_of(keras_private.steps_taken(nested[-1])):
        optimizer.build(variables)
    for each, (slots, own, degrees) in zip(nested, before, strict=True):
        for name, value in keras_private.own_values(each).items():
            if name in own:
                value.assign(own[name].value)
        for kind, of_variables in keras_private.slots(each).items():
            for variable in keras_private.updated_variables(each):
                slot = of_variables.get(id(variable))
                value = source(slots.get(kind, {}), variable, degrees.get(kind, 0))
                if slot is not None and value is not None and tuple(value.shape) == tuple(slot.shape):
                    slot.assign(ops.cast(value, backend.dtype(slot)))


def pulled(member: Member, slot: Tensor, degree: int) -> Tensor:
    """A member's slot as that of the common value."""
    slot = backend.tensor(slot)
    if tuple(slot.shape) != tuple(member.variable.shape):
        return slot  # rows or columns of a factored one, which no view is for
    common = member.least_squares(slot) * member.scale ** _power(degree)
    return ops.where(ops.all(slot >= 0), ops.abs(common), common)


def shown(member: Member, common: Tensor, degree: int, stored: Tensor | None) -> Tensor:
    """What the slot of the common value is for a member; what its view leaves free stays as it is stored."""
    if tuple(common.shape) != tuple(member.common_shape):
        return common
    zeros = ops.zeros(tuple(member.variable.shape), backend.dtype(member.variable))
    slot = member.apply(common / member.scale ** _power(degree), zeros if stored is None else backend.tensor(stored))
    return ops.where(ops.all(common >= 0), ops.abs(slot), slot)


def _power(degree: int) -> int:
    """A view multiplies weights by its scale and gradients by its inverse, so their powers by powers of that."""
    return degree + 1 if degree else 0


def _degrees(optimizer: Any) -> dict[str, int]:
    """By which power of the gradients the slots of each kind grow: 1 for a first moment, 2 for a second one."""
    if not keras_private.slots(optimizer):
        return {}
    config = json.dumps(keras.saving.serialize_keras_object(optimizer))
    return keras_private.DEGREES_OF_ALL | _measured_degrees(type(optimizer), config)


@functools.lru_cache
def _measured_degrees(kind: type, config: str) -> dict[str, int]:
    """From the slots after one step with some gradients, and with twice these."""
    found = []
    for factor in (1e3, 2e3):
        probe = keras.saving.deserialize_keras_object(json.loads(config), custom_objects={kind.__name__: kind})
        probe.clipnorm = probe.clipvalue = probe.global_clipnorm = None
        probe.gradient_accumulation_steps, probe.use_ema = None, False
        variables = [keras.Variable(np.ones(shape, "float32")) for shape in ((2, 2), (2,))]
        probe.build(variables)
        gradients = [factor * np.linspace(0.5, 1.0, shape[0] ** len(shape)).reshape(shape) for shape in ((2, 2), (2,))]
        probe.apply([ops.convert_to_tensor(gradient.astype("float32")) for gradient in gradients], variables)
        found.append({name: list(slots.values()) for name, slots in keras_private.slots(probe).items()})
    return {name: max(map(_degree, slots, found[1][name])) for name, slots in found[0].items()}


def _degree(once: keras.Variable | None, twice: keras.Variable | None) -> int:
    sizes = [0.0 if slot is None else float(np.linalg.norm(backend.array(slot.value))) for slot in (once, twice)]
    return max(0, round(np.log2(sizes[1] / sizes[0]))) if sizes[0] > 0.0 else 0
