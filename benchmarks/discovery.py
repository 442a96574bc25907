"""Which tasks there are: a part of the command line is a folder, a task a module in it."""

import importlib
import pkgutil
from pathlib import Path

from benchmarks.task import Task

PARTS = ("quality", "speed", "memory", "scale")


def names(part: str) -> list[str]:
    """The tasks of a part, or of all of them, as `part/module`."""
    parts = PARTS if part == "all" else (part,)
    root = Path(__file__).parent
    return [f"{part}/{module.name}" for part in parts for module in pkgutil.iter_modules([str(root / part)])]


def load(name: str) -> Task:
    """The task of that name.

    Raises:
        ModuleNotFoundError: A package that its data come from is not installed.
    """
    module = importlib.import_module(f"benchmarks.{name.replace('/', '.')}")
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    (task,) = (kind() for kind in kinds if issubclass(kind, Task))
    return task
