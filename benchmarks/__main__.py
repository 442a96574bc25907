"""Command line: `python -m benchmarks [all|quality|speed|memory|scale] [--quick|--full] [--seed N] [--output DIR]`."""

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import chain, digits, memory, report, scale, schools, small_groups
from benchmarks.task import Options, Record, Task

TASKS: dict[str, Task] = {
    "schools": schools.Exam(),
    "digits": digits.Digits(),
    "chain": chain.Chain(),
    "small_groups": small_groups.SmallGroups(),
    "memory": memory.Memory(),
    "scale": scale.Scale(),
}
PARTS = ("all", *dict.fromkeys(task.part for task in TASKS.values()))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What tying is good for, and its cost.")
    parser.add_argument("part", nargs="?", choices=PARTS, default="all", help="what to measure (default: all)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="only see that it runs")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="more splits, seeds and rounds")
    parser.add_argument("--seed", type=int, default=0, help="where all randomness comes from (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"), help="folder for JSON and PNG")
    parser.set_defaults(size="default")
    return parser.parse_args(arguments)


def measure(console: Console, tasks: Mapping[str, Task], options: Options) -> tuple[list[Record], dict[str, float]]:
    """Runs the tasks one after the other under a progress bar each. Returns all records, and each task's seconds."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    records: list[Record] = []
    seconds = {}
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(t.title, total=t.count(options), start=False) for name, t in tasks.items()}
        for name, task in tasks.items():
            progress.start_task(bars[name])
            started = time.perf_counter()
            for record in task.measure(options):
                records.append({"task": name, **record})
                progress.advance(bars[name])
            keras.backend.clear_session()
            gc.collect()
            seconds[name] = round(time.perf_counter() - started, 1)
    return records, seconds


def main() -> int:
    """Measures, prints the table and writes the files."""
    # Every task compiles many models, which TensorFlow takes for one that is traced again and again.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    arguments = parse()
    options = Options(seed=arguments.seed, size=arguments.size)
    tasks = {name: task for name, task in TASKS.items() if arguments.part in ("all", task.part)}
    console = Console()
    arguments.output.mkdir(parents=True, exist_ok=True)
    records, seconds = measure(console, tasks, options)
    report.write_json(arguments.output / "results.json", options, seconds, records)
    report.draw_picture(arguments.output / "results.png", tasks, records)
    report.print_table(console, tasks, records)
    console.print(f"{sum(seconds.values()):.0f} s; every record is in {arguments.output / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
