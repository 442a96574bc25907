"""Measures one case, perhaps in a process of its own. Imports Keras only when it measures."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

from benchmarks.task import Case, Options, Record


def measure(name: str, case: Case, options: Options) -> tuple[str, Case, float, list[Record]]:
    """What was measured, of which task and case, and how many seconds it took."""
    with _no_notes_of_imports():
        from benchmarks import discovery

        task = discovery.load(name)
        import keras
    # Every task compiles many models, which TensorFlow takes for one that is traced again and again.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    started = time.perf_counter()
    records = list(task.measure(options, case))
    seconds = time.perf_counter() - started
    keras.backend.clear_session()  # collects garbage, too
    return name, case, seconds, records


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
