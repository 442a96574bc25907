"""A user's script with every public name, which `pyright` checks in strict mode; see test_typing.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

import equalize
from equalize.callbacks import FactorSchedule, PeriodicSync, TiedCheckpoint, TieMonitor, TieSchedule
from equalize.constraints import Equal, Follow, GroupConstraint, Invariant, ProximalPairwiseL1, ProximalPairwiseNorm
from equalize.errors import EqualizeError, GroupMismatchError, NotLinkedError, TieBrokenError
from equalize.optimizers import TiedOptimizer
from equalize.reductions import MGDA, PCGrad, Reduction, UPGrad
from equalize.regularizers import ChainL2, GroupRegularizer, MeanL2, PairwiseL1, PairwiseL2, PairwiseNorm, TraceNorm
from equalize.saving import deduplicate, load_model, save_model, save_weights
from equalize.views import Chain, Flip, Pattern, Rotate90, Scale, Slice, Transpose, View


def rules() -> list[Equal | MeanL2 | PairwiseL2 | PairwiseNorm | PairwiseL1 | ChainL2 | TraceNorm]:
    views: list[View] = [Transpose(), Flip(0), Rotate90(1), Scale(2.0), Slice((0, 0), (2, 2))]
    views.append(Pattern([[0, 1], [1, 0]], (2,)))
    return [
        Equal("towers", rate=0.5, weight=2.0, view=Chain(*views), inner="non_neg"),
        MeanL2("towers", 0.1),
        PairwiseL2("towers", [[0.0, 1.0], [1.0, 0.0]]),
        PairwiseNorm("towers", np.ones((2, 2))),
        PairwiseL1(factor=0.1),
        ChainL2(factor=0.1, inner="l2"),
        TraceNorm(factor=0.1, view=Transpose()),
    ]


class SumToZero(GroupConstraint):
    def project(self, values: Sequence[Any]) -> list[Any]:
        mean = sum(values) / len(values)
        return [value - mean for value in values]


class Energy(GroupRegularizer):
    def penalty(self, values: Sequence[Any]) -> Any:
        return sum((value**2).sum() for value in values)


def custom() -> list[SumToZero | Energy]:
    return [SumToZero("towers", view=Flip(0)), Energy("towers", 0.5)]


def proximal() -> tuple[ProximalPairwiseL1, ProximalPairwiseNorm]:
    return ProximalPairwiseL1("tasks", factor=0.1), ProximalPairwiseNorm("tasks", factor=0.1)


def follow(registry: equalize.GroupRegistry, student: keras.Model, teacher: keras.Model) -> PeriodicSync:
    registry.tie("teacher", [student, teacher], Follow(rate=0.01, every=2), statistics=True)
    registry.tie("free", [student, teacher], None, weights=[3, 1])
    registry.extend("free", [teacher], weights=[2])
    registry.anchor("start", student, MeanL2(factor=0.1), values=[np.zeros((3, 2))])
    clusters: list[str] = [group.name for group in registry.split("free", atol=0.1)]
    registry.untie(*clusters)
    return PeriodicSync(registry, "free", every=10, outer_optimizer=keras.optimizers.SGD(0.7, nesterov=True))


def symmetric() -> Invariant:
    return Invariant([Rotate90(1), Rotate90(2), Rotate90(3)])


def tie(model: keras.Model, left: keras.Layer, right: keras.Layer) -> equalize.GroupRegistry:
    registry = equalize.GroupRegistry().link(model, initial="strict")
    tied = registry.tie("layers", [left, right], Equal())
    groups = tied if isinstance(tied, list) else [tied]
    names: list[str] = [group.name for group in groups]
    registry.untie(*names)
    return registry


def look(registry: equalize.GroupRegistry, model: keras.Model, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    lines: list[str] = []
    registry.summary(print_fn=lines.append)
    registry.plot("ties.png")
    for finding in registry.diagnose():
        lines.append(f"{finding.kind} {finding.subject} {finding.message} {finding.fix}")
    for name, advice in registry.advise(model, x, y, names=["towers"]).items():
        lines.append(f"{name} {advice.cosine + advice.distance + advice.losses[advice.best]:.2f}")
    group: equalize.Group = registry["towers"]
    members: tuple[equalize.Member, ...] = group.members
    paths: list[str] = [member.path for member in members if member.view is None and member.weight == 1.0]
    lines += paths
    spread: float = group.spread()
    lines.append(f"{group.hard} {group.projects} {spread} {len(registry)} {'towers' in registry}")
    return registry.spread()


def train(registry: equalize.GroupRegistry) -> TieMonitor:
    def rise(epoch: int) -> float:
        return 0.1 * epoch

    reductions: list[str | Reduction] = ["mean", PCGrad(seed=1), MGDA(), UPGrad()]
    optimizer = TiedOptimizer("adam", registry, reduction=reductions[0])
    monitor = TieMonitor(registry, atol=1e-6, repair=False, gradients=True)
    ending = TieSchedule(registry, "towers", {0: Equal(), 5: None, 7: MeanL2(factor=0.1)}, on_step=True)
    print(ending.rules)
    conflicts: dict[str, list[dict[str, float]]] = monitor.conflicts
    found: dict[str, dict[str, float]] = optimizer.conflicts()
    print(conflicts, found, optimizer.watch_conflicts(), [PCGrad(1).weights(1.0) for _ in range(2)])
    schedule = FactorSchedule(registry, ["towers"], rise)
    print(optimizer.averages, [group.name for group in optimizer.groups], schedule.names)
    broken: dict[str, float] = monitor.broken
    history: dict[str, list[float]] = monitor.history
    print(broken, history)
    monitor.plot("spread.png")
    registry.project()
    registry.sync("mean", "towers")
    registry.replace("towers", MeanL2(factor=0.1))
    registry.penalty("towers")
    return monitor


def mend(registry: equalize.GroupRegistry) -> equalize.GroupRegistry:
    try:
        registry.check(atol=0.0)
    except TieBrokenError:
        registry.sync()
    except (NotLinkedError, GroupMismatchError) as error:
        raise EqualizeError(f"{equalize.__version__}: {error}") from error
    return equalize.GroupRegistry.from_config(registry.get_config())


def share(left: keras.Layer, right: keras.Layer) -> bool:
    equalize.share(left, right)
    relation = equalize.relation(left, right)
    return relation == "same" if isinstance(relation, str) else set(relation.values()) == {"same"}


def keep(model: keras.Model, registry: equalize.GroupRegistry) -> tuple[int, int]:
    checkpoint = TiedCheckpoint("last.keras", registry, save_best_only=True)
    print(checkpoint.registry)
    save_model(model, "model.keras", registry)
    save_weights(model, "model.weights.h5")
    loaded, ties = load_model("model.keras", compile=False)
    shared: list[keras.Variable] = ties.share()
    stored, free = registry.count_params(model)
    print(loaded, list(ties), shared, free / stored)
    before, after = deduplicate("model.keras")
    return before, after


def best_way(make_model: Callable[[], keras.Model], x: np.ndarray, y: np.ndarray) -> tuple[str, float | None]:
    def towers(model: Any) -> dict[str, Any]:
        return {"towers": model.layers[1:3]}

    def mean(model: keras.Model, registry: equalize.GroupRegistry, members: Mapping[str, Any]) -> Any:
        for name, each in members.items():
            registry.tie(name, each, Equal())

        def tied(optimizer: Any) -> TiedOptimizer:
            return TiedOptimizer(optimizer, registry, reduction="mean")

        return tied

    ways = ["untied", "exact", ("soft", [0.1, 1.0]), PairwiseNorm(factor=0.1), mean]
    comparison: equalize.Comparison = equalize.compare(
        make_model,
        towers,
        x,
        y,
        ways=ways,
        validation_data=(x, y),
        compile={"optimizer": "adam", "loss": "mse", "metrics": ["mae"]},
        fit={"epochs": 3},
        seeds=[1, 2],
        metric="mae",
        mode="min",
        path="runs.jsonl",
    )
    comparison.summary(print_fn=print)
    comparison.plot("scores.png")
    comparison.save("records.json")
    print(comparison.metric, comparison.mode, [record["score"] for record in comparison.records])
    return comparison.best
