"""What may go wrong with the ties of a model though nothing is broken yet."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from equalize._backend import keras_private, living, wrapping
from equalize._inputs.arguments import counted
from equalize._linking import pairing
from equalize._reports.invariance import has_invariant
from equalize._ties.bound import Bound, group_of, own, rule_of, ties_on
from equalize._ties.effects import Effect, described, same
from equalize._ties.rules import Rule
from equalize._ties.spread import pulled_arrays
from equalize._ties.tied_group import TiedGroup

EQUALIZE = (
    'After averaging of weights (`use_ema`) call `registry.sync("mean")`, which is exact. After loading weights that '
    "differ call `registry.sync()`, which gives every member the value of the first."
)
"""What to do about hard groups that are not equal."""


@dataclass(frozen=True)
class Finding:
    """One thing that deserves a look.

    Attributes:
        kind: A short name for the kind of finding, for instance `"ema"`.
        subject: The group, or the layer, that it is about.
        message: What was found.
        fix: What to do about it.

    Example:
    >>> import keras, equalize
    >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
    >>> model = keras.Sequential([keras.Input((2,)), first, second])
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
    >>> changed = first.kernel.assign(keras.ops.ones((2, 2)))
    >>> (finding,) = registry.diagnose()
    >>> finding.kind, finding.subject, "registry.sync()" in finding.fix
    ('unequal', 'pair', True)
    """

    kind: str
    subject: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"[{self.kind}] '{self.subject}': {self.message} {self.fix}"


def findings(
    groups: Sequence[TiedGroup],
    pending: Sequence[str],
    models: Sequence[keras.Model],
    *,
    monitored: bool,
    conflicts: Mapping[str, Mapping[str, float]],
) -> list[Finding]:
    """All findings about groups, and about the models that hold their members.

    Args:
        groups: The groups of a registry.
        pending: The names of groups of a config that are not linked yet.
        models: The models to look at.
        monitored: Whether a `TieMonitor` makes the groups equal when training ends.
        conflicts: For ties what `TiedOptimizer.conflicts` said of the last epoch that was watched.
    """
    found = [*_pending(pending), *_unequal(groups), *_lost(groups), *_regularized(groups), *_parted(groups, models)]
    found += [*_pulled_to_the_frozen(groups), *_still(groups), *_conflicting(conflicts)]
    for model in models:
        found += _undone(model)
        parts = wrapping.parts(getattr(model, "optimizer", None))
        if not parts:
            continue
        found += [*_swapped(model), *([] if monitored else _invariant(model, parts))]
        own = {id(weight) for weight in model.weights}
        as_one = {id(group) for part in parts for optimizer in part for group in _updated_as_one(optimizer)}
        for group in groups:
            if group.of_statistics:  # which no optimizer trains
                continue
            moving = [member.variable for member in group.members if not member.anchor]
            if id(group) not in as_one and any(id(member.variable) in own for member in group.members):
                found += _about_optimizers(group, _trained_by(parts, moving), monitored=monitored)
                found += _out_of_reach(group, model.optimizer, moving)
    return list(dict.fromkeys(found))


def _conflicting(conflicts: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    """Ties of uses that pull against each other all the time."""
    for tie, found in conflicts.items():
        if found["steps"] >= _STEPS and found["largest"] < 0.0:
            yield Finding(
                "conflict",
                tie,
                f"the gradients of two uses pointed against each other in each of the {found['steps']:.0f} steps of "
                f"the last epoch: their smallest cosine was {found['cosine']:.2f} in the mean.",
                "Give `TiedOptimizer` a reduction, such as `equalize.reductions.PCGrad()`, or tie these weights "
                "softly or not at all; `registry.advise` says what held-out data say of that.",
            )


_STEPS = 10  # fewer may be chance


def _updated_as_one(optimizer: Any) -> list[TiedGroup]:
    """The groups of a `TiedOptimizer`; before it is built, those that it will find."""
    if not hasattr(optimizer, "registry"):
        return []
    return optimizer.groups if optimizer.built else [group for group in optimizer.registry.values() if group.hard]


def _trained_by(parts: Sequence[Sequence[Any]], variables: Sequence[keras.Variable]) -> list[tuple[Any, Any]]:
    """The innermost optimizers with those of the variables that each updates.

    One of several knows its variables when it is built, by the first step, and is left out until then.
    """
    if len(parts) == 1:
        return [(parts[0][-1], variables)]
    known = [{id(variable) for variable in keras_private.updated_variables(part[-1])} for part in parts]
    trained = [[variable for variable in variables if id(variable) in ids] for ids in known]
    return [(part[-1], variables) for part, variables in zip(parts, trained, strict=True) if variables]


def _pending(names: Iterable[str]) -> Iterator[Finding]:
    for name in names:
        yield Finding(
            "pending",
            name,
            "the tie was loaded and is not linked yet, so it ties nothing.",
            "Call `registry.link(model)`, or tie the variables again with `registry.tie`.",
        )


def _regularized(groups: Iterable[TiedGroup]) -> Iterator[Finding]:
    """Hard groups whose members have regularizers of their own that differ: a shared variable could have only one."""
    for group in groups:
        moving = [member for member in group.members if not member.anchor]
        given = [own(member.variable.regularizer) for member in moving]
        seen = [Effect(each, member.view if member.whole else None) for member, each in zip(moving, given, strict=True)]
        if group.hard and not all(same(seen[0], each, list(pulled_arrays(moving[:1]))) for each in seen[1:]):
            listed = ", ".join(f"'{m.path}': {described(each)}" for m, each in zip(moving, given, strict=True))
            yield Finding(
                "regularizers",
                group.name,
                f"the members' own regularizers differ, and count as their mean ({listed}).",
                "Give all members the same regularizer.",
            )


def _still(groups: Iterable[TiedGroup]) -> Iterator[Finding]:
    """Groups in which nothing trains, so that no step has their members follow."""
    for group in groups:
        directed = group.tying.directed and not group.of_statistics and not group.is_driven
        if directed and not any(member.variable.trainable for member in group.members):
            yield Finding(
                "followers",
                group.name,
                "no member is trainable, so no step of an optimizer has the others follow.",
                "Make the member that leads trainable, or call `registry.project(name)` where they are to move.",
            )


def _pulled_to_the_frozen(groups: Iterable[TiedGroup]) -> Iterator[Finding]:
    """Partial ties to what does not train, which people make who want it to follow."""
    for group in groups:
        partial = group.tying.one_value and not group.hard and not group.tying.directed and not group.of_statistics
        frozen = [member for member in group.members if member.anchor and not member.constant] if partial else []
        if frozen and not all(member.anchor for member in group.members):
            yield Finding(
                "frozen",
                group.name,
                f"'{frozen[0].path}' is not trainable, so it stays, and the others are pulled to it.",
                "If it is meant to follow them, as the teacher of a mean teacher does, tie with "
                "`equalize.constraints.Follow(rate=...)`, and name the member that leads first.",
            )


def _unequal(groups: Iterable[TiedGroup]) -> Iterator[Finding]:
    for group in groups:
        if group.hard and group.spread() != 0.0:
            yield Finding(
                "unequal",
                group.name,
                f"the members of a hard group differ by up to {group.spread():g}.",
                EQUALIZE,
            )


def _lost(groups: Iterable[TiedGroup]) -> Iterator[Finding]:
    """Variables that layers no longer have. The group continues without them, or with what nobody uses."""
    held = {id(variable) for layer in living.objects_of(keras.Layer) for variable in pairing.every_weight(layer)}
    for group in groups:
        # An optimizer may keep a variable alive. One that never was a layer's has a path of one part.
        left = [m.path for m in group.members if "/" in m.path and not m.constant and id(m.variable) not in held]
        lost = [*group.lost, *left]
        if lost:
            listed = ", ".join(f"'{path}'" for path in lost)
            yield Finding(
                "lost",
                group.name,
                f"layers have lost {listed}, and the group ties {counted(len(group.members) - len(left), 'weight')} "
                "that they have.",
                "Rebuilding a layer and quantization make new variables: tie those with `registry.tie`. If a model "
                "was deleted, there is nothing to do.",
            )


def _parted(groups: Iterable[TiedGroup], models: Iterable[keras.Model]) -> Iterator[Finding]:
    """Moving statistics of layers all of whose weights are those of other layers, but not the statistics."""
    kept = {id(m.variable) for group in groups if group.of_statistics for m in group.members}
    hard = {id(m.variable): group for group in groups if group.hard for m in group.members}
    found: dict[str, list[str]] = {}
    for layer in {id(each): each for model in models for each in keras_private.flattened(model)}.values():
        inside = list(keras_private.flattened(layer))
        weights = [weight for each in inside for weight in pairing.made_trainable(each)]
        own = {id(weight) for weight in weights}
        if weights and all(key in hard and any(id(m.variable) not in own for m in hard[key].members) for key in own):
            for statistic in (statistic for each in inside for statistic in pairing.statistics(each)):
                if id(statistic) not in kept:
                    found.setdefault(hard[id(weights[0])].name, []).append(statistic.path)
    for name, paths in found.items():
        yield Finding(
            "statistics",
            name,
            f"the layers are tied, and their moving statistics are not ({', '.join(map(repr, dict.fromkeys(paths)))}), "
            "so they give different results in inference.",
            "Tie the layers with `registry.tie(..., statistics=True)`.",
        )


def _undone(model: keras.Model) -> Iterator[Finding]:
    """Rules that a layer declares and its variables do not have, or have unlinked, and kernels under LoRA."""
    for layer in keras_private.flattened(model):
        if getattr(layer, "lora_enabled", False):
            yield from _under_lora(layer)
            continue
        yield from _handed_on(layer)
        present = [tie for weight in layer.weights for tie in ties_on(weight)]
        linked = {tie.group.name for tie in present if isinstance(tie, Bound)}
        unlinked = {(type(tie), tie.group) for tie in present if isinstance(tie, Rule)}
        for rule in vars(layer).values():
            if not isinstance(rule, Rule) or not layer.built or rule.group in linked:
                continue
            if (type(rule), rule.group) not in unlinked:
                yield Finding(
                    "dropped",
                    layer.name,
                    f"the layer was given {rule.describe()} of group '{rule.group}', and none of its variables has it.",
                    "Quantization and assigning `variable.constraint` do that: tie what the layer has now with "
                    "`registry.tie`, or leave the layer out of them.",
                )
            else:
                yield Finding(
                    "unlinked",
                    layer.name,
                    f"{rule.describe()} of group '{rule.group}' is not linked.",
                    "Call `registry.link(model)`.",
                )


def _handed_on(layer: keras.Layer) -> Iterator[Finding]:
    """Rules that a layer passes on to several weights: a `MultiHeadAttention` to those of all its projections."""
    rules = [(type(rule), rule.group) for rule in vars(layer).values() if isinstance(rule, Rule)]
    for kind, name in dict.fromkeys(rules):
        tied = [w for w in layer.weights if any(_is(rule_of(tie), kind, name) for tie in ties_on(w))]
        if len(tied) > rules.count((kind, name)):
            yield Finding(
                "handed_on",
                layer.name,
                f"the layer gives one {kind.__name__} to several weights, and so ties them to each other "
                f"({', '.join(repr(weight.path) for weight in tied)}).",
                "If that is not meant, leave the rule out of the layer and tie weights with `registry.tie`.",
            )


def _is(rule: Rule, kind: type, name: str | None) -> bool:
    return type(rule) is kind and rule.group == name


def _under_lora(layer: keras.Layer) -> Iterator[Finding]:
    """Keras 3.15 freezes a kernel under LoRA and hands its regularizer to the two factors of what is added to it."""
    factors = [weight for weight in layer.trainable_weights if weight.name.startswith("lora_")]
    if all(any(group_of(tie) is not None for tie in ties_on(factor)) for factor in factors):
        return
    for rule in (rule_of(tie) for weight in layer.non_trainable_weights for tie in ties_on(weight)):
        yield Finding(
            "lora",
            layer.name,
            f"LoRA has frozen a kernel of group '{rule.group}' and trains an addition to it, which is not tied.",
            "Leave tied layers out of LoRA; or enable it in all layers of the group, with one rank, and tie the "
            "factors by `registry.tie('a', [layer.lora_kernel_a for layer in layers], equalize.constraints.Equal())` "
            "and so on. A tie of layers that is made after LoRA is enabled has the factors.",
        )


def _about_optimizers(group: TiedGroup, trained: Sequence[tuple[Any, Any]], *, monitored: bool) -> Iterator[Finding]:
    """What optimizers do to a group whose members they update one by one."""
    if group.hard and not monitored and any(optimizer.use_ema for optimizer, _ in trained):
        yield Finding(
            "ema",
            group.name,
            "`use_ema` writes averages over the members at the end of `fit`, which are not equal.",
            "Train with `callbacks=[equalize.callbacks.TieMonitor(registry)]`, or call "
            '`registry.sync("mean")` afterwards.',
        )
    for optimizer, variables in trained:
        if group.hard and optimizer.global_clipnorm and len(variables) > 1:
            yield Finding(
                "global_clipnorm",
                group.name,
                f"`global_clipnorm` counts the gradient of each of the {len(variables)} members, where one shared "
                "variable would count once, with their sum.",
                "Expect other clipping than with sharing, or use `equalize.optimizers.TiedOptimizer`; `clipnorm` "
                "treats each member alone.",
            )
        if group.tying.directed:
            followers = [variable.path for variable in variables if variable.trainable]
            if not followers:
                continue
            yield Finding(
                "followers",
                group.name,
                f"'{followers[0]}' follows, and the optimizer trains it as well, with weight decay and momentum.",
                "Set `trainable = False` on what follows.",
            )
            continue
        if group.projects and not group.tying.enforced and optimizer.gradient_accumulation_steps:
            yield Finding(
                "accumulation",
                group.name,
                f"the {group.tying.setting} {group.tying.strength:g} works in each of the "
                f"{optimizer.gradient_accumulation_steps} micro-steps of an update, since Keras calls constraints in "
                "all of them.",
                "Choose it for one micro-step: a rate of 1 − (1 − rate)^(1/steps), or the factor divided by the steps.",
            )
    decays = {
        (optimizer.weight_decay or 0.0) if keras_private.decays(optimizer, variable) else 0.0
        for optimizer, variables in trained
        for variable in variables
    }
    if len(decays) > 1:
        yield Finding(
            "weight_decay",
            group.name,
            "weight decay is not the same for all members, so the group decays at a rate in between.",
            "Exclude all members from weight decay, or none.",
        )


def _swapped(model: keras.Model) -> Iterator[Finding]:
    """Groups of which `SwapEMAWeights` would swap one member, with nobody to tell the others."""
    tied = [optimizer for optimizer in wrapping.everything(model.optimizer) if hasattr(optimizer, "registry")]
    alone = [optimizer for optimizer in tied if optimizer.averages and not optimizer.registry.monitors]
    swaps = living.objects_of(keras.callbacks.SwapEMAWeights) if alone else []
    if any(swap.model in (None, model) for swap in swaps):
        for group in (group for optimizer in alone for group in _updated_as_one(optimizer)):
            yield Finding(
                "ema",
                group.name,
                "`SwapEMAWeights` writes the averages of a `TiedOptimizer` over one member of the group, so what is "
                "evaluated is half averaged.",
                "Train with `callbacks=[keras.callbacks.SwapEMAWeights(), equalize.callbacks.TieMonitor(registry)]`.",
            )


def _invariant(model: keras.Model, parts: Sequence[Sequence[Any]]) -> Iterator[Finding]:
    """Kernels whose averages are not invariant."""
    kept = [variable for variable in model.trainable_variables if has_invariant(variable.constraint)]
    for optimizer, variables in _trained_by(parts, kept):
        for variable in variables if optimizer.use_ema else ():
            yield Finding(
                "ema",
                variable.path,
                "`use_ema` writes averages over the kernel at the end of `fit`, which are not as its `Invariant` has "
                "them.",
                "Train with `callbacks=[equalize.callbacks.TieMonitor(registry)]`; the registry may be empty.",
            )


def _out_of_reach(group: TiedGroup, optimizer: Any, moving: Sequence[keras.Variable]) -> Iterator[Finding]:
    """Members that the optimizer of a model does not carry on JAX, once it is built."""
    known = {id(variable) for variable in keras_private.updated_variables(optimizer)}
    inside = [id(variable) in known for variable in moving]
    if keras.backend.backend() == "jax" and any(inside) and not all(inside):
        yield Finding(
            "optimizers",
            group.name,
            "not all members are trained by the optimizer of this model, and on JAX it reaches no other variable.",
            "Train all members with one optimizer, or apply the optimizers inside one `keras.StatelessScope`.",
        )
