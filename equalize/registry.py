"""The registry: the groups of a model by name, and everything one does with them."""

import copy
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from equalize import arguments, backend, binding, discovery, persistence, planning, retracing
from equalize.arguments import received
from equalize.errors import EqualizeError
from equalize.groups import Group
from equalize.inspection import Inspection
from equalize.projections import Tensor
from equalize.rules import Rule

_INITIAL = ("first", "mean", "strict")


@keras.saving.register_keras_serializable(package="equalize")
class GroupRegistry(Inspection):
    """Links the variables of a model into groups that are kept equal, or close, while the model trains.

    A constraint or a regularizer is called for one variable and knows of no other. The registry is where the others
    come from: `link` finds the rules that were given to layers, `tie` ties what is already built. After that the
    model trains with plain Keras; the registry need not be kept, but with it one can look, check and untie.

    It is a mapping from a group's name to the `equalize.Group`. It holds variables weakly: when a model is deleted,
    its groups are gone.

    Attributes:
        monitors: The `equalize.callbacks.TieMonitor`s that look after the groups, as long as they exist.

    Example:
    >>> import keras, equalize
    >>> first, second = keras.layers.Dense(4), keras.layers.Dense(4)
    >>> model = keras.Sequential([keras.Input((4,)), first, second])
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("layers", [first.kernel, second.kernel], equalize.constraints.Equal())
    >>> equalize_report = registry.check()  # raises if they are not equal
    >>> list(registry), group.hard, group.spread()
    (['layers'], True, 0.0)
    """

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        self._pending: list[dict[str, Any]] = []
        self._models: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self.monitors: weakref.WeakSet[Any] = weakref.WeakSet()

    def link(self, *models: keras.Model, initial: str = "first") -> "GroupRegistry":
        """Finds the rules in built models, checks the groups that they name, and makes hard groups equal.

        Nothing is changed before everything is checked. Linking a model again changes nothing. A registry made by
        `from_config` also ties what its config says, by the places of variables in the tree of layers.

        Args:
            *models: Built models (or layers). Give several in one call where one group spans models that are
                trained apart.
            initial: What hard groups become: `"first"` (the value of the first member, in the order of the model's
                weights), `"mean"`, or `"strict"` (raise unless they are equal). The mean of n independent random
                initial values has 1/√n of their standard deviation, so it suits trained weights only. Members that
                are not trainable prevail over all three. Soft groups are left as they are.

        Returns:
            The registry itself.

        Raises:
            NotLinkedError: No rule was found, or a model is not built.
            GroupMismatchError: A group has one member; shapes, dtypes or rules disagree; a variable is in two hard
                groups; a group of this name belongs to another model; two frozen members differ.
            TieBrokenError: `initial="strict"` and the members of a hard group are not equal.
        """
        arguments.option("initial", initial, _INITIAL)
        _require_values("link")
        return self._link(models, initial)

    def _link(self, models: Sequence[keras.Layer], initial: str = "first") -> "GroupRegistry":
        """Links models as `link` does; their variables must have values, also where Keras infers shapes at the time."""
        restored = planning.restore(self, self._pending, models, initial)
        found = discovery.find_groups(models, ruleless=bool(restored))
        known = dict(self)
        new: list[planning.Plan] = []
        adopted: dict[str, Group] = {}
        outgrown: list[Group] = []
        for name, entries in found.items():
            existing = discovery.existing_group(name, entries, known.get(name))
            if existing is not None and all(rule.bound_group is existing for _, rule in entries):
                adopted[name] = existing
                continue
            if existing is not None:
                outgrown.append(existing)
            new.append(planning.plan_declared(name, entries, [*known, *found], initial))
        plans = [*new, *restored]  # what layers declare goes inside of what was tied on top
        planning.require_apart(plans)
        planning.warn_of_overwriting(plans, initial, stacklevel=4)
        for group in outgrown:
            binding.detach(group)
        for plan in plans:
            self._add(plan.establish(initial))
        self._pending = []
        self._groups.update(adopted)
        self._models.update(models)
        retracing.retrace(_variables(plan.group for plan in plans))
        return self

    def tie(self, name: str, members: Sequence[Any], rule: Rule, *, initial: str = "first") -> Group | list[Group]:
        """Ties variables, or layers weight by weight, that are already built.

        What is on a variable already goes on: its constraint becomes the rule's `inner`, its regularizer is still
        added.

        A tie made here is in no layer's config, so a copy of the model does not have it: one that is cloned, pickled,
        or saved and loaded trains untied, and nothing can notice. Tie the copy before you train it:
        `GroupRegistry.from_config(registry.get_config()).link(copy)`. Two kinds of ties do travel: those that layers
        declare (`kernel_constraint=Equal("towers")`), whose copies raise `NotLinkedError` until they are linked, and
        those of a `TiedOptimizer`, which is saved with the model and has its registry; its copy links itself.

        Members that have been trained, and differ, lose that with `initial="first"`: a `UserWarning` says so.

        Args:
            name: Name of the group; with layers, the groups are named `name/place of the weight in the layer`.
            members: Variables and constant arrays, each alone or as a pair with its view
                (`(decoder.kernel, equalize.views.Transpose())`), or layers (models, nested blocks) of one structure.
            rule: `equalize.constraints.Equal()` or a regularizer of `equalize.regularizers`, without a group name.
            initial: As in `link`.

        Returns:
            The `equalize.Group`, or the list of them where layers were given.

        Raises:
            GroupMismatchError: The name is taken; there are fewer than two members; shapes, dtypes, structures or
                constraints differ; a variable is in another hard group; two members that do not move differ.
            NotLinkedError: A layer is not built.
            TieBrokenError: `initial="strict"` and the members of a hard group are not equal.
            TypeError: A member is neither a variable, a layer nor an array, or the rule is no rule.
        """
        arguments.option("initial", initial, _INITIAL)
        _require_values("tie")
        discovery.require_rule(name, rule)
        by_group, layers = discovery.members_of(name, members)
        planned = []
        for group_name, group_members in by_group.items():
            for member in group_members:
                member.weight = rule.weight
                member.view = member.view or rule.view
            planned.append(planning.plan(self, group_name, group_members, rule, initial))
        planning.require_apart(planned)
        planning.warn_of_overwriting(planned, initial, stacklevel=3)
        groups = [self._add(plan.establish(initial)) for plan in planned]
        self._pending = [entry for entry in self._pending if not _within(entry["name"], name)]
        retracing.retrace(_variables(groups))
        return groups if layers else groups[0]

    def untie(self, *names: str) -> None:
        """Dissolves groups, all where none is named; the variables keep their values, and their inner rules.

        What was untied is plain Keras again, config included: layers that declare the rule are left with what it had
        inside, so the model saves without a word of `equalize` and loads where `equalize` is not installed. A
        `TiedOptimizer` is no part of that: compile with another optimizer.

        Args:
            *names: Names of groups, or of ties of layers: `untie("blocks")` dissolves every `blocks/...`.

        Raises:
            EqualizeError: There is no such group.
            TypeError: A name is no string.
        """
        groups = self.select(names)
        binding.undeclare(groups)
        for group in groups:
            binding.detach(group)
            del self._groups[group.name]
        retracing.retrace(_variables(groups))

    def sync(self, method: str = "first", *names: str) -> None:
        """Makes the named groups equal, soft ones too; without names, every hard group.

        Args:
            method: `"first"` (the value of the first member) or `"mean"`. Members that do not move prevail.
            *names: Names of groups, or of ties of layers.
        """
        arguments.option("method", method, ("first", "mean"))
        groups = self.select(names)
        for group in groups:
            group.require_anchors_agree()
        for group in groups:
            if names or group.hard:
                group.sync(method)

    def penalty(self, *names: str) -> Tensor:
        """The sum of the penalties of the named soft groups, or of all, for a loss written by hand.

        Use it instead of `model.losses`, not beside it: those hold the same penalties, in shares.

        Returns:
            A scalar tensor, differentiable in every trainable member, in the widest of the groups' dtypes and at least
            float32. Without soft groups it is 0 in `keras.config.floatx()`.
        """
        groups = [group for group in self.select(names) if not group.projects or names]
        for group in groups:
            if group.projects:
                raise EqualizeError(
                    f"Group '{group.name}' has no penalty: its rule is {group.rule.describe()}, a projection. "
                    "Expected: names of groups tied by a regularizer."
                )
        penalties = [group.penalty() for group in groups]
        return functools.reduce(ops.add, penalties) if penalties else ops.zeros(())

    def project(self, *names: str) -> None:
        """Projects the named groups, or all, once and now: for a loop whose optimizer knows no constraints.

        Call it after each step of a `torch.optim` or `optax` optimizer. Keras's own optimizers do it by themselves.
        """
        groups = self.select(names)
        for group in groups:
            if names and not group.projects:
                raise EqualizeError(
                    f"Group '{group.name}' cannot be projected: its rule is {group.rule.describe()}, a penalty. "
                    "Expected: names of groups tied by `equalize.constraints.Equal`."
                )
        for group in groups:
            if group.projects:
                group.project()

    def select(self, names: Sequence[str]) -> list[Group]:
        """The groups of these names, or those of a tie of layers that has the name; all without a name.

        Raises:
            EqualizeError: There is no such group.
            TypeError: A name is no string.
        """
        names = arguments.names("names", names)
        selected = {} if names else dict(self)
        for name in names:
            below = {key: group for key, group in self.items() if _within(key, name)}
            below = {name: self[name]} if name in self else below
            if not below:
                raise EqualizeError(_unknown(name, self))
            selected |= below
        return list(selected.values())

    def get_config(self) -> dict[str, Any]:
        """The ties made with `tie`, as JSON-serializable data: rules, places of variables, views and constants.

        A variable is known by its place in the tree of layers of each living model that holds it, since names and
        paths are neither unique nor stable. Ties that layers carry in their own configs are not repeated here.
        """
        made = persistence.group_configs([group for group in self.values() if not group.declared])
        return {"groups": made + copy.deepcopy(self._pending)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GroupRegistry":
        """A registry with the ties of a config, which `link(model)` makes for a model of the same structure.

        Raises:
            EqualizeError: The config is truncated, or was changed into something else.
        """
        registry = cls()
        registry._pending = persistence.checked_config(config)
        return registry

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupRegistry.from_config, (self.get_config(),)

    def __getitem__(self, name: str) -> Group:
        if name not in self:
            raise KeyError(_unknown(name, self))
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._groups if name in self])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        group = self._groups.get(name)  # type: ignore[arg-type]
        return group is not None and any(not member.constant for member in group.members)

    def _add(self, group: Group) -> Group:
        self._groups[group.name] = group
        return group


def checked_registry(registry: Any) -> GroupRegistry:
    """The argument `registry` of callbacks and optimizers."""
    if not isinstance(registry, GroupRegistry):
        raise TypeError(f"`registry` must be an `equalize.GroupRegistry`. Received: {received(registry)}.")
    return registry


def _variables(groups: Iterable[Group]) -> list[keras.Variable]:
    return [member.variable for group in groups for member in group.members]


def _require_values(call: str) -> None:
    """Raises where variables have no values, as in the `build` of a subclassed model that Keras calls in `fit`."""
    if backend.computes_later():
        raise EqualizeError(
            f"`{call}` was called while Keras infers shapes or traces a step, where variables have no values. "
            f"Expected: a model that is built. Call `{call}` after `model.build(...)`, or after the first call on data."
        )


def _within(name: str, tie: str) -> bool:
    """Whether a group is the tie of this name, or one of those that a tie of layers made."""
    return name == tie or name.startswith(f"{tie}/")


def _unknown(name: str, known: Iterable[str]) -> str:
    names = list(known)
    fix = f"Expected one of: {names}." if names else "Expected: a name that was linked or tied; there is none yet."
    return f"There is no group {name!r}. {fix}"
