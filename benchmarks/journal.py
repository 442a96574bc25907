"""What a run has measured so far, in a file that grows as it goes, so that an interrupted run can go on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.task import Case, Record


class Journal:
    """The finished cases of a run: one line of JSON each, below one line with the settings.

    A file with other settings, for instance another seed or another version of a package, starts over.

    Args:
        path: The file.
        settings: What the measurements depend on.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self._path = path
        self._done: dict[str, dict[str, Any]] = {}
        head, *lines = self._read() or [None]
        if head == settings:
            self._done = {_key(line["task"], line["case"]): line for line in lines}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = [settings, *self._done.values()]
        path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, key: tuple[str, Case]) -> bool:
        return _key(*key) in self._done

    def add(self, task: str, case: Case, seconds: float, records: Sequence[Record]) -> None:
        """Writes down a case that is finished."""
        records = [{"task": task, **case, **record} for record in records]
        line = {"task": task, "case": case, "seconds": seconds, "records": records}
        self._done[_key(task, case)] = line
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def records(self, task: str, cases: Sequence[Case]) -> list[Record]:
        """The records of these cases of a task."""
        return [record for case in cases for record in self._done[_key(task, case)]["records"]]

    def seconds(self, task: str, cases: Sequence[Case]) -> float:
        """How long these cases of a task took."""
        return sum(self._done[_key(task, case)]["seconds"] for case in cases)

    def close(self) -> None:
        """Removes the file, since the run is finished."""
        self._path.unlink()

    def _read(self) -> list[Any]:
        """The lines of the file, without one that was cut off."""
        lines = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return lines


def _key(task: str, case: Case) -> str:
    return json.dumps([task, case], sort_keys=True)
