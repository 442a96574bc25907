"""The README and the pages under docs/: their examples, run from top to bottom, and their links.

`python -m tests.pages tutorial watching` runs pages and puts the pictures that they show into docs/images.
"""

import os
import pathlib
import re
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]


def title(page: pathlib.Path) -> str:
    return page.relative_to(DOCS if DOCS in page.parents else ROOT).with_suffix("").as_posix()


def blocks(page: pathlib.Path) -> list[str]:
    """The Python blocks of a page, each after as many empty lines as stand before it on the page."""
    text = page.read_text("utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def needs(page: pathlib.Path) -> list[tuple[str, str | None]]:
    """The modules that a page needs besides what the package installs, each with its lowest version."""
    found = re.findall(r"^# needs: (\w+)(?:>=([\d.]+))?$", page.read_text("utf-8"), re.MULTILINE)
    return [(module, version or None) for module, version in found]


def run(page: pathlib.Path) -> None:
    """Runs the blocks of a page in one namespace, in the current folder."""
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


def prose(page: pathlib.Path) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def draw(page: pathlib.Path) -> None:
    """Runs a page and keeps the pictures that it shows."""
    import matplotlib

    matplotlib.use("agg")
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run(page)
        os.chdir(home)
        for name in re.findall(r"\]\(images/(.*?\.png)\)", prose(page)):
            shutil.copy(pathlib.Path(folder, name), DOCS / "images" / name)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(DOCS / f"{name}.md")
