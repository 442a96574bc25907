"""Writes the tables of docs/performance.md from a run's `results.json`: `python -m benchmarks.tables [--check]`.

Between `<!-- results: NAME -->` and `<!-- end -->` stands the table of a task, or what `run` says about the run. A NAME
may end in a filter, `speed/chain?n = 4`: then only the lines that contain its text.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "results.json"
PAGES = (HERE.parent / "docs" / "performance.md",)
BLOCK = re.compile(r"(<!-- results: (?P<name>.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def describe(content: Mapping[str, Any]) -> str:
    """What a run ran on."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    machine = content["machine"]
    length = f"{content['wall_seconds'] / 60:.0f} minutes"
    if content["cases_from_before"]:  # then the wall clock has seen the last part only
        length = f"{sum(content['seconds'].values()) / 60:.0f} minutes summed over its cases"
    load = "unknown" if content["load"] is None else f"{content['load']:.1f}"
    return (
        f"`--{content['size']}`, seed {content['seed']}, backend {content['backend']}, {length}. "
        f"{machine['cores']} cores of {machine['processor']}, {machine['system']}; mean load of the last quarter of an "
        f"hour, this run's own included: {load}. {versions}.\n"
    )


def table(content: Mapping[str, Any], name: str) -> str:
    """The table of one task, or the lines of it that contain what follows a question mark in the name."""
    task, _, text = name.partition("?")
    lines = [row for row in content["tables"][task]["rows"] if text in row["what"]]
    goals = any(row["goal"] for row in lines)
    marks = {None: "", True: " ✓", False: " **missed**"}
    rows = [("what", "measured", "goal"), ("---",) * 3]
    rows += [(row["what"], row["measured"], row["goal"] + marks[row["reached"]]) for row in lines]
    return "".join("| " + " | ".join(row if goals else row[:2]) + " |\n" for row in rows)


def filled(text: str, content: Mapping[str, Any]) -> str:
    """The text of a page with what belongs between its markers."""

    def fill(block: re.Match[str]) -> str:
        name = block["name"]
        inside = describe(content) if name == "run" else table(content, name)
        return f"{block[1]}\n{inside}\n{block[3]}"

    return BLOCK.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables, or only says whether they are in step."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description="The tables of docs/performance.md."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is out of step")
    check = parser.parse_args(arguments).check
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    stale = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if text != filled(text, content):
            stale.append(path)
            if not check:
                path.write_text(filled(text, content), encoding="utf-8")
    for path in stale:
        print(f"{path}: {'out of step, run `python -m benchmarks.tables`' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
