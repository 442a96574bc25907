"""The spread of every way of tying at every place in every dtype: `python -m tests.matrix` writes it to a README.

All cells take about a quarter of an hour. Names of backends and places as arguments limit what is run and printed;
then nothing is written.
"""

import argparse
import re
import sys
from pathlib import Path

from tests import places
from tests.places import APART, DTYPES, PLACES

README = Path(__file__).parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- matrix -->\n).*(?=<!-- end -->)", re.DOTALL)
TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
WAYS = ("exact", "hard", "partial", "soft")
LACKING = "–"


def measured(run, way):
    """The spread where there must be none: over all copies of all members, or of each member alone."""
    assert run.steps > 1  # loss scaling skips steps that overflow
    return run.spread_of_copies() if way in APART else run.spread_of_members()


def rows(place):
    """The ways that have a row: where members are not meant to be equal, only copies on several devices can be."""
    return [way for way in WAYS if place.several or way not in APART]


def lines(backend, name):
    """The rows of a place, with what was measured there."""
    place = PLACES[backend][name]
    found = places.runs(backend, name, place.pairs(rows(place), DTYPES))
    for way in rows(place):
        cells = (LACKING if dtype in place.lacks else f"{measured(found[way, dtype], way):g}" for dtype in DTYPES)
        yield "| " + " | ".join([name, way, *cells]) + " |\n"


def table(backend, names):
    """The table of one backend."""
    head = ["where", "way", *DTYPES]
    text = [f"\n### {TITLES[backend]}\n\n", "| " + " | ".join(head) + " |\n", "|" + " --- |" * len(head) + "\n"]
    for name in names:
        print(f"{backend}: {name}", file=sys.stderr, flush=True)
        text += lines(backend, name)
    return "".join(text)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("only", nargs="*", help="backends and places")
    only = set(parser.parse_args(arguments).only)
    chosen = {
        backend: [name for name in found if not only or {backend, name} & only] for backend, found in PLACES.items()
    }
    tables = "".join(table(backend, names) for backend, names in chosen.items() if names)
    if only:
        print(tables)
    else:
        README.write_text(BLOCK.sub(lambda _: tables + "\n", README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
