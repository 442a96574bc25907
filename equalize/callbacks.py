"""Callbacks: what happens to ties around a training run, beyond its steps.

`TieMonitor` logs how far apart members are and how far their gradients conflict, and repairs hard ties when training
ends; `FactorSchedule` changes how strongly a group is tied from epoch to epoch; `TieSchedule` has ties end or begin;
`PeriodicSync` makes members equal now and then; `TiedCheckpoint` keeps files of the model, small and with the ties.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from equalize import _backend as backend
from equalize._backend import keras_private, living, wrapping
from equalize._inputs import arguments, configs
from equalize._inputs.arguments import received
from equalize._reports import plots
from equalize._reports.invariance import asymmetry, has_invariant
from equalize._ties import following
from equalize._ties.bound import Bound
from equalize._ties.rules import Rule
from equalize._ties.tied_group import TiedGroup
from equalize.errors import EqualizeError, NotLinkedError
from equalize.optimizers import TiedOptimizer
from equalize.registry import GroupRegistry, checked_registry
from equalize.saving import save_model, save_weights

__all__ = ["FactorSchedule", "PeriodicSync", "TieMonitor", "TieSchedule", "TiedCheckpoint"]


class TieMonitor(keras.callbacks.Callback):
    """Logs how far apart the members of each group are, and makes hard groups equal when training ends.

    After every epoch the logs hold the spread of each group, hard, partial or soft, as `spread/<name of the group>`.
    `History` and the progress bar always show it. Callbacks see each other's entries in the order of the list, so put
    those that read the spread (`CSVLogger`, `TensorBoard`, `EarlyStopping(monitor="spread/...")`,
    `ModelCheckpoint(monitor="spread/...")`) after the monitor.

    An optimizer with `use_ema=True` averages the weights *before* each projection, and writes the averages over the
    model when `fit` ends. That breaks hard ties. The monitor repairs them: the projection is linear, so the mean of the
    averages is the average of the means, and projecting once more is exact. It does so when training ends, after Keras
    wrote the averages, and writes nothing during training. If a callback restores averaged weights when training ends
    (`EarlyStopping(restore_best_weights=True)` after `SwapEMAWeights`), put it before the monitor. Files that
    `ModelCheckpoint` writes of swapped weights hold the averages as they are; link the loaded model with
    `initial="mean"`.

    Under `equalize.optimizers.TiedOptimizer` averages end equal by themselves. But `SwapEMAWeights` swaps one member of
    each group there, and the monitor gives the others the same value. So put the monitor after it.

    The averages of a kernel with `equalize.constraints.Invariant` are not invariant, for the same reason, and the same
    repair is exact. The monitor makes it for all such kernels of the model, tied or not, even with an empty registry.

    Partial and soft groups are only logged. A group with an anchor takes the anchor's value.

    With `gradients=True` it also logs how far the gradients of the uses of each tie conflict under a `TiedOptimizer`,
    from the backward pass that there is anyway: `conflict/<tie>` is the smallest cosine between two of them, and
    `gradient/<tie>` the norm of what the inner optimizer is given, both as means over the steps of the epoch. Cosines
    below 0 say that what helps one use hurts another; see `equalize.reductions`.

    Args:
        registry: The `equalize.GroupRegistry` that the model is linked by.
        atol: The largest spread at which a hard group counts as equal, and the largest change by their symmetry at
            which `Invariant` kernels count as invariant. 0.0 asks for equal bits.
        repair: Whether hard groups that are not equal when training ends are made equal, to their mean, and
            `Invariant` kernels invariant. If False, a `UserWarning` names them.
        gradients: Whether to log how far gradients conflict.

    Attributes:
        history: The spread of each group after every epoch of the last training, by name.
        conflicts: For each tie what `TiedOptimizer.conflicts` said after every epoch of the last training.
        broken: The hard groups that were not equal when the last training ended, by name, with the spread that each
            had then: before the repair, where there was one; likewise `Invariant` kernels, by path, with how far
            they were from being invariant. Empty where all was as it should be.

    Raises:
        TypeError: `registry` is not a registry, `atol` is not a number, or `repair` or `gradients` is not a bool.
        EqualizeError: `atol` is negative or not finite; or a run starts under a `TiedOptimizer`, and the monitor
            comes before `SwapEMAWeights`; or without one, and `gradients` is True.
        NotLinkedError: Training starts, and the model has neither a group of the registry nor an `Invariant` kernel.

    Example:
    >>> import keras, numpy as np, equalize
    >>> from equalize.callbacks import TieMonitor
    >>> inputs = keras.Input((3,))
    >>> left, right = keras.layers.Dense(2), keras.layers.Dense(2)
    >>> model = keras.Model(inputs, keras.layers.Add()([left(inputs), right(inputs)]))
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("towers", [left.kernel, right.kernel], equalize.constraints.Equal())
    >>> model.compile(keras.optimizers.SGD(0.1, use_ema=True), "mse")
    >>> monitor = TieMonitor(registry)
    >>> history = model.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=2, verbose=0, callbacks=[monitor])
    >>> history.history["spread/towers"], registry.spread()
    ([0.0, 0.0], {'towers': 0.0})
    """

    def __init__(self, registry: GroupRegistry, *, atol: float = 0.0, repair: bool = True, gradients: bool = False):
        super().__init__()
        self.registry = checked_registry(registry)
        self.atol = arguments.number("atol", atol, low=0.0)
        self.repair = arguments.flag("repair", repair)
        self.gradients = arguments.flag("gradients", gradients)
        self.conflicts: dict[str, list[dict[str, float]]] = {}
        self.broken: dict[str, float] = {}
        self.history: dict[str, list[float]] = {}
        registry.monitors.add(self)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.broken, self.history = {}, {}
        invariant = any(has_invariant(variable.constraint) for variable in self.model.trainable_variables)
        if not invariant and not _has_member(self.model, self.registry.values()):
            raise NotLinkedError(
                f"TieMonitor has nothing to watch in the model '{self.model.name}': expected a registry with a group "
                f"in it, received {self.registry!r}. A model that was loaded or cloned has ties of its own: call "
                "`registry = equalize.GroupRegistry().link(model)` and give the monitor that registry."
            )
        self._require_order()
        self.conflicts = {}
        if self.gradients:
            self._watch_conflicts()

    def _watch_conflicts(self) -> None:
        optimizers = self._tied()
        if not optimizers:
            raise EqualizeError(
                f"TieMonitor cannot see gradients in the model '{self.model.name}': expected that it is compiled with "
                f"a TiedOptimizer for this registry, received {type(self.model.optimizer).__name__}. Compile with "
                "`equalize.optimizers.TiedOptimizer(optimizer, registry)`, or leave `gradients` out."
            )
        for optimizer in optimizers:
            if not optimizer.built:
                optimizer.build(self.model.trainable_variables)
            if optimizer.watch_conflicts():
                living.retrace_model(self.model)
            optimizer.conflicts()  # those of a run that was interrupted

    def _tied(self) -> list[TiedOptimizer]:
        """The optimizers of the model that train the groups of the registry."""
        return [optimizer for optimizer in self._all_tied() if optimizer.registry is self.registry]

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._follow()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._require_order()
        self._follow()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        self._follow()

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._require_order()
        self._follow()

    def on_predict_end(self, logs: dict[str, Any] | None = None) -> None:
        self._follow()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._follow()
        spreads = self._spread()
        for name, spread in spreads.items():
            self.history.setdefault(name, []).append(spread)
        conflicts = {tie: found for each in self._tied() for tie, found in each.conflicts().items()}
        for tie, found in conflicts.items():
            self.conflicts.setdefault(tie, []).append(found)
        if logs is not None:
            logs.update({f"spread/{name}": spread for name, spread in spreads.items()})
            logs.update({f"conflict/{tie}": found["cosine"] for tie, found in conflicts.items()})
            logs.update({f"gradient/{tie}": found["norm"] for tie, found in conflicts.items()})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        # `fit` calls `optimizer.finalize_variable_values` before this on all backends (Keras 3.5 and 3.15).
        hard = {name: spread for name, spread in self._spread().items() if self.registry[name].tying.enforced}
        unequal = {name: spread for name, spread in hard.items() if not spread <= self.atol}
        if self.repair and unequal:
            self.registry.sync("mean", *unequal)
        asymmetric = self._asymmetric()
        self.broken = unequal | {subject: off for subject, (off, _) in asymmetric.items()}
        if self.repair:
            for _, project in asymmetric.values():
                project()
        elif self.broken:
            listed = ", ".join(f"'{name}' (spread {spread:g})" for name, spread in unequal.items())
            groups = (
                f"Hard groups that are not equal at the end of training: {len(unequal)} of {len(hard)}; expected a "
                f"spread of at most {self.atol:g}, received: {listed}. "
            )
            listed = ", ".join(f"'{subject}' (off by {off:g})" for subject, (off, _) in asymmetric.items())
            kernels = f"Kernels that are not as their `Invariant` has them at the end of training: {listed}. "
            warnings.warn(
                f"{groups if unequal else ''}{kernels if asymmetric else ''}"
                "Averaging of weights (`use_ema`) does this. "
                'Give TieMonitor `repair=True`, or call `registry.sync("mean")`, which is exact.',
                UserWarning,
                stacklevel=2,
            )

    def _asymmetric(self) -> dict[str, tuple[float, Callable[[], Any]]]:
        """What an `Invariant` keeps and is not invariant, by group or path: how far off, and how to project it."""
        found: dict[str, tuple[float, Callable[[], Any]]] = {}
        for variable in self.model.trainable_variables:
            constraint, value = variable.constraint, backend.tensor(variable)
            if not has_invariant(constraint):
                continue
            subject, project = variable.path, functools.partial(_project, variable)
            if isinstance(constraint, Bound):
                group, value = constraint.group, constraint.member.least_squares(value)
                if not group.hard:
                    continue
                subject, project, constraint = group.name, group.project, group.inner
            off = asymmetry(constraint, value)
            if not off <= self.atol:
                found.setdefault(subject, (off, project))
        return found

    def _require_order(self) -> None:
        """Raises where `SwapEMAWeights` comes later and so would write to one member of a group after this."""
        callbacks = _running_callbacks() if any(self._averaging()) else []
        after = callbacks[callbacks.index(self) :] if self in callbacks else []
        if any(isinstance(callback, keras.callbacks.SwapEMAWeights) for callback in after):
            raise EqualizeError(
                "TieMonitor comes before SwapEMAWeights in the list of callbacks. Expected: after it, to give all "
                "members what that wrote to one member of each group of a TiedOptimizer; received: "
                f"{[type(callback).__name__ for callback in callbacks]}. Write "
                "`callbacks=[keras.callbacks.SwapEMAWeights(), TieMonitor(registry)]`."
            )

    def _averaging(self) -> Iterator[TiedOptimizer]:
        """The optimizers of the model that keep averages of one member in place of all."""
        return (optimizer for optimizer in self._all_tied() if optimizer.averages)

    def _all_tied(self) -> Iterator[TiedOptimizer]:
        for optimizer in wrapping.everything(getattr(self.model, "optimizer", None)):
            if isinstance(optimizer, TiedOptimizer):
                yield optimizer

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws how far apart the members of each group were after every epoch of the last training.

        With `gradients=True` also how far the gradients of each tie conflicted.

        Args:
            path: The file to write; its suffix says the format, `.png`, `.svg` or `.pdf`.

        Raises:
            TypeError: `path` is not a path.
            EqualizeError: No epoch has ended, the suffix is another, or the folder does not exist.
            ImportError: matplotlib is not installed; the extra `plot` brings it.
        """
        plots.plot_spread(self.history, path, {n: [e["cosine"] for e in v] for n, v in self.conflicts.items()})

    def _follow(self) -> None:
        """Under a TiedOptimizer, gives all members what `SwapEMAWeights` wrote to one."""
        for optimizer in self._averaging():
            if optimizer.built:
                _take_back(self.model)
                optimizer.follow()

    def _spread(self) -> dict[str, float]:
        """The spread of every group, of the weights as they are now."""
        _take_back(self.model)
        return self.registry.spread()


def _take_back(model: keras.Model) -> None:
    """During an epoch on JAX the weights are in the compiled step, not in the model, until it takes them back."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def _project(variable: keras.Variable) -> None:
    variable.assign(variable.constraint(backend.tensor(variable)))


def _running_callbacks() -> list[keras.callbacks.Callback]:
    """The callbacks of the run that has called one of them, in their order; Keras tells none of the others."""
    frame = sys._getframe().f_back
    while frame is not None:
        caller = frame.f_locals.get("self")
        if caller is not None and isinstance(caller, keras.callbacks.CallbackList):
            return list(caller.callbacks)
        frame = frame.f_back
    return []


class FactorSchedule(keras.callbacks.Callback):
    """Changes the factor of soft groups, or the rate of partial ones, from epoch to epoch.

    Tie little at first and more later, and members find their own way before they meet. Or start tied and let them
    part. At the beginning of every epoch, `schedule(epoch)` becomes the `factor` of the groups' rules, or the `rate` of
    those tied by `equalize.constraints.Equal`. It is logged as `factor/<name of the group>`.

    On TensorFlow the compiled step reads the number from a variable, and on PyTorch from the rule, so a change costs
    nothing. JAX compiles the number into the step, so a schedule that changes in every epoch costs a compilation an
    epoch. A rate that reaches or leaves 1.0, where members become bitwise equal, retraces the step on TensorFlow, too.
    The last number stays with the group. The configs of layers that declare a rule keep the number that they had.

    Args:
        registry: The `equalize.GroupRegistry` that the model is linked by.
        names: Name of a group or of a tie of layers, or a list of them.
        schedule: A function of the epoch, counted from 0, that returns the factor or rate. Keras's schedules are such
            functions: `keras.optimizers.schedules.PolynomialDecay(0.0, 10, 1.0)` rises linearly over ten epochs,
            `keras.optimizers.schedules.ExponentialDecay(1e-4, 1, 2.0)` doubles in every epoch.

    Raises:
        TypeError: `registry` is not a registry, `names` are not strings, or `schedule` cannot be called.
        EqualizeError: `names` is empty, a group is unknown when training starts, its factor is a matrix, or the
            schedule returns a number out of range (`factor` in [0, ∞), `rate` in (0, 1]).
        NotLinkedError: Training starts, and no group has a member in the model.

    Example:
    >>> import keras, numpy as np, equalize
    >>> inputs = keras.Input((3,))
    >>> left, right = keras.layers.Dense(2), keras.layers.Dense(2)
    >>> model = keras.Model(inputs, keras.layers.Add()([left(inputs), right(inputs)]))
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("towers", [left.kernel, right.kernel], equalize.regularizers.MeanL2(factor=0.0))
    >>> model.compile("sgd", "mse")
    >>> rise = equalize.callbacks.FactorSchedule(registry, "towers", lambda epoch: 0.5 * epoch)
    >>> history = model.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=3, verbose=0, callbacks=[rise])
    >>> history.history["factor/towers"], registry["towers"].rule.factor
    ([0.0, 0.5, 1.0], 1.0)
    """

    def __init__(self, registry: GroupRegistry, names: str | Sequence[str], schedule: Callable[[int], Any]):
        super().__init__()
        self.registry = checked_registry(registry)
        self.names = arguments.names("names", names)
        if not self.names:
            raise EqualizeError(f"`names` must name at least one group. Received: {received(names)}.")
        self.schedule = arguments.function("schedule", schedule, "of the epoch")

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        groups = self._groups()
        if not _has_member(self.model, groups):
            raise NotLinkedError(
                f"FactorSchedule has nothing to change in the model '{self.model.name}': none of {self.names} has a "
                "member there. Expected: the registry that this model is linked by."
            )
        _retrace_groups([group for group in groups if group.make_adjustable()])

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        value = self.schedule(epoch)
        if ops.is_tensor(value) or isinstance(value, np.ndarray):  # as Keras's schedules return it
            value = ops.convert_to_numpy(value)
            value = value.item() if value.ndim == 0 else value
        groups = self._groups()
        numbers = [group.tying.checked_strength(value) for group in groups]
        _retrace_groups([group for group, number in zip(groups, numbers, strict=True) if group.adjust(number)])

    def _groups(self) -> list[TiedGroup]:
        """The groups, each with a number to change."""
        groups = self.registry.select(self.names, statistics=False)
        for group in groups:
            if not isinstance(group.tying.strength, float):
                raise EqualizeError(
                    f"FactorSchedule cannot change the strength of group '{group.name}': expected a rule with a number "
                    f"for it; received {group.describe()}. Call `registry.replace({group.name!r}, rule)` instead."
                )
        return groups

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is not None:
            logs.update({f"factor/{group.name}": group.tying.strength for group in self._groups()})


class _CountsSteps(keras.callbacks.Callback):
    """Counts the steps of a `fit` over its epochs: batches, of which several may run at once."""

    _steps = _before = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._steps = self._before = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._before = self._steps

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._steps = self._before + batch + 1


class TieSchedule(_CountsSteps):
    """Changes the rule of a group at given epochs or steps: ties that end, begin or turn soft within one `fit`.

    Share, then unshare: tied at first, weights learn what is common from all gradients; set free later, each goes its
    own way from there. Under a `TiedOptimizer` the optimizer's slots are handed over at each change, so the next step
    of Adam is as large as the last one; see `GroupRegistry.replace`. Each change has the step traced once more.

    A run that is resumed goes on: epochs are those of `fit(initial_epoch=...)`, and steps those that the optimizer has
    taken. Load the model with `equalize.saving.load_model`, which has the ties of the time when it was saved, and give
    the schedule the registry that comes with it.

    Args:
        registry: The `equalize.GroupRegistry` that the model is linked by.
        name: Name of a group, or of a tie of layers, all of whose groups change.
        rules: For epochs, counted from 0, the rule that holds from then on, without a group name; None for a free
            group. Before the first of them the group keeps the rule that it has.
        on_step: Whether the numbers are steps instead, counted from 0 over all epochs.

    Raises:
        TypeError: `registry` is not a registry, `rules` is not a mapping from integers to rules, or `on_step` is not a
            bool.
        EqualizeError: `rules` is empty or has a negative number, or when training starts, the group is unknown.
        NotLinkedError: Training starts, and the group has no member in the model.

    Example:
    >>> import keras, numpy as np, equalize
    >>> inputs = keras.Input((3,))
    >>> left, right = keras.layers.Dense(2), keras.layers.Dense(2)
    >>> model = keras.Model(inputs, [left(inputs), right(inputs)])
    >>> registry = equalize.GroupRegistry()
    >>> groups = registry.tie("towers", [left, right], equalize.constraints.Equal())
    >>> model.compile(equalize.optimizers.TiedOptimizer("adam", registry), ["mse", "mse"])
    >>> schedule = equalize.callbacks.TieSchedule(registry, "towers", {0: equalize.constraints.Equal(), 5: None})
    >>> x, y = np.ones((8, 3)), [np.ones((8, 2)), np.zeros((8, 2))]
    >>> history = model.fit(x, y, epochs=5, verbose=0, callbacks=[schedule])
    >>> equalize.relation(left.kernel, right.kernel)
    'equal'
    >>> history = model.fit(x, y, initial_epoch=5, epochs=6, verbose=0, callbacks=[schedule])
    >>> equalize.relation(left.kernel, right.kernel)
    'different'

    Reference:
        Yang et al., Speeding up deep model training by sharing weights and then unsharing (2021).
    """

    def __init__(self, registry: GroupRegistry, name: str, rules: Mapping[int, Rule | None], *, on_step: bool = False):
        super().__init__()
        self.registry = checked_registry(registry)
        self.name = arguments.text("name", name, "the name of a group")
        self.on_step = arguments.flag("on_step", on_step)
        if not isinstance(rules, Mapping) or not all(isinstance(rule, Rule | None) for rule in rules.values()):
            raise TypeError(f"`rules` must be a mapping from integers to rules, or None. Received: {received(rules)}.")
        if not rules:
            raise EqualizeError(f"`rules` must have at least one rule. Received: {received(rules)}.")
        self.rules = {arguments.integer("rules", start, low=0): rule for start, rule in rules.items()}
        self._due: int | None = None
        self._first = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        groups = self._groups()
        if not _has_member(self.model, groups):
            raise NotLinkedError(
                f"TieSchedule has nothing to change in the model '{self.model.name}': group '{self.name}' has no "
                "member there. Expected: the registry that this model is linked by."
            )
        self._due = None
        self._first = int(backend.array(keras_private.steps_taken(wrapping.parts(self.model.optimizer)[0][-1]).value))

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_begin(epoch, logs)
        if not self.on_step:
            self._change(epoch)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self.on_step:
            self._change(self._first + self._before + batch)

    def _change(self, now: int) -> None:
        """Gives the group the rule that holds now, unless it has it."""
        due = max((start for start in self.rules if start <= now), default=None)
        if due is None or due == self._due:
            return
        self._due, rule = due, self.rules[due]
        if all(_settings(group.rule) == _settings(rule) for group in self._groups()):
            return
        _take_back(self.model)
        self.registry.replace(self.name, rule)

    def _groups(self) -> list[TiedGroup]:
        return self.registry.select([self.name], statistics=False)


def _settings(rule: Rule | None) -> Any:
    """What makes two rules one: all that their members agree on, and what they have inside."""
    return None if rule is None else (type(rule), rule.common_config(), rule.get_config().get("inner"))


def _has_member(model: keras.Model, groups: Iterable[TiedGroup]) -> bool:
    """Whether a model holds a member of one of the groups."""
    return bool(living.holding([model], [member.variable for group in groups for member in group.members]))


def _retrace_groups(groups: Sequence[TiedGroup]) -> None:
    """Has the steps of all models that hold a member retraced, also of those that are trained elsewhere."""
    if groups:
        living.retrace(member.variable for group in groups for member in group.members)


class PeriodicSync(_CountsSteps):
    """Makes the members of groups equal after every n-th step, and leaves them alone in between.

    Local SGD: replicas that train on different data become equal now and then, to their mean, as in federated
    averaging. The `weights` of `GroupRegistry.tie` say how much each member counts. With an outer optimizer, the change
    of the mean since the last time counts as a gradient, and the outer optimizer takes a step. With Nesterov's momentum
    that is DiLoCo.

    Members are equal, bit for bit, after the steps that it synchronizes, and not after others. If training ends between
    two, call `registry.sync("mean", name)`. Followers (`equalize.constraints.Follow`) move here instead of in the
    optimizer's step. On JAX, where an optimizer moves only what it trains, that is the only way.

    A step is a batch of `fit`, counted over all its epochs. If several run at once (`steps_per_execution`), members are
    synchronized after the execution that contains the n-th step. The outer optimizer's state lives with this object. No
    file of the model holds it.

    Args:
        registry: The `equalize.GroupRegistry` that has the groups.
        names: Name of a group or of a tie of layers, or a list of them; all groups where it is None.
        every: The number of steps from one time to the next.
        method: What members become, as in `GroupRegistry.sync`: `"mean"`, or `"first"`.
        outer_optimizer: A Keras optimizer, its name or its config, for what members agree on; None for their mean.

    Raises:
        TypeError: `registry` is not a registry, or another argument is of the wrong type.
        EqualizeError: `every` is below 1, `method` is unknown, or it is `"first"` with an outer optimizer; or when
            training starts, a group is unknown.
        NotLinkedError: Training starts, and no group has a member in the model.

    Example:
    >>> import keras, numpy as np, equalize
    >>> inputs = keras.Input((3,))
    >>> left, right = keras.layers.Dense(2), keras.layers.Dense(2)
    >>> model = keras.Model(inputs, keras.layers.Add()([left(inputs), right(inputs)]))
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("replicas", [left.kernel, right.kernel], None)
    >>> model.compile("sgd", "mse")
    >>> sync = equalize.callbacks.PeriodicSync(registry, "replicas", every=2)
    >>> history = model.fit(np.ones((8, 3)), np.ones((8, 2)), batch_size=2, verbose=0, callbacks=[sync])
    >>> registry.spread()  # after four steps
    {'replicas': 0.0}

    Reference:
        McMahan et al., Communication-efficient learning of deep networks from decentralized data (2017), algorithm 1;
        Stich, Local SGD converges fast and communicates little (2019); Douillard et al., DiLoCo: Distributed
        low-communication training of language models (2023), algorithm 1.
    """

    def __init__(
        self,
        registry: GroupRegistry,
        names: str | Sequence[str] | None = None,
        *,
        every: int,
        method: str = "mean",
        outer_optimizer: Any = None,
    ):
        super().__init__()
        self.registry = checked_registry(registry)
        self.names = () if names is None else arguments.names("names", names)
        self.every = arguments.integer("every", every, low=1)
        self.method = arguments.option("method", method, ("first", "mean"))
        self.outer_optimizer: Any = None
        if outer_optimizer is not None:
            self.outer_optimizer = configs.optimizer("outer_optimizer", outer_optimizer)
        if outer_optimizer is not None and method != "mean":
            raise EqualizeError(
                f'An outer optimizer needs the change of the mean. Expected: `method="mean"`. Received: {method!r}.'
            )
        self._agreed: dict[str, keras.Variable] = {}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        groups = self._groups()
        if not _has_member(self.model, groups):
            raise NotLinkedError(
                f"PeriodicSync has nothing to synchronize in the model '{self.model.name}': expected groups with a "
                f"member there, received {[group.name for group in groups]}. Give it the registry of this model."
            )
        followed = self._followed()
        for group in followed:
            group.drivers.add(self)
        if followed:
            self._watch(followed)
        if self.outer_optimizer is not None:
            self._agree()

    def _agree(self) -> None:
        """Has the outer optimizer begin at what members are the mean of."""
        led = self._led()
        if self.outer_optimizer.built and not {group.name for group in led} <= set(self._agreed):
            raise EqualizeError(
                f"The outer optimizer of PeriodicSync was built for the groups {list(self._agreed)}. Expected: the "
                f"same ones; received: {[group.name for group in led]}. Make a new PeriodicSync with an optimizer of "
                "its own."
            )
        for group in led:
            value = group.value
            if group.name not in self._agreed:
                self._agreed[group.name] = keras.Variable(value, dtype=backend.dtype(value), name="agreed")
            self._agreed[group.name].assign(value)
        if not self.outer_optimizer.built and self._agreed:
            self.outer_optimizer.build(list(self._agreed.values()))

    def _watch(self, followed: Sequence[TiedGroup]) -> None:
        """Has the model trace its step anew where what follows here is not what it was traced with."""
        function = self.model.train_function
        if not isinstance(function, _Watched):
            living.retrace_model(self.model)
            function = self.model.train_function = _Watched(self.model.train_function, self.model)
        function.watch(followed)

    @property
    def is_running(self) -> bool:
        """Whether a `fit` that runs has this callback; one that was interrupted has told nobody."""
        return any(callback is self for callbacks in _running_fits() for callback in callbacks)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        followed = self._followed()
        if followed and not isinstance(self.model.train_function, _Watched):  # something else retraced it
            self._watch(followed)
        last = self._steps
        super().on_train_batch_end(batch, logs)
        if last // self.every != self._steps // self.every:
            self.synchronize()

    def synchronize(self) -> None:
        """Makes the members equal now."""
        _take_back(self.model)
        led = self._led() if self._agreed else []
        for group in self._groups():
            if not group.tying.directed and group not in led:
                group.sync(self.method)
        if led:
            changes = [self._agreed[group.name].value - group.value for group in led]
            self.outer_optimizer.apply(changes, [self._agreed[group.name] for group in led])
        for group in led:
            group.assign(self._agreed[group.name].value)
        following.move(self._followed())  # at last, since leaders are members of other groups as well

    def _groups(self) -> list[TiedGroup]:
        return self.registry.select(self.names)

    def _followed(self) -> list[TiedGroup]:
        """The groups whose members follow here, in place of the optimizer's step."""
        return [group for group in self._groups() if group.tying.directed]

    def _led(self) -> list[TiedGroup]:
        """The groups for which the outer optimizer takes steps: those that nothing holds."""
        groups = [group for group in self._groups() if group.tying.same_shape and not group.of_statistics]
        return [group for group in groups if not any(member.anchor for member in group.members)]


class _Watched:
    """What a model trains by, which is traced anew when other groups follow by a callback than those of the trace."""

    def __init__(self, function: Callable[..., Any], model: keras.Model):
        self._function, self._model = function, model
        self._groups: list[TiedGroup] = []
        self._traced: list[bool] | None = None

    def watch(self, groups: Sequence[TiedGroup]) -> None:
        """Looks after more groups, which followed in the step as far as it was traced."""
        new = [group for group in groups if group not in self._groups]
        self._groups += new
        if self._traced is not None:
            self._traced += [False] * len(new)

    def __call__(self, *args: Any) -> Any:
        now = [group.is_driven for group in self._groups]
        if self._traced is not None and now != self._traced:
            living.retrace_model(self._model)
            self._function, self._model.train_function = self._model.train_function, self
        self._traced = now
        return self._function(*args)


def _running_fits() -> Iterator[list[keras.callbacks.Callback]]:
    """The callbacks of each `fit` that runs, in whatever thread: TensorFlow's strategies trace in their own."""
    for frame in sys._current_frames().values():
        while frame is not None:
            running = frame.f_locals.get("callbacks") if frame.f_code.co_name == "fit" else None
            if isinstance(running, keras.callbacks.CallbackList):
                yield list(getattr(running, "callbacks", ()))
            frame = frame.f_back  # type: ignore[assignment]


class TiedCheckpoint(keras.callbacks.ModelCheckpoint):
    """Keras's `ModelCheckpoint`, with files as `equalize.saving` writes them.

    Equal arrays are stored once, the ties travel with the model, and a file is replaced in one step. If the process
    dies during a write, the last file is whole. `equalize.saving.load_model` reads the files. Keras does, too, without
    the ties.

    Args:
        filepath: As `keras.callbacks.ModelCheckpoint` takes it, ending in `.keras`, or in `.weights.h5` with
            `save_weights_only=True`; on a local disk.
        registry: The registry whose ties to save; by default all ties of the model's weights.
        **kwargs: As `keras.callbacks.ModelCheckpoint` takes them: `monitor`, `save_best_only`, `save_freq`, ...

    Raises:
        TypeError: `filepath` is not a path, or `registry` not a registry.
        EqualizeError: The name does not end so, or is not on a local disk.

    Example:
    >>> import keras, numpy as np, os, tempfile, equalize
    >>> left, right = keras.layers.Dense(2), keras.layers.Dense(2)
    >>> model = keras.Sequential([keras.Input((2,)), left, right])
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("pair", [left.kernel, right.kernel], equalize.constraints.Equal())
    >>> model.compile("adam", "mse")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint = equalize.callbacks.TiedCheckpoint(f"{folder}/best.keras", registry, save_best_only=True)
    ...     validation = np.ones((4, 2)), np.ones((4, 2))
    ...     run = model.fit(*validation, validation_data=validation, verbose=0, callbacks=[checkpoint])
    ...     best, ties = equalize.saving.load_model(f"{folder}/best.keras")
    >>> list(ties)
    ['pair']
    """

    def __init__(self, filepath: str | os.PathLike[str], registry: GroupRegistry | None = None, **kwargs: Any):
        arguments.file("filepath", filepath, [".weights.h5" if kwargs.get("save_weights_only") else ".keras"])
        super().__init__(filepath, **kwargs)
        self.registry = None if registry is None else checked_registry(registry)

    @property
    def model(self) -> Any:
        """The model that is trained, which is saved as `equalize.saving` does it."""
        model = super().model
        return None if model is None else _Saved(model, self.registry)


class _Saved:
    """A model that is saved as `equalize.saving` does it."""

    def __init__(self, model: Any, registry: GroupRegistry | None):
        self._model, self._registry = model, registry

    def save(self, filepath: str, overwrite: bool = True) -> None:
        save_model(self._model, filepath, self._registry)

    def save_weights(self, filepath: str, overwrite: bool = True) -> None:
        save_weights(self._model, filepath)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
