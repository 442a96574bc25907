"""Measures one case, perhaps in a process of its own. Imports Keras only when it measures."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import discovery, machine
from benchmarks.task import Case, Options


def measure(name: str, case: Case, options: Options) -> dict[str, Any]:
    """The line of the journal for a case of the task of that name."""
    with _no_notes_of_imports():
        task = discovery.load(name)
        import keras
    # Every task compiles many models, which TensorFlow takes for one that is traced again and again.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    line: dict[str, Any] = {"task": name, "case": case}
    with machine.watched(line):
        line["records"] = list(task.measure(options, case))
    keras.backend.clear_session()  # collects garbage, too
    return line


@contextlib.contextmanager
def _no_notes_of_imports() -> Iterator[None]:
    """TensorFlow's libraries write to the process's standard error as they start, into the progress bars."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
