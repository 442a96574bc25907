"""One run: a progress bar a task, then the tables, the files and the pictures.

What is not timed runs first, a case on each core; then what is timed, one case after the other. In a full run each
timed task has a process of its own, since allocators keep much of what large models leave behind. The times of a smoke
run mean nothing, so there a case of any task runs on each core.
"""

import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import joblib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import discovery, report, worker
from benchmarks.journal import Journal
from benchmarks.task import Options, Task


def run(part: str, options: Options, output: Path, console: Console | None = None) -> int:
    """Measures the tasks of a part, or goes on with it where an earlier run was interrupted.

    Returns:
        The exit status: 1 where a task could not run since its data package is missing.
    """
    console = console or Console()
    started = time.perf_counter()
    tasks, missing = load(part)
    if part == "all" and options.size != "smoke":
        tasks = {name: task for name, task in tasks.items() if task.main}
    for name, package in missing.items():
        console.print(f"[yellow]{name} left out: needs {package}. Install it with: pip install -e '.\\[bench]'")
    settings = report.settings(options)
    folder = output / settings["backend"]
    journal = Journal(folder, settings)
    if len(journal):
        console.print(f"Going on with an interrupted run: {len(journal)} cases are there already.")
    measure(console, journal, tasks, options)
    for name in discovery.PARTS:
        lines = {key: journal.lines(key, t.cases(options)) for key, t in tasks.items() if key.startswith(f"{name}/")}
        if lines:
            content = report.content(settings, lines, tasks)
            report.write_json(folder / f"{name}.json", content)
            report.draw_pictures(folder, lines, tasks)
            report.print_tables(console, content)
    journal.finish()
    console.print(f"{time.perf_counter() - started:.0f} s; tables, pictures and every record are in {folder}")
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
    cases = {name: task.cases(options) for name, task in tasks.items()}
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(t.title, total=len(cases[name]), start=False) for name, t in tasks.items()}
        todo: dict[str, list[Any]] = {}
        for name, of_task in cases.items():
            missing = [case for case in of_task if (name, case) not in journal]
            progress.advance(bars[name], len(of_task) - len(missing))
            todo[name] = [joblib.delayed(worker.measure)(name, case, options) for case in missing]
        timed = [name for name, task in tasks.items() if task.timed and options.size != "smoke"]
        untimed = [name for name in tasks if name not in timed]
        for names in (untimed, *([name] for name in timed)):
            for name in names:
                progress.start_task(bars[name])
            for line in run_all([call for name in names for call in todo[name]], options, timed=names is not untimed):
                journal.add(line)
                progress.advance(bars[line["task"]])


def run_all(calls: Sequence[Any], options: Options, *, timed: bool) -> Iterator[dict[str, Any]]:
    """What some calls return, as soon as each does."""
    if timed and options.size == "full":
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for function, positional, named in calls:
                yield process.submit(function, *positional, **named).result()
    else:
        jobs = 1 if timed or len(calls) < 2 else -1  # other processes are of use from two calls on
        yield from joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)(calls)
