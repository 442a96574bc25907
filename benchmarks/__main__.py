"""Command line: `python -m benchmarks [PART] [--quick|--full] [--backend NAME] [--seed N] [--output DIR]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.discovery import PARTS
from benchmarks.task import Options

BACKENDS = ("tensorflow", "jax", "torch")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What tying is good for, and its cost.")
    parser.add_argument(
        "part", nargs="?", choices=("all", *PARTS), default="all", help="what to measure (default: hard against soft)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", dest="size", action="store_const", const="smoke", help=argparse.SUPPRESS)
    size.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="about four minutes on two cores (default)"
    )
    size.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        help="all ways, more seeds and sizes: about two hours on two cores",
    )
    parser.add_argument("--backend", choices=BACKENDS, default=os.environ.get("KERAS_BACKEND", BACKENDS[0]))
    parser.add_argument("--seed", type=int, default=0, help="where all randomness comes from (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"), help="folder for JSON and PNG")
    parser.set_defaults(size="quick")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and writes the files."""
    given = parse(arguments)
    os.environ["KERAS_BACKEND"] = given.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from benchmarks import runner  # imports Keras, which takes its backend from the environment

    try:
        return runner.run(given.part, Options(seed=given.seed, size=given.size), given.output)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on with what is left.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
