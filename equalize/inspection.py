"""What a registry tells about its groups, without changing anything."""

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import rich.console

from equalize import arguments, plotting, reporting, retracing
from equalize.advice import Advice, advise
from equalize.arguments import received
from equalize.diagnosis import EQUALIZE, Finding, findings
from equalize.errors import TieBrokenError
from equalize.groups import Group


class Inspection(Mapping[str, Group]):
    """The part of `equalize.GroupRegistry` that looks at groups: tables, pictures, findings, checks."""

    monitors: weakref.WeakSet[Any]
    _pending: list[dict[str, Any]]
    _models: weakref.WeakSet[keras.Model]

    def select(self, names: Sequence[str]) -> list[Group]:
        """The groups of these names, or those of a tie of layers that has the name; all without a name."""
        raise NotImplementedError

    @property
    def pending(self) -> list[str]:
        """The names of groups of a config that `link` has yet to make."""
        return [entry["name"] for entry in self._pending]

    def spread(self) -> dict[str, float]:
        """The largest entry of max − min over the members of each group: 0.0 where they are equal."""
        return {name: group.spread() for name, group in self.items()}

    def check(self, atol: float = 0.0) -> None:
        """Raises `TieBrokenError` unless the members of every hard group are equal to within `atol`.

        Args:
            atol: The largest spread that counts as equal. 0.0 asks for equal bits.

        Raises:
            TieBrokenError: The members of a hard group are further apart.
            EqualizeError: `atol` is negative or not finite.
            TypeError: `atol` is no number.
        """
        atol = arguments.number("atol", atol, low=0.0)
        broken = {name: s for name, s in self.spread().items() if self[name].hard and not s <= atol}
        if broken:
            lines = "".join(
                f"\n    '{name}': spread {spread:g}, members {', '.join(str(m) for m in self[name].members)}"
                for name, spread in broken.items()
            )
            raise TieBrokenError(
                f"Hard groups that are not equal: {len(broken)} of {sum(group.hard for group in self.values())}; "
                f"expected a spread of at most {atol:g}, received:{lines}\n{EQUALIZE}"
            )

    def summary(self, print_fn: Any = None) -> None:
        """Prints a table of the groups: rule, members, weights stored and free, and how far apart the members are.

        A registry that ends a notebook's cell shows the same table, and so does `rich.print(registry)`.

        Args:
            print_fn: Called with the table as plain text of at most 80 columns, for a log; by default it is printed,
                in color where the terminal has it.
        """
        _require_printer(print_fn)
        reporting.print_summary(list(self.values()), len(self.diagnose()), print_fn)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws which layers each group ties, and how far apart its members are.

        Above, a row for each group with a mark in the column of each layer that it ties. Below, a heat map for each
        group: the largest entry of |w_i − w_j| for each pair of members, as their views pull them back. All maps have
        one scale. A group of n members costs n·(n − 1)/2 comparisons.

        Args:
            path: The file to write; its suffix says the format, `.png`, `.svg` or `.pdf`.

        Raises:
            TypeError: `path` is no path.
            EqualizeError: The registry has no group, the suffix is another, or the folder does not exist.
            ImportError: matplotlib is not installed; the extra `plot` brings it.
        """
        plotting.plot_groups(list(self.values()), path)

    def diagnose(self, *models: keras.Model) -> list[Finding]:
        """What may go wrong with the ties though nothing is broken yet, each with a fix.

        Looks at the groups, and at models with their optimizers: averaging of weights without a monitor, of members
        and of kernels that `Invariant` keeps, clipping by the global norm, weight decay of some members only, partial
        averaging under gradient accumulation, rules that LoRA or quantization dropped, that were never linked, or
        that a layer hands to several weights, regularizers of members that differ, members that an optimizer on JAX
        does not reach, members that no longer exist, hard groups that are not equal.

        Args:
            *models: The models to look at. Without any it looks at those that were linked and at all that hold a
                member. Finding these takes a fraction of a second, and misses what `gc.freeze()` has put away.

        Returns:
            A list of findings, empty where there is nothing to say. Print one to read it.

        Raises:
            TypeError: One of `models` is no Keras model.
        """
        for model in models:
            if not isinstance(model, keras.Model):
                raise TypeError(f"`diagnose` expects Keras models. Received: {received(model)}.")
        variables = [member.variable for group in self.values() for member in group.members if not member.constant]
        looked_at = models or dict.fromkeys([*self._models, *retracing.holding(variables)])
        repaired = any(monitor.repair for monitor in self.monitors)
        return findings(list(self.values()), self.pending, list(looked_at), monitored=repaired)

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
        all others as they are: what the loss would be if its members moved 10, 25, 50 or 100 % of the way to their
        mean, and which of these is best. Where 100 % is best, tie hard; where a part of the way is, tie softly, or by
        `Equal(rate=...)`; where 0 % is, leave the members free. Small differences on few data are chance.

        Training data cannot tell: free members fit them best where they are, whether tying is right or not. Nor can
        the gradients of members, of which the table has the mean cosine: at the minimum of the loss of tied members
        they cancel, so they seem to disagree just where tying is right.

        Members that are equal stay equal, so ask before you tie; to make a group that only measures, tie softly with
        `factor=0.0`. And only members with one start can be averaged: networks trained from different random values
        have their hidden units in different orders, and their mean says nothing. Call `registry.sync("first", ...)`
        with the groups' names before you train.

        Members move as the group's rule would have them: as views show the common value, by their weights, with the
        inner constraint of `Equal`, and to the anchor where there is one. Penalties on weights, those of ties and all
        others, are left out of the loss. The model is left bit for bit as it was. Each group takes five passes over
        the data; a terminal shows a bar meanwhile.

        Args:
            model: A compiled model that all members belong to.
            x: Inputs that the model was not trained on, an array or a structure of arrays.
            y: Their targets, likewise.
            names: Names of groups, or of ties of layers; all where none is given.
            batch_size: How many samples to look at in one go.
            print_fn: Called with the table as plain text of at most 80 columns; by default it is printed.

        Returns:
            An `equalize.advice.Advice` for each group, by name.

        Raises:
            EqualizeError: The model is not compiled or lacks a member, inputs and targets do not hold the same number
                of samples, at least one, the model cannot compute its loss of them, or `batch_size` is below 1.
            TypeError: An argument is of the wrong type.
        """
        _require_printer(print_fn)
        groups = self.select(arguments.names("names", names))
        advice = advise(groups, model, x, y, arguments.integer("batch_size", batch_size, low=1))
        reporting.print_advice(advice, print_fn)
        return {each.group: each for each in advice}

    def __repr__(self) -> str:
        listed = [*map(repr, self.values()), *(f"{name!r} (not linked yet)" for name in self.pending)]
        return f"<GroupRegistry: {', '.join(listed) or 'no groups'}>"

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        yield from reporting.summary_parts(list(self.values()), len(self.diagnose()), options.max_width)

    def _repr_html_(self) -> str:
        return reporting.summary_html(list(self.values()), len(self.diagnose()))


def _require_printer(print_fn: Any) -> None:
    if print_fn is not None:
        arguments.function("print_fn", print_fn, "of a text, or None")
