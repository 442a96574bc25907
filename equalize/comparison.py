"""Which way to tie is best for a model and its data: `compare` tries them, and a `Comparison` is what came out."""

import csv
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from equalize._comparing.journal import Journal, described, described_model, plain
from equalize._comparing.runs import Data, Record, Task, new_optimizer
from equalize._comparing.samples import Samples, samples, validation
from equalize._comparing.ways import Way, ways_of
from equalize._inputs import arguments
from equalize._inputs.arguments import counted, received
from equalize._reports import plots, summary
from equalize._reports.progress import bar
from equalize._reports.results import Row, rows
from equalize.errors import EqualizeError

__all__ = ["Comparison", "compare"]

_HELD_OUT = 0.2
"""The part of the training data that strengths are chosen on, unless `validation_split` says another."""

_LOWER = ("loss", "error", "mse", "mae", "mape", "msle", "rmse", "entropy", "divergence", "hinge", "poisson")
_HIGHER = ("acc", "auc", "precision", "recall", "f1", "fbeta", "r2", "iou", "similarity", "score")


class Comparison:
    """What `compare` found: every run, the best way, a table and a picture.

    Attributes:
        records: A dictionary for each run: `way`, `strength` (None where there is none), `seed`, `score` (the metric on
            the data that the ways are compared on), `choice_score` (on those that strengths are chosen on), `loss`,
            `step_seconds`, `free_weights`, `spread` (how far apart the members came to be), `seconds` and `error` (what
            went wrong, or None). Numbers that there are not are not-a-number.
        metric: The name of the score.
        mode: `"min"` where lower scores are better, `"max"` where higher ones are.

    Example:
    >>> import keras, numpy as np, equalize
    >>> def two_towers():
    ...     inputs = keras.Input((3,))
    ...     return keras.Model(inputs, keras.layers.add([keras.layers.Dense(1)(inputs) for _ in range(2)]))
    >>> x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    >>> comparison = equalize.compare(
    ...     two_towers, lambda model: {"towers": model.layers[1:3]}, x, x[:, :1], ways=["untied", "hard"], seeds=1,
    ...     compile={"loss": "mse"}, fit={"epochs": 2},
    ... )
    >>> [record["way"] for record in comparison.records], comparison.mode
    (['untied', 'hard'], 'min')
    """

    def __init__(self, records: list[dict[str, Any]], metric: str, mode: str, notes: Sequence[str]):
        self.records = records
        self.metric = metric
        self.mode = mode
        self._notes = list(notes)

    @property
    def best(self) -> tuple[str, float | None]:
        """The name of the best way, and its strength, which is None where it has none."""
        row = self._rows[0]
        return row.way, row.strength

    @functools.cached_property
    def _rows(self) -> list[Row]:
        return rows(self.records, lower=self.mode == "min")

    def summary(self, print_fn: Callable[[str], object] | None = None) -> None:
        """Prints a table of the ways, the best first, each at the strength that was chosen for it.

        Args:
            print_fn: Called with the table as plain text of at most 80 columns, for a log; by default it is printed,
                in color where the terminal has it.
        """
        if print_fn is not None:
            arguments.function("print_fn", print_fn, "of a text, or None")
        relative = any(row.way == "untied" for row in self._rows)
        seeds = len({record["seed"] for record in self.records})
        direction = "lower" if self.mode == "min" else "higher"
        at_end = [f"'{row.way}' at {row.strength:g}" for row in self._rows if row.at_end]
        lines = [
            f"{self.metric}: the mean over {counted(seeds, 'seed')} and its standard error; {direction} is better.",
            f"Step: median time of a training step{', over that of untied' if relative else ''}. Free: weights that "
            "training can choose. Spread: how far apart the members came to be.",
            *self._notes,
            *([f"At an end of the strengths that were tried: {', '.join(at_end)}."] if at_end else []),
        ]
        summary.print_comparison(self._rows, self.metric, lines, relative=relative, print_fn=print_fn)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the score over the strength of each way that has one, with the untied way before and others after it.

        Args:
            path: The file to write; its suffix says the format, `.png`, `.svg` or `.pdf`.

        Raises:
            TypeError: `path` is not a path.
            EqualizeError: The suffix is another, or the folder does not exist.
            ImportError: matplotlib is not installed; the extra `plot` brings it.
        """
        plots.plot_comparison(self._rows, self.metric, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all records to a file.

        Args:
            path: The file, ending in `.json` (the metric, the best way and the records) or `.csv` (a line for each
                record). A file that is there is replaced.

        Raises:
            TypeError: `path` is not a path.
            EqualizeError: The name has another ending, or the folder does not exist.
        """
        name = _checked_file(path, [".json", ".csv"])
        records = [plain(record) for record in self.records]
        with open(name, "w", encoding="utf-8", newline="") as file:
            if name.endswith(".json"):
                about = {"metric": self.metric, "mode": self.mode, "best": self.best, "notes": self._notes}
                json.dump({**about, "records": records}, file, indent=1)
            else:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
                writer.writeheader()
                writer.writerows(records)

    def __repr__(self) -> str:
        way, strength = self.best
        chosen = way if strength is None else f"{way} at {strength:g}"
        return f"<Comparison of {counted(len(self._rows), 'way')} by {self.metric!r}: {chosen} is best>"


def compare(
    make_model: Callable[[], keras.Model],
    members: Callable[[keras.Model], Mapping[str, Any]],
    x: Any,
    y: Any = None,
    *,
    ways: Sequence[Any] | None = None,
    validation_data: Any = None,
    compile: Mapping[str, Any] | Callable[[keras.Model], Any],  # noqa: A002 - Keras's word
    fit: Mapping[str, Any],
    seeds: int | Sequence[int] = 3,
    metric: str = "loss",
    mode: str = "auto",
    path: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Trains a model tied in several ways, and tells which is best on data that none was trained on.

    For each seed, every way starts from the same initial values and sees the same batches. So `"exact"` and `"shared"`,
    which are one computation, have the same score, up to rounding. What ways are compared on is `validation_data`;
    without it, a fifth of the training data, drawn anew for each seed. Where some way has several strengths, these are
    chosen on another fifth (or the part that `fit={"validation_split": ...}` says), never on what the ways are compared
    on: the strength with the best mean over the seeds. All ways train on the same rest.

    Results are those of `model.evaluate`, without penalties on weights: a soft tie's penalty is part of its training,
    and not of its score. Penalties on what layers return, and losses that `add_loss` adds, count.

    What fails in one way, shapes that cannot be tied or results that are not numbers, is in its row, and the others
    go on. On a terminal a bar shows how far they are. Each run sets Keras's random seed.

    Args:
        make_model: Returns a new, built model that is not tied.
        members: From such a model, what to tie: the `members` of `GroupRegistry.tie`, by the names of groups.
        x: The training data: an array, a structure of arrays, or a `tf.data.Dataset` of batches, which is read into
            memory. Some of it is held out, so what comes from a generator must be made arrays first.
        y: The targets, likewise; none beside a data set, or where the model needs none.
        ways: What to compare, all of these by default.

            - `"untied"`, and `"shared"`: one variable in several layers, for members without views;
            - `"exact"` (by `equalize.optimizers.TiedOptimizer`) and `"hard"` (by `equalize.constraints.Equal`). Under
              SGD the sum of n gradients, which `"shared"` and `"exact"` take, wants a learning rate n times smaller;
            - `"partial"` (by `Equal(rate=...)`, at 0.003, 0.03 and 0.3) and `"soft"` (by `equalize.regularizers.MeanL2`
              at 0.001, 0.01, 0.1 and 1);
            - a rule, such as `equalize.regularizers.PairwiseNorm(factor=0.1)`;
            - a reduction, such as `equalize.reductions.PCGrad()`: `"exact"` with it;
            - a function of `(model, registry, members)`, where `members` is what your `members` returned. It ties,
              before the model is compiled. What it may return:
              callbacks for `fit`, an optimizer, a function from the optimizer of `compile` to another one (`lambda
              optimizer: TiedOptimizer(optimizer, registry, reduction="mean")`), or a list of these;
            - a pair of one of these and a list of strengths, as in `("soft", [0.1, 1.0])` or `(PairwiseNorm(), [0.01,
              0.1])`, which replace the rule's factor or rate. A function gets the strength as a fourth argument.
        validation_data: What the ways are compared on, as `model.fit` takes it, but no generator.
        compile: The arguments of `model.compile`, where the optimizer may be an object, a name, a config, a class or a
            function: each run has a new one. Or a function that compiles the model it is given.
        fit: The arguments of `model.fit`, but for the data; `sample_weight` is split with them. Where there are
            `callbacks` (a list, or a function that makes one for each run), the `val_` results that they see are of
            the part that strengths are chosen on.
        seeds: How many seeds, from 0, or a list of them.
        metric: The name of the result of `model.evaluate` to compare.
        mode: `"min"` or `"max"`, for the better results; `"auto"` knows by the name of the metric.
        path: A file ending in `.jsonl` that keeps finished runs. After an interruption, the same call goes on. Ways,
            strengths and seeds may be added; strengths only where some way had several from the start, or `fit` has a
            `validation_split`. A function among the ways is known by its name, and `make_model` by the weights of what
            it makes.

    Returns:
        The `Comparison`.

    Raises:
        EqualizeError: An argument is invalid, `make_model` or `members` fails, no way could be trained, the model has
            no such metric, or `path` is of another comparison.
        TypeError: An argument is of the wrong type.

    Example:
    >>> import keras, numpy as np, equalize
    >>> def one_head_per_task():
    ...     inputs = [keras.Input((3,)) for _ in range(4)]
    ...     return keras.Model(inputs, [keras.layers.Dense(1)(task) for task in inputs])
    >>> x = [np.random.default_rng(task).normal(size=(40, 3)).astype("float32") for task in range(4)]
    >>> y = [task @ np.float32([[1], [2], [3]]) for task in x]  # the tasks are one
    >>> comparison = equalize.compare(
    ...     one_head_per_task, lambda model: {"heads": model.layers[4:]}, x, y, ways=["untied", "exact"], seeds=2,
    ...     compile={"optimizer": keras.optimizers.SGD(0.01), "loss": ["mse"] * 4}, fit={"epochs": 3},
    ... )
    >>> comparison.best
    ('exact', None)
    """
    arguments.function("make_model", make_model, "that returns a model")
    arguments.function("members", members, "from a model to what to tie")
    listed = ways_of(ways)
    direction = _direction(arguments.text("metric", metric, "the name of a result"), mode)
    numbers = _checked_seeds(seeds)
    settings = _checked_fit(fit)
    file = None if path is None else _checked_file(path, [".jsonl"])
    held = validation(validation_data)
    data, batch = samples("x", x, y, settings.pop("sample_weight", None))
    if batch is not None:
        settings.setdefault("batch_size", batch)
    several = any(len(way.strengths) > 1 for way in listed)
    part = settings.pop("validation_split", _HELD_OUT if several else 0.0)
    part = arguments.number("validation_split", part, low=0.0, high=0.5)
    if several and not part:
        raise EqualizeError(
            "`validation_split` is 0, and strengths are chosen on that part of the training data. Expected: a part "
            "above 0, or ways with one strength each."
        )
    task = Task(make_model, members, _checked_compile(compile), settings, metric)
    split = functools.partial(_split, data, held, part)
    notes = _notes(split(numbers[0]), several, held is not None)
    journal = Journal(file, {} if file is None else _settings(task, data, held, part))
    return Comparison(_run_all(task, listed, numbers, split, journal), metric, direction, notes)


def _run_all(
    task: Task, ways: Sequence[Way], seeds: Sequence[int], split: Callable[[int], Data], journal: Journal
) -> list[Record]:
    """The records of all runs. Those of a seed are in random order, so that what slows the machine slows all ways."""
    runs = [(way, strength) for way in ways for strength in way.strengths]
    done: dict[tuple[int, int], Record] = {}
    with bar("Comparing", len(runs) * len(seeds)) as step:
        for seed in seeds:
            data, cause = split(seed), None
            for place in map(int, np.random.default_rng(seed).permutation(len(runs))):
                way, strength = runs[place]
                record = journal.find(way, strength, seed)
                if record is None:
                    record, problem = task.run(way, strength, seed, data)
                    journal.add(way, record)
                    cause = cause or problem
                done[place, seed] = record
                step()
            _require_result([done[place, seed] for place in range(len(runs))], cause)
    return [done[place, seed] for place in range(len(runs)) for seed in seeds]


def _require_result(records: Sequence[Record], cause: Exception | None) -> None:
    """Raises where no way has a result: that is not the fault of a way."""
    if any(math.isfinite(record["score"]) for record in records):
        return
    found = {str(record["error"] or f"a result of {record['score']}"): record["way"] for record in reversed(records)}
    reasons = "".join(f"\n    {way}: {reason}" for reason, way in reversed(found.items()))
    raise EqualizeError(
        "No way could be trained to a finite result. Expected: a model, data and arguments that `make_model()`, "
        f"`compile` and `fit` take as they do without `compare`. Received:{reasons}"
    ) from cause


def _split(data: Samples, held: Samples | None, part: float, seed: int) -> Data:
    """The samples of a seed: what is not given apart is held out."""
    fractions = [*([_HELD_OUT] if held is None else []), *([part] if part else [])]
    train, *others = data.split(seed, fractions)
    test = others.pop(0) if held is None else held
    return Data(train, others[0] if others else None, test)


def _notes(data: Data, several: bool, given: bool) -> list[str]:
    """What was done with the data."""
    held = "`validation_data`" if given else "held out, without `validation_data`"
    lines = [f"Trained on {counted(data.train.count, 'sample')}; compared on {data.test.count:,}, {held}."]
    if data.choice is not None and several:
        lines.append(f"Strengths chosen on {data.choice.count:,} others of the training data.")
    return lines


def _settings(task: Task, data: Samples, held: Samples | None, part: float) -> dict[str, Any]:
    """What all runs depend on, for the file that keeps them."""
    return {
        "data": data.digest(),
        "validation_data": None if held is None else held.digest(),
        "part to choose strengths on": part,
        "model": described_model(*task.model(0)),
        "compile": described(task.compile),
        "fit": described(task.fit),
        "metric": task.metric,
        "backend": keras.backend.backend(),
    }


def _checked_file(path: Any, endings: Sequence[str]) -> str:
    name = arguments.file("path", path, endings)
    if not os.path.isdir(os.path.dirname(name) or "."):
        raise EqualizeError(f"`path` must be in a folder that exists. Received: {name!r}.")
    return name


def _checked_compile(given: Any) -> Any:
    if callable(given):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(
            "`compile` must be a dictionary with the arguments of `model.compile`, or a function that compiles a "
            f"model. Received: {received(given)}."
        )
    new_optimizer(given)
    return dict(given)


def _checked_fit(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise TypeError(
            "`fit` must be a dictionary with the arguments of `model.fit`, for instance {'epochs': 10}. Received: "
            f"{received(given)}."
        )
    known = [key for key in ("x", "y", "validation_data") if key in given]
    if known or not all(isinstance(key, str) for key in given):
        raise EqualizeError(
            f"`fit` must hold the arguments of `model.fit` but for the data, which `compare` has. Received: "
            f"{sorted(map(str, given))}."
        )
    return {"verbose": 0, **given}


def _checked_seeds(given: Any) -> list[int]:
    numbers = arguments.integers("seeds", given)
    if np.ndim(given) == 0:
        numbers = tuple(range(arguments.integer("seeds", given, low=1)))
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise EqualizeError(f"`seeds` must be different numbers, none negative. Received: {received(given)}.")
    return list(numbers)


def _direction(metric: str, mode: str) -> str:
    """Whether lower or higher results are better."""
    if arguments.option("mode", mode, ("auto", "min", "max")) != "auto":
        return mode
    lower, higher = (any(part in metric.lower() for part in parts) for parts in (_LOWER, _HIGHER))
    if lower == higher:
        raise EqualizeError(
            f'Whether lower or higher is better cannot be told from the name {metric!r}. Expected: `mode="min"` or '
            '`mode="max"` beside it.'
        )
    return "min" if lower else "max"
