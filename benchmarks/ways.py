"""The ways to tie: untied, by reference, by `equalize`, and by what people write today.

To add one, add a `Way` to `WAYS`; every task then measures it that asks for it by name.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

import equalize
from benchmarks.task import Options

Groups: TypeAlias = Mapping[str, Sequence[keras.layers.Layer]]
"""Built layers to tie weight by weight, under the name of their group."""

Callbacks: TypeAlias = list[keras.callbacks.Callback]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to tie layers.

    Attributes:
        label: What tables and pictures call it.
        attach: Ties built layers before `compile`, given the factor of the penalty; returns what `fit` must call.
        shared: Whether the layers of a group are one object from the start.
        penalizes: Whether the factor matters.
    """

    label: str
    attach: Callable[[Groups, float], Callbacks]
    shared: bool = False
    penalizes: bool = False

    def layers(self, build: Callable[[], keras.layers.Layer], count: int) -> list[keras.layers.Layer]:
        """The layers of one group: `count` of them, or one of them `count` times."""
        return [build()] * count if self.shared else [build() for _ in range(count)]


def _leave(groups: Groups, factor: float) -> Callbacks:
    return []


def _rule(make_rule: Callable[[float], Any]) -> Callable[[Groups, float], Callbacks]:
    """Ties with a rule of `equalize`. The variables then hold the rule, so the registry may go."""

    def attach(groups: Groups, factor: float) -> Callbacks:
        registry = equalize.GroupRegistry()
        for name, layers in groups.items():
            registry.tie(name, list(layers), make_rule(factor))
        return []

    return attach


def _variables(groups: Groups) -> list[tuple[keras.Variable, ...]]:
    """The variables to tie, weight by weight."""
    return [
        members
        for layers in groups.values()
        for members in zip(*(layer.trainable_variables for layer in layers), strict=True)
    ]


class _StackedMean(keras.constraints.Constraint):
    """Habit: every call stacks all members, averages them and writes them, n times a step."""

    def __init__(self, members: Sequence[keras.Variable]):
        self._members = members

    def __call__(self, w: Any) -> Any:
        mean = ops.mean(ops.stack([member.value for member in self._members]), axis=0)
        for member in self._members:
            member.assign(mean)
        return mean


def _stack(groups: Groups, factor: float) -> Callbacks:
    for members in _variables(groups):
        for member in members:
            member.assign(members[0])
            member.constraint = _StackedMean(members)
    return []


class _AverageAfterBatch(keras.callbacks.Callback):
    """Habit: fetch the weights of all layers after every batch, average in NumPy, and set them."""

    def __init__(self, groups: Groups):
        super().__init__()
        self._groups = groups

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        for layers in self._groups.values():
            weights = zip(*(layer.get_weights() for layer in layers), strict=True)
            means = [sum(members) / len(members) for members in weights]
            for layer in layers:
                layer.set_weights(means)


def _callback(groups: Groups, factor: float) -> Callbacks:
    return [_AverageAfterBatch(groups)]


class _AllPairs(keras.regularizers.Regularizer):
    """Habit: the squared distance of every pair, n·(n − 1)/2 of them, in the loss once."""

    def __init__(self, members: Sequence[keras.Variable], factor: float):
        self._members = members
        self._factor = factor

    def __call__(self, x: Any) -> Any:
        pairs = itertools.combinations(self._members, 2)
        return self._factor * sum(ops.sum(ops.square(ops.subtract(left.value, right.value))) for left, right in pairs)


def _all_pairs(groups: Groups, factor: float) -> Callbacks:
    for members in _variables(groups):
        members[0].regularizer = _AllPairs(members, factor)
    return []


def _penalty(rule: Any) -> Way:
    """The way to tie with a regularizer of `equalize`."""
    return Way(f"soft: {rule.__name__}", _rule(lambda factor: rule(factor=factor)), penalizes=True)


WAYS: dict[str, Way] = {
    "untied": Way("untied", _leave),
    "reference": Way("one shared variable", _leave, shared=True),
    "hard": Way("hard: Equal", _rule(lambda factor: equalize.constraints.Equal())),
    "mean_l2": _penalty(equalize.regularizers.MeanL2),
    "pairwise_l2": _penalty(equalize.regularizers.PairwiseL2),
    "pairwise_l1": _penalty(equalize.regularizers.PairwiseL1),
    "pairwise_norm": _penalty(equalize.regularizers.PairwiseNorm),
    "chain_l2": _penalty(equalize.regularizers.ChainL2),
    "trace_norm": _penalty(equalize.regularizers.TraceNorm),
    "stack": Way("habit: stacked mean", _stack),
    "callback": Way("habit: set_weights", _callback),
    "all_pairs": Way("habit: all pairs", _all_pairs, penalizes=True),
}


def configurations(names: Sequence[str], factors: Sequence[float], options: Options) -> list[tuple[str, float]]:
    """The ways of those names, those with a penalty once for each factor; in a quick run for the middle one only."""
    if options.size == "quick":
        factors = factors[len(factors) // 2 :][:1]
    return [(name, factor) for name in names for factor in (factors if WAYS[name].penalizes else (0.0,))]


def spread(layers: Sequence[keras.layers.Layer]) -> float:
    """The largest entry of max − min over the layers' weights: 0.0 where they are equal."""
    weights = zip(*(layer.get_weights() for layer in layers), strict=True)
    return max(float(np.ptp(np.stack(members), axis=0).max()) for members in weights)
