"""One run of a comparison: a new model, tied in one way, trained and looked at."""

import contextlib
import functools
import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np

from equalize._backend import keras_private, living
from equalize._comparing.samples import Samples
from equalize._comparing.ways import Members, Way
from equalize._inputs import configs
from equalize._inputs.arguments import received
from equalize._ties.bound import ties_on, without_penalties
from equalize.errors import EqualizeError
from equalize.registry import GroupRegistry

Record: TypeAlias = dict[str, Any]

_DROPPED = 2**28  # bytes of models that are gone, after which memory is given back


@dataclass
class Data:
    """The samples of one seed.

    Attributes:
        train: What models are trained on.
        choice: What strengths are chosen on, where there are some to choose.
        test: What the ways are compared on.
    """

    train: Samples
    choice: Samples | None
    test: Samples


@dataclass
class Task:
    """What all runs have in common.

    Attributes:
        make_model: Makes a built model that is not tied.
        members: What to tie in it.
        compile: The arguments of `model.compile`, or a function that compiles a model.
        fit: The arguments of `model.fit`, but for the data.
        metric: The name of what is compared, among the results of `model.evaluate`.
    """

    make_model: Callable[[], keras.Model]
    members: Callable[[keras.Model], Members]
    compile: Mapping[str, Any] | Callable[[keras.Model], Any]
    fit: Mapping[str, Any]
    metric: str

    def __post_init__(self) -> None:
        self._made: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self._dropped = 0

    def model(self, seed: int) -> tuple[keras.Model, Members]:
        """A new model from the seed's random values, and what to tie in it.

        Raises:
            EqualizeError: The user's functions fail, or do not do what they should.
        """
        keras.utils.set_random_seed(seed)
        model = _called("make_model", self.make_model)
        if not isinstance(model, keras.Model) or not model.built or model in self._made:
            what = received(model)
            if isinstance(model, keras.Model):
                what = f"the model of before, '{model.name}'" if model.built else f"'{model.name}', which is not built"
            raise EqualizeError(
                "`make_model` must return a new model at each call, and build it (a subclassed model by a call on some "
                f"data). Received: {what}."
            )
        self._made.add(model)
        tied = next((weight for weight in model.weights if list(ties_on(weight))), None)
        if tied is not None:
            raise EqualizeError(
                f"`make_model` must return a model that is not tied. Received: '{model.name}', where '{tied.path}' has "
                "a rule. Leave the rules out of its layers; `compare` ties what `members` says."
            )
        members = _called("members", self.members, model)
        if not isinstance(members, Mapping) or not members:
            raise EqualizeError(
                "`members` must return what to tie by the names of groups, as `registry.tie(name, members, rule)` "
                f'takes it: {{"towers": [left, right]}}. Received: {received(members)}.'
            )
        return model, members

    def run(self, way: Way, strength: float | None, seed: int, data: Data) -> tuple[Record, Exception | None]:
        """Trains a model in one way. What goes wrong there is in the record, and returned beside it.

        Raises:
            EqualizeError: The user's functions fail, or no result has the name of the metric.
        """
        started, problem, results = time.perf_counter(), None, {}
        record: Record = {"way": way.name, "strength": strength, "seed": seed}
        record |= dict.fromkeys(("score", "choice_score", "loss", "step_seconds", "spread"), math.nan)
        record |= {"free_weights": None, "seconds": 0.0, "error": None}
        model, members = self.model(seed)
        registry, clock = GroupRegistry(), _Clock()
        try:
            change, callbacks = _besides(way.tie(model, registry, members, strength))
            self._compile(model, change)
            record["free_weights"] = registry.count_params(model)[1]
            self._train(model, seed, data, [clock, *callbacks])
            if getattr(model.optimizer, "use_ema", False):
                registry.sync("mean")  # the averages that Keras writes in the end are of each member by itself
            choice = data.choice if len(way.strengths) > 1 else None
            results = self._results(model, choice, data.test)
            record["spread"] = max(registry.spread().values(), default=math.nan)
        except Exception as error:  # of whatever kind: it is what there is to say about this way
            record["error"], problem = f"{type(error).__name__}: {error}", error
        for key, found in results.items():
            if self.metric not in found:
                raise EqualizeError(
                    f"`metric` must be the name of a result of `model.evaluate`: one of {sorted(found)}. Received: "
                    f"{self.metric!r}. Add it to the `metrics` that the model is compiled with."
                )
            record[key] = float(found[self.metric])
        record["loss"] = float(results.get("score", {}).get("loss", math.nan))
        record |= {"step_seconds": clock.seconds_of_a_step, "seconds": time.perf_counter() - started}
        self._drop(model)
        return record, problem

    def _compile(self, model: keras.Model, change: Callable[[Any], Any]) -> None:
        if callable(self.compile):
            self.compile(model)
        else:
            model.compile(**{**self.compile, "optimizer": new_optimizer(self.compile)})
        model.optimizer = change(model.optimizer)

    def _train(self, model: keras.Model, seed: int, data: Data, callbacks: list[Any]) -> None:
        given = dict(self.fit)
        own = given.pop("callbacks", None)
        own = own() if callable(own) else own
        callbacks += own if isinstance(own, (list, tuple)) else [] if own is None else [own]
        if own and data.choice is not None:  # they may ask for `val_loss`; in all ways, since it draws random numbers
            given["validation_data"] = tuple(data.choice.parts.values())
        if not model.run_eagerly:
            with contextlib.suppress(Exception):  # what cannot be built without values, the step builds
                batch = np.arange(min(given.get("batch_size") or 32, data.train.count))
                keras_private.build_for_training(model, **data.train.take(batch).parts)
        keras.utils.set_random_seed(seed)  # ties may draw random numbers, and batches must be the same
        model.fit(**data.train.parts, **given, callbacks=callbacks)
        if "validation_data" in given:
            living.retrace_model(model)

    def _results(self, model: keras.Model, choice: Samples | None, test: Samples) -> dict[str, dict[str, Any]]:
        """What `model.evaluate` says of the data, without penalties on weights: those of ties are not all alike."""
        asked = {"score": test} | ({} if choice is None else {"choice_score": choice})
        size = {"batch_size": self.fit["batch_size"]} if "batch_size" in self.fit else {}
        with without_penalties(model):
            return {
                key: model.evaluate(**samples.parts, **size, verbose=0, return_dict=True)
                for key, samples in asked.items()
            }

    def _drop(self, model: keras.Model) -> None:
        """Gives memory back, now and then: models are parts of cycles, and looking for these takes a while."""
        self._dropped += 16 * model.count_params()  # each weight, its gradient and two slots
        if self._dropped > _DROPPED:
            self._dropped = 0
            gc.collect()


class _Clock(keras.callbacks.Callback):
    """Times the epochs of `fit`, without what is validated after them."""

    def __init__(self) -> None:
        super().__init__()
        self._epochs: list[float] = []
        self._started: float | None = None

    @property
    def seconds_of_a_step(self) -> float:
        """The median over all epochs but the first, in which functions are compiled."""
        return statistics.median(self._epochs[1:]) if len(self._epochs) > 1 else math.nan

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._started = time.perf_counter()

    def on_test_begin(self, logs: Any = None) -> None:
        self._stop()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._started is not None:
            self._epochs.append((time.perf_counter() - self._started) / (self.params.get("steps") or math.nan))
            self._started = None


def _called(name: str, function: Callable[..., Any], *given: Any) -> Any:
    try:
        return function(*given)
    except Exception as error:  # whatever the user's function raises
        raise EqualizeError(
            f"`{name}` failed: expected a function that {_DOES[name]}; received what led to {type(error).__name__}: "
            f"{str(error).rstrip('.')}."
        ) from error


_DOES = {"make_model": "returns a built model", "members": "returns what to tie, by the names of groups"}


def new_optimizer(settings: Mapping[str, Any]) -> Any:
    """A new optimizer, from what `compile` has: a name, a config, a function or class, or one to do as.

    Raises:
        EqualizeError: It is none of these, or the function fails.
    """
    name = 'compile["optimizer"]'
    given = settings.get("optimizer", "rmsprop")
    if isinstance(given, keras.optimizers.Optimizer):
        return type(given).from_config(given.get_config())
    if callable(given):
        try:
            given = given()
        except Exception as error:  # whatever the user's function raises
            raise EqualizeError(
                f"`{name}` failed: expected a function that returns an optimizer; received what led to "
                f"{type(error).__name__}: {str(error).rstrip('.')}."
            ) from error
    return configs.optimizer(name, given)


def _besides(returned: Any) -> tuple[Callable[[Any], Any], list[Any]]:
    """What a way returned: what becomes of the optimizer, and callbacks."""
    change: Callable[[Any], Any] = _same
    callbacks = []
    for each in returned if isinstance(returned, (list, tuple)) else [returned]:
        if isinstance(each, keras.callbacks.Callback):
            callbacks.append(each)
        elif isinstance(each, keras.optimizers.Optimizer):
            change = functools.partial(_same, each)
        elif callable(each):
            change = each
        elif each is not None:
            raise TypeError(
                "A way must return nothing, callbacks, an optimizer, a function from the optimizer of `compile` to "
                f"another one, or a list of these. Received: {received(each)}."
            )
    return change, callbacks


def _same(optimizer: Any, *_: Any) -> Any:
    return optimizer
