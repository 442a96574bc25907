"""The ways to tie: untied, by reference, by `equalize`, and by what people write today.

To add one, add a `Way` to `WAYS`; every task then measures it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
from keras import ops

import equalize
from benchmarks import colors
from benchmarks.task import Options

Groups: TypeAlias = Mapping[str, Sequence[Any]]
"""What to tie, under the name of the group: built layers, which are tied weight by weight, or variables."""


class Tied(NamedTuple):
    """What a tied model is trained with.

    Attributes:
        optimizer: The optimizer to compile with.
        callbacks: What `fit` must call.
    """

    optimizer: keras.optimizers.Optimizer
    callbacks: Sequence[keras.callbacks.Callback] = ()


Attach: TypeAlias = Callable[[Groups, float, keras.optimizers.Optimizer], Tied]


def _leave(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    return Tied(optimizer)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to tie.

    Attributes:
        label: What tables and pictures call it.
        color: Its colour in pictures, that of its family.
        attach: Ties what is built, before `compile`, given the strength and the model's optimizer.
        tie: What `equalize.compare` takes for it, and None where no task compares it so.
        strengths: The strengths that `compare` tries; empty where the way has none.
        marker: Its marker in pictures, that of its rule.
        hard: Whether the members stay equal.
        summed: Whether a group is updated once, from the sum of its members' gradients.
        thorough: Whether only full runs measure it.
    """

    label: str
    color: str
    attach: Attach = _leave
    tie: Any = None
    strengths: tuple[float, ...] = ()
    marker: str = "o"
    hard: bool = False
    summed: bool = False
    thorough: bool = False

    def compared(self, options: Options) -> Any:
        """What `equalize.compare` takes for it; a run that is not full takes one strength."""
        strengths = options.choose(self.strengths[:1], self.strengths[1:2], self.strengths)
        return (self.tie, list(strengths)) if strengths else self.tie

    def in_run(self, options: Options) -> bool:
        """Whether a run measures it."""
        return options.size == "full" or not self.thorough


def _share(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    for members in groups.values():
        equalize.share(*members)
    return Tied(optimizer)


def _tie(groups: Groups, rule: Any) -> equalize.GroupRegistry:
    registry = equalize.GroupRegistry()
    for name, members in groups.items():
        registry.tie(name, list(members), rule)
    return registry


def _rule(make_rule: Callable[[float], Any]) -> Attach:
    """Ties with a rule of `equalize`. The variables then hold the rule, so the registry may go."""

    def attach(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
        _tie(groups, make_rule(strength))
        return Tied(optimizer)

    return attach


def _exact(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    return Tied(equalize.optimizers.TiedOptimizer(optimizer, _tie(groups, equalize.constraints.Equal())))


def _variables(groups: Groups) -> list[list[keras.Variable]]:
    """The variables to tie, group by group and weight by weight, for the ways that do all by hand."""
    found = []
    for members in groups.values():
        if isinstance(members[0], keras.layers.Layer):
            found += map(list, zip(*(layer.trainable_variables for layer in members), strict=True))
        else:
            found.append(list(members))
    return found


def _start_equal(members: Sequence[keras.Variable]) -> None:
    for member in members[1:]:
        member.assign(ops.copy(members[0].value))


class _StackedMean(keras.constraints.Constraint):
    """By hand: every call stacks all members, averages them and writes them, n times a step."""

    def __init__(self, members: Sequence[keras.Variable], own: keras.Variable):
        self._members = members
        self._own = own

    def __call__(self, w: Any) -> Any:
        mean = ops.mean(ops.stack([member.value for member in self._members]), axis=0)
        for member in self._members:
            member.assign(mean)
        return ops.convert_to_tensor(self._own.value)


def _stack(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    for members in _variables(groups):
        _start_equal(members)
        for member in members:
            member.constraint = _StackedMean(members, member)
    return Tied(optimizer)


class _AverageAfterBatch(keras.callbacks.Callback):
    """By hand: fetch the members after every batch, average in NumPy, and set them."""

    def __init__(self, groups: Sequence[Sequence[keras.Variable]]):
        super().__init__()
        self._groups = groups

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if keras.backend.backend() == "jax" and self.model is not None:
            self.model.jax_state_sync()
        for members in self._groups:
            mean = np.mean([ops.convert_to_numpy(member.value) for member in members], axis=0)
            for member in members:
                member.assign(mean)


def _callback(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    members = _variables(groups)
    for group in members:
        _start_equal(group)
    return Tied(optimizer, [_AverageAfterBatch(members)])


class _AllPairs(keras.regularizers.Regularizer):
    """By hand: the squared distance of every pair, n·(n − 1)/2 of them, in the loss once."""

    def __init__(self, members: Sequence[keras.Variable], factor: float):
        self._members = members
        self._factor = factor

    def __call__(self, x: Any) -> Any:
        pairs = itertools.combinations([member.value for member in self._members], 2)
        return self._factor * sum(ops.sum(ops.square(left - right)) for left, right in pairs)


def _all_pairs(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    for members in _variables(groups):
        members[0].regularizer = _AllPairs(members, strength)
    return Tied(optimizer)


FACTOR, RATE = 1e-4, 0.1
"""The strengths of soft and partial ties whose steps are timed."""

FACTORS = (0.001, 0.01, 0.1)
RATES = (0.003, 0.03, 0.3)


def _penalty(kind: Any, marker: str, tie: Any = None) -> Way:
    """The way to tie with a regularizer of `equalize`; all but one are for full runs."""
    attach = _rule(lambda factor: kind(factor=factor))
    return Way(f"soft: {kind.__name__}", colors.BLUE, attach, tie, FACTORS, marker, thorough=tie is None)


_SOFT = equalize.regularizers

WAYS: dict[str, Way] = {
    "untied": Way("untied", colors.BLACK, tie="untied"),
    "shared": Way("one shared variable", colors.SKY, _share, "shared", hard=True, summed=True, marker="s"),
    "exact": Way("exact: TiedOptimizer", colors.ORANGE, _exact, "exact", hard=True, summed=True),
    "hard": Way("hard: Equal", colors.VERMILLION, _rule(lambda _: equalize.constraints.Equal()), "hard", hard=True),
    "partial": Way(
        "partial: Equal(rate)",
        colors.GREEN,
        _rule(lambda rate: equalize.constraints.Equal(rate=rate)),
        "partial",
        RATES,
    ),
    "soft": _penalty(_SOFT.MeanL2, "o", "soft"),
    "PairwiseL2": _penalty(_SOFT.PairwiseL2, "s"),
    "PairwiseL1": _penalty(_SOFT.PairwiseL1, "v"),
    "PairwiseNorm": _penalty(_SOFT.PairwiseNorm, "^"),
    "ChainL2": _penalty(_SOFT.ChainL2, "D"),
    "TraceNorm": _penalty(_SOFT.TraceNorm, "P"),
    "stacked_mean": Way("hand-written: stacked mean", colors.PINK, _stack, hard=True),
    "set_weights": Way("hand-written: set_weights", colors.PINK, _callback, hard=True, marker="s"),
    "all_pairs": Way("hand-written: all pairs", colors.PINK, _all_pairs, strengths=FACTORS, marker="v"),
}


def strength(way: Way) -> float:
    """The strength of a way whose step is timed."""
    return {FACTORS: FACTOR, RATES: RATE}.get(way.strengths, 0.0)


def spread(groups: Groups) -> float:
    """The largest entry of max − min over the members: 0.0 where they are equal."""
    values = [[ops.convert_to_numpy(member) for member in members] for members in _variables(groups)]
    return max(float(np.ptp(np.stack(members), axis=0).max()) for members in values)
