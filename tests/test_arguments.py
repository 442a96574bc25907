"""Every public constructor and function, with arguments that it does not expect.

Each value is either taken, and then what was made is sound, or refused with an `EqualizeError` or a `TypeError` that
says something, and then nothing has changed. A public name that is not called here fails the first test.
"""

import copy
import decimal
import fractions
import functools
import importlib.util
import inspect
import json
import random

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import ops

import equalize
from equalize import callbacks, constraints, optimizers, reductions, regularizers, saving, views
from equalize._ties.rules import Rule
from equalize.constraints import Equal, Follow
from equalize.errors import EqualizeError
from equalize.regularizers import MeanL2, PairwiseNorm
from equalize.views import Scale, Transpose, View
from tests.conftest import BACKEND
from tests.pictures import picture, require_whole
from tests.strategies import attacks


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Pictures that are drawn go there."""
    monkeypatch.chdir(tmp_path)


class World:
    """A model with a hard and a soft group and free layers, another model, and a registry."""

    def __init__(self):
        entrance = keras.Input((3,))
        self.layers = {name: keras.layers.Dense(3, name=name) for name in ("a", "b", "c", "d", "e", "f")}
        self.model = keras.Model(entrance, [layer(entrance) for layer in self.layers.values()])
        self.model.compile("sgd", ["mse"] * 6)
        self.other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, kernel_constraint=Equal("far"))])
        self.twins = [keras.layers.Dense(2, kernel_constraint=Equal("twins")) for _ in range(2)]
        self.linkable = keras.Model(entrance, [twin(entrance) for twin in self.twins])
        self.registry = equalize.GroupRegistry()
        self.registry.tie("hard", [self.a, (self.b, Transpose())], Equal())
        self.registry.tie("soft", [self.c, self.d, np.eye(3, dtype="float32")], MeanL2(factor=0.5))
        self.data = np.ones((4, 3), "float32"), [np.zeros((4, 3), "float32")] * 6

    def __getattr__(self, name):
        if name in vars(self).get("layers", ()):
            return self.layers[name].kernel
        raise AttributeError(name)

    def picture(self):
        return picture(self.registry, self.model, self.other, self.linkable)

    def require_whole(self):
        require_whole(self.registry)

    @functools.cached_property
    def built(self):
        optimizer = optimizers.TiedOptimizer("sgd", self.registry)
        optimizer.build(self.model.trainable_variables)
        return optimizer

    @functools.cached_property
    def configs(self):
        """The configs of the optimizer and of its registry, which look for all living models and so take their time."""
        config = self.built.get_config()
        return {"optimizer": config, "registry": config["registry"]["config"]}


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


class Uncomparable:
    def __eq__(self, other):
        raise RuntimeError("no")

    def __bool__(self):
        raise RuntimeError("no")

    def __hash__(self):
        raise RuntimeError("no")


def itself():
    own = []
    own.append(own)
    return own


def foreign(**changes):
    """The config of something that is not data."""
    return {"module": "os", "class_name": "function", "config": "system", "registered_name": "equalize>Equal"} | changes


@keras.saving.register_keras_serializable()
class ToZero(constraints.GroupConstraint):
    """A custom rule."""

    def project(self, values):
        return [ops.zeros_like(value) for value in values]


@keras.saving.register_keras_serializable()
class Squares(regularizers.GroupRegularizer):
    """Another."""

    def penalty(self, values):
        return sum(ops.sum(ops.square(value)) for value in values)


# Each by a function of the world, since some are used up, and some must be of the model that they are given to.
JUNK = {
    "None": lambda w: None,
    **{
        repr(value)[:20]: lambda w, value=value: value
        for value in (True, False, -1, 0, 1, 2, 10**30, -(2**63), 0.5, -0.5, -0.0, 1e-320, 1e308, -1e308, 1j)
    },
    **{text: lambda w, text=text: float(text) for text in ("nan", "inf", "-inf")},
    "an integer beyond float": lambda w: 10**400,
    "an integer beyond print": lambda w: -(10**5000),
    **{
        repr(text)[:20]: lambda w, text=text: text
        for text in ("", " ", "nonsense", "hard", "soft", "first", "[red]", "\0", "l2", "sgd", "x" * 5000, b"hard")
    },
    **{repr(empty): lambda w, empty=empty: type(empty)() for empty in ((), [], {}, set())},
    "[None]": lambda w: [None],
    "a list of itself": lambda w: itself(),
    "ragged": lambda w: [[0, 1], [1]],
    "a name twice": lambda w: ["hard", "hard"],
    "numbers": lambda w: [0.5, 0.5],
    "integers": lambda w: (1, 0),
    "bools": lambda w: [True, False],
    "a large matrix": lambda w: [[0.0, 1e308], [1e308, 0.0]],
    "a dictionary": lambda w: {"a": 1},
    "half a config": lambda w: {"class_name": "Equal"},
    "the config of a layer": lambda w: keras.saving.serialize_keras_object(keras.layers.Dense(2)),
    "the config of a view": lambda w: keras.saving.serialize_keras_object(Transpose()),
    "the config of a rule": lambda w: keras.saving.serialize_keras_object(Equal()),
    "the config of a function": lambda w: foreign(),
    "the config of a lambda": lambda w: foreign(class_name="__lambda__", config={"value": "x"}),
    "range": lambda w: range(2),
    "a generator": lambda w: (i for i in range(2)),
    "object()": lambda w: object(),
    "unprintable": lambda w: Unprintable(),
    "uncomparable": lambda w: Uncomparable(),
    "a class": lambda w: object,
    "a class of Keras": lambda w: keras.constraints.NonNeg,
    "an error": lambda w: ValueError("x"),
    "a lambda": lambda w: lambda *args: args,
    "a builtin": lambda w: len,
    "a module": lambda w: np,
    "a fraction": lambda w: fractions.Fraction(1, 3),
    "a decimal": lambda w: decimal.Decimal(1),
    "np.float32": lambda w: np.float32(0.5),
    "np.nan": lambda w: np.float64("nan"),
    "np.int64": lambda w: np.int64(1),
    "np.bool_": lambda w: np.bool_(True),
    "np.complex64": lambda w: np.complex64(1),
    "np.str_": lambda w: np.str_("hard"),
    "np.datetime64": lambda w: np.datetime64("2020-01-01"),
    "a scalar array": lambda w: np.array(0.5),
    "an empty array": lambda w: np.zeros((0,), "float32"),
    "a vector": lambda w: np.ones(3, "float32"),
    "a matrix": lambda w: np.ones((3, 3), "float32"),
    "another matrix": lambda w: np.full((3, 3), 7.0),
    "a wrong shape": lambda w: np.ones((2, 3), "float32"),
    "not a number": lambda w: np.full((3, 3), np.nan, "float32"),
    "whole numbers": lambda w: np.ones((3, 3), "int64"),
    "an array of bools": lambda w: np.ones((3, 3), bool),
    "an array of strings": lambda w: np.array([["x"] * 3] * 3),
    "an array of objects": lambda w: np.array([[None] * 3] * 3, object),
    "an array of complex numbers": lambda w: np.ones((3, 3), complex),
    "a scalar tensor": lambda w: ops.ones(()),
    "a tensor": lambda w: ops.ones((3, 3)),
    "a tensor of integers": lambda w: ops.ones((3,), "int32"),
    "an empty tensor": lambda w: ops.zeros((0, 3)),
    "a symbolic tensor": lambda w: keras.KerasTensor((3, 3)),
    "a variable": lambda w: keras.Variable(np.ones((3, 3), "float32")),
    "a variable of integers": lambda w: keras.Variable(np.ones((3, 3), "int32"), dtype="int32", trainable=False),
    "a frozen variable": lambda w: keras.Variable(np.ones((3, 3), "float32"), trainable=False),
    "a tied variable": lambda w: w.a,
    "a softly tied variable": lambda w: w.c,
    "a free variable": lambda w: w.e,
    "a variable of another model": lambda w: w.other.layers[0].kernel,
    "a layer": lambda w: w.layers["e"],
    "a tied layer": lambda w: w.layers["a"],
    "an unbuilt layer": lambda w: keras.layers.Dense(3),
    "a layer without weights": lambda w: keras.layers.Flatten(),
    "the model": lambda w: w.model,
    "another model": lambda w: w.other,
    "a model that can be linked": lambda w: w.linkable,
    "an unbuilt model": lambda w: keras.Sequential([keras.layers.Dense(3, kernel_constraint=Equal("far"))]),
    "the registry": lambda w: w.registry,
    "another registry": lambda w: equalize.GroupRegistry(),
    "a group": lambda w: w.registry["hard"],
    "a member": lambda w: w.registry["hard"].members[0],
    "a rule": lambda w: Equal(),
    "a partial rule": lambda w: Equal(rate=0.5),
    "a named rule": lambda w: Equal("elsewhere"),
    "a bound rule": lambda w: w.a.constraint,
    "a rule with a view": lambda w: Equal(view=Transpose()),
    "a soft rule": lambda w: MeanL2(),
    "a rule for two": lambda w: PairwiseNorm(factor=[[0, 1], [1, 0]]),
    "a rule with a function": lambda w: Equal(inner=lambda value: ops.sum(value)),
    "a rule that wants more axes": lambda w: Equal(inner=keras.constraints.MaxNorm(1.0, axis=3)),
    "a view": lambda w: Scale(3),
    "a view that does not fit": lambda w: views.Slice((5,), (1,)),
    "a view of one axis twice": lambda w: views.Flip((0, -2)),
    "Invariant": lambda w: constraints.Invariant([Transpose()]),
    "a constraint": lambda w: keras.constraints.NonNeg(),
    "a regularizer": lambda w: keras.regularizers.L2(),
    "an optimizer": lambda w: keras.optimizers.SGD(),
    "a tied optimizer": lambda w: optimizers.TiedOptimizer("sgd", w.registry),
    "a callback": lambda w: keras.callbacks.TerminateOnNaN(),
}


def rule_calls(rule, **good):
    return rule, lambda w: {"group": "name", "view": Transpose(), "inner": None, **good}


def soft(rule):
    return rule_calls(rule, factor=0.5)


def unpacked(function):
    """A function of `*arguments`, as one of a list; what is not a list is an argument itself."""
    return lambda w, arguments, **kwargs: function(w)(
        *(arguments if isinstance(arguments, list) else [arguments]), **kwargs
    )


def of(function):
    return lambda w, **kwargs: function(w)(**kwargs)


def drawing(plot):
    """A picture, where matplotlib is installed."""

    def draw(w, path):
        try:
            plot(w)(path)
        except ImportError:
            assert importlib.util.find_spec("matplotlib") is None

    return draw


def monitor_after_an_epoch(w):
    monitor = callbacks.TieMonitor(w.registry)
    monitor.history = {"hard": [0.0], "soft": [1.0]}
    return monitor


def two_layers():
    """A model that can be compared."""
    entrance = keras.Input((3,))
    return keras.Model(entrance, keras.layers.add([keras.layers.Dense(3)(entrance) for _ in range(2)]))


def compared():
    run = {"way": "soft", "seed": 0, "free_weights": 3, "error": None, "choice_score": 1.0, "spread": 0.0}
    run |= {"score": 1.0, "loss": 1.0, "step_seconds": 1.0}
    return equalize.Comparison([{**run, "strength": strength} for strength in (0.1, 1.0)], "loss", "min", [])


def saved(w):
    """The name of a file of the model."""
    saving.save_weights(w.model, "saved.weights.h5")
    saving.save_model(w.model, "saved.keras")
    return "saved.keras"


def replace(w, name, rule):
    w.registry.replace(name, rule)
    w.registry.sync()  # which the next step would do


# How to call each public name, and arguments that are in order.
CALLS = {
    "Comparison.plot": (drawing(lambda w: compared().plot), lambda w: {"path": "scores.svg"}),
    "Comparison.save": (of(lambda w: compared().save), lambda w: {"path": "records.csv"}),
    "Comparison.summary": (of(lambda w: compared().summary), lambda w: {"print_fn": len}),
    "GroupRegistry.replace": (replace, lambda w: {"name": "soft", "rule": MeanL2(factor=1.0)}),
    "GroupRegistry.split": (of(lambda w: w.registry.split), lambda w: {"name": "soft", "atol": 0.5}),
    "GroupRegistry.anchor": (
        of(lambda w: w.registry.anchor),
        lambda w: {"name": "new", "layers": [w.layers["e"]], "rule": MeanL2(), "values": [np.ones((3, 3)), np.ones(3)]},
    ),
    "GroupRegistry.extend": (
        of(lambda w: w.registry.extend),
        lambda w: {"name": "soft", "members": [w.e, (w.f, Transpose())], "weights": [2, 3]},
    ),
    "GroupRegistry.link": (
        unpacked(lambda w: w.registry.link),
        lambda w: {"arguments": [w.linkable], "initial": "mean"},
    ),
    "GroupRegistry.tie": (
        of(lambda w: w.registry.tie),
        lambda w: {"name": "new", "members": [w.e, (w.f, Transpose())], "rule": Equal(), "initial": "mean"},
    ),
    "GroupRegistry.tie, weights": (
        of(lambda w: w.registry.tie),
        lambda w: {"name": "new", "members": [w.e, w.f], "rule": MeanL2(), "weights": [0.5, 2]},
    ),
    "GroupRegistry.tie, statistics": (
        of(lambda w: w.registry.tie),
        lambda w: {"name": "new", "members": [w.layers["e"], w.layers["f"]], "rule": Equal(), "statistics": True},
    ),
    "GroupRegistry.count_params": (of(lambda w: w.registry.count_params), lambda w: {"model": w.model}),
    "GroupRegistry.share": (unpacked(lambda w: w.registry.share), lambda w: {"arguments": ["hard"]}),
    "GroupRegistry.untie": (unpacked(lambda w: w.registry.untie), lambda w: {"arguments": ["hard"]}),
    "GroupRegistry.sync": (unpacked(lambda w: w.registry.sync), lambda w: {"arguments": ["mean", "hard"]}),
    "GroupRegistry.penalty": (unpacked(lambda w: w.registry.penalty), lambda w: {"arguments": ["soft"]}),
    "GroupRegistry.project": (unpacked(lambda w: w.registry.project), lambda w: {"arguments": ["hard"]}),
    "GroupRegistry.check": (of(lambda w: w.registry.check), lambda w: {"atol": 0.0}),
    "GroupRegistry.summary": (of(lambda w: w.registry.summary), lambda w: {"print_fn": len}),
    "GroupRegistry.diagnose": (unpacked(lambda w: w.registry.diagnose), lambda w: {"arguments": [w.model]}),
    "GroupRegistry.advise": (
        of(lambda w: w.registry.advise),
        lambda w: {
            "model": w.model,
            "x": w.data[0],
            "y": w.data[1],
            "names": ["hard"],
            "batch_size": 4,
            "print_fn": len,
        },
    ),
    "GroupRegistry.plot": (drawing(lambda w: w.registry.plot), lambda w: {"path": "ties.svg"}),
    "GroupRegistry.select": (of(lambda w: w.registry.select), lambda w: {"names": ["hard"]}),
    "GroupRegistry.from_config": (
        equalize.GroupRegistry.from_config,
        lambda w: {"config": copy.deepcopy(w.configs["registry"])},
    ),
    "Member": (equalize.Member, lambda w: {"variable": w.e, "view": Transpose(), "weight": 2.0}),
    "callbacks.FactorSchedule": (
        callbacks.FactorSchedule,
        lambda w: {"registry": w.registry, "names": ["soft"], "schedule": len},
    ),
    "callbacks.PeriodicSync": (
        callbacks.PeriodicSync,
        lambda w: {"registry": w.registry, "names": "soft", "every": 3, "method": "mean", "outer_optimizer": "sgd"},
    ),
    "callbacks.TieMonitor.plot": (drawing(lambda w: monitor_after_an_epoch(w).plot), lambda w: {"path": "spread.svg"}),
    "callbacks.TieMonitor": (
        callbacks.TieMonitor,
        lambda w: {"registry": w.registry, "atol": 0.5, "repair": True, "gradients": False},
    ),
    "callbacks.TieSchedule": (
        callbacks.TieSchedule,
        lambda w: {"registry": w.registry, "name": "soft", "rules": {0: Equal(), 5: None}, "on_step": True},
    ),
    "callbacks.TiedCheckpoint": (
        callbacks.TiedCheckpoint,
        lambda w: {"filepath": "last.keras", "registry": w.registry},
    ),
    "constraints.Equal": rule_calls(Equal, rate=0.5, weight=2.0),
    "constraints.Follow": (Follow, lambda w: {"group": "name", "rate": 0.5, "every": 2, "view": Transpose()}),
    "constraints.GroupConstraint": rule_calls(ToZero),
    "constraints.ProximalPairwiseL1": rule_calls(constraints.ProximalPairwiseL1, factor=0.5),
    "constraints.ProximalPairwiseNorm": rule_calls(constraints.ProximalPairwiseNorm, factor=0.5),
    "constraints.Invariant": (constraints.Invariant, lambda w: {"views": [Transpose()], "inner": "non_neg"}),
    "optimizers.TiedOptimizer": (
        optimizers.TiedOptimizer,
        lambda w: {"inner_optimizer": "sgd", "registry": w.registry, "reduction": "sum", "name": "tied"},
    ),
    "optimizers.TiedOptimizer.build": (
        of(lambda w: optimizers.TiedOptimizer("sgd", w.registry).build),
        lambda w: {"variables": list(w.model.trainable_variables)},
    ),
    "optimizers.TiedOptimizer.apply": (
        lambda w, trainable_variables: w.built.apply([ops.ones((3, 3))] * 2, trainable_variables),
        lambda w: {"trainable_variables": [w.c, w.e]},
    ),
    "optimizers.TiedOptimizer.from_config": (
        optimizers.TiedOptimizer.from_config,
        lambda w: {"config": copy.deepcopy(w.configs["optimizer"])},
    ),
    "reductions.Reduction.from_config": (reductions.PCGrad.from_config, lambda w: {"config": {"seed": 3}}),
    "reductions.PCGrad": (reductions.PCGrad, lambda w: {"seed": 3}),
    "regularizers.ChainL2": soft(regularizers.ChainL2),
    "regularizers.GroupRegularizer": soft(Squares),
    "regularizers.MeanL2": soft(MeanL2),
    "regularizers.PairwiseL1": soft(regularizers.PairwiseL1),
    "regularizers.PairwiseL2": soft(regularizers.PairwiseL2),
    "regularizers.PairwiseNorm": soft(PairwiseNorm),
    "regularizers.TraceNorm": soft(regularizers.TraceNorm),
    "compare": (
        equalize.compare,
        lambda w: {
            "make_model": two_layers,
            "members": lambda model: {"pair": model.layers[1:3]},
            "x": w.data[0],
            "y": w.data[0],
            "ways": ["untied"],
            "validation_data": (w.data[0], w.data[0]),
            "compile": {"optimizer": "sgd", "loss": "mse", "run_eagerly": True},
            "fit": {"epochs": 1, "batch_size": 4},
            "seeds": [0],
            "metric": "loss",
            "mode": "min",
            "path": "runs.jsonl",
        },
    ),
    "relation": (equalize.relation, lambda w: {"a": w.a, "b": w.b}),
    "saving.deduplicate": (saving.deduplicate, lambda w: {"filepath": saved(w)}),
    "saving.load_model": (saving.load_model, lambda w: {"filepath": saved(w)}),
    "saving.save_model": (
        saving.save_model,
        lambda w: {"model": w.model, "filepath": "new.keras", "registry": w.registry},
    ),
    "saving.save_weights": (saving.save_weights, lambda w: {"model": w.model, "filepath": "new.weights.h5"}),
    "share": (unpacked(lambda w: equalize.share), lambda w: {"arguments": [w.e, w.f]}),
    "views.Chain": (unpacked(lambda w: views.Chain), lambda w: {"arguments": [Transpose(), Scale(2)]}),
    "views.Chain.from_config": (views.Chain.from_config, lambda w: {"config": views.Chain(Scale(2)).get_config()}),
    "views.Flip": (views.Flip, lambda w: {"axes": [0]}),
    "views.Pattern": (views.Pattern, lambda w: {"indices": [[0, 1, 0]], "shape": (2,)}),
    "views.Rotate90": (views.Rotate90, lambda w: {"k": 1, "axes": (0, 1)}),
    "views.Scale": (Scale, lambda w: {"factor": 2.0}),
    "views.Slice": (views.Slice, lambda w: {"start_indices": (0, 1), "shape": (1, 2)}),
    "views.Transpose": (Transpose, lambda w: {"axes": (1, 0)}),
    "views.View.from_config": (Scale.from_config, lambda w: {"config": {"factor": 2.0}}),
}

FUNCTIONS = {"print_fn", "schedule"}  # which users write, and whose errors are theirs

# What equalize or Keras calls with objects of its own, and never a user.
CALLED_BY_GROUPS = {"adjoint", "apply", "apply_gradient", "least_squares", "overlaps"}  # of a member
CALLED_BY_MEMBERS = {
    "adjoint",
    "bounds",
    "common_shape",
    "covers",
    "forward",
    "least_squares",
    "multiplicity",
}  # of a view
CALLED_BY_GROUP = {"checked_strength", "common_value", "having", "penalty", "project", "subset"}  # of a rule
CALLED_BY_KERAS = {
    "handing_over",  # of the registry, with its own groups
    "apply_gradients",  # hands over to `apply`
    "exclude_from_weight_decay",
    "finalize_variable_values",
    *("learning_rate", "weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "gradient_accumulation_steps"),
    *("use_ema", "ema_momentum", "ema_overwrite_frequency"),
    "load_own_variables",
    "loss_scale_factor",
    "save_own_variables",
    "scale_loss",
    "set_weights",
    "stateless_apply",
}


def called_by_others(kind, method):
    return (
        (kind is equalize.Member and method in CALLED_BY_GROUPS)
        or (issubclass(kind, View) and method in CALLED_BY_MEMBERS)
        or (issubclass(kind, Rule) and method in CALLED_BY_GROUP)
        or (issubclass(kind, reductions.Reduction) and method == "weights")  # of an optimizer
        or (issubclass(kind, optimizers.TiedOptimizer) and method in CALLED_BY_KERAS)
        or (issubclass(kind, keras.callbacks.Callback) and method.startswith("on_"))
    )


WITHOUT_ARGUMENTS = (
    View,
    equalize.Comparison,
    equalize.Group,
    equalize.GroupRegistry,
    reductions.Reduction,
    reductions.MGDA,
    reductions.UPGrad,
)


def public_names():
    """Every public constructor, every function, and every method that takes an argument."""
    things = {}
    for name in equalize.__all__:
        thing = getattr(equalize, name)
        if inspect.ismodule(thing):
            own = {k: v for k, v in vars(thing).items() if getattr(v, "__module__", "") == thing.__name__}
            things |= {f"{name}.{key}": value for key, value in own.items() if not key.startswith("_")}
        else:
            things[name] = thing
    for name, thing in things.items():
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            if thing not in WITHOUT_ARGUMENTS:
                yield name
            for method, value in vars(thing).items():
                value = getattr(value, "__func__", value)
                takes = inspect.isfunction(value) and len(inspect.signature(value).parameters) > 1
                settable = isinstance(value, property) and value.fset is not None
                if (takes or settable) and not method.startswith("_") and not called_by_others(thing, method):
                    yield f"{name}.{method}"
        elif inspect.isfunction(thing):
            yield name


def test_every_public_name_is_called_with_bad_arguments():
    assert sorted(public_names()) == sorted(name for name in CALLS if "," not in name)


def variants(good, junk):
    """The value in the place of an argument, and in the places inside of it."""
    yield lambda: junk()
    if isinstance(good, (list, tuple)) and good:
        kind = type(good)
        yield lambda: kind([junk(), *good[1:]])
        yield lambda: kind([*good, junk()])
        yield lambda: kind([(good[0], junk()), *good[1:]])
    if isinstance(good, dict):
        for key in good:
            yield lambda key=key: {**good, key: junk()}
        yield lambda: {**good, "more": junk()}


def require_sound(made):
    """What was made of arguments that were taken can be written down, and made again."""
    innermost = made
    while isinstance(innermost, Rule):
        innermost = innermost.inner
    of_function = inspect.isroutine(getattr(innermost, "inner", innermost))  # Keras loads none that is not registered
    if isinstance(made, (Rule, View, constraints.Invariant)) and not of_function:
        config = json.loads(json.dumps(made.get_config()))
        assert type(made).from_config(config).get_config() == made.get_config()
        repr(made)


class Tried:
    """Calls, each with a look at what it did; `cases` counts them."""

    def __init__(self):
        self.cases = self.taken = 0
        self.renew()

    def renew(self):
        self.world = World()
        self.before = self.world.picture()

    def call(self, name, arguments):
        function = CALLS[name][0]
        takes_world = "w" in inspect.signature(function).parameters
        self.cases += 1
        try:
            made = function(self.world, **arguments) if takes_world else function(**arguments)
        except (EqualizeError, TypeError) as error:
            problem = str(error)
        else:
            problem = None
        if problem is not None:
            assert len(problem) > 15, (name, problem)
            assert self.world.picture() == self.before, name
        else:
            self.taken += 1
            require_sound(made)
            if self.world.picture() != self.before:
                self.world.require_whole()
                self.renew()


@pytest.fixture(scope="module")
def tried():
    """One world for all tests, as long as nothing that they do changes it."""
    return Tried()


def try_all(tried, name, junk_of):
    """Calls with every piece of junk that `junk_of` chooses for a place in an argument."""
    before = tried.cases, tried.taken
    places = [
        (key, place)
        for key, good in CALLS[name][1](tried.world).items()
        for place in range(len([*variants(good, None)]))
    ]
    for key, place in places:
        for junk in junk_of(key, place):
            good = CALLS[name][1](tried.world)
            value = list(variants(good[key], lambda junk=junk: JUNK[junk](tried.world)))[place]()
            if not (key in FUNCTIONS and callable(value)):
                tried.call(name, {**good, key: value})
    assert 0 <= tried.taken - before[1] < tried.cases - before[0]  # a path of a picture, say, is never taken


def sample_of(name, key, place, size=6):
    """Junk for one place, the same in every run, and different from place to place."""
    return random.Random(f"{name} {key} {place}").sample(sorted(JUNK), size)


def test_all_junk_is_tried_somewhere():
    world = World()
    samples = [
        sample_of(name, key, place)
        for name in CALLS
        for key, good in CALLS[name][1](world).items()
        for place in range(len([*variants(good, None)]))
    ]
    assert {junk for sample in samples for junk in sample} == JUNK.keys()


@pytest.mark.filterwarnings("ignore")  # Keras and NumPy may warn of what they are given before it is refused
@pytest.mark.parametrize("name", CALLS)
def test_a_bad_argument_is_an_error_that_changes_nothing(tried, name):
    try_all(tried, name, lambda key, place: sample_of(name, key, place))


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the checks are the same on each backend, and take minutes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_every_bad_argument_in_every_place_is_an_error_that_changes_nothing(tried, name):
    try_all(tried, name, lambda key, place: JUNK)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_thing_twice_is_an_error_or_no_harm(tried, name):
    for key, good in CALLS[name][1](tried.world).items():
        if isinstance(good, list):
            tried.call(name, {**CALLS[name][1](tried.world), key: [good[0], *good]})
            tried.call(name, {**CALLS[name][1](tried.world), key: [*good, *good]})


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
pieces = st.sampled_from(sorted(JUNK)).map(JUNK.get) | plain.map(lambda value: lambda w: value)
values = st.recursive(
    pieces,
    lambda inner: st.lists(inner, max_size=4).flatmap(
        lambda parts: st.sampled_from([list, tuple]).map(lambda kind: lambda w: kind(part(w) for part in parts))
    ),
    max_leaves=6,
)


def attack(examples):
    """Random arguments in random places; returns what was tried."""
    tried = Tried()

    @attacks(examples)
    @hypothesis.given(st.sampled_from(sorted(CALLS)), st.data())
    def run(name, data):
        arguments = CALLS[name][1](tried.world)
        for key in data.draw(st.sets(st.sampled_from(sorted(arguments))) if arguments else st.just(())):
            value = data.draw(values)(tried.world)
            if not (key in FUNCTIONS and callable(value)):
                arguments[key] = value
        tried.call(name, arguments)

    run()
    return tried


@pytest.mark.filterwarnings("ignore")
@pytest.mark.sampled
@pytest.mark.parametrize("cases", [40, 100])
def test_random_arguments_are_errors_that_change_nothing(cases):
    tried = attack(cases)
    assert 0 < tried.taken < tried.cases


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_many_random_arguments_are_errors_that_change_nothing():
    tried = attack(20_000)
    print(f"tried {tried.cases} calls, of which {tried.taken} were taken")
    assert 0 < tried.taken < tried.cases
