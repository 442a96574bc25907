"""Shared updates: an optimizer updates one member of a group in place of all, and the others take its value."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import keras
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._ties.member import Member
from equalize._ties.tied_group import TiedGroup


@dataclass(frozen=True)
class SharedUpdate:
    """A hard group in one optimizer.

    Attributes:
        group: The group.
        moving: The members that may move and that the optimizer trains, by their index among its variables.
        leader: The index of the member that is updated for all; None where an anchor holds the group.
    """

    group: TiedGroup
    moving: Mapping[int, Member]
    leader: int | None

    @property
    def updated(self) -> set[int]:
        """The indices that are updated: the leader's, and those of members that a view leaves free entries in."""
        return {index for index, member in self.moving.items() if index == self.leader or not member.whole}

    def reduced(self, gradients: Mapping[int, Tensor | None], reduction: str) -> dict[int, Tensor | None]:
        """From the members' gradients, by index, those of what is updated.

        The leader gets the gradient of the common value, Σ Vᵢᵀ(gᵢ), as its own view shows it; for `reduction="mean"`
        divided by the number of members that may move. The others' free entries keep their gradients.
        """
        given = {index: gradients[index] for index in self.moving if gradients.get(index) is not None}
        if not given:
            if self.leader is None or gradients.keys().isdisjoint(self.moving):
                return {}
            return {self.leader: None}
        total = backend.add_gradients([self.moving[index].adjoint(gradient) for index, gradient in given.items()])
        if reduction == "mean":
            total = backend.scale_gradient(total, 1.0 / len(self.moving))
        return {
            index: self.moving[index].apply_gradient(
                total if index == self.leader else ops.zeros_like(total), given.get(index)
            )
            for index in self.updated
            if index == self.leader or index in given
        }

    def follow(self) -> None:
        """Gives all members what the leader has become, or the anchor is."""
        if self.leader is None:
            self.group.project()
        else:
            self.group.follow(self.moving[self.leader])


def shared_updates(groups: Iterable[TiedGroup], variables: Sequence[keras.Variable]) -> list[SharedUpdate]:
    """The hard groups that have members among the variables."""
    indices = {id(variable): index for index, variable in enumerate(variables)}
    found = []
    for group in groups:
        members = group.members if group.hard else ()
        moving = {indices[id(m.variable)]: m for m in members if not m.anchor and id(m.variable) in indices}
        if moving:
            held = any(member.anchor for member in members)
            found.append(SharedUpdate(group, moving, None if held else _leader(moving)))
    return found


def updated_indices(updates: Iterable[SharedUpdate], count: int) -> list[int]:
    """The indices of what is updated, of `count` variables: all that is not tied, and for each group its part."""
    tied = {index for update in updates for index in update.moving}
    kept = {index for update in updates for index in update.updated}
    return [index for index in range(count) if index in kept or index not in tied]


@contextlib.contextmanager
def underway(updates: Iterable[SharedUpdate]) -> Iterator[None]:
    """While leaders are updated: Keras's calls of the groups' constraints project nothing."""
    with contextlib.ExitStack() as stack:
        for update in updates:
            stack.enter_context(update.group.shared_update())
        yield


def _leader(moving: Mapping[int, Member]) -> int:
    """The first, unless its view leaves entries free, rounds, or is at all, where another's does not."""

    def detours(index: int) -> tuple[bool, bool, bool, int]:
        member = moving[index]
        return not member.whole, not member.lossless, member.view is not None, index

    return min(moving, key=detours)
