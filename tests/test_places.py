"""Every way of tying at every place: copies of members after every step, and the numbers of one device."""

import functools
import re

import numpy as np
import pytest

from tests import matrix, places
from tests.conftest import BACKEND, KERAS_3_5
from tests.places import APART, DTYPES, PLACES, STEPS, WAYS

ONE, *OTHERS = PLACES[BACKEND]
QUICK_WAYS = ("exact", "hard", "partial")  # on one device; several devices need new processes and are slow


def tried(name):
    """What is tried of a place here; `python -m tests.matrix` tries all dtypes."""
    place = PLACES[BACKEND][name]
    if place.processes > 1:  # which take the longest
        return place.pairs(matrix.WAYS, ["float32"])
    return place.pairs(WAYS, ["float32"]) + place.pairs(["exact", "hard"], ["bfloat16"])


def quick(name, way, dtype):
    return not PLACES[BACKEND][name].several and (name == ONE or (dtype == "float32" and way in QUICK_WAYS))


def case(*values, way, dtype):
    return pytest.param(*values, marks=[] if quick(values[0], way, dtype) else pytest.mark.slow)


@functools.cache
def elsewhere(name):
    if KERAS_3_5 and BACKEND == "jax" and PLACES[BACKEND][name].processes > 1:
        pytest.skip("`fit` of Keras 3.5 takes no data from several processes")
    return places.runs(BACKEND, name, tried(name))


@functools.cache
def run(name, way, dtype):
    if not PLACES[BACKEND][name].several:
        return places.run_here(name, way, dtype)
    return elsewhere(name)[way, dtype]


@pytest.mark.parametrize(
    ("name", "way", "dtype"),
    [case(name, way, dtype, way=way, dtype=dtype) for name in PLACES[BACKEND] for way, dtype in tried(name)],
)
@pytest.mark.sampled
def test_copies_and_members_are_equal_after_every_step(name, way, dtype):
    found = run(name, way, dtype)
    assert len(found.copies) == STEPS + 1  # and once more at the end
    assert found.steps == (1 if "frozen" in way else STEPS)
    for member in range(3):
        assert {len(step[member]) for step in found.copies} == {expected_copies(name, member)}
    assert found.spread_of_copies() == 0.0
    assert (found.spread_of_members() == 0.0) == (way not in APART)


def expected_copies(name, member):
    """A sharded member has fewer copies than there are devices."""
    place = PLACES[BACKEND][name]
    sharded = "ModelParallel" in name and ("alike" in name or member < 2)
    return place.devices * place.processes // (2 if sharded else 1)


@pytest.mark.parametrize(
    ("name", "way"),
    [case(name, way, way=way, dtype=dtype) for name in OTHERS for way, dtype in tried(name) if dtype == "float32"],
)
@pytest.mark.sampled
def test_the_numbers_are_those_of_one_device(name, way):
    if KERAS_3_5 and (BACKEND == "tensorflow" or "ModelParallel" in name):
        pytest.skip("Keras 3.5 gives other numbers there than on one device, for untied models as well")
    found, expected = (run(each, way, "float32").values for each in (name, ONE))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_table_has_all_rows_and_no_spread():
    (tables,) = matrix.BLOCK.findall(matrix.README.read_text("utf-8"))
    section = tables.split(f"### {matrix.TITLES[BACKEND]}\n")[1].split("###")[0]
    head, _, *lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    assert head.split(" | ") == ["where", "way", *DTYPES]
    cells = [tuple(row.split(" | ")) for row in lines]
    expected = [(name, way) for name, place in PLACES[BACKEND].items() for way in matrix.rows(place)]
    assert [row[:2] for row in cells] == expected
    for name, _, *numbers in cells:
        lacking = PLACES[BACKEND][name].lacks
        assert numbers == [matrix.LACKING if dtype in lacking else "0" for dtype in DTYPES]
