"""The pages of docs/recipes: each runs from top to bottom, exactly as printed."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs" / "recipes").glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_there_are_pages():
    assert {"learned-ties", "now-and-then"} <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.slow
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    blocks = BLOCK.findall(page.read_text("utf-8"))
    for block in blocks:
        needs = re.match(r"# needs: (\w+)\n", block)
        if needs:
            pytest.importorskip(needs[1])
        exec(compile(block, page.name, "exec"), namespace)
    assert all(f'"{left.name}"' in "".join(blocks) for left in tmp_path.iterdir())
