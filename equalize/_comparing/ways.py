"""The ways to tie that `equalize.compare` is told."""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras

from equalize._inputs import arguments
from equalize._inputs.arguments import received
from equalize._ties.rules import Rule
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.optimizers import TiedOptimizer
from equalize.reductions import Reduction
from equalize.registry import GroupRegistry
from equalize.regularizers import MeanL2
from equalize.sharing import share

Members: TypeAlias = Mapping[str, Any]
"""What `GroupRegistry.tie` takes, by the names of groups."""

NAMES = ("untied", "shared", "exact", "hard", "partial", "soft")


@dataclass(frozen=True)
class Way:
    """One way to tie.

    Attributes:
        name: What tables call it.
        tie: Ties the members of a model, given a registry and the strength; returns what a model is trained with
            besides, as a function of the user's does.
        strengths: The strengths to try; None for a way that has none.
        identity: What the runs of another way, in a file, do not have.
    """

    name: str
    tie: Callable[[keras.Model, GroupRegistry, Members, float | None], Any]
    strengths: tuple[float | None, ...] = (None,)
    identity: str = ""


def ways_of(given: Any) -> list[Way]:
    """The argument `ways`.

    Raises:
        TypeError: Something in it is no way to tie.
        EqualizeError: A name or a strength is invalid, or two ways have one name.
    """
    if given is None:
        given = NAMES
    if not isinstance(given, (list, tuple)) or not given:
        raise TypeError(f"`ways` must be a list of ways to tie, or None for all. {_EXPECTED} {_found(given)}")
    ways = [_way(each) for each in given]
    names = [way.name for way in ways]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EqualizeError(
            f"`ways` has '{twice}' twice. Expected: each way once, with all its strengths, for instance "
            f'`("soft", [0.1, 1.0])`. Received: {names}.'
        )
    return ways


_EXPECTED = (
    f"Expected: {', '.join(map(repr, NAMES))}, a rule, a reduction, a function of `(model, registry, members)`, or a "
    'pair of one of these and a list of strengths, as in `("soft", [0.1, 1.0])`.'
)


def _found(given: Any) -> str:
    return f"Received: {received(given)}."


def _way(given: Any) -> Way:
    what: Any
    what, strengths = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if isinstance(what, str):
        arguments.option("ways", what, NAMES)
        if what in _STRONG:
            rule, grid = _STRONG[what]
            return Way(what, _by_rule(rule), _strengths(grid if strengths is None else strengths, rule), what)
        if strengths is not None:
            raise EqualizeError(f"The way '{what}' has no strength. Expected: `{what!r}` alone. {_found(given)}")
        return Way(what, _WEAK[what], identity=what)
    if isinstance(what, type) and issubclass(what, Rule):
        kind: Any = what
        what = kind()
    if isinstance(what, Rule):
        return _way_of_rule(what, strengths)
    if isinstance(what, Reduction) and strengths is None:
        return Way(f"exact, {what!r}", functools.partial(_exact, reduction=what), identity=repr(what))
    if callable(what) and not isinstance(what, _NO_FUNCTIONS):
        name = getattr(getattr(what, "func", what), "__name__", type(what).__name__)
        if strengths is None:
            return Way(name, lambda model, registry, members, _: what(model, registry, members), identity=name)
        return Way(name, what, _strengths(strengths), name)
    raise TypeError(f"`ways` has something that is no way to tie. {_EXPECTED} {_found(given)}")


_NO_FUNCTIONS = (type, keras.Layer, keras.constraints.Constraint, keras.regularizers.Regularizer)


def _way_of_rule(rule: Rule, strengths: Any) -> Way:
    config = json.dumps([type(rule).__name__, rule.get_config()], sort_keys=True, default=repr)
    if strengths is None and not isinstance(rule.strength, float):
        return Way(rule.describe(), _by_rule(rule), identity=config)
    if rule.setting is None:
        raise EqualizeError(f"The rule {rule.describe()} has no strength. Expected: the rule alone. {_found(rule)}")
    # The name leaves the strength out, which has a column of its own, and so does what runs are known by.
    without = [f"{key}={value!r}" for key, value in rule._settings().items() if key != rule.setting]
    name = type(rule).__name__ + (f"({', '.join(without)})" if without else "")
    return Way(name, _by_rule(rule), _strengths([rule.strength] if strengths is None else strengths, rule), config)


def _strengths(given: Any, rule: Rule | None = None) -> tuple[float, ...]:
    if not isinstance(given, (list, tuple)) or not given:
        raise TypeError(f"The strengths of a way must be a list of numbers. {_found(given)}")
    checked = arguments.number if rule is None else lambda _, value: rule.checked_strength(value)
    return tuple(sorted({checked("strengths", value) for value in given}))


def _by_rule(rule: Rule) -> Callable[..., None]:
    def tie(model: keras.Model, registry: GroupRegistry, members: Members, strength: float | None) -> None:
        own = rule if strength is None else rule.having(**{str(rule.setting): strength})
        for name, given in members.items():
            registry.tie(name, given, own)

    return tie


def _untied(model: keras.Model, registry: GroupRegistry, members: Members, strength: float | None) -> None:
    """Ties nothing. Free groups say how far members come to be apart, where these can be compared."""
    for name, given in members.items():
        with contextlib.suppress(EqualizeError):
            registry.tie(name, given, None)


def _shared(model: keras.Model, registry: GroupRegistry, members: Members, strength: float | None) -> None:
    for name, given in members.items():
        if any(isinstance(member, tuple) for member in given):
            raise GroupMismatchError(
                f"'shared' does not suit group '{name}': a member with a view needs a variable of its own. Expected: "
                "layers, or variables without views. 'exact' gives the numbers of one shared variable."
            )
        share(*given)


def _exact(
    model: keras.Model,
    registry: GroupRegistry,
    members: Members,
    strength: float | None,
    reduction: str | Reduction = "sum",
) -> Any:
    _by_rule(Equal())(model, registry, members, None)
    return functools.partial(TiedOptimizer, registry=registry, reduction=reduction)


_WEAK: dict[str, Any] = {"untied": _untied, "shared": _shared, "exact": _exact, "hard": _by_rule(Equal())}
_STRONG: dict[str, tuple[Rule, list[float]]] = {
    "partial": (Equal(rate=0.5), [0.003, 0.03, 0.3]),
    "soft": (MeanL2(), [0.001, 0.01, 0.1, 1.0]),
}
