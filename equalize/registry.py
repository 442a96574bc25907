"""The registry: the groups of a model by name, and everything one does with them."""

import contextlib
import copy
import functools
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import rich.console
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._backend.living import holding, models_holding, retrace
from equalize._inputs import arguments
from equalize._inputs.arguments import received
from equalize._linking import discovery, planning
from equalize._linking.config import checked_config, group_configs
from equalize._reports import plots, summary
from equalize._reports.advice import Advice, advise
from equalize._reports.diagnosis import EQUALIZE, Finding, findings
from equalize._ties.bound import attach_statistics, detach
from equalize._ties.rules import Rule
from equalize._ties.tied_group import TiedGroup
from equalize.constraints import Equal
from equalize.errors import EqualizeError, TieBrokenError
from equalize.sharing import replacement_of

__all__ = ["Advice", "Finding", "GroupRegistry"]

_INITIAL = ("first", "mean", "strict")


@keras.saving.register_keras_serializable(package="equalize")
class GroupRegistry(Mapping[str, TiedGroup]):
    """Links the variables of a model into groups that are kept equal, or close, while the model trains.

    Keras calls a constraint or a regularizer for one variable, which knows of no other. The registry brings the others
    in: `link` finds the rules that layers declare, and `tie` ties what is already built. After that the model trains
    with plain Keras. You need not keep the registry, but you need it to look at ties, check them and untie them.

    A registry is a mapping from a group's name to the `equalize.Group`. It holds variables weakly: when a model is
    deleted, its groups are gone.

    Attributes:
        monitors: The living `equalize.callbacks.TieMonitor`s of the groups.
        optimizers: The living `equalize.optimizers.TiedOptimizer`s that train the groups.

    Example:
    >>> import keras, equalize
    >>> first, second = keras.layers.Dense(4), keras.layers.Dense(4)
    >>> model = keras.Sequential([keras.Input((4,)), first, second])
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("layers", [first.kernel, second.kernel], equalize.constraints.Equal())
    >>> registry.check()  # raises if they are not equal
    >>> list(registry), group.hard, group.spread()
    (['layers'], True, 0.0)
    """

    def __init__(self) -> None:
        self._groups: dict[str, TiedGroup] = {}
        self._pending: list[dict[str, Any]] = []
        self._models: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self.monitors: weakref.WeakSet[Any] = weakref.WeakSet()
        self.optimizers: weakref.WeakSet[Any] = weakref.WeakSet()

    def link(self, *models: keras.Model, initial: str = "first") -> "GroupRegistry":
        """Finds the rules that layers declare, checks the groups that they name, and makes hard groups equal.

        It checks everything before it changes anything. Linking a model again changes nothing. A registry made by
        `from_config` also ties what its config says, by the places of variables in the tree of layers.

        Args:
            *models: Built models (or layers). Give several in one call if one group spans models that train apart.
            initial: What hard groups become: `"first"` (the value of the first member, in the order of the model's
                weights), `"mean"`, or `"strict"` (raise unless they are equal). The mean of n independent random
                initial values has 1/√n of their standard deviation, so `"mean"` suits trained weights only. A member
                that is not trainable prevails over all three. Soft groups stay as they are.

        Returns:
            The registry itself.

        Raises:
            NotLinkedError: No rule was found, or a model is not built.
            GroupMismatchError: A group has one member; shapes, dtypes or rules disagree; a variable is in two hard
                groups; a group of this name belongs to another model; two frozen members differ.
            TieBrokenError: `initial="strict"` and the members of a hard group are not equal.

        Example:
        >>> import keras, equalize
        >>> inputs = keras.Input((3,))
        >>> left = keras.layers.Dense(2, kernel_constraint=equalize.constraints.Equal("towers"))
        >>> right = keras.layers.Dense(2, kernel_constraint=equalize.constraints.Equal("towers"))
        >>> model = keras.Model(inputs, [left(inputs), right(inputs)])
        >>> registry = equalize.GroupRegistry().link(model)
        >>> list(registry), equalize.relation(left.kernel, right.kernel)
        (['towers'], 'equal')
        """
        arguments.option("initial", initial, _INITIAL)
        _require_values("link")
        return self._link(models, initial)

    def _link(self, models: Sequence[keras.Layer], initial: str = "first") -> "GroupRegistry":
        """Links models as `link` does; their variables must have values, also where Keras infers shapes at the time."""
        restored = planning.restore(self, self._pending, models, initial)
        found = discovery.find_groups(models, ruleless=bool(restored) or self._has_members_in(models))
        known = dict(self)
        new: list[planning.Plan] = []
        adopted: dict[str, TiedGroup] = {}
        outgrown: list[TiedGroup] = []
        for name, entries in found.items():
            existing = discovery.existing_group(name, entries, known.get(name))
            if existing is not None and all(group is existing for _, _, group in entries):
                adopted[name] = existing
                continue
            if existing is not None:
                outgrown.append(existing)
            new.append(planning.plan_declared(name, entries, [*known, *found], initial))
        plans = [*new, *restored]  # what layers declare goes inside of what was tied on top
        planning.require_apart(plans)
        planning.warn_of_overwriting(plans, initial, stacklevel=4)
        for group in outgrown:
            detach(group)
        for plan in plans:
            self._add(plan.establish(initial))
        self._keep_statistics()
        self._pending = []
        self._groups.update(adopted)
        self._models.update(models)
        retrace(_variables(plan.group for plan in plans))
        return self

    def tie(
        self,
        name: str,
        members: Sequence[Any],
        rule: Rule | None,
        *,
        initial: str = "first",
        statistics: bool = False,
        weights: Sequence[float] | None = None,
    ) -> TiedGroup | list[TiedGroup]:
        """Ties variables, or layers weight by weight, that are already built.

        What is on a variable already stays in force: its constraint becomes the rule's `inner`, and its regularizer is
        still added.

        No layer's config holds a tie made here. So a model that is cloned, pickled, or saved by Keras and loaded trains
        untied, and nothing can notice. Save with `equalize.saving.save_model`, whose files keep the ties, or tie the
        copy before you train it: `GroupRegistry.from_config(registry.get_config()).link(copy)`. Two kinds of ties
        travel by themselves: those that layers declare (`kernel_constraint=Equal("towers")`), whose copies raise
        `NotLinkedError` until they are linked, and those of a `TiedOptimizer`, whose copy links itself.

        With `initial="first"`, trained members that differ take the value of the first: a `UserWarning` says so.

        Args:
            name: Name of the group. With layers, the groups are named `name/place of the weight in the layer`.
            members: Variables and constant arrays, each alone or as a pair with its view
                (`(decoder.kernel, equalize.views.Transpose())`), or layers (models, nested blocks) of one structure.
            rule: `equalize.constraints.Equal()`, `Follow()` or a regularizer of `equalize.regularizers`, without a
                group name. Under `Follow` the first member leads. None makes a free group, which ties nothing: you can
                measure it, and `sync` or `equalize.callbacks.PeriodicSync` make it equal now and then.
            initial: What hard groups become: `"first"`, `"mean"` or `"strict"`, as in `link`.
            statistics: Whether to keep the moving statistics of the layers equal, too, to their mean after every step:
                those of `BatchNormalization`, and every other floating weight that the layers update without training
                it. Then two hard tied towers are one function. One layer that is called twice updates its statistics
                twice a step; each of two layers does so once, so they move half as fast. Statistics of frozen layers
                stay, and the others take them. Without it, a hard tie of layers that have statistics warns, since the
                layers give different results in inference.
            weights: A positive number for each member or layer, 1 by default: how much it counts in the mean, in
                `sync("mean")` and in the penalties `MeanL2` and `PairwiseL2`. With the number of examples that each
                member was trained on, the mean is that of federated averaging.

        Returns:
            The `equalize.Group` of variables; for layers, the list of the groups of their weights.

        Raises:
            GroupMismatchError: The name is taken; there are fewer than two members; shapes, dtypes, structures or
                constraints differ; a variable is in another hard group; two members that do not move differ.
            NotLinkedError: A layer is not built.
            TieBrokenError: `initial="strict"` and the members of a hard group are not equal.
            EqualizeError: `weights` are not positive, or not one for each member; or the rule has a weight.
            TypeError: A member is neither a variable, a layer nor an array, or the rule is not a rule.

        Example:
        >>> import keras, equalize
        >>> encoder, decoder = keras.layers.Dense(2), keras.layers.Dense(4)
        >>> model = keras.Sequential([keras.Input((4,)), encoder, decoder])
        >>> registry = equalize.GroupRegistry()
        >>> members = [encoder.kernel, (decoder.kernel, equalize.views.Transpose())]
        >>> registry.tie("autoencoder", members, equalize.constraints.Equal())
        <Group 'autoencoder': Equal(), 2 members>
        >>> blocks = [keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)]) for _ in range(3)]
        >>> [group.name for group in registry.tie("blocks", blocks, equalize.constraints.Equal())]
        ['blocks/dense/kernel', 'blocks/dense/bias']
        """
        arguments.option("initial", initial, _INITIAL)
        _require_values("tie")
        arguments.flag("statistics", statistics)
        rule = discovery.required_rule(name, rule)
        by_group, layers = discovery.members_of(name, members)
        shares = discovery.checked_weights(name, weights, rule, len(members))
        moving = discovery.statistics_of(name, members) if layers and statistics else {}
        if statistics and not layers:
            raise EqualizeError(
                f"`statistics=True` needs layers, which have moving statistics. Received: variables for '{name}'. Give "
                "the layers, or leave it out."
            )
        tie, of_statistics = name if layers else None, _for_statistics(rule)
        planned = []
        for group_name, group_members in (by_group | moving).items():
            for member, weight in zip(group_members, shares, strict=True):
                member.weight = weight
                member.view = member.view or rule.view
            own = of_statistics if group_name in moving else rule
            plan = planning.plan(self, group_name, group_members, own, initial, tie, of_statistics=group_name in moving)
            planned.append(plan)
        planning.require_apart(planned)
        planning.warn_of_overwriting(planned, initial, stacklevel=3)
        if layers and rule.hard and not statistics:
            planning.warn_of_statistics(name, members, stacklevel=3)
        groups = [self._add(plan.establish(initial)) for plan in planned]
        self._keep_statistics()
        self._pending = [entry for entry in self._pending if not _within(entry["name"], name)]
        retrace(_variables(groups))
        return groups if layers else groups[0]

    def extend(self, name: str, members: Sequence[Any], *, weights: Sequence[float] | None = None) -> None:
        """Adds members to a group that `tie` made; they take its value, unless another hard group holds theirs.

        Args:
            name: Name of the group, or of a tie of layers.
            members: Variables and arrays, each alone or as a pair with its view; or layers of the structure of those
                that are tied.
            weights: A positive number for each new member, 1 by default: how much it counts in the mean.

        Raises:
            EqualizeError: There is no such group, layers declare it, or `weights` are not as in `tie`.
            GroupMismatchError: The members do not fit, as in `tie`; or they are layers of another structure.
            NotLinkedError: A layer is not built.
            TypeError: A member is neither a variable, a layer nor an array.

        Example:
        >>> import keras, equalize
        >>> first, second, third = (keras.layers.Dense(2) for _ in range(3))
        >>> built = [layer.build((None, 4)) for layer in (first, second, third)]
        >>> registry = equalize.GroupRegistry()
        >>> groups = registry.tie("heads", [first, second], equalize.constraints.Equal())
        >>> registry.extend("heads", [third])
        >>> len(registry["heads/kernel"].members), equalize.relation(first.kernel, third.kernel)
        (3, 'equal')
        """
        _require_values("extend")
        groups = self.select([arguments.text("name", name, "the name of a group")])
        added = discovery.members_to_add(name, members, groups)
        shares = discovery.checked_weights(name, weights, groups[0].tying, len(members))
        for new in added.values():
            for member, weight in zip(new, shares, strict=True):
                member.weight = weight
        changes = [planning.plan_extension(group, added[group.name], self) for group in groups]
        for apply in changes:
            apply()
        self._keep_statistics()
        retrace(_variables(groups))

    def replace(self, name: str, rule: Rule | None) -> None:
        """Gives a group another rule, to go from a soft tie to a hard one, for instance; or none, to set it free.

        Members, views and weights stay as they are, and so do values: what is made hard becomes equal, to its mean, in
        the next step. Under a `TiedOptimizer` slots are handed over: what the optimizer knew of the group goes to each
        member when a hard group ends, and what it knew of the members to the group when one begins, which becomes equal
        at once. The next step of `fit` follows the new rule, also inside a callback; a step that was compiled by
        hand must be compiled again. Layers that declare a rule keep that one in their configs.

        Args:
            name: Name of the group; or of a tie of layers, all of whose groups get the rule.
            rule: The new rule, without a group name, view or weight; None for a free group.

        Raises:
            TypeError: The new rule is not a rule.
            EqualizeError: There is no such group; or the rule names another group, a view or a weight.
            GroupMismatchError: The members do not fit it, or it would be the second hard rule of a variable.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(4), keras.layers.Dense(4)
        >>> model = keras.Sequential([keras.Input((4,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.regularizers.MeanL2(factor=0.1))
        >>> registry.replace("pair", equalize.constraints.Equal())
        >>> group.hard
        True
        """
        groups = self.select([arguments.text("name", name, "the name of a group")], statistics=False)
        if any(group.of_statistics for group in groups):
            raise EqualizeError(
                f"Group '{name}' is of moving statistics, which are kept equal and nothing else. Expected: the name of "
                f"another group. Received: {name!r}."
            )
        changes = [planning.plan_replacement(group, rule) for group in groups]
        own = _for_statistics(discovery.required_rule(groups[0].name, rule))
        changes += [planning.plan_replacement(group, own) for group in self._statistics_of(groups)]
        with contextlib.ExitStack() as stack:
            hard = discovery.required_rule(groups[0].name, rule).hard
            turned = [group for group in groups if group.hard != hard]
            for optimizer in self.optimizers if turned else ():
                stack.enter_context(optimizer.handing_over(turned if hard else ()))
            for apply in changes:
                apply()
        self._keep_statistics()
        retrace(_variables(groups))

    def _statistics_of(self, groups: Sequence[TiedGroup]) -> list[TiedGroup]:
        """The moving statistics of ties of layers all of whose weights are among some groups."""
        ties = {group.tie for group in groups if group.tie is not None}
        partly = {g.tie for g in self.values() if g.tie in ties and not g.of_statistics and g not in groups}
        return [group for group in self.values() if group.of_statistics and group.tie in ties - partly]

    def untie(self, *names: str) -> None:
        """Dissolves groups; without names, all. The variables keep their values, and what was on them before.

        What was untied is plain Keras again, config included. A layer that declares the rule keeps only the rule's
        `inner`, so the model saves with no mention of `equalize` and loads where `equalize` is not installed. If it was
        compiled with a `TiedOptimizer`, compile it with another optimizer first.

        Args:
            *names: Names of groups, or of ties of layers: `untie("blocks")` dissolves every `blocks/...`.

        Raises:
            EqualizeError: There is no such group.
            TypeError: A name is not a string.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
        >>> registry.untie("pair")
        >>> list(registry), equalize.relation(first.kernel, second.kernel)
        ([], 'equal')
        """
        groups = self.select(names)
        discovery.undeclare(groups)
        for group in groups:
            detach(group)
            del self._groups[group.name]
        self._keep_statistics()
        retrace(_variables(groups))

    def split(self, name: str, *, atol: float) -> list[TiedGroup]:
        """Splits a group that is not hard into hard groups, one for each cluster of members that are almost equal.

        Two members are in one cluster if they lie within `atol` of each other, or a chain of such members leads from
        one to the other (single linkage). Each cluster becomes a hard group of the mean of its members; members alone
        become plain variables. So members that a soft tie has brought together are exactly equal from then on, which
        `PairwiseNorm` and `PairwiseL1` alone do up to the optimizer's steps. Of a tie of layers, whole layers are
        clustered, by all their weights. After `equalize.constraints.ProximalPairwiseNorm` the tolerance can be 0.

        Args:
            name: Name of the group, or of a tie of layers. The new ones are `name/0`, `name/1` and so on, in the order
                of their first members.
            atol: The largest entry of |w_i − w_j|, as views pull members back, at which two members are neighbours.

        Returns:
            The new groups; none where all members are alone.

        Raises:
            EqualizeError: There is no such group, or `atol` is negative or not finite.
            GroupMismatchError: The group is hard, or directed; or two members of a cluster do not move and differ.
            TypeError: An argument is of the wrong type.

        Example:
        >>> import keras, equalize
        >>> heads = [keras.layers.Dense(1) for _ in range(5)]
        >>> built = [head.build((None, 2)) for head in heads]
        >>> for head, value in zip(heads, (1.0, 1.01, 5.0, 5.01, 9.0)):
        ...     _ = head.kernel.assign([[value], [value]])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("heads", [head.kernel for head in heads], None)
        >>> groups = registry.split("heads", atol=0.1)
        >>> [group.name for group in groups], [len(group.members) for group in groups]
        (['heads/0', 'heads/1'], [2, 2])
        >>> equalize.relation(heads[0].kernel, heads[1].kernel)
        'equal'

        Reference:
            Hocking, Joulin, Bach and Vert, Clusterpath (2011), for the clusters that such penalties make.
        """
        _require_values("split")
        groups = self.select([arguments.text("name", name, "the name of a group")])
        atol = arguments.number("atol", atol, low=0.0)
        planned = planning.plan_split(name, groups, atol, Equal(), self)
        planning.require_apart(planned)
        self.untie(*(group.name for group in groups))
        made = [self._add(plan.establish("mean")) for plan in planned]
        self._keep_statistics()
        retrace(_variables(made))
        return made

    def anchor(self, name: str, layers: Any, rule: Rule, *, values: Sequence[Any] | None = None) -> list[TiedGroup]:
        """Ties each trainable weight of some layers to the value that it holds now: L2-SP in one line.

        Each is a group of the weight and a constant. With `equalize.regularizers.MeanL2(factor=α)` the penalty is
        ½ · α · ‖w − w₀‖²; with `equalize.constraints.Equal(rate=r)` each step moves the weight back by the part r/2.

        Args:
            name: Name of the tie. The groups are `name/place of the weight`, for several layers
                `name/number of the layer/place`.
            layers: A layer or model, or a list of them.
            rule: A rule of two members, without a group name.
            values: What to tie to in place of what the weights hold: an array for each, in the order of
                `trainable_weights`.

        Returns:
            The groups.

        Raises:
            GroupMismatchError: A name is taken, or an array has another shape than its weight.
            NotLinkedError: A layer has no trainable weights.
            EqualizeError: `values` are not one for each weight.
            TypeError: An argument is of the wrong type.

        Example:
        >>> import keras, equalize
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
        >>> registry = equalize.GroupRegistry()
        >>> groups = registry.anchor("pretrained", model, equalize.regularizers.MeanL2(factor=0.1))
        >>> list(registry)[:2], float(keras.ops.convert_to_numpy(registry.penalty()))
        (['pretrained/dense/kernel', 'pretrained/dense/bias'], 0.0)

        Reference:
            Li, Grandvalet and Davoine, Explicit inductive bias for transfer learning with convolutional networks
            (2018), equation 2.
        """
        _require_values("anchor")
        rule = discovery.required_rule(name, rule)
        members = discovery.anchored(name, layers, values)
        planned = [planning.plan(self, each, pair, rule, "first", name) for each, pair in members.items()]
        planning.require_apart(planned)
        groups = [self._add(plan.establish("first")) for plan in planned]
        retrace(_variables(groups))
        return groups

    def share(self, *names: str) -> list[keras.Variable]:
        """Makes the members of hard groups one variable, so that what is exported holds it once; dissolves the groups.

        As `equalize.share` for groups that are equal: the first member takes the place of the others in their layers.
        Compile before you train on, since the old optimizer updates the old variables. Moving statistics that are tied
        are shared, too. What `model.export` writes then has one variable in place of many.

        Args:
            *names: Names of groups, or of ties of layers; all hard groups where none is named.

        Returns:
            The variable of each group.

        Raises:
            EqualizeError: There is no such group.
            GroupMismatchError: A group is not hard; a member has a view, so that its variable holds something else, or
                is a constant; or one variable cannot take the place of the members.
            TieBrokenError: The members of a group are not equal.

        Example:
        >>> import keras, equalize
        >>> layers = [keras.layers.Dense(4) for _ in range(3)]
        >>> model = keras.Sequential([keras.Input((4,)), *layers])
        >>> registry = equalize.GroupRegistry()
        >>> groups = registry.tie("layers", layers, equalize.constraints.Equal())
        >>> kernel, bias = registry.share()
        >>> all(layer.kernel is kernel for layer in layers), model.count_params(), list(registry)
        (True, 20, [])
        """
        groups = self.select(names)
        groups = groups if names else [group for group in groups if group.hard]
        replace = replacement_of(groups)
        kept = [group.members[0].variable for group in groups]
        if groups:
            self.untie(*(group.name for group in groups))
        replace()
        return kept

    def sync(self, method: str = "first", *names: str) -> None:
        """Makes the named groups equal, soft and free ones too; without names, every hard group.

        Args:
            method: `"first"` (the value of the first member) or `"mean"`. Members that do not move prevail.
            *names: Names of groups, or of ties of layers.

        Raises:
            EqualizeError: There is no such group, or `method` is unknown.
            GroupMismatchError: Two members that do not move differ.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.regularizers.MeanL2(factor=0.1))
        >>> registry.sync("mean", "pair")  # a common start
        >>> registry.spread()
        {'pair': 0.0}
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

        Args:
            *names: Names of soft groups, or of ties of layers.

        Returns:
            A scalar tensor, differentiable in every trainable member, in the widest of the groups' dtypes and at least
            float32. Without soft groups it is 0 in `keras.config.floatx()`.

        Raises:
            EqualizeError: There is no such group, or it has no penalty.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.regularizers.MeanL2(factor=0.1))
        >>> penalty = registry.penalty("pair")
        >>> penalty.shape == (), bool(penalty > 0)
        (True, True)
        """
        groups = [group for group in self.select(names, statistics=False) if group.penalizes or names]
        for group in groups:
            if not group.penalizes:
                raise EqualizeError(
                    f"Group '{group.name}' has no penalty: its rule is {group.tying.describe()}. "
                    "Expected: names of groups tied by a regularizer."
                )
        penalties = [group.penalty() for group in groups]
        return functools.reduce(ops.add, penalties) if penalties else ops.zeros(())

    def project(self, *names: str) -> None:
        """Projects the named groups, or all, once and now: for a loop whose optimizer knows no constraints.

        Call it after each step of a `torch.optim` or `optax` optimizer. Keras's own optimizers do it by themselves.

        Args:
            *names: Names of groups tied by a constraint, or of ties of layers.

        Raises:
            EqualizeError: There is no such group, or it cannot be projected.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
        >>> changed = first.kernel.assign(keras.ops.ones((2, 2)))  # what an optimizer of your own does
        >>> registry.project()
        >>> equalize.relation(first.kernel, second.kernel)
        'equal'
        """
        groups = self.select(names)
        for group in groups:
            if names and not group.projects:
                raise EqualizeError(
                    f"Group '{group.name}' cannot be projected: its rule is {group.tying.describe()}. "
                    "Expected: names of groups tied by `equalize.constraints.Equal`."
                )
        for group in groups:
            if group.projects:
                group.project()

    def select(self, names: Sequence[str], *, statistics: bool = True) -> list[TiedGroup]:
        """The groups of these names, or those of a tie of layers that has the name; all without a name.

        Args:
            names: Names of groups, or of ties of layers.
            statistics: Whether groups of moving statistics, which keep their rule, are meant without being named.

        Raises:
            EqualizeError: There is no such group.
            TypeError: A name is not a string.
        """
        names = arguments.names("names", names)
        selected = {} if names else dict(self)
        for name in names:
            below = {key: group for key, group in self.items() if _within(key, name)}
            below = {name: self[name]} if name in self else below
            if not below:
                raise EqualizeError(_unknown(name, self))
            selected |= below
        return [group for group in selected.values() if statistics or not group.of_statistics or group.name in names]

    @property
    def pending(self) -> list[str]:
        """The names of groups of a config that `link` has yet to make."""
        return [entry["name"] for entry in self._pending]

    def spread(self) -> dict[str, float]:
        """How far apart the members of each group are: the largest entry of max − min, 0.0 if they are equal.

        Under a custom `GroupConstraint` it is how far the members are from their own projection.

        Returns:
            The spread by the group's name.

        Example:
        >>> import keras, equalize
        >>> variables = [keras.Variable([0.0, value]) for value in (1.0, 3.0)]
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", variables, equalize.regularizers.MeanL2(factor=0.1))
        >>> registry.spread()
        {'pair': 2.0}
        """
        return {name: group.spread() for name, group in self.items()}

    def check(self, atol: float = 0.0) -> None:
        """Raises `TieBrokenError` unless the members of every hard group are equal to within `atol`.

        The members of a custom `GroupConstraint` are compared with their own projection.

        Args:
            atol: The largest spread that counts as equal. 0.0 asks for equal bits.

        Raises:
            TieBrokenError: The members of a hard group are further apart.
            EqualizeError: `atol` is negative or not finite.
            TypeError: `atol` is not a number.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
        >>> registry.check()
        >>> changed = first.kernel.assign(keras.ops.ones((2, 2)))  # behind the back of the tie
        >>> try:
        ...     registry.check()
        ... except equalize.errors.TieBrokenError as error:
        ...     print(str(error).startswith("Hard groups that are not equal: 1 of 1"))
        True
        """
        atol = arguments.number("atol", atol, low=0.0)
        broken = {name: s for name, s in self.spread().items() if self[name].tying.enforced and not s <= atol}
        if broken:
            count = sum(group.tying.enforced for group in self.values())
            lines = "".join(
                f"\n    '{name}': spread {spread:g}, members {', '.join(str(m) for m in self[name].members)}"
                for name, spread in broken.items()
            )
            raise TieBrokenError(
                f"Hard groups that are not equal: {len(broken)} of {count}; expected a spread of at most {atol:g}, "
                f"received:{lines}\n{EQUALIZE}"
            )

    def summary(self, print_fn: Any = None, *, expand: bool = False) -> None:
        """Prints a table of the groups: rule, members, weights stored and free, and how far apart the members are.

        All groups of a tie of layers are one row, with the largest spread among them. A registry that ends a notebook's
        cell shows the same table, and so does `rich.print(registry)`.

        Args:
            print_fn: Called with the table as plain text of at most 80 columns, for a log; by default it is printed,
                in color where the terminal has it.
            expand: Whether each group of a tie of layers has a row of its own, with the paths of its members.

        Raises:
            TypeError: `print_fn` cannot be called, or `expand` is not a bool.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> groups = registry.tie("pair", [first, second], equalize.constraints.Equal())
        >>> lines = []
        >>> registry.summary(print_fn=lines.append)  # for instance logging.info
        >>> "Equal()" in "".join(lines)
        True
        """
        _require_printer(print_fn)
        arguments.flag("expand", expand)
        summary.print_summary(list(self.values()), len(self.diagnose()), print_fn, expand=expand)

    def count_params(self, model: keras.Model) -> tuple[int, int]:
        """How many numbers a model stores in its weights, and how many of them training can choose.

        The members of a hard group have one value to choose, and none where an anchor holds it; what their views do
        not cover is chosen freely. Weights that are not trainable are only stored. What a constraint takes away is
        not counted.

        Args:
            model: A built model.

        Returns:
            `(stored, free)`; `stored` is `model.count_params()`.

        Example:
        >>> import keras, equalize
        >>> layers = [keras.layers.Dense(10) for _ in range(3)]
        >>> model = keras.Sequential([keras.Input((10,)), *layers])
        >>> registry = equalize.GroupRegistry()
        >>> groups = registry.tie("layers", layers, equalize.constraints.Equal())
        >>> registry.count_params(model)
        (330, 110)
        """
        arguments.model("model", model)
        stored = sum(math.prod(weight.shape) for weight in model.weights)
        return stored, summary.weights_free(list(self.values()), model.trainable_weights)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws which layers each tie has, and how far apart members are that are not equal.

        Above, a row for each group, or tie of layers, with a mark in the column of each layer that it has. Below, for
        up to six of those whose members are farthest apart, a heat map: the largest entry of |w_i − w_j| for each pair
        of members, as their views pull them back. All maps have one scale. A group of n members costs n·(n − 1)/2
        comparisons. The picture fits a page, whatever the number of groups.

        Args:
            path: The file to write; its suffix says the format, `.png`, `.svg` or `.pdf`.

        Raises:
            TypeError: `path` is not a path.
            EqualizeError: The registry has no group, the suffix is another, or the folder does not exist.
            ImportError: matplotlib is not installed; the extra `plot` brings it.

        Example:
        >>> import importlib.util, os, tempfile, keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> groups = registry.tie("pair", [first, second], equalize.regularizers.MeanL2(factor=0.1))
        >>> if importlib.util.find_spec("matplotlib"):
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         registry.plot(os.path.join(folder, "ties.svg"))
        """
        plots.plot_groups(list(self.values()), path)

    def diagnose(self, *models: keras.Model) -> list[Finding]:
        """What may go wrong with the ties though nothing is broken yet, each with a fix.

        It finds:

        - hard groups that are not equal, and members that no longer exist;
        - rules that were never linked, that LoRA or quantization dropped, or that a layer hands to several weights;
        - moving statistics that are not tied, and regularizers that differ between members;
        - averaging of weights (`use_ema`) without a `TieMonitor`, clipping by the global norm, weight decay of some
          members only, and partial averaging under gradient accumulation;
        - frozen teachers that do not follow, and members that an optimizer on JAX does not reach;
        - gradients of tied uses that conflicted in every step of the last epoch, where a `TieMonitor` saw gradients.

        Args:
            *models: The models to look at. Without any it looks at those that were linked and at all that hold a
                member. Finding these takes a fraction of a second, and misses what `gc.freeze()` has put away.

        Returns:
            A list of findings, empty if there is nothing to say. Print one to read it.

        Raises:
            TypeError: One of `models` is not a Keras model.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
        >>> model.compile(keras.optimizers.SGD(0.1, use_ema=True), "mse")
        >>> [finding.kind for finding in registry.diagnose()]
        ['ema']
        """
        for model in models:
            if not isinstance(model, keras.Model):
                raise TypeError(f"`diagnose` expects Keras models. Received: {received(model)}.")
        variables = [member.variable for group in self.values() for member in group.members if not member.constant]
        looked_at = models or dict.fromkeys([*self._models, *models_holding(variables)])
        repaired = any(monitor.repair for monitor in self.monitors)
        conflicts = {tie: runs[-1] for monitor in self.monitors for tie, runs in monitor.conflicts.items()}
        return findings(list(self.values()), self.pending, list(looked_at), monitored=repaired, conflicts=conflicts)

    def advise(
        self,
        model: keras.Model,
        x: Any,
        y: Any,
        *,
        names: Sequence[str] = (),
        batch_size: int = 256,
        print_fn: Any = None,
    ) -> dict[str, Advice]:
        """Is it worth tying? Prints what held-out data say about each group, and returns it.

        Train the members free, or softly tied, and give data that they were **not** trained on. For each group, with
        all others as they are, it computes the loss as if the members moved 0, 10, 25, 50 or 100 % of the way to their
        mean. If 100 % is best, tie hard. If a part of the way is best, tie softly, or by `Equal(rate=...)`. If 0 % is
        best, leave the members free. Small differences on few data are chance.

        Training data cannot tell: free members fit them best where they are, whether tying is right or not. The
        gradients of the members cannot tell either, though the table has their mean cosine. At the minimum of the loss
        of tied members they cancel, so they seem to disagree exactly where tying is right.

        Ask before you tie, since equal members stay equal. A free group, tied with the rule None, only measures. And
        start the members equal, with `registry.sync("first", ...)` before training: networks trained from different
        random values have their hidden units in different orders, and their mean says nothing.

        Members move as the group's rule has them: through views, by their weights, with the inner constraint of
        `Equal`, and to the anchor if there is one. The loss leaves out all penalties on weights. The model is left bit
        for bit as it was. Each group takes five passes over the data; a terminal shows a bar meanwhile.

        Args:
            model: A compiled model that all members belong to.
            x: Inputs that the model was not trained on, an array or a structure of arrays.
            y: Their targets, an array or a structure of arrays.
            names: Names of groups, or of ties of layers; all where none is given.
            batch_size: How many samples to look at in one go.
            print_fn: Called with the table as plain text of at most 80 columns; by default it is printed.

        Returns:
            An `equalize.registry.Advice` for each group, by name.

        Raises:
            EqualizeError: The model is not compiled or lacks a member, inputs and targets do not hold the same number
                of samples, at least one, the model cannot compute its loss of them, or `batch_size` is below 1.
            TypeError: An argument is of the wrong type.

        Example:
        >>> import keras, numpy as np, equalize
        >>> inputs = keras.Input((1,))
        >>> heads = [keras.layers.Dense(1, use_bias=False) for _ in range(2)]
        >>> model = keras.Model(inputs, [head(inputs) for head in heads])
        >>> for head, value in zip(heads, (0.5, 1.5)):
        ...     _ = head.kernel.assign([[value]])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("heads", [head.kernel for head in heads], None)
        >>> model.compile("sgd", ["mse", "mse"])
        >>> x = np.ones((4, 1))  # both targets are x, so the mean of the heads is right
        >>> registry.advise(model, x, [x, x], print_fn=lambda text: None)["heads"].best
        1.0
        """
        _require_printer(print_fn)
        groups = self.select(arguments.names("names", names), statistics=False)
        advice = advise(groups, model, x, y, arguments.integer("batch_size", batch_size, low=1))
        summary.print_advice(advice, print_fn)
        return {each.group: each for each in advice}

    def __repr__(self) -> str:
        listed = [*map(repr, self.values()), *(f"{name!r} (not linked yet)" for name in self.pending)]
        return f"<GroupRegistry: {', '.join(listed) or 'no groups'}>"

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        yield from summary.summary_parts(list(self.values()), len(self.diagnose()), options.max_width)

    def _repr_html_(self) -> str:
        return summary.summary_html(list(self.values()), len(self.diagnose()))

    def get_config(self) -> dict[str, Any]:
        """The ties made with `tie`, as JSON-serializable data: rules, places of variables, views and constants.

        A variable is known by its place in the tree of layers of each living model that holds it, since names and
        paths are neither unique nor stable. Ties that layers carry in their own configs are not repeated here.

        Returns:
            A dictionary for `from_config`.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
        >>> copy = keras.models.clone_model(model)
        >>> ties = equalize.GroupRegistry.from_config(registry.get_config()).link(copy)
        >>> list(ties), equalize.relation(copy.layers[0].kernel, copy.layers[1].kernel)
        (['pair'], 'equal')
        """
        made = group_configs([group for group in self.values() if not group.declared])
        return {"groups": made + copy.deepcopy(self._pending)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GroupRegistry":
        """A registry with the ties of a config, which `link(model)` makes for a model of the same structure.

        Args:
            config: What `get_config` returned.

        Raises:
            EqualizeError: The config is truncated, or was changed into something else.

        Example:
        >>> import keras, equalize
        >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
        >>> model = keras.Sequential([keras.Input((2,)), first, second])
        >>> registry = equalize.GroupRegistry()
        >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
        >>> loaded = equalize.GroupRegistry.from_config(registry.get_config())
        >>> loaded.pending  # until it is linked to a model
        ['pair']
        """
        registry = cls()
        registry._pending = checked_config(config)
        return registry

    def _keep_statistics(self) -> None:
        """Has the groups of a tie keep its moving statistics: those of the same layers, where they have weights."""
        kept = [group for group in self.values() if group.of_statistics]
        for group in self.values() if kept else ():
            group.statistics.clear()
        for group in kept:
            tie = [other for other in self.values() if other.tie == group.tie and not other.of_statistics]
            own = {id(weight) for member in group.members if member.owner for weight in member.owner.weights}
            near = [other for other in tie if any(id(member.variable) in own for member in other.members)] or tie
            for other in near[:1] if group.tying.directed else near:  # each call of a constraint would be a step
                attach_statistics(other, group)
            if not tie:
                del self._groups[group.name]

    def _has_members_in(self, models: Sequence[keras.Layer]) -> bool:
        """Whether models have a member, of a free group for instance, of which there is no sign on a variable."""
        layers = [model for model in models if isinstance(model, keras.Layer)]
        return bool(holding(layers, _variables(self.values())))

    def _expect(self, other: "GroupRegistry") -> None:
        """Takes over the ties of a config that another registry has yet to link, but for groups that are here."""
        self._pending += [entry for entry in other._pending if entry["name"] not in {*self, *self.pending}]

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupRegistry.from_config, (self.get_config(),)

    def __getitem__(self, name: str) -> TiedGroup:
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

    def _add(self, group: TiedGroup) -> TiedGroup:
        self._groups[group.name] = group
        return group


def checked_registry(registry: Any) -> GroupRegistry:
    """The argument `registry` of callbacks and optimizers."""
    if not isinstance(registry, GroupRegistry):
        raise TypeError(f"`registry` must be an `equalize.GroupRegistry`. Received: {received(registry)}.")
    return registry


def _for_statistics(rule: Rule) -> Rule:
    """The rule of moving statistics beside weights of a rule: they follow, or are free, as these are, or equal."""
    return rule if rule.directed or rule.slot is None else Equal()


def _require_printer(print_fn: Any) -> None:
    if print_fn is not None:
        arguments.function("print_fn", print_fn, "of a text, or None")


def _variables(groups: Iterable[TiedGroup]) -> list[keras.Variable]:
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
