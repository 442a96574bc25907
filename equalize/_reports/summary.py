"""What a registry shows of itself: tables for terminals, logs and notebooks."""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence

import keras
import rich.box
import rich.console
import rich.markup
import rich.table

from equalize._inputs.arguments import counted
from equalize._reports.advice import FRACTIONS, Advice
from equalize._reports.results import WITHIN, Row
from equalize._ties.tied_group import TiedGroup, by_tie

# Logs are read in editors and mail, and by programs that know ASCII only.
_LOG_WIDTH = 80

_TITLES = ("Group", "Rule", "Members", "Stored", "Free", "Spread")
_TEXTS = 3  # the first of them are text, and the others numbers
_NARROW = (14, 19)  # where there is little room it goes to the paths of members
_BETWEEN = 3  # columns


def print_summary(
    groups: Sequence[TiedGroup],
    findings: int = 0,
    print_fn: Callable[[str], object] | None = None,
    *,
    expand: bool = False,
) -> None:
    """Prints one row a group, or a tie of layers, and the totals.

    Args:
        groups: The groups of a registry.
        findings: How many findings `GroupRegistry.diagnose` has.
        expand: Whether each group of a tie of layers has a row of its own.
        print_fn: Called with the text, free of escape codes and at most 80 columns wide; None prints to the terminal,
            as `model.summary()` does.
    """
    plain = print_fn is not None

    def render(console: rich.console.Console) -> None:
        console.print(*summary_parts(groups, findings, console.width, plain=plain, expand=expand), sep="\n")

    _print(render, print_fn)


def print_advice(advice: Sequence[Advice], print_fn: Callable[[str], object] | None = None) -> None:
    """Prints one row a group: the loss by how far its members moved, the best of these, and the cosine of gradients."""
    title = "Loss if the members moved this far to their mean"
    table = rich.table.Table(title=title, box=_box(plain=print_fn is not None), show_edge=False, pad_edge=False)
    table.add_column("Group", overflow="fold")
    for heading in (*map(_percent, FRACTIONS), "Best", "Cosine"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in advice:
        losses = [_short(each.losses[fraction]) for fraction in FRACTIONS]
        cosine = "nan" if math.isnan(each.cosine) else f"{each.cosine:+.2f}"
        table.add_row(rich.markup.escape(each.group), *losses, _percent(each.best), cosine)
    _print(lambda console: console.print(table, _READING, sep="\n"), print_fn)


_READING = (
    "Best: 100% is for a hard tie, a part of the way for a soft one, 0% for none. Only data that the model was not "
    "trained on can say so. Cosine: whether the gradients of two members agree. It does not say whether tying helps: "
    "where tied members fit best, their gradients cancel."
)


def print_comparison(
    rows: Sequence[Row],
    metric: str,
    closing: Sequence[str],
    *,
    relative: bool,
    print_fn: Callable[[str], object] | None = None,
) -> None:
    """Prints one row a way, the best first, why some have no score, and lines below.

    Args:
        rows: The rows in their order.
        metric: The name of the score.
        closing: What to read below the table.
        relative: Whether times of steps are ratios to the untied way.
        print_fn: As in `print_summary`.
    """
    plain = print_fn is not None
    about, like = ("+-", "~") if plain else ("±", "≈")
    table = rich.table.Table(box=_box(plain=plain), show_edge=False, pad_edge=False)
    table.add_column("Way", overflow="fold")
    for heading in ("Strength", rich.markup.escape(metric), "Step", "Free", "Spread"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        error = "" if math.isnan(row.error) else f" {about} {row.error:.2g}"
        score = "failed" if row.problem else f"{like} " * row.close + _short(row.score) + error
        strength = "" if row.strength is None else f"{row.strength:g}"
        free = "" if row.free is None else f"{row.free:,}"
        name = rich.markup.escape(row.way)
        spread = "" if math.isnan(row.spread) else f"{row.spread:.3g}"
        table.add_row(name, strength, score, _step(row.step, relative), free, spread)
    below = [f"{row.way}: {row.problem}" for row in rows if row.problem]
    if any(row.close for row in rows):
        below.append(
            f"{like}: within {WITHIN:g} standard errors of the best. The error is that of the differences, seed "
            "by seed, or 1.4 times that of the best, where this is smaller."
        )
    below += closing
    _print(lambda console: console.print(table, *map(rich.markup.escape, below), sep="\n"), print_fn)


def _step(step: float, relative: bool) -> str:
    if math.isnan(step):
        return ""
    return f"{step:.2f}x" if relative else f"{1000 * step:.3g} ms"


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}"


def _short(number: float) -> str:
    """A number in at most nine characters, of which five columns fit a log."""
    return next(text for digits in (4, 3, 2, 1) if len(text := f"{number:.{digits}g}") <= 9)


def summary_parts(
    groups: Sequence[TiedGroup], findings: int, width: int, *, plain: bool = False, expand: bool = False
) -> list[rich.console.RenderableType]:
    """The table of the groups and the lines below it, for a console of rich that has this width."""
    rows = _rows(groups, expand)
    table = rich.table.Table(show_lines=True, box=_box(plain=plain), show_edge=False, pad_edge=False)
    for place, title in enumerate(_TITLES):
        table.add_column(title, justify="left" if place < _TEXTS else "right", overflow="fold")
    for row in zip(
        *_fitted([[title, *cells] for title, *cells in zip(_TITLES, *rows, strict=True)], width), strict=True
    ):
        table.add_row(*(rich.markup.escape(cell.replace("×", "x") if plain else cell) for cell in row))
    return [table, *(rich.markup.escape(line) for line in _closing(groups, findings))]


def _fitted(columns: list[list[str]], width: int) -> list[list[str]]:
    """The cells below the titles, column by column, those of text wrapped where there is too little room for all."""
    room = width - _BETWEEN * (len(columns) - 1) - sum(_longest(column) for column in columns[_TEXTS:])
    if sum(_longest(column) for column in columns[:_TEXTS]) > room:
        for place, most in enumerate(_NARROW):
            columns[place] = [_wrapped(cell, most) for cell in columns[place]]
            room -= _longest(columns[place])
        columns[_TEXTS - 1] = [_wrapped(cell, max(room, 10)) for cell in columns[_TEXTS - 1]]
    return [cells for _, *cells in columns]


def _longest(cells: Sequence[str]) -> int:
    return max(len(line) for cell in cells for line in cell.split("\n"))


def _wrapped(text: str, width: int) -> str:
    """Lines of at most a width: whole words, else whole parts of a path or an expression, else parts of names."""
    lines = []
    for line in text.split("\n"):
        wrapped = [""]
        for word in re.findall(r"\([\d, ]*\) ?|\S+ ?", line):
            for piece in _pieces(word, width, [r"[^/(]*[/(]|[^/(]+", r"[^_.]*[_.]|[^_.]+", f".{{1,{width}}}"]):
                if wrapped[-1] and len((wrapped[-1] + piece).rstrip()) > width:
                    wrapped.append("")
                wrapped[-1] += piece
        lines += [each.rstrip() for each in wrapped]
    return "\n".join(lines)


def _pieces(word: str, width: int, finer: Sequence[str]) -> list[str]:
    """A word, or its parts as the first pattern that makes them short enough finds them."""
    if len(word.rstrip()) <= width or not finer:
        return [word]
    return [piece for part in re.findall(finer[0], word) for piece in _pieces(part, width, finer[1:])]


def summary_html(groups: Sequence[TiedGroup], findings: int) -> str:
    """The same table for a notebook."""

    def row(tag: str, cells: Sequence[str]) -> str:
        sides = ["left"] * _TEXTS + ["right"] * (len(_TITLES) - _TEXTS)
        written = [html.escape(cell).replace("\n", "<br>") for cell in cells]
        return "".join(
            f'<{tag} style="text-align: {side}; vertical-align: top">{cell}</{tag}>'
            for side, cell in zip(sides, written, strict=True)
        )

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in _rows(groups, expand=False))
    closing = "<br>".join(html.escape(line) for line in _closing(groups, findings))
    return f"<table><thead><tr>{row('th', _TITLES)}</tr></thead><tbody>{body}</tbody></table><p>{closing}</p>"


def weights_stored(groups: Sequence[TiedGroup]) -> int:
    """Numbers held by the members, each variable counted once; constants belong to no model."""
    variables = {id(m.variable): m.variable for group in groups for m in group.members if not m.constant}
    return sum(math.prod(variable.shape) for variable in variables.values())


def weights_free(groups: Sequence[TiedGroup], weights: Iterable[keras.Variable] | None = None) -> int:
    """Numbers that training can choose: the effective parameter count, of the members or of some trainable weights.

    A hard group has those of its common value, or none where an anchor holds it, and what views leave free. What
    does not train has none.
    """
    groups = [group for group in groups if not group.of_statistics]
    if weights is None:
        weights = [member.variable for group in groups for member in group.members if member.variable.trainable]
    sizes = {id(weight): math.prod(weight.shape) for weight in weights}
    free = sum(sizes.values())
    for group in groups:
        moving = [m for m in group.members if group.hard and id(m.variable) in sizes and not m.anchor]
        chosen = 0 if any(member.anchor for member in group.members) else 1
        shown = sum(member.entries for member in moving)
        free -= shown - chosen * math.prod(moving[0].common_shape) if moving else 0
        free -= sum(m.entries for m in group.members if m.leads is False and id(m.variable) in sizes)
    return free


def _print(render: Callable[[rich.console.Console], None], print_fn: Callable[[str], object] | None) -> None:
    if print_fn is None:
        render(rich.console.Console(highlight=False))
        return
    console = rich.console.Console(highlight=False, force_terminal=False, color_system=None, width=_LOG_WIDTH)
    with console.capture() as capture:
        render(console)
    print_fn(capture.get())


def _box(*, plain: bool) -> rich.box.Box:
    return rich.box.ASCII if plain else rich.box.HEAVY_HEAD


def _rows(groups: Sequence[TiedGroup], expand: bool) -> list[tuple[str, ...]]:
    """The cells of each row: of a group, or of all groups of a tie of layers."""
    ties = [[group] for group in groups] if expand else by_tie(groups)
    return [_cells(tie[0]) if len(tie) == 1 else _cells_of_tie(tie) for tie in ties]


def _cells_of_tie(groups: Sequence[TiedGroup]) -> tuple[str, ...]:
    """How many weights of how many layers are tied, in place of all paths."""
    weights = [group for group in groups if not group.of_statistics]
    count = counted(len(weights), "weight")
    if len(weights) < len(groups):
        count += f" and {counted(len(groups) - len(weights), 'statistic')}"
    layers = max(len(group.members) for group in groups)
    rules = "\n".join(dict.fromkeys(group.describe() for group in weights))
    members = f"{count} × {counted(layers, 'layer')}"
    return str(groups[0].tie), rules, members, *_numbers(groups, max(group.spread() for group in groups))


def _numbers(groups: Sequence[TiedGroup], spread: float) -> tuple[str, str, str]:
    return f"{weights_stored(groups):,}", f"{weights_free(groups):,}", f"{spread:.3g}"


def _cells(group: TiedGroup) -> tuple[str, ...]:
    members = "\n".join(
        f"{m.path} {tuple(m.variable.shape)}{f' as {m.view!r}' if m.view else ''}{' (anchor)' if m.anchor else ''}"
        for m in group.members
    )
    return group.name, group.describe(), members, *_numbers([group], group.spread())


def _closing(groups: Sequence[TiedGroup], findings: int) -> list[str]:
    stored, free = weights_stored(groups), weights_free(groups)
    share = f" ({free / stored:.1%})" if stored else ""
    total = counted(len(groups), "group")
    found = [f"Findings: {findings}; `registry.diagnose()` says what and how to fix it"] if findings else []
    return [*found, f"Total: {total}, {counted(stored, 'weight')} stored, {counted(free, 'weight')} free{share}"]
