"""Writes the tables of docs/performance.md from `benchmarks/results`: `python -m benchmarks.tables [--check]`.

Between `<!-- results: NAME -->` and `<!-- end -->` stands what NAME says: `jax/speed` what that part ran on,
`jax/speed/chain` the table of a task, `jax/speed/chain?n = 4` what of it stands under headings with that text.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGES = (HERE.parent / "docs" / "performance.md",)
BLOCK = re.compile(r"(<!-- results: (?P<name>.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
MARKS = {None: "", True: " ✓", False: " **missed**"}


def load() -> dict[str, Any]:
    """What every part gave on every backend, by names such as `jax/speed`."""
    paths = sorted(RESULTS.glob("*/*.json"))
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text(encoding="utf-8")) for path in paths}


def describe(content: Mapping[str, Any]) -> str:
    """What a part ran on."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    machine, minutes = content["machine"], sum(content["seconds"].values()) / 60
    others = content["others"]  # None where nothing was timed
    quiet = "" if others is None else f"; while times were taken, others kept at most {others:.2f} of a core busy"
    return (
        f"Commit {content['commit']}, `--{content['size']}`, seed {content['seed']}, backend {content['backend']}, "
        f"{minutes:.0f} minutes summed over the cases. {machine['cores']} cores of {machine['processor']}, "
        f"{machine['system']}{quiet}. "
        f"{versions}.\n"
    )


def table(content: Mapping[str, Any], task: str, text: str) -> str:
    """The table of one task, or what stands under headings that contain the text."""
    lines = [row for row in content["tables"][task]["rows"] if text in row["heading"]]
    found = []
    for heading, group in itertools.groupby(lines, lambda row: row["heading"]):
        rows = list(group)
        goals = any(row["goal"] for row in rows)
        cells = [(heading or "what", "measured", "goal"), ("---", "---:", "---")]
        cells += [(row["what"], row["measured"], row["goal"] + MARKS[row["reached"]]) for row in rows]
        found.append("".join("| " + " | ".join(row if goals else row[:2]) + " |\n" for row in cells))
    return "\n".join(found)


def filled(text: str, results: Mapping[str, Any]) -> str:
    """The text of a page with what belongs between its markers."""

    def fill(block: re.Match[str]) -> str:
        name, _, under = block["name"].partition("?")
        backend, part, *task = name.split("/")
        content = results[f"{backend}/{part}"]
        inside = table(content, f"{part}/{task[0]}", under) if task else describe(content)
        return f"{block[1]}\n{inside}\n{block[3]}"

    return BLOCK.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables, or only says whether they are in step."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description="The tables of docs/performance.md."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is out of step")
    check = parser.parse_args(arguments).check
    results, stale = load(), []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if text != filled(text, results):
            stale.append(path)
            if not check:
                path.write_text(filled(text, results), encoding="utf-8")
    for path in stale:
        print(f"{path}: {'out of step, run `python -m benchmarks.tables`' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
