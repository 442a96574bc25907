"""The README's examples, run exactly as printed."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def title(block):
    """The heading that a block stands under."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", README[: README.index(block) - 10], flags=re.DOTALL), re.M
    )
    return headings[-1].replace(" ", "-")


def anchor(heading):
    """The link that leads to a heading."""
    return "#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_there_are_examples():
    assert len(BLOCKS) >= 5


def test_the_first_example_is_short():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 17


def test_links_lead_to_headings_and_every_recipe_is_in_the_contents():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    headings = {anchor(heading): level for level, heading in re.findall(r"^(#+) (.*)$", text, re.M)}
    links = set(re.findall(r"\]\((#[^)]*)\)", text))
    assert links <= headings.keys()
    assert {link for link, level in headings.items() if level == "###"} <= links


@pytest.mark.parametrize("block", BLOCKS, ids=title)
@pytest.mark.slow
def test_example(block, tmp_path, monkeypatch):
    needs = re.match(r"# needs: (\w+)(?:>=([\d.]+))?\n", block)
    if needs:
        pytest.importorskip(needs[1], needs[2])
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert all(f'"{left.name}"' in block for left in tmp_path.iterdir())
