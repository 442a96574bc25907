"""Optimizers that tie: `TiedOptimizer` makes one update for a whole group, from the sum of its members' gradients."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor, keras_private, wrapping
from equalize._backend.living import objects_of
from equalize._inputs import arguments, configs
from equalize._inputs.arguments import received
from equalize._linking import validation
from equalize._ties import slots
from equalize._ties.bound import group_of, leads, ties_on
from equalize._ties.following import follow_leaders
from equalize._ties.member import Member, listing
from equalize._ties.shared_update import (
    SharedUpdate,
    reduced_gradients,
    shared_updates,
    underway,
    updated_indices,
    updates_of,
)
from equalize._ties.tied_group import TiedGroup
from equalize.errors import EqualizeError, GroupMismatchError, NotLinkedError
from equalize.reductions import Reduction
from equalize.registry import GroupRegistry, checked_registry

__all__ = ["TiedOptimizer"]

_REDUCTIONS = ("sum", "mean")
_KEYS = {"name", "inner_optimizer", "registry", "reduction", "updated"}


def _of_inner(name: str) -> Any:
    """A setting that Keras and its callbacks ask an optimizer for: the inner one's, which the base class cannot set."""

    def get(self: Any) -> Any:
        return getattr(self.__dict__["inner_optimizer"], name) if "inner_optimizer" in self.__dict__ else None

    def change(self: Any, value: Any) -> None:
        if "inner_optimizer" in self.__dict__:
            setattr(self.inner_optimizer, name, value)

    return property(get, change, doc=f"The inner optimizer's `{name}`, which can be set.")


class _Built:
    """What slots were made for. It is not a list of the optimizer's, which TensorFlow would track.

    Attributes:
        variables: All variables that are trained.
        found: The hard groups that were found last, after the ties and the anchors of then.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        self.variables = list(variables)
        self.found: tuple[Any, list[SharedUpdate]] | None = None
        self._indices = {id(variable): index for index, variable in enumerate(variables)}

    def indices(self, variables: Sequence[keras.Variable]) -> list[int]:
        """The places of variables among those that are trained."""
        unknown = [getattr(v, "path", v.name) for v in variables if id(v) not in self._indices]
        if unknown:
            raise EqualizeError(
                "`apply` was given what the optimizer was not built with. Expected: variables of the model that it "
                f"trains. Received: {unknown}. Build it with all of them, or make a new TiedOptimizer."
            )
        return [self._indices[id(variable)] for variable in variables]


class _Conflicts:
    """How far the gradients of ties' uses have pointed against each other. TensorFlow would track a dict.

    Attributes:
        sums: For each tie by its name, over the steps since they were read: their number, the sum and the largest of
            the smallest cosines between two uses, and the sum of the norms of the total gradient.
    """

    def __init__(self, ties: Iterable[str]):
        self.sums = {
            tie: keras.Variable(_NO_STEPS, dtype="float32", trainable=False, name="conflict", aggregation="mean")
            for tie in ties
        }

    def add(self, tie: str, gramian: Tensor, weights: Tensor) -> None:
        """Counts one step, unless it has one use only or what is not finite."""
        n = gramian.shape[0]
        if n < 2 or tie not in self.sums:
            return
        norms = ops.sqrt(ops.diagonal(gramian))
        lengths = ops.expand_dims(norms, 0) * ops.expand_dims(norms, 1)
        cosines = ops.where(lengths > 0.0, gramian / ops.where(lengths > 0.0, lengths, 1.0), 0.0)
        smallest = ops.clip(ops.min(cosines + 2.0 * ops.eye(n, dtype=cosines.dtype)), -1.0, 1.0)
        norm = ops.sqrt(ops.maximum(ops.sum(weights * ops.sum(gramian * weights, axis=1)), 0.0))
        sums = self.sums[tie]
        steps, cosine, largest, total = ops.unstack(sums.value, 4)
        new = ops.stack([steps + 1.0, cosine + smallest, ops.maximum(largest, smallest), total + norm])
        sums.assign(ops.where(ops.isfinite(smallest + norm), new, sums.value))

    def read(self) -> dict[str, dict[str, float]]:
        """The means over the steps, and the largest of the smallest cosines, of the ties that had any; begins anew."""
        found = {}
        for tie, sums in self.sums.items():
            steps, cosine, largest, norm = map(float, backend.array(sums.value))
            sums.assign(_NO_STEPS)
            if steps:
                found[tie] = {"steps": steps, "cosine": cosine / steps, "largest": largest, "norm": norm / steps}
        return found


_NO_STEPS = [0.0, 0.0, -1.0, 0.0]


@keras.saving.register_keras_serializable(package="equalize")
class TiedOptimizer(keras.optimizers.Optimizer):
    """Trains the hard groups of a registry as if the members of each were one shared variable.

    Averaging is not sharing: under `equalize.constraints.Equal` alone every member has slots of its own, and with
    Adam the mean of n updates is not the update of the mean. This optimizer sums the members' gradients, which is the
    gradient of one shared variable, lets the inner optimizer update one member of each group, and copies the result
    to the others. From an equal start, the run is that of a model that shares the variable, for every Keras optimizer
    and its settings: weight decay, clipping, averages of weights, gradient accumulation, loss scaling. It holds one set
    of slots a group, so a step costs less than that of the untied model.

    Through views, the gradient of the common value is the sum of the adjoints, Σ Vᵢᵀ(gᵢ). Missing gradients count as
    zero. A group with an anchor stays at the anchor's value. Partial and soft groups, and variables that are not tied,
    train as usual. Entries of a member that a `Slice` leaves free have slots of their own. Slots have the shape of the
    variable that is updated. If parts of one variable are tied to each other, only the slots of one part are used.
    Members may have several floating dtypes: the widest is updated, and the others show it rounded.

    The learning rate, `iterations`, `variables` and settings such as `use_ema` and `clipnorm` are the inner
    optimizer's. What it decides for each variable, for instance by `exclude_from_weight_decay` or a `MultiOptimizer`,
    must be the same for all members of a group. `keras.callbacks.SwapEMAWeights` writes one member only: put
    `equalize.callbacks.TieMonitor` after it, or call `follow`.

    An optimizer that is loaded with a model links itself, and its registry is `model.optimizer.registry`. (In mixed
    float16, where Keras wraps the optimizer, it is `model.optimizer.inner_optimizer.registry`.) If the loaded ties do
    not fit the model, training is an error that says why. Members are compared when slots are made. If you load other
    values later, call `registry.sync()`. Otherwise all take the value of the first member.

    Args:
        inner_optimizer: A Keras optimizer, its name or its config. A `LossScaleOptimizer` may be inside or around.
        registry: The `equalize.GroupRegistry` whose hard groups are trained so. It may be linked after this, but
            before training.
        reduction: What becomes of the members' gradients: `"sum"` for the numbers of one shared variable; `"mean"`, the
            sum divided by the number of members that may move; or an object of `equalize.reductions`, such as
            `PCGrad()`, for gradients that conflict.
        name: Name of the optimizer.

    Raises:
        TypeError: `registry` is not a registry, `reduction` is something else, or `name` is not a string.
        EqualizeError: `reduction` or `name` is invalid, or `inner_optimizer` is a `TiedOptimizer` or none.
        NotLinkedError: Training starts, and no hard group of the registry has a variable that is trained.
        TieBrokenError: Slots are made, and the members of a hard group are not equal.
        GroupMismatchError: Slots are made, and a part of a group is given, or members are treated differently.

    Example:
    >>> import keras, numpy as np, equalize
    >>> inputs = keras.Input((3,))
    >>> left, right = (keras.layers.Dense(2, kernel_constraint=equalize.constraints.Equal("towers")) for _ in range(2))
    >>> model = keras.Model(inputs, keras.layers.Add()([left(inputs), right(inputs)]))
    >>> registry = equalize.GroupRegistry().link(model)
    >>> model.compile(equalize.optimizers.TiedOptimizer(keras.optimizers.Adam(), registry), "mse")
    >>> history = model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    >>> registry.spread()
    {'towers': 0.0}

    Reference:
        Rumelhart, Hinton and Williams, Learning internal representations by error propagation (1986), for the sum of
        the gradients of tied weights.
    """

    def __init__(
        self, inner_optimizer: Any, registry: GroupRegistry, *, reduction: str | Reduction = "sum", name: Any = None
    ):
        checked_registry(registry)
        reduction = _checked_reduction(reduction)
        if name is not None:
            arguments.text("name", name, "the name of the optimizer, or None")
            if "/" in name:
                raise EqualizeError(
                    f"`name` must not contain '/', which Keras parts names by. Received: {received(name)}."
                )
        inner_optimizer = _checked_inner(inner_optimizer)
        super().__init__(learning_rate=0.0, name=name)
        self._scaled_outside = False
        self._built: _Built | None = None
        self._updated: tuple[int, ...] | None = None
        self._known: frozenset[int] | None = None
        self._leaders: dict[int, int] = {}
        self._loaded = False
        self._handed_over = False
        self._conflicts: _Conflicts | None = None
        self._problem: EqualizeError | None = None
        registry.optimizers.add(self)
        self.registry = registry
        self.reduction = reduction
        self.inner_optimizer = inner_optimizer

    use_ema = _of_inner("use_ema")
    ema_momentum = _of_inner("ema_momentum")
    ema_overwrite_frequency = _of_inner("ema_overwrite_frequency")
    weight_decay = _of_inner("weight_decay")
    clipnorm = _of_inner("clipnorm")
    clipvalue = _of_inner("clipvalue")
    global_clipnorm = _of_inner("global_clipnorm")
    gradient_accumulation_steps = _of_inner("gradient_accumulation_steps")
    # What `keras.callbacks.SwapEMAWeights` swaps (Keras 3.15): of each group the member that is updated.
    _trainable_variables = _of_inner("_trainable_variables")
    _model_variables_moving_average = _of_inner("_model_variables_moving_average")

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Makes the slots: for one member of each group, and for every variable that is not tied.

        Args:
            variables: All variables to train.

        Raises:
            NotLinkedError: No hard group of the registry has a member among the variables.
            TieBrokenError: The members of a hard group are not equal.
            GroupMismatchError: A part of a group is given, or the inner optimizer treats members differently.
        """
        self._build(variables, loading=self._loaded)

    def _build(self, variables: Any, *, loading: bool) -> None:
        """Builds as `build` says. Keras builds what it loads, trained or not: without ties that waits for training."""
        variables = self._checked("variables", variables)
        if self.built or not variables:  # all is frozen, or Keras reads an HDF5 file before it knows the variables
            return
        if self._loaded or self._problem:
            self._link(variables)
        updates = self._updates(variables)
        stale = max(self._updated or (), default=0) >= len(variables)
        if loading and not updates and (stale or self._updated is None):
            self._loaded, self._updated = False, None
            return
        for update in updates:
            _require_all_members(update)
            _require_one_treatment(update, self.inner_optimizer)
            validation.require_equal_if_known(update.group)
        updated = self._updated
        if updates or stale or updated is None:
            self._require_updates(updates)
            updated = self._updated = tuple(updated_indices(updates, len(variables)))
        self._remember(updates)
        self.inner_optimizer.build([variables[index] for index in updated])
        self._built = _Built(variables)
        self.built = True

    @contextlib.contextmanager
    def handing_over(self, begun: Sequence[TiedGroup]) -> Iterator[None]:
        """While hard groups end or begin: hands their slots to the members, or the members' to them.

        A first moment of a sum of n gradients is n times that of one, and a second moment n² times. So slots are
        scaled, by the power of the gradients with which slots of their kind grow, which is measured, and the next step
        of an optimizer such as Adam is as large as the last one was. Of a group that begins, slots and values are the
        means of its members'. The inner optimizer stays, with its settings.

        Args:
            begun: The groups that begin. They are checked before anything changes.

        Raises:
            GroupMismatchError: A group begins, and the inner optimizer treats its members differently.
            EqualizeError: The weights are in a step of `fit` on JAX; call `model.jax_state_sync()` before.
        """
        if not self.built:
            yield
            return
        if any(backend.is_purged(variable) for variable in self._trained):
            raise EqualizeError(
                "TiedOptimizer cannot hand slots over: while `fit` runs on JAX they are in the compiled step. "
                "Expected: a model that has taken its state back. Call `model.jax_state_sync()` first, as "
                "`equalize.callbacks.TieSchedule` does."
            )
        try:
            before = self._updates_as_built()
        except EqualizeError:  # its ties have changed before, which it says when it is used again
            yield
            return
        for update in updates_of(begun, self._trained):
            _require_all_members(update)
            _require_one_treatment(update, self.inner_optimizer)
        yield
        after = self._updates(self._trained)
        if after != before:
            self._rebuild(before, after)

    def _rebuild(self, before: Sequence[SharedUpdate], after: Sequence[SharedUpdate]) -> None:
        """Has the inner optimizer update what is tied now, with slots from what was tied before."""
        ended = [update for update in before if update not in after]
        begun = [update for update in after if update not in before]
        for update in begun:
            update.group.sync("mean")

        # By variables: of ended groups each member, with what led it; of those that begin what leads them, with all.
        parts: dict[int, list[tuple[Member, Member, float]]] = {}
        for update in ended:
            if update.led_by is not None:
                for _, member in update.moving:
                    ended_here = (member, update.led_by, self._size(update))
                    parts.setdefault(id(member.variable), []).append(ended_here)
        led: dict[int, list[tuple[Member, list[Member], float]]] = {}
        for update in begun:
            if update.led_by is not None:
                members = [member for _, member in update.moving]
                led.setdefault(id(update.led_by.variable), []).append((update.led_by, members, self._size(update)))

        def source(old: Mapping[int, Any], variable: keras.Variable, degree: int) -> Tensor | None:
            value = old.get(id(variable))
            for member, leader, size in parts.get(id(variable), ()):
                slot = old.get(id(leader.variable))
                if slot is not None:
                    value = slots.shown(member, slots.pulled(leader, slot, degree) / size**degree, degree, value)
            for leader, members, size in led.get(id(variable), ()):
                held = [(member, old.get(id(member.variable))) for member in members]
                known = [slots.pulled(member, slot, degree) for member, slot in held if slot is not None]
                if known:
                    value = slots.shown(leader, sum(known) / len(known) * size**degree, degree, value)
            return None if value is None else backend.tensor(value)

        self._updated = tuple(updated_indices(after, len(self._trained)))
        self._remember(after)
        slots.rebuild(self.inner_optimizer, [self._trained[index] for index in self._updated], source)
        self._built, self._handed_over = _Built(self._trained), True

    def _size(self, update: SharedUpdate) -> float:
        """How many times the gradient of one use the reduction gives, where all uses have the same."""
        n = len(update.moving)
        if isinstance(self.reduction, str):
            return float({"sum": n, "mean": 1}[self.reduction])
        ones = ops.ones((n, n), "float32")
        return float(backend.array(ops.sum(_weights_of(self.reduction, ones, ops.cast(0, "int32")))))

    def _remember(self, updates: Sequence[SharedUpdate]) -> None:
        """Keeps which groups slots were made for, and which of their members have them."""
        self._known = frozenset(id(update.group) for update in updates) or None
        self._leaders = {
            id(update.group): update.moving[update.leader][0] for update in updates if update.leader is not None
        }

    def _checked(self, name: str, variables: Any) -> list[keras.Variable]:
        """Variables to train. TensorFlow's own may be among them: some that are not tied, or the values of Keras's."""
        variables = arguments.variables(name, variables, raw=True)
        if all(backend.is_variable(variable) for variable in variables):
            return variables
        members = [member.variable for group in self.registry.values() for member in group.members]
        tied = {id(variable.value): variable for variable in members}
        return [tied.get(id(variable), variable) for variable in variables]

    @property
    def _trained(self) -> list[keras.Variable]:
        """All variables that the optimizer was built for."""
        return [] if self._built is None else self._built.variables

    def _link(self, variables: Sequence[keras.Variable]) -> None:
        """Links the registry of a loaded optimizer with the model that trains the variables, where that can be done."""
        self._problem = None
        trained = {id(variable) for variable in variables}
        models = [
            model
            for model in objects_of(keras.Model)
            if trained <= {id(variable) for variable in model.trainable_variables}
        ]
        if models:
            try:
                with backend.eagerly():  # the first step may be traced
                    self.registry._link([min(models, key=lambda model: len(model.weights))])
            except EqualizeError as error:  # shown when training starts: the model may be loaded for other purposes
                self._problem = error

    @property
    def groups(self) -> list[TiedGroup]:
        """The hard groups that are updated as one variable each."""
        return [update.group for update in self._updates(self._trained)]

    @property
    def averages(self) -> bool:
        """Whether the inner optimizer keeps averages of weights, which callbacks may swap with the weights."""
        return any(optimizer.use_ema for optimizer in wrapping.everything(self.inner_optimizer))

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Any = None) -> None:
        if len(grads) == 0:
            return
        if not self.built:
            if trainable_variables is None:
                raise EqualizeError(
                    "`apply` was given gradients without variables, and the optimizer is not built. Expected: "
                    "`apply(gradients, variables)`, or `build(variables)` before."
                )
            self._build(trainable_variables, loading=False)
        if trainable_variables is None or self._built is None:
            indices: Sequence[int] = range(len(self._trained))
        else:
            indices = self._built.indices(self._checked("trainable_variables", trainable_variables))
        if len(indices) != len(grads):
            raise EqualizeError(
                f"`apply` needs a gradient, or None, for each variable. Received: {len(grads)} for "
                f"{arguments.counted(len(indices), 'variable')}. Give None for a variable that has none."
            )
        updates = self._updates_as_built()
        reduced = self._reduced(updates, dict(zip(indices, grads, strict=True)))
        with underway(updates):
            variables = [self._trained[index] for index in reduced]
            self.inner_optimizer.apply(list(reduced.values()), variables)
        self._follow(updates)

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        trainable_variables: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self.built and not trainable_variables:
            return [], list(optimizer_variables)
        if not self.built:
            raise EqualizeError(
                "`stateless_apply` needs an optimizer that is built. Received: one that is not. Call "
                "`build(variables)` before."
            )
        variables = self._trained
        if [tuple(value.shape) for value in trainable_variables] != [tuple(v.shape) for v in variables]:
            raise EqualizeError(
                "The variables that are trained are not those that the optimizer was built with. Expected: "
                f"{arguments.counted(len(variables), 'variable')}, {[variable.path for variable in variables]}. "
                f"Received: {len(trainable_variables)}. After layers were frozen or thawed make a new TiedOptimizer "
                "and compile with it."
            )
        scales = zip(self.variables, optimizer_variables, strict=True)
        conflicts = self.variables[len(self.inner_optimizer.variables) :]
        values = zip(variables, trainable_variables, strict=True)
        with keras.StatelessScope(state_mapping=[*values, *scales]) as scope:
            updates = self._updates_as_built()
            reduced = self._reduced(updates, dict(enumerate(grads)))
            updated = [variables[index] for index in self._updated or ()]
            with underway(updates):
                new_values, slots = self.inner_optimizer.stateless_apply(
                    list(optimizer_variables)[: len(self.inner_optimizer.variables)],
                    [reduced.get(index) for index in self._updated or ()],
                    [variable.value for variable in updated],
                )
            for variable, value in zip(updated, new_values, strict=True):
                variable.assign(value)
            self._follow(updates)
            slots = [*slots, *(scope.get_current_value(variable) for variable in conflicts)]
            return [scope.get_current_value(variable) for variable in variables], slots

    def _follow(self, updates: Sequence[SharedUpdate]) -> None:
        """Gives members what their leaders have become, and has follow what follows them."""
        for update in updates:
            update.follow()
        others = [member.variable for update in updates for member in update.copies if leads(member.variable)]
        if others:
            follow_leaders(others, wrapping.parts(self.inner_optimizer)[0][-1])

    def finalize_variable_values(self, var_list: Any) -> None:
        self.inner_optimizer.finalize_variable_values([self._trained[i] for i in self._updated or ()])
        if any(backend.is_purged(variable) for variable in self._trained):
            return  # a step of `fit` on JAX has failed, whose error must not be lost
        for update in self._updates(self._trained):
            update.follow()

    def follow(self) -> None:
        """Gives the members of each group the value of the one that is updated for all, which something else wrote."""
        for update in self._updates_as_built():
            update.follow()

    def watch_conflicts(self) -> bool:
        """Has the steps from now on record how far gradients conflict; whether they must be traced anew for it."""
        ties = {group.tie or group.name: None for group in self.groups}
        new = self._conflicts is None or list(self._conflicts.sums) != list(ties)
        if new:
            with backend.scope_of(self._trained[0]):
                self._conflicts = _Conflicts(ties)
        return new

    def conflicts(self) -> dict[str, dict[str, float]]:
        """How far the gradients of the uses of each tie conflicted since this was called last; empty where not watched.

        Returns:
            For each tie: the number of `steps`; the mean over them of the smallest `cosine` between the gradients of
            two uses, and the `largest` of these, which is negative where two conflicted in every step; and the mean
            `norm` of the gradient that the inner optimizer was given for the tie.
        """
        return {} if self._conflicts is None else self._conflicts.read()

    def scale_loss(self, loss: Tensor) -> Tensor:
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    @property
    def variables(self) -> list[keras.Variable]:
        """The inner optimizer's variables, and those of conflicts where they are watched, which nothing saves."""
        conflicts = [] if self._conflicts is None else list(self._conflicts.sums.values())
        return [*self.inner_optimizer.variables, *conflicts]

    @property
    def iterations(self) -> Any:
        """How many updates were made."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate, which can be set."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def loss_scale_factor(self) -> Any:
        """What the inner optimizer wants the loss to be multiplied by; None where a wrapper around this one does it."""
        if not hasattr(self, "inner_optimizer") or self._scaled_outside:
            return None
        if isinstance(self.inner_optimizer, keras.optimizers.LossScaleOptimizer):
            return self.inner_optimizer.scale_loss(1.0)
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: Any) -> None:
        # A LossScaleOptimizer sets it to None on what it wraps (Keras 3.15). TensorFlow's tracking of attributes calls
        # no setter with the value that is there already, and the base class sets it before there is an inner one.
        if hasattr(self, "inner_optimizer"):
            self._scaled_outside = factor is None
            self.inner_optimizer.loss_scale_factor = factor

    def set_weights(self, weights: Sequence[Any]) -> None:
        self.inner_optimizer.set_weights(weights)

    def save_own_variables(self, store: Any) -> None:
        """Nothing: the inner optimizer, which Keras saves beside this one, has all variables."""

    def load_own_variables(self, store: Any) -> None:
        """Nothing, as `save_own_variables`."""

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "registry": keras.saving.serialize_keras_object(self.registry),
            "reduction": self.reduction
            if isinstance(self.reduction, str)
            else keras.saving.serialize_keras_object(self.reduction),
            "updated": None if self._updated is None else list(self._updated),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "TiedOptimizer":
        """The optimizer of a config. It links its registry when it is built for the variables of a model.

        `updated` says which of the trained variables had slots, for a model whose ties cannot be linked.

        Raises:
            EqualizeError: The config is damaged, or has an optimizer of a class that Keras does not know.
        """
        if not isinstance(config, dict) or not {"inner_optimizer", "registry"} <= set(config) <= _KEYS:
            raise EqualizeError(
                f"Expected the config of a TiedOptimizer, with {sorted(_KEYS)}. Received: {received(config)}."
            )
        updated = _checked_indices(config.get("updated"))
        given = {key: value for key, value in config.items() if key != "updated"}
        with keras.saving.custom_object_scope(custom_objects or {}):
            given["registry"] = configs.restored(config["registry"], GroupRegistry, "a registry")
            optimizer = cls(**given)
        optimizer._updated = updated
        optimizer._loaded = True
        return optimizer

    def _groups(self, variables: Sequence[keras.Variable]) -> list[TiedGroup]:
        """The registry's groups, or where it has none those that are on the variables."""
        groups = list(self.registry.values())
        if not groups:
            bound = [group_of(tie) for variable in variables for tie in ties_on(variable)]
            groups = list({id(group): group for group in bound if group is not None}.values())
        return groups

    def _updates(self, variables: Sequence[keras.Variable]) -> list[SharedUpdate]:
        """The hard groups among the variables."""
        return shared_updates(self._groups(variables), variables, self._leaders)

    def _updates_as_built(self) -> list[SharedUpdate]:
        """The hard groups now, which must be those that slots were made for; found anew where ties have changed."""
        if self._built is None:
            return self._find_updates()
        groups = [(group, group.tying, group.members) for group in self._groups(self._trained)]
        anchors = [[member.anchor for member in members] for _, _, members in groups]
        if self._built.found is None or self._built.found[0] != (groups, anchors):
            self._built.found = (groups, anchors), self._find_updates()
        return self._built.found[1]

    def _find_updates(self) -> list[SharedUpdate]:
        updates = self._updates(self._trained)
        self._require_updates(updates)
        known = self._known = frozenset(id(update.group) for update in updates) if self._known is None else self._known
        new = [update.group.name for update in updates if id(update.group) not in known]
        variables = self._trained
        missing = set(updated_indices(updates, len(variables))) - set(self._updated or ())
        missing = [variables[index].path for index in sorted(missing) if variables[index].trainable]
        if new or missing:
            changed = [f"group '{name}' was not hard then" for name in new] + [f"no slots for '{p}'" for p in missing]
            raise EqualizeError(
                f"Ties have changed since the optimizer was built: {', '.join(changed)}. Expected: the groups that it "
                f"was built with; received {self.registry!r}. Make a new TiedOptimizer and compile with it (after "
                '`registry.sync("mean")`, where members are not equal yet).'
            )
        return updates

    def _require_updates(self, updates: Sequence[SharedUpdate]) -> None:
        frozen = any(group.hard and all(m.anchor for m in group.members) for group in self.registry.values())
        ended = self._handed_over or any(group.rule is None for group in self.registry.values())
        if not updates and not frozen and not ended:
            raise NotLinkedError(
                "TiedOptimizer has nothing to tie: expected a registry with a hard group among the variables that are "
                f"trained; received {self.registry!r}. Link or tie the model's layers before training: "
                "`registry.link(model)`, or `registry.tie(...)`. After `untie` or `share`, compile with another "
                "optimizer."
                f"{'' if self._problem is None else f' Linking the loaded ties failed: {self._problem}'}"
            ) from self._problem

    def _reduced(self, updates: Sequence[SharedUpdate], grads: dict[int, Tensor | None]) -> dict[int, Tensor | None]:
        """The gradients for the inner optimizer, in the order of the variables: those of a group are one."""
        how = self.reduction if isinstance(self.reduction, str) and self._conflicts is None else self._weights
        reduced = reduced_gradients(updates, grads, len(self._trained), how)
        if self._scaled_outside and isinstance(self.inner_optimizer, keras.optimizers.LossScaleOptimizer):
            # A LossScaleOptimizer around this one has unscaled what the one inside expects to be scaled.
            reduced = {i: None if g is None else self.inner_optimizer.scale_loss(g) for i, g in reduced.items()}
        return reduced

    def _weights(self, group: TiedGroup, gramian: Tensor) -> Tensor | str:
        """How much each use of the weights that a group's tie has counts, from the Gram matrix of their gradients."""
        scale = self.loss_scale_factor  # which multiplies the gradients, too
        gramian = gramian if scale is None else gramian / scale / scale
        how = self.reduction
        if isinstance(how, Reduction):
            how = _weights_of(how, gramian, self.iterations)
        if self._conflicts is not None:
            moving = len([member for member in group.members if not member.anchor])
            each = {"sum": 1.0, "mean": 1.0 / moving}
            weights = ops.full((gramian.shape[0],), each[how]) if isinstance(how, str) else how
            self._conflicts.add(group.tie or group.name, gramian, ops.cast(weights, gramian.dtype))
        return how


def _require_all_members(update: SharedUpdate) -> None:
    """Raises unless the optimizer is given every member that may move: the gradients of others would be lost."""
    moving = [member for member in update.group.members if not member.anchor]
    given = [member for _, member in update.moving]
    missing = [member for member in moving if member not in given]
    if missing:
        raise GroupMismatchError(
            f"TiedOptimizer is given a part of group '{update.group.name}': expected all {len(moving)} members that "
            f"may move, received {len(update.moving)}, without {missing[0]}. Give it the variables of all members; "
            "where optimizers differ by variable, wrap them: `TiedOptimizer(MultiOptimizer(...), registry)`."
            f"{listing(moving)}"
        )


def _require_one_treatment(update: SharedUpdate, optimizer: Any) -> None:
    """Raises unless the inner optimizer would train all members in the same way: one of them stands for all."""
    members = [member for _, member in update.moving]
    treatments = [dict(_treatment(optimizer, member.variable)) for member in members]
    for member, treatment in zip(members[1:], treatments[1:], strict=True):
        for setting, (value, fix) in treatment.items():
            expected = treatments[0].get(setting, (None, fix))[0]
            if value != expected:
                raise GroupMismatchError(
                    f"TiedOptimizer cannot train group '{update.group.name}' as one variable: the optimizer treats "
                    f"'{members[0].path}' and '{member.path}' differently. Expected: one {setting}; received "
                    f"{getattr(expected, 'name', expected)} and {getattr(value, 'name', value)}. {fix}"
                    f"{listing(members)}"
                )


def _treatment(optimizer: Any, variable: keras.Variable) -> Iterator[tuple[str, tuple[Any, str]]]:
    """What an optimizer decides variable by variable: for each setting its value, and how to make it agree."""
    for nested in wrapping.from_outside_in(optimizer):
        chosen = keras_private.optimizer_for(nested, variable)
        if chosen is not None:
            yield "optimizer", (chosen, "Map the paths of all members to one optimizer.")
            yield from _treatment(chosen, variable)
        elif nested.weight_decay:
            fix = "Call `exclude_from_weight_decay(var_list=[...])` with all members, or with none."
            yield "weight decay", (keras_private.decays(nested, variable), fix)
        adamw = keras_private.uses_adamw(nested, variable)
        if adamw is not None:
            fix = "Let `exclude_layers` match the paths of all members, or of none."
            yield "use of AdamW in Muon", (adamw, fix)


def _checked_inner(optimizer: Any) -> Any:
    found = configs.optimizer("inner_optimizer", optimizer)
    if isinstance(found, TiedOptimizer):
        raise EqualizeError(
            f"`inner_optimizer` must not be a TiedOptimizer itself. Received: the TiedOptimizer '{found.name}'. Give "
            "one of them a registry with all groups."
        )
    return found


def _checked_indices(updated: Any) -> tuple[int, ...] | None:
    """Which of the trained variables had slots, as a config says it: in ascending order, each once."""
    if updated is None:
        return None
    whole = isinstance(updated, (list, tuple)) and all(type(i) is int and i >= 0 for i in updated)
    if not whole or list(updated) != sorted(set(updated)):
        raise EqualizeError(f"`updated` must be a list of indices, ascending, or None. Received: {received(updated)}.")
    return tuple(updated)


def _checked_reduction(reduction: Any) -> str | Reduction:
    """The argument `reduction` of optimizers: a name, a reduction or its config."""
    if isinstance(reduction, dict):
        return configs.restored(reduction, Reduction, "a reduction")
    if isinstance(reduction, str):
        return arguments.option("reduction", reduction, _REDUCTIONS)
    if not isinstance(reduction, Reduction):
        raise TypeError(
            f"`reduction` must be one of {list(_REDUCTIONS)}, or an object of a class of `equalize.reductions`. "
            f"Received: {received(reduction)}."
        )
    return reduction


def _weights_of(reduction: Reduction, gramian: Tensor, step: Tensor) -> Tensor:
    """The weights that a reduction gives, checked."""
    reduction.step = step
    try:
        weights = ops.convert_to_tensor(reduction.weights(gramian))
    finally:
        del reduction.step  # which may be a placeholder of a trace
    if tuple(weights.shape) != (gramian.shape[0],):
        raise EqualizeError(
            f"`weights` of {type(reduction).__name__} must return one number for each of {gramian.shape[0]} uses, of "
            f"shape {(gramian.shape[0],)}. Received: shape {tuple(weights.shape)}."
        )
    return weights
