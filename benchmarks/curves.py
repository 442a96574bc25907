"""What the quality tasks have in common: results at the strength that validation data choose, and pictures of ways."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import colors, ways
from benchmarks.task import Record, distinct, mean_and_error, where


def chosen(records: Sequence[Record], name: str, key: str = "test", *, least: bool = False) -> list[float]:
    """A way's result in each split, at the strength that did best on the validation parts, as a mean over the splits.

    Args:
        records: Those of one task, each with `way`, `strength`, `split` and `validation`.
        name: The way.
        key: The result to return.
        least: Whether small validation figures are good, as losses are.
    """
    of_way = where(records, way=name)
    strengths = distinct(of_way, "strength")
    best = strengths[0]
    if len(strengths) > 1:
        means = {s: np.mean([record["validation"] for record in where(of_way, strength=s)]) for s in strengths}
        best = (min if least else max)(means, key=means.__getitem__)
    return [record[key] for record in sorted(where(of_way, strength=best), key=lambda record: record["split"])]


def measured(records: Sequence[Record]) -> list[str]:
    """The names of the ways that were measured."""
    return distinct(records, "way")


def dots(
    axes: Any,
    results: dict[str, Sequence[float]],
    *,
    digits: int = 1,
    known: Mapping[str, ways.Way] = ways.WAYS,
) -> None:
    """A line for each way: its mean with the standard error, and pale dots for its single results."""
    for place, (name, values) in enumerate(reversed(results.items())):
        mean, error = mean_and_error(values)
        color = known[name].color
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.3, markersize=5)
        axes.errorbar(mean, place, xerr=error, color=color, marker=known[name].marker, markersize=6, capsize=4)
        label = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(f"{mean:.{digits}f}", (mean, place), **label)
    axes.set_yticks(range(len(results)), [known[name].label for name in reversed(results)])
    axes.set_ylim(-0.5, len(results) - 0.3)
    axes.margins(x=0.08)


def explain(axes: Any, text: str = "bars: standard error") -> None:
    """Says in the upper right corner of a picture what error bars are, or more."""
    axes.set_title(text, loc="right", fontsize=8, color=colors.GREY)


def labelled_lines(
    axes: Any,
    lines: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    *,
    digits: int = 1,
    known: Mapping[str, ways.Way] = ways.WAYS,
) -> None:
    """A line for each way, over x, with standard errors, named at its right end without overlap."""
    ends = []
    for name, (x, means, errors) in lines.items():
        axes.errorbar(x, means, errors, color=known[name].color, marker=known[name].marker, markersize=4, capsize=3)
        ends.append((x[-1], means[-1], f"{known[name].label} {means[-1]:.{digits}f}", known[name].color))
    name_ends(axes, ends)


def name_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names lines at their right ends, each an x, a y, a text and a colour: beside the axes, one above the other."""
    from sklearn.isotonic import isotonic_regression

    axes.autoscale_view()  # which Matplotlib puts off until it draws
    gap = 11 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    to_fraction = axes.transScale + axes.transLimits
    ends = sorted(ends, key=lambda end: end[1])
    steps = gap * np.arange(len(ends))
    heights = np.array([to_fraction.transform((x, y))[1] for x, y, *_ in ends])
    places = isotonic_regression(heights - steps, y_max=1 - steps[-1]) + steps  # the nearest that are a gap apart
    for (x, y, text, color), place in zip(ends, places, strict=True):
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        where_ = {"xytext": (1.06, place), "textcoords": "axes fraction", "va": "center", "fontsize": 8}
        axes.annotate(text, (x, y), color=color, annotation_clip=False, arrowprops=line, **where_)


def trade(
    figure: Any,
    records: Sequence[Record],
    key: str,
    what: str,
    *,
    digits: int,
    known: Mapping[str, ways.Way] = ways.WAYS,
) -> None:
    """A panel for each value of a key: results against the number of free weights, each way named beside it."""
    values = distinct(records, key)
    for axes, value in zip(figure.subplots(1, len(values), squeeze=False)[0], values, strict=True):
        part = where(records, **{key: value})
        points = []
        for name in measured(part):
            mean, error = mean_and_error(chosen(part, name, least=True))
            weights = where(part, way=name)[0]["free_weights"]
            way = known[name]
            axes.errorbar(weights, mean, error, color=way.color, marker=way.marker, markersize=5, capsize=3)
            points.append((weights, mean, name))
        axes.margins(x=0.25, y=0.1)
        most, (low, high) = max(points)[0], axes.get_ylim()
        free = -float("inf")
        for weights, mean, name in sorted(points, key=lambda point: point[1]):
            free = max(mean, free + (high - low) * 0.05)
            text = f"{known[name].label} {mean:.{digits}f}"
            text, side = (f"{text}   ", "right") if weights == most else (f"   {text}", "left")
            axes.annotate(
                text, (weights, mean), (weights, free), color=known[name].color, ha=side, va="center", fontsize=8
            )
        axes.set(title=f"{key} of {value}" if len(values) > 1 else "", xlabel="free weights", ylabel=what)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    explain(axes)
