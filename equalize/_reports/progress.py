"""A bar on the terminal while something takes long."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import rich.console
import rich.progress


@contextlib.contextmanager
def bar(description: str, steps: int) -> Iterator[Callable[[], None]]:
    """Shows a bar on a terminal's error stream until the block ends; in a log or a notebook nothing.

    Args:
        description: What takes long.
        steps: How many steps it has.

    Yields:
        A function to call after each step.
    """
    console = rich.console.Console(file=sys.stderr)
    if console.is_jupyter or not console.is_terminal:
        yield lambda: None  # a bar that is only disabled writes an empty line, in Rich 13.0
        return
    columns = rich.progress.Progress.get_default_columns()
    with rich.progress.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=steps)
        yield lambda: progress.advance(task)
