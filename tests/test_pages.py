"""The README and the pages under docs/: examples run as printed, links lead somewhere, and claims name their tests."""

import re

import pytest

import equalize
from tests import pages
from tests.conftest import BACKEND
from tests.pages import DOCS, PAGES, README, ROOT
from tests.test_package import PUBLIC

QUICK = {
    "comparing",
    "custom-rules",
    "devices",
    "index",
    "recipes/loops",
    "recipes/now-and-then",
    "recipes/sharing",
}  # < 5 s each
WITH_EXAMPLES = [page for page in PAGES if pages.blocks(page)]


def case(page):
    name = pages.title(page)
    elsewhere = pytest.mark.skipif(
        BACKEND == "jax" and page != README, reason="takes minutes to compile; TensorFlow and PyTorch run it"
    )
    return pytest.param(page, id=name, marks=() if name in QUICK else (pytest.mark.slow, elsewhere))


@pytest.mark.parametrize("page", list(map(case, WITH_EXAMPLES)))
def test_the_examples_of_a_page_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    for module, version in pages.needs(page):
        pytest.importorskip(module, version)
    if any(module == "matplotlib" for module, _ in pages.needs(page)):
        import matplotlib

        matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    pages.run(page)
    text = page.read_text("utf-8")
    assert all(f'"{left.name}"' in text for left in tmp_path.iterdir())


def test_there_are_examples():
    assert len(WITH_EXAMPLES) >= 15


def test_the_readme_is_short_and_so_is_its_first_example():
    assert len(README.read_text("utf-8").splitlines()) <= 200
    assert len([line for line in pages.blocks(README)[0].splitlines() if line.strip()]) <= 17


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)", pages.prose(README))
    assert len(links) >= 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_page_is_in_the_contents():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    listed = re.findall(r"(\S+\.md)", nav)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES if page != README)


def test_every_picture_is_shown():
    pictures = {path.name for path in (DOCS / "images").iterdir()}
    text = "".join(page.read_text("utf-8") for page in PAGES) + (ROOT / "mkdocs.yml").read_text("utf-8")
    assert {name for name in pictures if f"images/{name}" not in text} == set()


def test_every_public_name_has_an_entry_in_the_api():
    api = "".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    entries = re.findall(r"^::: equalize\.(\S+)$", api, re.MULTILINE)
    returned = {"Advice": "registry.Advice", "Finding": "registry.Finding"}
    assert sorted(entries) == sorted(returned.get(name, name) for name in PUBLIC)
    assert all(entry.partition(".")[0] in {*equalize.__all__, "registry"} for entry in entries)


def test_every_row_of_the_behaviour_tables_names_tests_that_exist():
    text = (DOCS / "behaviour.md").read_text("utf-8")
    rows = [row for table in re.findall(r"^\|--.*\n((?:\|.*\n)+)", text, re.MULTILINE) for row in table.splitlines()]
    assert len(rows) >= 40
    for row in rows:
        named = re.search(r"<!-- ((?:test_\w+\.py::test_\w+ )+)--> \|$", row)
        assert named, f"names no test: {row}"
        for name in named[1].split():
            file, _, function = name.partition("::")
            assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text("utf-8"), name
