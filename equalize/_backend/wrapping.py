"""Optimizers around and inside of others: `LossScaleOptimizer`, `TiedOptimizer`, `MultiOptimizer`."""

from typing import Any

import keras


def from_outside_in(optimizer: Any) -> list[Any]:
    """An optimizer and those inside it; empty for what is not a Keras optimizer."""
    nested = [optimizer]
    while hasattr(nested[-1], "inner_optimizer"):
        nested.append(nested[-1].inner_optimizer)
    return nested if isinstance(nested[-1], keras.optimizers.Optimizer) else []


def parts(optimizer: Any) -> list[list[Any]]:
    """The optimizers that update variables, one or those of a `MultiOptimizer`, each with those around it first."""
    nested = from_outside_in(optimizer)
    several = getattr(nested[-1], "optimizers", None) if nested else ()
    return [nested] if several is None else [nested[:-1] + part for inner in several for part in parts(inner)]


def everything(optimizer: Any) -> list[Any]:
    """An optimizer and all that are inside it, each once."""
    return list({id(each): each for part in parts(optimizer) for each in part}.values())
