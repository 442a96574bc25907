"""Share, then unshare: transformer blocks that are tied for the first part of training and free for the rest.

Yang et al., Speeding up deep model training by sharing weights and then unsharing (2021), report that deep models need
about half of the training time. Does that show in a small one? Four blocks on text (see `benchmarks.text`) are tied
exactly for the first 10, 25 or 50 % of the steps, beside blocks that are always free and blocks that are always tied.
`TieSchedule` changes the rule, and `TiedOptimizer` hands its slots over. All ways see the same batches, so differences
are taken within each split. One learning rate serves all ways. The figures are over steps, not over time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import keras

import equalize
from benchmarks import colors, curves, ways
from benchmarks.comparing import stretch
from benchmarks.task import Case, Options, Record, Row, Task, distinct, mean_and_error, plus_minus, where
from benchmarks.text import BATCH, Block, build, in_order, load, loss
from equalize.callbacks import TieSchedule
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer

RATE = 3e-3
STRETCH = 16
FREE, TIED = "free", "tied"

SHARES = {FREE: 0.0, "10 %": 0.1, "25 %": 0.25, "50 %": 0.5, TIED: 1.0}


def _tied(share: float) -> ways.Attach:
    """Ties for a share of the steps, whose number is the strength."""

    def attach(groups: ways.Groups, strength: float, optimizer: keras.optimizers.Optimizer) -> ways.Tied:
        registry = equalize.GroupRegistry()
        registry.tie("blocks", list(groups["blocks"]), Equal())
        schedule = TieSchedule(registry, "blocks", {0: Equal(), round(share * strength): None}, on_step=True)
        return ways.Tied(TiedOptimizer(optimizer, registry), [schedule])

    return attach


WAYS = {
    FREE: ways.Way("always free", colors.BLACK),
    "10 %": ways.Way("tied for 10 %", colors.GREEN, _tied(SHARES["10 %"])),
    "25 %": ways.Way("tied for 25 %", colors.BLUE, _tied(SHARES["25 %"])),
    "50 %": ways.Way("tied for 50 %", colors.PINK, _tied(SHARES["50 %"])),
    TIED: ways.Way("always tied", colors.ORANGE, _tied(SHARES[TIED]), hard=True),
}


def blocks(options: Options) -> int:
    """How many blocks the transformer has."""
    return options.choose(2, 2, 4)


def splits(options: Options) -> int:
    """How many random splits of the text."""
    return options.choose(1, 1, 8)


def steps(options: Options) -> int:
    """How many steps to train for."""
    return options.choose(4, 8, 40) * STRETCH


def part(options: Options) -> int:
    """How many steps from one measurement to the next."""
    return steps(options) // options.choose(2, 2, 10)


class Unsharing(Task):
    """Loss of a transformer whose blocks are tied at first, over the steps."""

    title = "Share, then unshare: four transformer blocks on text"
    timed = False
    main = False
    size = (10.0, 4.2)

    def cases(self, options: Options) -> Sequence[Case]:
        return [{"way": name} for name in options.choose((FREE, "50 %", TIED), (FREE, "50 %", TIED), WAYS)]

    def measure(self, options: Options, case: Case) -> Iterator[Record]:
        entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        for split in range(splits(options)):
            (x, y), test, characters = load(options, split)
            seed = options.seed_of(split)
            keras.utils.set_random_seed(seed)
            way = WAYS[case["way"]]
            model = build(characters, blocks(options))
            groups = {"blocks": [layer for layer in model.layers if isinstance(layer, Block)]}
            tied = way.attach(groups, steps(options), keras.optimizers.Adam(RATE))
            model.compile(tied.optimizer, entropy, **stretch(STRETCH))
            order = in_order(seed, len(y), steps(options) * BATCH).reshape(-1, part(options) * BATCH)
            for number, some in enumerate(order, start=1):
                model.fit(x[some], y[some], batch_size=BATCH, shuffle=False, verbose=0, callbacks=tied.callbacks)
                yield {
                    "split": split,
                    "seed": seed,
                    "steps": number * part(options),
                    "test": loss(model, test),
                    "spread": ways.spread(groups),
                }

    def rows(self, records: Sequence[Record]) -> list[Row]:
        last = max(distinct(records, "steps"))
        lines = []
        names = curves.measured(records)
        for name in names:
            lines.append(Row(WAYS[name].label, plus_minus(_figures(records, name, last), " bits", digits=3)))
        for name in names[1:]:
            less = _differences(records, name, last)
            goal = ("< 0", mean_and_error(less)[0] < 0) if name != TIED else ("", None)
            what = f"{WAYS[name].label} less {WAYS[FREE].label}"
            lines.append(Row(what, plus_minus(less, " bits", digits=3, sign="+"), *goal))
        spread = max(r["spread"] for r in records if r["steps"] <= SHARES[r["way"]] * last)
        return [*lines, Row("spread of tied blocks", f"{spread:g}", "0", spread == 0.0)]

    def draw(self, figure: Any, records: Sequence[Record]) -> None:
        counts, measured = distinct(records, "steps"), curves.measured(records)
        whole, apart = figure.subplots(1, 2)
        figure.get_layout_engine().set(wspace=0.06)
        for axes, figures, names in ((whole, _figures, measured), (apart, _differences, measured[1:])):
            lines = {}
            for name in names:
                points = [mean_and_error(figures(records, name, count)) for count in counts]
                lines[name] = (counts, [mean for mean, _ in points], [error for _, error in points])
            curves.labelled_lines(axes, lines, digits=3, known=WAYS)
            axes.set(xlabel="steps")
        whole.set_ylabel("bits per character")
        apart.set_ylabel("bits more than always free")
        apart.axhline(0.0, color=colors.GREY, linewidth=0.8)
        curves.explain(apart)


def _figures(records: Sequence[Record], name: str, count: int) -> list[float]:
    """The losses of a way after so many steps, split by split."""
    return [record["test"] for record in where(records, way=name, steps=count)]


def _differences(records: Sequence[Record], name: str, count: int) -> list[float]:
    """What the losses of a way are above those of blocks that are always free, split by split."""
    pairs = zip(_figures(records, name, count), _figures(records, FREE, count), strict=True)
    return [loss - free for loss, free in pairs]
