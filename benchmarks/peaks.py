"""The peak of a process's memory while something runs, as Linux counts it.

The resident memory is noted, Linux's mark of the highest is reset (`/proc/self/clear_refs`), something runs, and the
mark (`VmHWM`) is read. Probes run in a fresh process, in which glibc gives every large buffer back when it is freed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

AVAILABLE = Path("/proc/self/clear_refs").exists()

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


def resident() -> int:
    """The resident memory of this process now, in bytes."""
    return _status("VmRSS")


def peak(run: Callable[[], Any]) -> int:
    """The highest resident memory of this process while something runs, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run()
    return _status("VmHWM")


def probes(module: str, *arguments: str) -> Iterator[Any]:
    """What a module prints as lines of JSON when it is run in a process of its own.

    Raises:
        RuntimeError: It failed; with what it wrote to its standard error.
    """
    call = [sys.executable, "-m", module, *arguments]
    finished = subprocess.run(call, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{call} ended with exit status {finished.returncode}:\n{finished.stderr}")
    yield from map(json.loads, finished.stdout.splitlines())


def draw(axes: Any, bars: Sequence[tuple[str, float, str]]) -> None:
    """Draws bars from the top down, each a label, a length and a colour."""
    for place, (_, length, color) in enumerate(reversed(bars)):
        axes.barh(place, length, color=color, height=0.7)
        axes.annotate(f"{length:.1f}", (length, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [label for label, *_ in reversed(bars)])
    axes.margins(x=0.12)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
