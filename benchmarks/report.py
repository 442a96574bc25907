"""What a run leaves: tables on the screen and in a file a part, and a picture a task."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import machine
from benchmarks.journal import records
from benchmarks.task import Options, Row, Task

Lines = Mapping[str, Sequence[Mapping[str, Any]]]
"""What the journal has of each task."""


def settings(options: Options) -> dict[str, Any]:
    """What the figures of a run depend on."""
    return {
        "commit": machine.commit(),
        "seed": options.seed,
        "size": options.size,
        "backend": keras.backend.backend(),
        "versions": machine.versions(),
        "machine": machine.machine(),
    }


def content(settings: Mapping[str, Any], lines: Lines, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The tables of the tasks of a part, with what is needed to repeat them."""
    seconds = {name: round(sum(line["seconds"] for line in of_task)) for name, of_task in lines.items()}
    tables = {
        name: {"title": tasks[name].title, "rows": [dataclasses.asdict(row) for row in rows(tasks[name], of_task)]}
        for name, of_task in lines.items()
    }
    others = max((line.get("others", 0.0) for name in lines if tasks[name].timed for line in lines[name]), default=None)
    return {**settings, "seconds": seconds, "others": others, "tables": tables}


def rows(task: Task, lines: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The table of a task. A figure that was timed while others kept the machine busy is set beside no goal."""
    found = task.rows(records(lines))
    quiet = [line for line in lines if not task.timed or line.get("others", 0.0) <= machine.BUSY]
    if len(quiet) == len(lines):
        return found
    sure = set(map(_without_goal, task.rows(records(quiet)))) if quiet else set()
    busy = "the machine was busy"
    return [row if _without_goal(row) in sure else dataclasses.replace(row, goal=busy, reached=None) for row in found]


def _without_goal(row: Row) -> Row:
    return dataclasses.replace(row, goal="", reached=None)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the content, each line of a table on a line of its own."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def print_tables(console: Console, content: Mapping[str, Any]) -> None:
    """Prints what was measured beside what was hoped for, a section a task."""
    screen = Table()
    for column, justify in (("what", "left"), ("measured", "right"), ("goal", "left")):
        screen.add_column(column, justify=justify)
    marks = {None: "", True: " [green]✓", False: " [red]✗ MISSED"}
    for task in content["tables"].values():
        screen.add_section()
        screen.add_row(f"[bold]{escape(task['title'])}")
        heading = ""
        for row in task["rows"]:
            if row["heading"] != heading:
                heading = row["heading"]
                screen.add_row(f"[italic]{escape(heading)}")
            screen.add_row(
                " " + escape(row["what"]), escape(row["measured"]), escape(row["goal"]) + marks[row["reached"]]
            )
    console.print(screen)


STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "svg.hashsalt": "equalize",
    "svg.fonttype": "none",
}


def draw_pictures(folder: Path, lines: Lines, tasks: Mapping[str, Task]) -> None:
    """Draws a picture a task, as SVG and as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, of_task in lines.items():
        with pyplot.rc_context(STYLE):
            figure = pyplot.figure(figsize=tasks[name].size, layout="constrained")
            tasks[name].draw(figure, records(of_task))
            figure.suptitle(tasks[name].title, x=0.01, ha="left", fontweight="bold")
            path = folder / name.replace("/", "-")
            figure.savefig(path.with_suffix(".png"), dpi=200)
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
            pyplot.close(figure)
