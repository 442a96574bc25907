"""One run: the tasks one after the other under a progress bar each, then the table, the file and the pictures."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import discovery, report
from benchmarks.journal import Journal
from benchmarks.task import Options, Task


def run(part: str, options: Options, output: Path, console: Console | None = None) -> int:
    """Measures the tasks of a part, or goes on with it where an earlier run was interrupted.

    Returns:
        The exit status: 1 where a task could not run since its data package is missing.
    """
    console = console or Console()
    # Every task compiles many models, which TensorFlow takes for one that is traced again and again.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    tasks, missing = load(part)
    for name, package in missing.items():
        console.print(f"[yellow]{name} left out: needs {package}. Install it with: pip install -e '.\\[bench]'")
    settings = report.settings(options)
    journal = Journal(output / "unfinished.jsonl", settings)
    if len(journal):
        console.print(f"Going on with an interrupted run: {len(journal)} cases are there already.")
    measure(console, journal, tasks, options)
    content = report.content(settings, journal, tasks, options, missing)
    report.write_json(output / "results.json", content)
    report.draw_pictures(output, content, tasks)
    report.print_table(console, content)
    journal.close()
    console.print(f"{sum(content['seconds'].values()):.0f} s; every record is in {output / 'results.json'}")
    return 1 if missing else 0


def load(part: str) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks of a part that can run, and for each of the others the package that it lacks."""
    tasks, missing = {}, {}
    for name in discovery.names(part):
        try:
            tasks[name] = discovery.load(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "benchmarks":
                raise
            missing[name] = error.name
    return tasks, missing


def measure(console: Console, journal: Journal, tasks: Mapping[str, Task], options: Options) -> None:
    """Measures the cases that the journal lacks, and writes each down as soon as it is there."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(t.title, total=len(t.cases(options)), start=False) for name, t in tasks.items()}
        for name, task in tasks.items():
            progress.start_task(bars[name])
            for case in task.cases(options):
                if (name, case) not in journal:
                    started = time.perf_counter()
                    records = list(task.measure(options, case))
                    journal.add(name, case, time.perf_counter() - started, records)
                    keras.backend.clear_session()  # collects garbage, too
                progress.advance(bars[name])
