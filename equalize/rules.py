"""What constraints and regularizers that tie have in common: a group's name, and the binding to a member."""

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import keras

from equalize import arguments, backend, configs
from equalize.arguments import received
from equalize.errors import EqualizeError, NotLinkedError
from equalize.views import View

if TYPE_CHECKING:
    from equalize.groups import Group
from equalize.members import Member


class Rule:
    """How a group is tied. The rule that a user writes is a template; each member gets a copy bound to it.

    A copy, a pickle or a config of a bound rule is unbound: what is cloned never shares a group with its original.
    """

    ties: ClassVar[bool] = True
    """Whether it is a rule that a user gives, and not one that serves another."""

    slot: ClassVar[str]
    """The attribute of a `keras.Variable` that holds the rule."""

    own_keys: ClassVar[frozenset[str]]
    """The entries of the config that may differ between the members of one group."""

    setting: ClassVar[str]
    """The argument that says how strongly the rule ties."""

    weight: float = 1.0
    view: View | None = None
    group: str | None
    inner: Any

    given: Any = None
    """What a user gave as `inner`; a group's rule may have found another on the variables."""

    anchors: tuple[keras.Variable, ...] = ()
    """The variables that hold the member of a bound rule and that live as long as it does."""

    _binding: "tuple[Group, Member] | None" = None
    _dial: Any = None

    @property
    def count(self) -> int | None:
        """How many members the rule is for; None where any number will do."""
        return None

    def among(self, places: Sequence[int]) -> "Rule":
        """The rule for some of the members that it was given for, by their places in the group."""
        return self

    @property
    def hard(self) -> bool:
        """Whether the rule makes the members bitwise equal."""
        return False

    @property
    def strength(self) -> Any:
        """How strongly the rule ties: its factor, or its rate."""
        return getattr(self, self.setting)

    @property
    def dialled(self) -> Any:
        """The strength as computations read it: a number, or a variable that a compiled step follows."""
        return self.strength if self._dial is None else self._dial

    def checked_strength(self, strength: Any) -> float:
        """A new strength, checked as the constructor checks it."""
        raise NotImplementedError

    def make_adjustable(self) -> bool:
        """Has compiled steps read the strength from a variable, where they can; tells whether that is new to them."""
        if self._dial is None:
            self._dial = backend.dial(self.strength)
            return self._dial is not None
        return False

    def adjust(self, strength: float) -> bool:
        """Changes the strength. Tells whether compiled steps know the old one only and must be traced anew."""
        was, was_hard = self.strength, self.hard
        setattr(self, self.setting, strength)
        if self._dial is None:
            return strength != was
        self._dial.assign(strength)
        return self.hard != was_hard

    def bind(self, group: "Group", member: "Member", inner: Any) -> "Rule":
        """A copy that serves one member, with what else is on the variable as its `inner`."""
        bound = copy.copy(self)
        bound.group = group.name
        bound.inner = inner
        bound._binding = (group, member)
        return bound

    def template(self, inner: Any) -> "Rule":
        """An unbound copy that stands for the whole group."""
        template = copy.copy(self)
        template.inner = inner
        return template

    def around(self, inner: Any) -> "Rule":
        """A copy, bound as this one is, with something else inside."""
        around = self.template(inner)
        around._binding = self._binding
        around.anchors = self.anchors
        return around

    @property
    def bound_group(self) -> "Group | None":
        """The group of a bound rule."""
        return None if self._binding is None else self._binding[0]

    @property
    def bound_member(self) -> "Member | None":
        """The member that a bound rule serves."""
        return None if self._binding is None else self._binding[1]

    def _require_binding(self, where: str) -> "tuple[Group, Member]":
        if self._binding is None:
            raise NotLinkedError(
                f"{type(self).__name__}(group={self.group!r}) {where} has never been linked, so it ties nothing. "
                "Expected: a registry that knows the model before training starts. "
                "Call `equalize.GroupRegistry().link(model)` once the model is built (and again after loading or "
                "cloning it)."
            )
        return self._binding

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_binding", "_dial", "anchors")}

    def common_config(self) -> dict[str, Any]:
        """What the members of one group must agree on."""
        config: dict[str, Any] = self.template(None).get_config()  # type: ignore[attr-defined]
        return {key: value for key, value in config.items() if key not in self.own_keys}

    def describe(self) -> str:
        """The rule as one would write it, without what is at its default."""
        settings = ", ".join(f"{key}={value!r}" for key, value in self._settings().items())
        return f"{type(self).__name__}({settings})"

    def _settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{self.describe()} of group {self.group!r}>"


def checked_group(group: Any, rule: type[Rule]) -> str | None:
    """The argument `group` of a rule: a name, or None where `tie` will give it."""
    meaning = "the name of a group"
    if group is not None and not isinstance(group, str):
        meaning += f" (the {rule.setting} goes by name: `{rule.__name__}({rule.setting}=...)`)"
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


def checked_inner(get: Any, inner: Any, kind: type) -> Any:
    """The argument `inner` of a rule, from an object, a config or a name; a function will do, as it does for Keras."""
    what, problem = f"a Keras {kind.__name__.lower()}", None
    try:
        found = configs.restored(inner, kind, what, get) if isinstance(inner, dict) else get(inner)
    except Exception as error:  # whatever Keras raises about a name or a config that it does not know
        found, problem = inner, error
    if problem is not None or (found is not None and not isinstance(found, kind) and not inspect.isfunction(found)):
        raise EqualizeError(
            f"`inner` must be {what}, its config or its name. Received: {received(inner)}."
        ) from problem
    if isinstance(found, Rule) and kind is keras.constraints.Constraint:
        raise EqualizeError(
            f"`inner` must not tie: a variable belongs to one hard group. Received: {received(found)}. Give all "
            "members one group name."
        )
    return found
