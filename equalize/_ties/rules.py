"""Rules: how a group is tied. A rule is a value; what stands on a variable is a `Bound` of `equalize._ties.bound`."""

import abc
import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import keras
import numpy as np

from equalize._backend import Tensor
from equalize._inputs import arguments, configs
from equalize._inputs.arguments import received
from equalize._math import factors
from equalize.errors import EqualizeError, NotLinkedError
from equalize.views import View

Self = TypeVar("Self", bound="Rule")


class Tying:
    """A constraint or regularizer that ties: a rule, or what stands for one on a variable."""

    inner: Any
    """The constraint or regularizer that it carries inside."""


class Rule(Tying, abc.ABC):
    """Base of the constraints and regularizers that tie. A rule knows no group and no variable, and never changes."""

    slot: ClassVar[str | None]
    """The attribute of a `keras.Variable` that holds the rule: `"constraint"` or `"regularizer"`; None for no rule."""

    own_keys: ClassVar[frozenset[str]] = frozenset({"group", "weight", "view", "inner"})
    """The entries of the config that may differ between the members of one group."""

    setting: ClassVar[str | None] = None
    """The argument that says how strongly the rule ties, where there is one."""

    same_shape: ClassVar[bool] = True
    """Whether the members must have one shape, as their views pull them back."""

    one_value: ClassVar[bool] = False
    """Whether the rule moves the members to one common value, which is an anchor's where there is one."""

    directed: ClassVar[bool] = False
    """Whether the first member leads, and is never changed, and the others move, trainable or not."""

    weighted: ClassVar[bool] = True
    """Whether weights of members mean something to the rule, at least where all pairs have one strength."""

    entrywise: ClassVar[bool] = False
    """Whether `project` treats each entry by itself, so that small members of many groups can be joined. A subclass
    says so for itself, since it may project otherwise."""

    group: str | None
    view: View | None = None
    weight: float = 1.0

    weights: tuple[Any, ...] | None = None
    """While `project` or `penalty` runs: the weight of each member in a mean."""

    fixed: tuple[bool, ...] = ()
    """While `project` or `penalty` runs: whether each member is an anchor, which is never moved."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Has the rule refuse changes once its constructor, the one of its own class, has returned."""
        super().__init_subclass__(**kwargs)
        cls.entrywise = vars(cls).get("entrywise", False)
        if "__init__" not in vars(cls):
            return
        construct = cls.__init__

        @functools.wraps(construct)
        def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **kwargs)
            if type(self).__init__ is constructor:
                vars(self)["_made"] = True

        cls.__init__ = constructor

    def __setattr__(self, name: str, value: Any) -> None:
        if "_made" in self.__dict__:
            raise EqualizeError(
                f"A rule does not change once it is made: cannot set `{name}` of {self.describe()}. Expected: a new "
                "rule in its place. Call `registry.replace(name, rule)`."
            )
        super().__setattr__(name, value)

    @property
    def hard(self) -> bool:
        """Whether the rule makes the members bitwise equal."""
        return False

    @property
    def enforced(self) -> bool:
        """Whether the members are as the rule has them after every step, exactly or up to rounding."""
        return self.hard

    @property
    def count(self) -> int | None:
        """How many members the rule is for; None for any number."""
        return None

    def subset(self: Self, places: Sequence[int]) -> Self:
        """The rule for some of the members that it was made for, by their places in the group."""
        return self

    @property
    def strength(self) -> Any:
        """How strongly the rule ties: its factor, or its rate; None where it has no such number."""
        return None if self.setting is None else getattr(self, self.setting)

    def checked_strength(self, strength: Any) -> float:
        """A strength, checked as the constructor checks it."""
        raise NotImplementedError

    def having(self: Self, **attributes: Any) -> Self:
        """A copy with other attributes."""
        made = copy.copy(self)
        vars(made).update(attributes)
        return made

    def __call__(self, x: Tensor) -> Tensor:
        where = f"on '{getattr(x, 'path', 'a tensor')}'"
        raise NotLinkedError(
            f"{type(self).__name__}(group={self.group!r}) {where} has never been linked, so it ties nothing. "
            "Expected: a registry that knows the model before training starts. "
            "Call `equalize.GroupRegistry().link(model)` once the model is built (and again after loading or "
            "cloning it)."
        )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON-serializable data."""
        raise NotImplementedError

    def common_config(self) -> dict[str, Any]:
        """What the members of one group must agree on."""
        return {key: value for key, value in self.having(inner=None).get_config().items() if key not in self.own_keys}

    def describe(self) -> str:
        """The rule as one would write it, without what is at its default."""
        settings = ", ".join(f"{key}={value!r}" for key, value in self._settings().items())
        return f"{type(self).__name__}({settings})"

    def _settings(self) -> dict[str, Any]:
        """What `describe` shows: the arguments that say how the rule ties, where they are not at their defaults."""
        parameters = inspect.signature(type(self).__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        shown = {key: value for key, value in self.get_config().items() if key not in self.own_keys}
        return {key: Short(value) for key, value in shown.items() if repr(value) != repr(defaults.get(key))}

    def __repr__(self) -> str:
        return f"<{self.describe()} of group {self.group!r}>"


class Factored(Rule):
    """A rule whose strength is a factor: a number, or where it is `pairwise` also a matrix with one for each pair."""

    setting = "factor"
    pairwise: ClassVar[bool] = False
    """Whether `factor` may be a matrix with an entry for each pair of members, which the rule applies by itself."""

    factor: float | factors.Factors

    def checked_factor(self, factor: Any) -> float | factors.Factors:
        """The argument `factor`."""
        return factors.checked_factor(factor) if self.pairwise else self.checked_strength(factor)

    def checked_strength(self, strength: Any) -> float:
        return arguments.number("factor", strength, low=0.0)

    @property
    def count(self) -> int | None:
        return len(self.factor) if isinstance(self.factor, tuple) else None

    def subset(self, places: Sequence[int]) -> Any:
        if not isinstance(self.factor, tuple) or len(places) == len(self.factor):
            return self
        return self.having(factor=factors.subset(self.factor, places))

    @property
    def _matrix(self) -> np.ndarray | None:
        """The factor of each pair; None where all have one."""
        return np.array(self.factor) if isinstance(self.factor, tuple) else None

    def get_config(self) -> dict[str, Any]:
        return {"factor": [list(row) for row in self.factor] if isinstance(self.factor, tuple) else self.factor}


class Free(Rule):
    """The rule of a group that is not tied: it is measured, compared, and synchronized now and then."""

    slot = None

    def __init__(self) -> None:
        self.group = None
        self.inner = None

    def get_config(self) -> dict[str, Any]:
        return {}

    def describe(self) -> str:
        return "free"


class Short:
    """A value as messages and tables write it: matrices and long ones by what they are."""

    def __init__(self, value: Any):
        self._value = value

    def __repr__(self) -> str:
        if isinstance(self._value, list) and any(isinstance(row, list) for row in self._value):
            return f"<{len(self._value)}×{len(self._value[0])} matrix>"
        text = repr(self._value)
        return text if len(text) <= 40 else f"<{type(self._value).__name__}>"


def checked_group(group: Any, rule: Rule) -> str | None:
    """The argument `group` of a rule: a name, or None where `tie` will give it."""
    meaning = "the name of a group"
    if group is not None and not isinstance(group, str) and rule.setting is not None:
        meaning += f" (the {rule.setting} goes by name: `{type(rule).__name__}({rule.setting}=...)`)"
    return None if group is None else arguments.text("group", group, meaning)


def checked_view(view: Any) -> View | None:
    """The argument `view` of a rule, from an object or a config."""
    if isinstance(view, dict):
        return configs.restored(view, View, "a view")
    if view is not None and not isinstance(view, View):
        raise TypeError(
            f"`view` must be a view of `equalize.views`, for instance `Transpose()`. Received: {received(view)}."
        )
    return view


def view_config(view: View | None) -> dict[str, Any] | None:
    """The entry `view` of a rule's config."""
    return None if view is None else keras.saving.serialize_keras_object(view)


def checked_inner(get: Any, inner: Any, kind: type, *, tying: bool = True) -> Any:
    """The argument `inner`, from an object, a config or a name; a function will do, as it does for Keras.

    A rule may have another one inside, for another group that the variable belongs to, or belongs to in part.
    """
    what, problem = f"a Keras {kind.__name__.lower()}", None
    try:
        found = configs.restored(inner, kind, what, get) if isinstance(inner, dict) else get(inner)
    except Exception as error:  # whatever Keras raises about a name or a config that it does not know
        found, problem = inner, error
    if problem is not None or (found is not None and not isinstance(found, kind) and not inspect.isfunction(found)):
        raise EqualizeError(
            f"`inner` must be {what}, its config or its name. Received: {received(inner)}."
        ) from problem
    if isinstance(found, Tying) and not (tying and isinstance(found, Rule)):
        raise EqualizeError(
            f"`inner` must not tie. Received: {received(found)}. Give the layer the rule itself, with this constraint "
            "as its `inner`."
        )
    return found
