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
from equalize import views

Groups: TypeAlias = Mapping[str, Sequence[Any]]
"""What to tie, under the name of the group: built layers, which are tied weight by weight, or else variables, each
with a view (`(variable, view)`) where it shows the common value otherwise."""


class Tied(NamedTuple):
    """What a tied model is trained with.

    Attributes:
        optimizer: The optimizer to compile with.
        callbacks: What `fit` must call.
    """

    optimizer: keras.optimizers.Optimizer
    callbacks: Sequence[keras.callbacks.Callback] = ()


Attach: TypeAlias = Callable[[Groups, float, keras.optimizers.Optimizer], Tied]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to tie.

    Attributes:
        label: What tables and pictures call it.
        color: Its colour in pictures, that of its family.
        attach: Ties what is built, before `compile`, given the strength and the model's optimizer.
        strength: What its strength means, "factor" or "rate"; empty where it has none.
        hard: Whether the members stay equal.
        shared: Whether the layers of a group are one object from the start.
        summed: Whether a group is updated once, from the sum of its members' gradients.
        entrywise: Whether it treats each entry of the members by itself, so that columns of kernels do not mix.
        thorough: Whether only full runs measure it.
    """

    label: str
    color: str
    attach: Attach
    strength: str = ""
    hard: bool = False
    shared: bool = False
    summed: bool = False
    entrywise: bool = True
    thorough: bool = False

    @property
    def by_hand(self) -> bool:
        """Whether people write it today, without `equalize`."""
        return self.color == colors.PINK

    def layers(self, build: Callable[[], keras.layers.Layer], count: int) -> list[keras.layers.Layer]:
        """The layers of one group: `count` of them, or one of them `count` times."""
        return [build()] * count if self.shared else [build() for _ in range(count)]


def _leave(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    return Tied(optimizer)


def _tie(groups: Groups, make_rule: Callable[[], Any]) -> equalize.GroupRegistry:
    registry = equalize.GroupRegistry()
    for name, members in groups.items():
        registry.tie(name, list(members), make_rule())
    return registry


def _rule(make_rule: Callable[[float], Any]) -> Attach:
    """Ties with a rule of `equalize`. The variables then hold the rule, so the registry may go."""

    def attach(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
        _tie(groups, lambda: make_rule(strength))
        return Tied(optimizer)

    return attach


def _exact(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    return Tied(equalize.optimizers.TiedOptimizer(optimizer, _tie(groups, equalize.constraints.Equal)))


class _Member(NamedTuple):
    """A variable and how it shows the common value, for the ways that do all by hand."""

    variable: keras.Variable
    view: views.View | None

    def pull(self) -> Any:
        """The common value that the variable shows."""
        value = ops.convert_to_tensor(self.variable.value)
        return value if self.view is None else self.view.least_squares(value)

    def assign(self, common: Any) -> None:
        """Lets the variable show a common value."""
        self.variable.assign(common if self.view is None else self.view.forward(common))


def _members(groups: Groups) -> list[list[_Member]]:
    """The variables to tie, group by group and weight by weight."""
    found = []
    for given in groups.values():
        if isinstance(given[0], keras.layers.Layer):
            weights = zip(*(layer.trainable_variables for layer in given), strict=True)
            found += [[_Member(variable, None) for variable in variables] for variables in weights]
        else:
            found.append([_Member(*item) if isinstance(item, tuple) else _Member(item, None) for item in given])
    return found


def _start_equal(members: Sequence[_Member]) -> None:
    for member in members[1:]:
        member.assign(ops.copy(members[0].pull()))


class _StackedMean(keras.constraints.Constraint):
    """By hand: every call stacks all members, averages them and writes them, n times a step."""

    def __init__(self, members: Sequence[_Member], own: _Member):
        self._members = members
        self._own = own

    def __call__(self, w: Any) -> Any:
        mean = ops.mean(ops.stack([member.pull() for member in self._members]), axis=0)
        for member in self._members:
            member.assign(mean)
        return ops.convert_to_tensor(self._own.variable.value)


def _stack(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    for members in _members(groups):
        _start_equal(members)
        for member in members:
            member.variable.constraint = _StackedMean(members, member)
    return Tied(optimizer)


class _AverageAfterBatch(keras.callbacks.Callback):
    """By hand: fetch the members after every batch, average in NumPy, and set them."""

    def __init__(self, groups: Sequence[Sequence[_Member]]):
        super().__init__()
        self._groups = groups

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if keras.backend.backend() == "jax" and self.model is not None:
            self.model.jax_state_sync()
        for members in self._groups:
            mean = np.mean([ops.convert_to_numpy(member.pull()) for member in members], axis=0)
            for member in members:
                member.assign(mean)


def _callback(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    members = _members(groups)
    for group in members:
        _start_equal(group)
    return Tied(optimizer, [_AverageAfterBatch(members)])


class _AllPairs(keras.regularizers.Regularizer):
    """By hand: the squared distance of every pair, n·(n − 1)/2 of them, in the loss once."""

    def __init__(self, members: Sequence[_Member], factor: float):
        self._members = members
        self._factor = factor

    def __call__(self, x: Any) -> Any:
        pairs = itertools.combinations([member.pull() for member in self._members], 2)
        return self._factor * sum(ops.sum(ops.square(left - right)) for left, right in pairs)


def _all_pairs(groups: Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> Tied:
    for members in _members(groups):
        members[0].variable.regularizer = _AllPairs(members, strength)
    return Tied(optimizer)


def _penalty(rule: Any, **settings: Any) -> Way:
    """The way to tie with a regularizer of `equalize`."""
    attach = _rule(lambda factor: rule(factor=factor))
    return Way(f"soft: {rule.__name__}", colors.BLUE, attach, strength="factor", **settings)


_PARTIAL = _rule(lambda rate: equalize.constraints.Equal(rate=rate))
_HARD = _rule(lambda strength: equalize.constraints.Equal())

WAYS: dict[str, Way] = {
    "untied": Way("untied", colors.BLACK, _leave),
    "reference": Way("one shared variable", colors.SKY, _leave, hard=True, shared=True, summed=True),
    "exact": Way("exact: TiedOptimizer", colors.ORANGE, _exact, hard=True, summed=True),
    "hard": Way("hard: Equal", colors.VERMILLION, _HARD, hard=True),
    "partial": Way("partial: Equal(rate)", colors.GREEN, _PARTIAL, strength="rate"),
    "mean_l2": _penalty(equalize.regularizers.MeanL2),
    "pairwise_l2": _penalty(equalize.regularizers.PairwiseL2, thorough=True),
    "pairwise_l1": _penalty(equalize.regularizers.PairwiseL1, thorough=True),
    "pairwise_norm": _penalty(equalize.regularizers.PairwiseNorm, thorough=True, entrywise=False),
    "chain_l2": _penalty(equalize.regularizers.ChainL2, thorough=True),
    "trace_norm": _penalty(equalize.regularizers.TraceNorm, thorough=True, entrywise=False),
    "stack": Way("hand-written: stacked mean", colors.PINK, _stack, hard=True),
    "callback": Way("hand-written: set_weights", colors.PINK, _callback, hard=True),
    "all_pairs": Way("hand-written: all pairs", colors.PINK, _all_pairs, strength="factor"),
}


def configurations(grids: Mapping[str, Sequence[float]], options: Options) -> list[dict[str, Any]]:
    """The cases of a quality task: every way, those with a strength once for each of its grid.

    A quick run takes every second strength of each grid, and leaves out the thorough ways and those by hand, which differ
    from `equalize` in what they cost. A smoke run takes only one strength.
    """
    cases = []
    for name, way in WAYS.items():
        grid = grids[way.strength] if way.strength else (0.0,)
        grid = options.choose(grid[:1], grid[::2], grid)
        if options.size == "full" or not (way.thorough or way.by_hand):
            cases += [{"way": name, "strength": strength} for strength in grid]
    return cases


def spread(groups: Groups) -> float:
    """The largest entry of max − min over the members: 0.0 where they are equal."""
    values = [[ops.convert_to_numpy(member.pull()) for member in members] for members in _members(groups)]
    return max(float(np.ptp(np.stack(members), axis=0).max()) for members in values)


def free_weights(model: keras.Model, groups: Groups, way: Way) -> int:
    """How many numbers are trained; those of the members of a hard group count once."""
    copies = sum(np.prod(member.variable.shape) for members in _members(groups) for member in members[1:])
    repeated = copies if way.hard and not way.shared else 0
    return int(sum(np.prod(variable.shape) for variable in model.trainable_variables) - repeated)
