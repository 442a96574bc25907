"""Groups, as their users see them."""

import abc
from typing import Any

from equalize._backend import Tensor
from equalize._inputs.arguments import counted
from equalize._ties.member import Member


class Group(abc.ABC):
    """Variables that a rule ties, in the order in which they were found or given.

    Made by `GroupRegistry.link` and `GroupRegistry.tie`, and read from the registry: `registry["towers"]`.

    Attributes:
        name: The group's name.

    Example:
    >>> import keras, equalize
    >>> first, second = keras.layers.Dense(4), keras.layers.Dense(4)
    >>> model = keras.Sequential([keras.Input((4,)), first, second])
    >>> group = equalize.GroupRegistry().tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
    >>> group.name, group.hard, len(group.members), group.spread(), tuple(group.value.shape)
    ('pair', True, 2, 0.0, (4, 4))
    """

    name: str

    @property
    @abc.abstractmethod
    def members(self) -> tuple[Member, ...]:
        """The members whose variables still exist."""

    @property
    @abc.abstractmethod
    def rule(self) -> Any:
        """The rule, for instance `equalize.constraints.Equal()`, or None for a free group.

        `GroupRegistry.replace` gives the group another.
        """

    @property
    @abc.abstractmethod
    def tying(self) -> Any:
        """The rule, which says of a free group that it does not tie."""

    @property
    @abc.abstractmethod
    def inner(self) -> Any:
        """The constraint that the common value obeys as well: the rule's `inner`, or what the variables had."""

    @property
    @abc.abstractmethod
    def value(self) -> Tensor:
        """The common value: that of the anchors where there are any, else the mean of the members.

        Raises:
            EqualizeError: The members are of unlike shapes, which have none.
        """

    @abc.abstractmethod
    def spread(self) -> float:
        """The largest entry of max − min over the members as their views pull them back.

        For a custom `GroupConstraint`: the largest change of an entry by its projection.

        Returns:
            0.0 where the members are equal: where each shows, bit for bit, what one common value would give it; or
            where a custom projection changes no entry by more than rounding, 8 units in the last place of the largest.
            Infinite where one member alone is not a number.
        """

    @property
    def hard(self) -> bool:
        """Whether the members are bitwise equal after every optimizer step."""
        return self.tying.hard

    @property
    def projects(self) -> bool:
        """Whether the rule is a projection (hard, partial or custom) and not a penalty."""
        return self.tying.slot == "constraint"

    @property
    def penalizes(self) -> bool:
        """Whether the rule is a penalty in the loss."""
        return self.tying.slot == "regularizer"

    def describe(self) -> str:
        """The rule as one would write it, with the constraint inside."""
        return self.tying.having(inner=self.inner).describe()

    def __repr__(self) -> str:
        return f"<Group {self.name!r}: {self.describe()}, {counted(len(self.members), 'member')}>"
