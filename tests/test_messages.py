"""The messages of `tests.messages`, printed to be read as one text, and whether they are all that equalize raises."""

import ast
import functools
import importlib
import pathlib
import pkgutil
import re
import textwrap
import traceback
from collections import Counter

import pytest

import equalize
from tests import messages
from tests.conftest import BACKEND
from tests.messages import CASES

for found in pkgutil.iter_modules(messages.__path__):
    importlib.import_module(f"tests.messages.{found.name}")  # which registers what it provokes

FOLDER = pathlib.Path(equalize.__file__).parent

# Places that only a step on JAX reaches, by file and function.
ON_JAX = {("_ties/tied_group.py", name) for name in ("_anchored_value", "require_reach", "_require_values")}
ON_JAX |= {("optimizers.py", "handing_over")}


def wrapped(text):
    lines = text.split("\n")
    inner = [textwrap.wrap(line, 100, break_long_words=False, break_on_hyphens=False) for line in lines]
    return "\n".join("\n".join(parts) for parts in inner)


@functools.cache
def raised(provoke):
    """What a provocation raises. Several tests ask, and some provocations train a model."""
    with pytest.raises((equalize.errors.EqualizeError, TypeError, KeyError, ImportError, UserWarning)) as caught:
        provoke()
    return caught.value


def said(error):
    return error.args[0] if isinstance(error, KeyError) else str(error)


def named(file):
    """A file of equalize by its path below the package."""
    return pathlib.Path(file).relative_to(FOLDER).as_posix()


def places_that_raise():
    """File, first and last line, and function of every `raise` and warning with a message."""
    places = []
    for file in sorted(FOLDER.rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            warns = isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
            # What a disk says is passed on.
            others = ("raise NotImplementedError", "raise", "raise self._problem")
            raises = isinstance(node, ast.Raise) and ast.unparse(node) not in others
            if warns or raises:
                inside = [f.name for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                if not inside:
                    continue  # at the import, in a process of its own: tests/test_package.py
                places.append((named(file), node.lineno, node.end_lineno, inside[-1]))
    return places


def places_of(error):
    """Where equalize raised the error, and those of its causes whose text it repeats: files and lines."""
    text, places = said(error), []
    while error is not None:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if FOLDER in pathlib.Path(frame.filename).parents
        ]
        if frames and str(said(error)).rstrip(".") in text:
            places.append((named(frames[-1].filename), frames[-1].lineno))
        error = error.__cause__
    return places


def here(case):
    return CASES[case][2] == BACKEND


@pytest.mark.parametrize("case", [case for case in CASES if here(case)])
def test_the_message_is_the_one_pinned(case):
    provoke, pinned, _ = CASES[case]
    text = wrapped(said(raised(provoke)))
    print(f"\n{case.replace('_', ' ')}:\n{textwrap.indent(text, '    ')}")
    assert text == pinned


def test_every_place_that_raises_is_reached():
    reached = [place for case in CASES if here(case) for place in places_of(raised(CASES[case][0]))]
    missing = [
        f"{file}:{first}"
        for file, first, last, function in places_that_raise()
        if not any(file == at and first <= line <= last for at, line in reached)
        and (BACKEND == "jax" or (file, function) not in ON_JAX)
    ]
    assert missing == []


def test_messages_say_what_was_expected_and_hold_no_internal_names():
    for case, (_, text, _) in CASES.items():
        assert re.search(r"[Ee]xpect|must|needs|[Cc]all|Install", text), case
        assert not re.search(r"(?<![\w.])_[a-z]\w+|NoneType|equalize\._", text), case
        assert text.endswith((".", ")", '"', "]", "float32", "trained'")) or "Members" in text, case
    assert max(Counter(text for _, text, _ in CASES.values()).values()) == 1
