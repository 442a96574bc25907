"""What files of tied models take: room, time and memory, beside those that Keras writes.

Twelve transformer blocks, tied and trained as one by `TiedOptimizer` with Adam, and the same blocks untied. A fresh
process saves and loads each in turn with Keras and with `equalize.saving`, and reports the median times, the peak of
resident memory during one save, and the sizes. The file of one block that is used twelve times is what one weight for
all would take.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import equalize
from benchmarks import colors, peaks
from benchmarks.task import Case, Options, Record, Row, Task, distinct, where

BLOCKS, TOKENS, HEADS = 12, 8, 4
KINDS = ("tied", "untied")
WRITERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Keras": (keras.saving.save_model, keras.saving.load_model),
    "equalize": (equalize.saving.save_model, equalize.saving.load_model),
}


def block(width: int) -> keras.Model:
    """An encoder block of a transformer."""
    tokens = keras.Input((TOKENS, width))
    attended = keras.layers.MultiHeadAttention(HEADS, width // HEADS)(tokens, tokens)
    seen = keras.layers.LayerNormalization()(tokens + attended)
    inside = keras.layers.Dense(width)(keras.layers.Dense(4 * width, activation="relu")(seen))
    return keras.Model(tokens, keras.layers.LayerNormalization()(seen + inside))


def model_of(kind: str, width: int) -> keras.Model:
    """Twelve blocks, "tied" or "untied", or one that is used "again"; with slots that hold what is like no other."""
    blocks = [block(width)] * BLOCKS if kind == "again" else [block(width) for _ in range(BLOCKS)]
    x = entrance = keras.Input((TOKENS, width))
    for each in blocks:
        x = each(x)
    model, registry = keras.Model(entrance, x), equalize.GroupRegistry()
    optimizer = keras.optimizers.Adam()
    if kind == "tied":
        registry.tie("blocks", blocks, equalize.constraints.Equal())
        optimizer = equalize.optimizers.TiedOptimizer(optimizer, registry)
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    random = np.random.default_rng(0)
    for variable in model.optimizer.variables:
        if len(variable.shape):
            variable.assign(random.normal(size=variable.shape))
    return model


def seconds(run: Callable[[], Any]) -> float:
    """How long something takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def probe(kind: str, width: int, rounds: int) -> Iterator[Record]:
    """What is measured in this process."""
    model = model_of(kind, width)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.keras" for name in WRITERS}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in WRITERS}
        for _ in range(rounds + 1):
            for name, (save, load) in WRITERS.items():
                saved = seconds(lambda save=save, name=name: save(model, files[name]))
                times[name].append((saved, seconds(lambda load=load, name=name: load(files[name]))))
        for name, (save, _) in WRITERS.items():
            before = peaks.resident()
            memory = peaks.peak(lambda save=save, name=name: save(model, files[name])) - before
            save_time, load_time = (statistics.median(each) for each in zip(*times[name][1:], strict=True))
            size = files[name].stat().st_size
            yield {"writer": name, "save": save_time, "load": load_time, "memory": memory, "size": size}
        if kind == "tied":
            keras.saving.save_model(model_of("again", width), files["Keras"])
            yield {"writer": "one block used again", "size": files["Keras"].stat().st_size}


class Files(Task):
    """Files of twelve tied transformer blocks."""

    title = "Files of twelve transformer blocks"
    main = False
    size = (7.0, 3.0)

    def cases(self, options: Options) -> Sequence[Case]:
        return [{"kind": kind, "width": options.choose(32, 384, 384)} for kind in KINDS]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        if peaks.AVAILABLE:
            rounds = options.choose(1, 1, 5)
            yield from peaks.probes(__name__, case["kind"], str(case["width"]), str(rounds))

    def rows(self, records: Sequence[Record]) -> list[Row]:
        if not records:
            return [Row("not measured", "needs Linux")]
        lines = []
        for kind in distinct(records, "kind"):
            of = {record["writer"]: record for record in where(records, kind=kind)}
            ours, theirs, largest = of["equalize"], of["Keras"], 16 * of["Keras"]["width"] ** 2
            if kind == "tied":
                room = ours["size"] / of["one block used again"]["size"]
                whole = theirs["size"] / of["one block used again"]["size"]
                lines.append(Row("tied: Keras's file / one block's", f"{whole:.2f}"))
                lines.append(Row("tied: file / one block's", f"{room:.3f}", "<= 1.05", room <= 1.05))
            for what in ("save", "load"):
                ratio = ours[what] / theirs[what]
                lines.append(Row(f"{kind}: time to {what} / Keras's", f"{ratio:.2f}", "<= 1.20", ratio <= 1.2))
            more = (ours["memory"] - theirs["memory"]) / largest
            lines.append(
                Row(f"{kind}: memory to save, beyond Keras's", f"{more:+.1f} arrays", "<= 1 array", more <= 1.0)
            )
        return lines

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        bars = [
            (f"{record['kind']}, {record['writer']}", record["size"] / 1e6, color)
            for record in records
            for color in [colors.BLUE if record["writer"] == "equalize" else colors.PINK]
        ]
        axes = figure.subplots()
        peaks.draw(axes, bars)
        axes.set_xlabel("size of the file (MB)")


if __name__ == "__main__":
    for found in probe(sys.argv[1], *map(int, sys.argv[2:])):
        print(json.dumps(found))
