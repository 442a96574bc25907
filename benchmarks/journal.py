"""What a run has measured so far, in a file that grows as it goes, so that an interrupted run can go on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.task import Case, Record


class Journal:
    """The finished cases of a run: one line of JSON each, below one line with the settings.

    A file with other settings, for instance of another commit, seed or version of a package, starts over.

    Args:
        folder: Where the file is: `unfinished.jsonl`, and `records.jsonl` when the run is finished.
        settings: What the measurements depend on.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self._path = folder / "unfinished.jsonl"
        self._done: dict[str, dict[str, Any]] = {}
        head, *lines = self._read() or [None]
        if head == settings:
            self._done = {_key(line["task"], line["case"]): line for line in lines}
        folder.mkdir(parents=True, exist_ok=True)
        content = [settings, *self._done.values()]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, key: tuple[str, Case]) -> bool:
        return _key(*key) in self._done

    def add(self, line: dict[str, Any]) -> None:
        """Writes down a case that is finished: `task`, `case`, `records`, `seconds`, and `others` where it is known."""
        self._done[_key(line["task"], line["case"])] = line
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self, task: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """The lines of these cases of a task."""
        return [self._done[_key(task, case)] for case in cases]

    def finish(self) -> None:
        """The run is finished: the next one begins anew."""
        self._path.replace(self._path.with_name("records.jsonl"))

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


def records(lines: Sequence[Mapping[str, Any]]) -> list[Record]:
    """The records of some lines, each with its case."""
    return [{**line["case"], **record} for line in lines for record in line["records"]]


def _key(task: str, case: Case) -> str:
    return json.dumps([task, case], sort_keys=True)
