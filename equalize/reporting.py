"""The table that `GroupRegistry.summary` prints."""

import math
from collections.abc import Callable, Sequence

import rich.console
import rich.markup
import rich.table

from equalize.advice import Advice
from equalize.groups import Group


def print_summary(groups: Sequence[Group], findings: int = 0, print_fn: Callable[[str], object] | None = None) -> None:
    """Prints one row a group, and the totals.

    Args:
        groups: The groups of a registry.
        findings: How many findings `GroupRegistry.diagnose` has.
        print_fn: Called with the text, free of escape codes; None prints to the terminal, as `model.summary()` does.
    """
    _print(lambda console: _render(console, groups, findings), print_fn)


def print_advice(advice: Sequence[Advice], print_fn: Callable[[str], object] | None = None) -> None:
    """Prints one row a group: agreement of gradients, distance, and the loss now and tied."""
    table = rich.table.Table()
    table.add_column("Group", overflow="fold")
    for title in ("Gradients agree (cosine)", "Distance", "Loss now", "Loss if tied", "Rise"):
        table.add_column(title, justify="right")
    for each in advice:
        figures = (f"{each.cosine:+.2f}", f"{each.distance:.3g}", f"{each.loss:.4g}", f"{each.tied_loss:.4g}")
        table.add_row(rich.markup.escape(each.group), *figures, f"{each.rise:+.3g}")
    _print(lambda console: console.print(table), print_fn)


def _print(render: Callable[[rich.console.Console], None], print_fn: Callable[[str], object] | None) -> None:
    if print_fn is None:
        render(rich.console.Console(highlight=False))
        return
    console = rich.console.Console(highlight=False, force_terminal=False, color_system=None)
    with console.capture() as capture:
        render(console)
    print_fn(capture.get())


def weights_stored(groups: Sequence[Group]) -> int:
    """Numbers held by the members, each variable counted once; constants belong to no model."""
    variables = {id(m.variable): m.variable for group in groups for m in group.members if not m.constant}
    return sum(math.prod(variable.shape) for variable in variables.values())


def weights_free(groups: Sequence[Group]) -> int:
    """Numbers that training can choose: the effective parameter count.

    A hard group has those of its common value, or none where an anchor holds it, and what views leave free. What
    does not train has none.
    """
    tied = {id(m.variable) for group in groups if group.hard for m in group.members}
    loose = {
        id(m.variable): m.variable
        for group in groups
        for m in group.members
        if not m.anchor and id(m.variable) not in tied
    }
    common = sum(
        math.prod(group.members[0].common_shape)
        for group in groups
        if group.hard and not any(member.anchor for member in group.members)
    )
    common += sum(
        math.prod(m.variable.shape) - math.prod(m.common_shape)
        for group in groups
        for m in group.members
        if group.hard and not m.anchor
    )
    return common + sum(math.prod(variable.shape) for variable in loose.values())


def _render(console: rich.console.Console, groups: Sequence[Group], findings: int) -> None:
    table = rich.table.Table(show_lines=True)
    for title, justify in (("Group", "left"), ("Rule", "left"), ("Members", "left")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for title in ("Stored", "Free", "Spread"):
        table.add_column(title, justify="right", overflow="fold")
    for group in groups:
        members = "\n".join(
            f"{m.path} {tuple(m.variable.shape)}{f' as {m.view!r}' if m.view else ''}{' (anchor)' if m.anchor else ''}"
            for m in group.members
        )
        cells = (
            group.name,
            group.rule.describe(),
            members,
            f"{weights_stored([group]):,}",
            f"{weights_free([group]):,}",
            f"{group.spread():g}",
        )
        table.add_row(*map(rich.markup.escape, cells))
    stored, free = weights_stored(groups), weights_free(groups)
    share = f" ({free / stored:.1%})" if stored else ""
    console.print(table)
    if findings:
        console.print(f" Findings: {findings}; `registry.diagnose()` says what and how to mend it")
    console.print(f" Total: {len(groups)} groups, {stored:,} weights stored, {free:,} weights free{share}")
