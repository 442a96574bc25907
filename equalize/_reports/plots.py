"""Pictures of ties, drawn with matplotlib, which the extra `plot` installs."""

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from equalize._inputs import arguments
from equalize._reports.progress import bar
from equalize._reports.results import Row
from equalize._ties.member import Member
from equalize._ties.spread import pulled_arrays
from equalize._ties.tied_group import TiedGroup, by_tie
from equalize.errors import EqualizeError

# Colors of Okabe and Ito, which people with any kind of color vision tell apart; markers differ as well.
_HARD, _LOOSE, _ANCHOR = ("#0072B2", "o"), ("#D55E00", "o"), ("#000000", "s")
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_KINDS = {True: "kept equal, bit for bit", False: "pulled together"}
_NUMBERED = 6
"""Up to so many members a heat map has its numbers written into it."""
_NAMED = 16
"""Up to so many members a heat map names each."""
_PAGE = 10.0, 13.0
"""The largest picture in inches: a page."""
_MAPS = 6
"""So many heat maps are drawn at most, of the ties whose members are farthest apart."""
_FAR = 30.0
"""Scores that are so far apart are drawn on a logarithmic scale."""
_ROWS, _COLUMNS = 40, 48
"""So many ties are drawn at most; so many layers are named."""


class _Row:
    """A tie of layers, or a group that was tied alone."""

    def __init__(self, groups: Sequence[TiedGroup]):
        self.groups = groups
        self.name = str(groups[0].tie) if len(groups) > 1 else groups[0].name
        weights = [group for group in groups if not group.of_statistics]
        self.rules = ", ".join(dict.fromkeys(group.describe() for group in weights or groups))
        self.hard = all(group.hard for group in groups)
        self.spread = max(group.spread() for group in groups)
        columns = list(zip(*(group.members for group in groups), strict=False))
        self.layers = [_common_layer(members) for members in columns]
        self.anchors = [all(member.anchor for member in members) for members in columns]


def _common_layer(members: Sequence[Member]) -> str:
    """The path of the innermost layer that owns all of some members."""
    paths = zip(*(_layer(member).split("/") for member in members), strict=False)
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, paths)
    return "/".join(parts[0] for parts in common) or _layer(members[0])


def plot_groups(groups: Sequence[TiedGroup], path: str | os.PathLike[str]) -> None:
    """Draws which layers each tie has, and how far apart the members are where they are not equal.

    The picture fits a page: of many ties the first are drawn, and the distances in those that are farthest apart.

    Args:
        groups: The groups.
        path: The file to write; its suffix says the format, `.png`, `.svg` or `.pdf`.

    Raises:
        TypeError: `path` is not a path.
        EqualizeError: There is no group, or the path is not that of a picture.
        ImportError: matplotlib is not installed.
    """
    path = arguments.picture("path", path)
    if not groups:
        raise EqualizeError(
            "`plot` has nothing to draw: expected a registry with groups, received one without. Call "
            "`registry.link(model)` or `registry.tie(...)` first."
        )
    figure_of = _figure()
    rows = [_Row(tie) for tie in by_tie(groups)]
    apart = sorted((row for row in rows if row.spread != 0.0), key=lambda row: -row.spread)[:_MAPS]
    shown = rows[:_ROWS]
    layers = list(dict.fromkeys(layer for row in shown for layer in row.layers))
    longest = min(max(len(_short(layer)) for layer in layers), 40)
    grid = min(1.6 + 0.32 * len(shown) + 0.07 * longest, 0.6 * _PAGE[1])
    lines = math.ceil(len(apart) / 3)
    maps = min((2.2 + 0.05 * longest) * lines, _PAGE[1] - grid)
    figure = figure_of(figsize=(_PAGE[0], grid + maps), layout="constrained")
    if not apart:
        _draw_grid(figure.subplots(), shown, layers, len(rows) - len(shown))
    else:
        upper, lower = figure.subfigures(2, 1, height_ratios=(grid, maps))
        _draw_grid(upper.subplots(), shown, layers, len(rows) - len(shown))
        _draw_maps(lower, apart, lower.subplots(lines, min(len(apart), 3), squeeze=False))
    figure.savefig(path, dpi=120)


def plot_spread(
    history: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    conflicts: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draws the spread of every group over the epochs, one line for each, with its name at the end.

    Args:
        history: The spreads of each group, epoch by epoch.
        path: The file to write; its suffix says the format, `.png`, `.svg` or `.pdf`.
        conflicts: The smallest cosines between gradients of each tie, for a second panel.

    Raises:
        TypeError: `path` is not a path.
        EqualizeError: No epoch has ended, or the path is not that of a picture.
        ImportError: matplotlib is not installed.
    """
    path = arguments.picture("path", path)
    if not any(history.values()):
        raise EqualizeError(
            "TieMonitor has nothing to draw: expected at least one epoch of training, received none. Call "
            "`model.fit(..., callbacks=[monitor])` first."
        )
    panels = 2 if conflicts else 1
    figure = _figure()(figsize=(8.0, 4.5 * panels), layout="constrained")
    axes, *below = figure.subplots(panels, squeeze=False)[:, 0]
    ends = _draw_epochs(axes, history)
    positive = [value for spreads in history.values() for value in spreads if 0.0 < value < math.inf]
    if positive:
        axes.set_yscale("symlog", linthresh=min(positive))
    axes.set_ylim(bottom=0.0, top=None if positive else 1.0)
    axes.set_ylabel("spread: largest entry of max − min (0: equal)")
    _label_ends(axes, ends)
    for panel in below:
        panel.axhline(0.0, color="0.6", linewidth=0.8)
        ends = _draw_epochs(panel, conflicts or {})
        panel.set_ylim(-1.0, 1.0)
        panel.set_ylabel("smallest cosine between gradients (< 0: conflict)")
        _label_ends(panel, ends)
    figure.savefig(path, dpi=120)


def _draw_epochs(axes: Any, history: Mapping[str, Sequence[float]]) -> list[tuple[float, Any, str, str]]:
    """A line over the epochs for each name, and where it ends; names with one history, as hard groups have, are one."""
    lines: dict[tuple[float, ...], list[str]] = {}
    for name, numbers in history.items():
        lines.setdefault(tuple(numbers), []).append(name)
    ends = []
    for index, (numbers, names) in enumerate(lines.items()):
        values = np.where(np.isfinite(numbers), numbers, np.nan)
        epochs = np.arange(1, len(values) + 1)
        color = _COLORS[index % len(_COLORS)]
        axes.plot(epochs, values, color=color, marker="o", markersize=3, clip_on=False)
        ends.append((float(values[-1]), epochs[-1], color, _listed(names)))
    axes.margins(x=0.0)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    return ends


def plot_comparison(rows: Sequence[Row], metric: str, path: str | os.PathLike[str]) -> None:
    """Draws the score over the strength, a panel for each way that has strengths, with the other ways beside it.

    Args:
        rows: The rows of a comparison.
        metric: The name of the score.
        path: The file to write; its suffix says the format, `.png`, `.svg` or `.pdf`.

    Raises:
        TypeError: `path` is not a path.
        EqualizeError: The path is not that of a picture.
        ImportError: matplotlib is not installed.
    """
    path = arguments.picture("path", path)
    figure_of = _figure()
    graded = [row for row in rows if len(row.curve) > 1]
    others = [row for row in rows if len(row.curve) == 1 and not row.problem]
    left, right = ([row for row in others if (row.way == "untied") == first] for first in (True, False))
    right.sort(key=lambda row: row.way != "hard")
    scores = [point.mean for row in rows for point in row.curve if math.isfinite(point.mean)]
    columns = max(len(graded), 1)
    figure = figure_of(figsize=(min(1.5 + 4.0 * columns, 3 * _PAGE[0]), 4.5), layout="constrained")
    panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for axes, row in zip(panels, graded or [None], strict=True):
        points = [] if row is None else sorted(row.curve, key=lambda point: point.strength or 0.0)
        places = np.arange(len(points)) + len(left)  # strengths are of any size, and few
        marks = [*(each.way for each in left), *(f"{point.strength:g}" for point in points)]
        if row is not None:
            means, errors = [point.mean for point in points], [point.error for point in points]
            axes.errorbar(places, means, errors, color=_COLORS[0], marker="o", markersize=4, capsize=3, clip_on=False)
            chosen = [point.strength for point in points].index(row.strength)
            axes.plot(places[chosen], means[chosen], "o", color=_COLORS[0], markersize=9, clip_on=False)
            axes.set_title(row.way, fontsize=9)
            axes.set_xlabel("strength (large mark: chosen)")
        for index, each in enumerate([*left, *right]):
            place = index if index < len(left) else index + len(points)
            color = _COLORS[1 + index % (len(_COLORS) - 1)]
            error = 0.0 if math.isnan(each.error) else each.error
            axes.axhline(each.score, color=color, linewidth=0.8, linestyle=":", zorder=0)
            axes.errorbar(place, each.score, error, color=color, marker="D", markersize=6, capsize=4, clip_on=False)
        marks += [each.way for each in right]
        axes.set_xticks(range(len(marks)), [_short(mark, 24) for mark in marks], rotation=45, ha="right")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{metric} (mean ± standard error)")
    if max(scores) > _FAR * min(scores) > 0.0:
        panels[0].set_yscale("log")
    figure.savefig(path, dpi=120)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed. Expected: the extra `plot` of equalize. Install it: "
            'pip install "equalize[plot]"'
        ) from error
    return Figure


def _draw_grid(axes: Any, rows: Sequence[_Row], layers: Sequence[str], more: int) -> None:
    """One row a tie, one column a layer, and a mark where the tie has the layer."""
    used = set()
    for place, row in enumerate(rows):
        columns = [layers.index(layer) for layer in row.layers]
        color, marker = _HARD if row.hard else _LOOSE
        axes.plot(columns, [place] * len(columns), color=color, linestyle="-" if row.hard else ":", zorder=1)
        for anchor, column in zip(row.anchors, columns, strict=True):
            edge, shape = _ANCHOR if anchor else (color, marker)
            kind = "does not move" if anchor else _KINDS[row.hard]
            axes.scatter(
                column,
                place,
                60 if len(layers) <= _COLUMNS else 12,
                color=edge if row.hard else "white",
                edgecolors=edge,
                marker=shape,
                zorder=2,
                label=None if kind in used else kind,
            )
            used.add(kind)
    axes.set_yticks(range(len(rows)), [f"{_short(row.name)}   {_short(row.rules)}" for row in rows])
    step = math.ceil(len(layers) / _COLUMNS)
    axes.set_xticks(range(0, len(layers), step), [_short(layer) for layer in layers[::step]], rotation=90)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    axes.set_title(f"What is tied, by layer{f'; {more} more ties are not shown' if more else ''}", fontsize=9)
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )


def _draw_maps(figure: Any, rows: Sequence[_Row], cells: Any) -> None:
    """For each tie whose members are apart, the distance of every member from every other."""
    with bar("Comparing the members", sum(len(g.members) for row in rows for g in row.groups)) as step:
        distances = [_farthest([_distances(group, step) for group in row.groups]) for row in rows]
    top = max(values[np.isfinite(values)].max(initial=0.0) for values in distances) or 1.0
    image = None
    for index, axes in enumerate(cells.flat):
        if index >= len(rows):
            axes.set_axis_off()
            continue
        row, values = rows[index], distances[index]
        image = axes.imshow(np.ma.masked_invalid(values), cmap="cividis", vmin=0.0, vmax=top)
        names = [_short(layer, 24) for layer in row.layers]
        places = range(len(names)) if len(names) <= _NAMED else range(0, len(names), math.ceil(len(names) / _NAMED))
        axes.set_xticks(places, [names[place] for place in places], rotation=90, fontsize=6)
        axes.set_yticks(places, [names[place] for place in places], fontsize=6)
        axes.set_title(f"{_short(row.name, 24)}: spread {row.spread:.3g}", fontsize=9)
        if len(names) <= _NUMBERED:
            for i, j in np.ndindex(values.shape):
                color = "black" if values[i, j] > 0.55 * top else "white"
                axes.text(j, i, f"{values[i, j]:.2g}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=cells, shrink=0.8).set_label("distance: largest entry of |difference|", fontsize=8)


def _farthest(distances: Sequence[np.ndarray]) -> np.ndarray:
    """The largest distance of each pair over the groups of a tie, NaN where one is."""
    return np.max(np.stack(distances), axis=0)


def _distances(group: TiedGroup, step: Callable[[], None]) -> np.ndarray:
    """The largest entry of |w_i − w_j| for each pair of members, as their views pull them back."""
    n, equal = len(group.members), group.spread() == 0.0
    values = [] if equal else list(pulled_arrays(group.members))
    values = [value.astype(np.promote_types(value.dtype, "float32")) for value in values]
    distances = np.zeros((n, n))
    for i in range(n):
        step()
        for j in range(0 if equal else i):
            with np.errstate(invalid="ignore", over="ignore"):
                largest = np.max(np.abs(values[i] - values[j]), initial=0.0)
            distances[i, j] = distances[j, i] = largest if np.isfinite(largest) else np.nan
    return distances


def _label_ends(axes: Any, ends: Sequence[tuple[float, Any, str, str]]) -> None:
    """Writes names beside the ends of lines, moved apart where they would cover each other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((epoch, value))[1]) if value == value else 1.0 for value, epoch, *_ in ends]
    gap = min(0.06, 1.0 / len(ends))
    highest, places = 1.0 + gap, {}
    for index in sorted(range(len(ends)), key=heights.__getitem__, reverse=True):
        highest = places[index] = min(heights[index], highest - gap)
    lowest = -gap
    for index in reversed(places):
        lowest = places[index] = max(places[index], lowest + gap)
    for index, place in places.items():
        _, _, color, name = ends[index]
        axes.annotate(
            name,
            xy=(1.0, heights[index]),
            xytext=(1.03, place),
            xycoords="axes fraction",
            color=color,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "relpos": (0.0, 0.5), "color": color, "linewidth": 0.6},
        )


def _layer(member: Member) -> str:
    """The path of the layer that owns a member."""
    return member.path.rpartition("/")[0] or member.path


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(_short(name) for name in names[:3]) + more


def _short(name: str, length: int = 40) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"
