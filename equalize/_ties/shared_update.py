"""Shared updates: an optimizer updates one member of a group in place of all, and the others take its value."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._ties.bound import leads
from equalize._ties.member import Member
from equalize._ties.tied_group import TiedGroup

_NONE: Mapping[int, int] = {}


@dataclass(frozen=True)
class SharedUpdate:
    """A hard group in one optimizer.

    Attributes:
        group: The group.
        moving: The members that may move and that the optimizer trains, each with the index of its variable. A variable
            may be in it several times, by parts.
        leader: The place in `moving` of the member that is updated for all; None where an anchor holds the group.
    """

    group: TiedGroup
    moving: Sequence[tuple[int, Member]]
    leader: int | None

    def reduced(
        self, gradients: Mapping[int, Tensor | None], reduced: dict[int, Tensor | None], updated: set[int], how: str
    ) -> None:
        """Replaces the gradients of members by those of what is updated.

        The leader gets the gradient of the common value, Σ Vᵢᵀ(gᵢ), as its own view shows it; for `how="mean"` divided
        by the number of members that may move. Of the others none is left, and what is free keeps its own.

        Args:
            gradients: The gradients of all variables, by their indices.
            reduced: The gradients of what is updated, which are changed.
            updated: The indices of what is updated.
            how: The reduction.
        """
        given = [(i, member) for i, member in self.moving if gradients.get(i) is not None]
        total = backend.add_gradients([member.adjoint(gradients[i]) for i, member in given]) if given else None
        if how == "mean" and total is not None:
            total = backend.scale_gradient(total, 1.0 / len(self.moving))
        for place, (i, member) in enumerate(self.moving):
            value, own = total if place == self.leader else None, reduced.get(i)
            if i in updated and not (value is None and own is None):
                reduced[i] = member.apply_gradient(_zeros(member, own) if value is None else value, own)

    @property
    def copies(self) -> list[Member]:
        """The members that take the value of the leader, and have no update of their own."""
        return [member for place, (_, member) in enumerate(self.moving) if place != self.leader]

    def follow(self) -> None:
        """Gives all members what the leader has become, or the anchor is."""
        if self.leader is None:
            self.group.project()
        else:
            self.group.follow(self.moving[self.leader][1])


def _zeros(member: Member, gradient: Tensor) -> Tensor:
    return ops.zeros(member.common_shape, backend.dtype(gradient))


def reduced_gradients(
    updates: Sequence[SharedUpdate], gradients: Mapping[int, Tensor | None], count: int, how: str
) -> dict[int, Tensor | None]:
    """From the gradients of `count` variables, by index, those of what is updated, in the order of the variables."""
    kept = set(updated_indices(updates, count))
    reduced = {index: gradient for index, gradient in gradients.items() if index in kept}
    for update in updates:
        update.reduced(gradients, reduced, kept, how)
    return dict(sorted(reduced.items()))


def shared_updates(
    groups: Iterable[TiedGroup], variables: Sequence[keras.Variable], leaders: Mapping[int, int] = _NONE
) -> list[SharedUpdate]:
    """The hard groups that have members among the variables.

    Args:
        groups: Groups.
        variables: Variables.
        leaders: The index of the leader that a group has had, by its id, which remains while it may move.
    """
    indices = {id(variable): index for index, variable in enumerate(variables)}
    found = []
    for group in groups:
        members = group.members if group.hard else ()
        moving = [(indices[id(m.variable)], m) for m in members if not m.anchor and id(m.variable) in indices]
        if moving:
            held = any(member.anchor for member in members)
            found.append(SharedUpdate(group, moving, None if held else _leader(moving, leaders.get(id(group)))))
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
