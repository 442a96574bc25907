"""Shared updates: an optimizer updates one member of a group in place of all, and the others take its value."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._math import means
from equalize._ties.bound import leads
from equalize._ties.member import Member
from equalize._ties.tied_group import TiedGroup, by_tie

_NONE: Mapping[int, int] = {}


@dataclass(frozen=True)
class SharedUpdate:
    """A hard group in one optimizer.

    Attributes:
        group: The group.
        moving: The members that may move and that the optimizer trains, each with the index of its variable. A variable
            may be in it several times, by parts.
        uses: The place of each of them among all members of the group.
        leader: The place in `moving` of the member that is updated for all; None where an anchor holds the group.
    """

    group: TiedGroup
    moving: Sequence[tuple[int, Member]]
    uses: Sequence[int]
    leader: int | None

    def pulled(self, gradients: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
        """What each member's gradient is for the common value, Vᵢᵀ(gᵢ), by the member's place in the group."""
        given = zip(self.uses, self.moving, strict=True)
        return {use: m.adjoint(gradients[i]) for use, (i, m) in given if gradients.get(i) is not None}

    def reduce(self, total: Tensor | None, reduced: dict[int, Tensor | None], updated: set[int]) -> None:
        """Replaces the gradients of members by those of what is updated.

        The leader gets the gradient of the common value, as its own view shows it. Of the others none is left, and
        what is free keeps its own.

        Args:
            total: The gradient of the common value.
            reduced: The gradients of what is updated, by the indices of variables, which are changed.
            updated: The indices of what is updated.
        """
        for place, (i, member) in enumerate(self.moving):
            value, own = total if place == self.leader else None, reduced.get(i)
            if i in updated and not (value is None and own is None):
                reduced[i] = member.apply_gradient(_zeros(member, own) if value is None else value, own)

    @property
    def led_by(self) -> Member | None:
        """The member that is updated for all."""
        return None if self.leader is None else self.moving[self.leader][1]

    @property
    def copies(self) -> list[Member]:
        """The members that take the value of the leader, and have no update of their own."""
        return [member for place, (_, member) in enumerate(self.moving) if place != self.leader]

    def follow(self) -> None:
        """Gives all members what the leader has become, or the anchor is."""
        if self.led_by is None:
            self.group.project()
        else:
            self.group.follow(self.led_by)


def _zeros(member: Member, gradient: Tensor) -> Tensor:
    return ops.zeros(member.common_shape, backend.dtype(gradient))


def reduced_gradients(
    updates: Sequence[SharedUpdate], gradients: Mapping[int, Tensor | None], count: int, reduction: Any
) -> dict[int, Tensor | None]:
    """From the gradients of variables those of what is updated, in the order of the variables.

    Args:
        updates: The shared updates.
        gradients: Gradients, by the indices of their variables.
        count: How many variables there are.
        reduction: `"sum"`; or `"mean"`, divided by the number of members that may move; or a function from a group of
            the tie and the Gram matrix of its uses to their weights, or to one of these words.
    """
    kept = set(updated_indices(updates, count))
    reduced = {index: gradient for index, gradient in gradients.items() if index in kept}
    of_group = {id(update.group): update for update in updates}
    for groups in by_tie([update.group for update in updates]):
        tie = [of_group[id(group)] for group in groups]
        pulled = [update.pulled(gradients) for update in tie]
        weighed = reduction if isinstance(reduction, str) else _weighed(groups[0], pulled, reduction)
        for update, of_uses, total in zip(tie, pulled, _totals(pulled, weighed), strict=True):
            if weighed == "mean" and of_uses:
                total = backend.scale_gradient(total, 1.0 / len(update.moving))
            update.reduce(total, reduced, kept)
    return dict(sorted(reduced.items()))


Weighed: TypeAlias = "str | dict[int, Tensor]"
"""How the gradients of a tie are reduced: `"sum"`, `"mean"`, or by a weight for each use."""


def _totals(pulled: Sequence[Mapping[int, Tensor]], weighed: Weighed) -> Iterator[Tensor | None]:
    """For each group of a tie the sum of the gradients of its uses, weighed where there are weights."""
    for of_uses in pulled:
        gradients = list(of_uses.values())
        if not gradients or isinstance(weighed, str):
            yield backend.add_gradients(gradients) if gradients else None
        else:
            weights = [ops.cast(weighed[use], backend.dtype(gradients[0])) for use in of_uses]
            yield backend.weighted_gradients(gradients, weights)


def _weighed(group: TiedGroup, pulled: list[dict[int, Tensor]], weigh: Callable[..., Tensor | str]) -> Weighed:
    """Weighs the gradients of one tie's uses, by those of all its groups."""
    uses = sorted({use for of_uses in pulled for use in of_uses})
    if not uses:
        return "sum"
    together = [backend.over_replicas(list(of_uses.values())) for of_uses in pulled]
    gramian = sum(_gramian(uses, of_uses, whole) for of_uses, (whole, _) in zip(pulled, together, strict=True))
    weights = weigh(group, gramian)
    if isinstance(weights, str):
        return weights
    for of_uses, (whole, _) in zip(pulled, together, strict=True):
        of_uses.update(zip(of_uses, whole, strict=True))
    # The inner optimizer adds up over replicas what is a sum over them already.
    return {use: weights[place] / together[0][1] for place, use in enumerate(uses)}


def _gramian(uses: Sequence[int], given: Iterable[int], gradients: Sequence[Tensor]) -> Tensor:
    """The inner products of the gradients of uses in one group, where a missing gradient counts as zero."""
    if not gradients:
        return 0.0
    dense = [means.widen(gradient) for gradient in backend.dense_gradients(gradients)]
    gramian = ops.cast(backend.inner_products(dense), "float32")
    places = [uses.index(use) for use in given]
    if len(places) == len(uses):
        return gramian
    chosen = ops.convert_to_tensor(np.eye(len(uses), dtype="float32")[places])
    return backend.product(ops.transpose(chosen), backend.product(gramian, chosen))


def shared_updates(
    groups: Iterable[TiedGroup], variables: Sequence[keras.Variable], leaders: Mapping[int, int] = _NONE
) -> list[SharedUpdate]:
    """The hard groups that have members among the variables.

    Args:
        groups: Groups.
        variables: Variables.
        leaders: The index of the leader that a group has had, by its id, which remains while it may move.
    """
    return updates_of([group for group in groups if group.hard], variables, leaders)


def updates_of(
    groups: Iterable[TiedGroup], variables: Sequence[keras.Variable], leaders: Mapping[int, int] = _NONE
) -> list[SharedUpdate]:
    """The same of all groups, as they are or will be if they are made hard."""
    indices = {id(variable): index for index, variable in enumerate(variables)}
    found = []
    for group in groups:
        members = group.members
        uses = [use for use, m in enumerate(members) if not m.anchor and id(m.variable) in indices]
        moving = [(indices[id(members[use].variable)], members[use]) for use in uses]
        if moving:
            held = any(member.anchor for member in members)
            found.append(SharedUpdate(group, moving, uses, None if held else _leader(moving, leaders.get(id(group)))))
    return found


def updated_indices(updates: Iterable[SharedUpdate], count: int) -> list[int]:
    """The indices of what is updated, of `count` variables: what is not tied, or in part, and what leads a group."""
    parts: dict[int, list[Member]] = {}
    leaders = set()
    for update in updates:
        for index, member in update.moving:
            parts.setdefault(index, []).append(member)
        if update.leader is not None:
            leaders.add(update.moving[update.leader][0])
    return [index for index in range(count) if index in leaders or index not in parts or _leaves_free(parts[index])]


def _leaves_free(parts: Sequence[Member]) -> bool:
    """Whether members that are parts of one variable, which do not overlap, leave entries of it free."""
    return not parts[0].whole and sum(member.entries for member in parts) < math.prod(parts[0].variable.shape)


@contextlib.contextmanager
def underway(updates: Iterable[SharedUpdate]) -> Iterator[None]:
    """While leaders are updated: Keras's calls of the groups' constraints project nothing."""
    with contextlib.ExitStack() as stack:
        for update in updates:
            stack.enter_context(update.group.shared_update())
        yield


def _leader(moving: Sequence[tuple[int, Member]], before: int | None) -> int:
    """One that others follow, since they do when it is updated; else the first of the widest dtype.

    Unless its view leaves entries free, rounds, or is at all, where another's does not.
    """

    def detours(place: int) -> tuple[Any, ...]:
        member = moving[place][1]
        followed = leads(member.variable)
        narrow = member.common_dtype is not None
        known = before is not None and moving[place][0] == before  # which has the slots
        return not known, not followed, narrow, not member.whole, not member.lossless, member.view is not None, place

    return min(range(len(moving)), key=detours)
