"""Configs and files that are truncated or tampered with: data, never code, never half a registry."""

import copy
import json
import sys
import zipfile

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

import equalize
from equalize._ties.bound import ties_on
from equalize.constraints import Equal
from equalize.errors import EqualizeError, GroupMismatchError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2, PairwiseNorm
from equalize.views import Chain, Scale, Transpose
from tests.conftest import KERAS_3_5
from tests.pictures import picture, require_whole
from tests.strategies import attacks

MATRIX = [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


def untied():
    entrance = keras.Input((3,))
    layers = [keras.layers.Dense(3, name=name) for name in "abcd"]
    return keras.Model(entrance, [layer(entrance) for layer in layers])


def tied():
    model = untied()
    a, b, c, d = model.layers[1:]
    registry = equalize.GroupRegistry()
    registry.tie(
        "hard", [a.kernel, (b.kernel, Chain(Transpose(), Scale(-1)))], Equal(inner=keras.constraints.MaxNorm(9))
    )
    registry.tie("soft", [a.bias, b.bias, np.full(3, 0.5, "float32")], PairwiseNorm(factor=MATRIX))
    registry.tie("deep", [c, d], MeanL2(factor=0.5, inner="l2"))
    return model, registry


def plain(config):
    return json.loads(json.dumps(config))


MODEL, REGISTRY = tied()
CONFIG = plain(REGISTRY.get_config())
TARGET = untied()


def optimizer_config():
    optimizer = TiedOptimizer(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 5)), REGISTRY)
    optimizer.build(MODEL.trainable_variables)
    return plain(optimizer.get_config())


# ---- nothing that a config names is run


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    """The name of a module that says so when it is imported."""
    (tmp_path / "bomb.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_suffix('.hit').touch()\ndef f(*a): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "bomb"
    assert not (tmp_path / "bomb.hit").exists()
    assert "bomb" not in sys.modules


def foreign(module):
    """Configs that Keras 3.5 would answer by importing the module."""
    names = ["equalize>Equal", "equalize>Nothing", "f", None]
    functions = [{"class_name": "function", "config": "f", "registered_name": name} for name in names]
    classes = [{"class_name": "F", "config": {}, "registered_name": name} for name in names[1:]]
    spec = {"class_name": "__typespec__", "config": [], "spec_name": "f", "registered_name": "equalize>Equal"}
    return [{"module": module, **config} for config in [*functions, *classes, spec]]


@pytest.mark.slow
def test_no_module_that_a_config_names_is_imported(bomb):
    for config in foreign(bomb):
        for make in (
            lambda c: Equal("g", view=c),
            lambda c: Equal("g", inner=c),
            lambda c: MeanL2("g", inner=c),
            lambda c: Chain.from_config({"views": [c]}),
            lambda c: equalize.constraints.Invariant([c]),
            lambda c: equalize.constraints.Invariant([Transpose()], inner=c),
            lambda c: TiedOptimizer(c, REGISTRY),
            lambda c: TiedOptimizer.from_config({**optimizer_config(), "registry": c}),
            lambda c: TiedOptimizer.from_config({**optimizer_config(), "inner_optimizer": c}),
            lambda c: equalize.GroupRegistry.from_config({"groups": [{**CONFIG["groups"][0], "rule": c}]}),
        ):
            with pytest.raises(EqualizeError, match=r"onfig|one of"):
                make(config)


def test_a_lambda_is_not_loaded():
    rule = Equal("g", inner=lambda w: w)
    with pytest.warns(UserWarning, match="lambda"):
        config = rule.get_config()
    with pytest.raises(EqualizeError, match="`inner` must be a Keras constraint"):
        Equal.from_config(config)


@keras.saving.register_keras_serializable(package="tests")
class Sorted(keras.constraints.Constraint):
    def __call__(self, w):
        return keras.ops.sort(w, axis=0)


@keras.saving.register_keras_serializable(package="tests")
def halved(w):
    return w / 2


@keras.saving.register_keras_serializable(package="tests")
class Mirror(equalize.views.Flip):
    pass


def test_what_is_registered_with_keras_is_loaded():
    for inner in (Sorted(), *([] if KERAS_3_5 else [halved])):  # which saves functions without their package
        assert type(Equal.from_config(plain(Equal("g", inner=inner).get_config())).inner) is type(inner)
    assert Equal.from_config(plain(Equal("g", view=Mirror(0)).get_config())).view == Mirror(0)


@keras.saving.register_keras_serializable(package="tests")
class Alarm(keras.layers.Layer):
    @classmethod
    def from_config(cls, config):
        raise AssertionError("made of a config that asks for something else")


def test_a_registered_class_of_another_kind_is_not_made():
    alarm = {"module": "tests", "class_name": "Alarm", "config": {}, "registered_name": "tests>Alarm"}
    for argument in ("view", "inner"):
        with pytest.raises(EqualizeError) as caught:
            Equal("g", **{argument: alarm})
        assert "made of a config" not in f"{caught.value}{caught.value.__cause__}"


# ---- mutations

nodes = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just([]) | st.just({})


def places(config, path=()):
    """Every place in nested lists and dictionaries."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def at(config, path):
    for key in path:
        config = config[key]
    return config


def mutated(config, data):
    """The config with one to three changes: something taken away, replaced, doubled, exchanged, added or renamed."""
    config = copy.deepcopy(config)
    for _ in range(data.draw(st.integers(1, 3))):
        paths = list(places(config))
        if not paths:
            break
        path = data.draw(st.sampled_from(paths))
        holder, key = at(config, path[:-1]), path[-1]
        change = data.draw(st.sampled_from(["drop", "replace", "exchange", "add", "rename", "double"]))
        if change == "drop":
            del holder[key]
        elif change == "replace":
            holder[key] = data.draw(nodes)
        elif change == "exchange":
            holder[key] = copy.deepcopy(at(config, data.draw(st.sampled_from(paths))))
        elif change == "add" and isinstance(holder, dict):
            holder[data.draw(st.text(max_size=6))] = data.draw(nodes)
        elif change == "rename" and isinstance(holder, dict):
            holder[data.draw(st.sampled_from(["config", "views", "name", "path", "more"]))] = holder.pop(key)
        elif change == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
    return config


def refused(action):
    """What an action makes; None where it is refused with an error that says something."""
    problem = made = None
    try:
        made = action()
    except (EqualizeError, TypeError) as error:
        problem = str(error)
    assert problem is None or len(problem) > 15
    return made


def try_registry(config):
    """Reads a config and links what it makes; returns how far it came."""
    given, before = copy.deepcopy(config), picture(equalize.GroupRegistry(), TARGET)
    registry = refused(lambda: equalize.GroupRegistry.from_config(config))
    assert repr(config) == repr(given)
    if registry is None:
        return "refused"
    own = registry.get_config()
    if refused(lambda: registry.link(TARGET)) is None:
        assert len(registry) == 0
        assert repr(registry.get_config()) == repr(own)
        assert picture(equalize.GroupRegistry(), TARGET) == before
        return "not linked"
    require_whole(registry)
    registry.untie()
    for weight in TARGET.weights:
        assert not list(ties_on(weight))
        weight.constraint = weight.regularizer = None  # what a rule had inside stays
    return "linked"


def attack(examples, start, attempt):
    """How often each outcome was seen."""
    outcomes = {}

    @attacks(examples)
    @hypothesis.given(st.data())
    def run(data):
        outcome = attempt(mutated(start, data))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    run()
    return outcomes


def try_optimizer(config):
    given = copy.deepcopy(config)
    optimizer = refused(lambda: TiedOptimizer.from_config(config))
    assert repr(config) == repr(given)
    if optimizer is None:
        return "refused"
    plain(optimizer.get_config())
    return "made"


@pytest.mark.sampled
@pytest.mark.parametrize("mutations", [60, 200])
def test_a_mutated_registry_is_refused_or_whole(mutations):
    assert attack(mutations, CONFIG, try_registry).keys() == {"refused", "not linked", "linked"}


@pytest.mark.sampled
@pytest.mark.parametrize("mutations", [20, 50])
def test_a_mutated_optimizer_is_refused_or_made(mutations):
    assert attack(mutations, optimizer_config(), try_optimizer).keys() == {"refused", "made"}


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", ["registry", "optimizer"])
def test_many_mutated_configs_are_refused_or_whole(kind):
    start, attempt = {"registry": (CONFIG, try_registry), "optimizer": (optimizer_config(), try_optimizer)}[kind]
    outcomes = attack(20_000, start, attempt)
    print(f"{kind}: {sum(outcomes.values())} mutated configs: {outcomes}")
    assert len(outcomes) > 1


def change(path, value):
    config = copy.deepcopy(CONFIG)
    at(config, path[:-1])[path[-1]] = value
    return config


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"groups": [CONFIG["groups"][0]] * 2}, "a name of its own for each group"),
        (change(("groups", 0, "name"), " "), "`name` must not be empty"),
        (change(("groups", 0, "members", 0, "weight"), -1.0), "`weight` must be a finite number"),
        (change(("groups", 1, "members", 2, "constant"), {"values": [[1], [1, 2]], "dtype": "float32"}), "a constant"),
        (change(("groups", 1, "members", 2, "constant", "dtype"), "no such"), "a constant with values"),
        (change(("groups", 1, "members", 2, "constant", "values"), [10**400] * 3), "a constant with values"),
        (change(("groups", 1, "rule", "config", "factor"), [[0, -1], [-1, 0]]), "not negative"),
        (change(("groups", 0, "members", 1, "view", "config"), {}), "config of a `Chain`"),
        (change(("groups", 0, "rule", "config", "group"), "other"), "rule of group 'other'"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(config, match):
    with pytest.raises(
        EqualizeError,
        match="(?s)^(This is not the config of a registry|The config of group .* cannot be used).*" + match,
    ):
        equalize.GroupRegistry.from_config(config)


def test_two_hard_groups_of_a_config_do_not_take_one_variable():
    config = {"groups": [CONFIG["groups"][0], {**CONFIG["groups"][0], "name": "again"}]}
    before = picture(equalize.GroupRegistry(), TARGET)
    registry = equalize.GroupRegistry.from_config(config)
    with pytest.raises(GroupMismatchError, match="group 'hard' has it as well"):
        registry.link(TARGET)
    assert picture(equalize.GroupRegistry(), TARGET) == before


def test_a_config_is_not_the_registrys_own():
    config = copy.deepcopy(CONFIG)
    registry = equalize.GroupRegistry.from_config(config)
    config["groups"].clear()
    registry.get_config()["groups"][0]["name"] = "changed"
    assert registry.get_config() == CONFIG


def test_very_deep_views_are_an_error():
    view = keras.saving.serialize_keras_object(Transpose())
    for _ in range(5000):
        view = {"registered_name": "equalize>Chain", "class_name": "Chain", "config": {"views": [view]}}
    with pytest.raises(EqualizeError, match="damaged"):
        Equal("g", view=view)


# ---- files


def saved(path):
    entrance = keras.Input((3,))
    layers = [
        keras.layers.Dense(3, kernel_constraint=Equal("t", view=view, inner="max_norm"), name=name)
        for name, view in (("a", None), ("b", Transpose()))
    ]
    model = keras.Model(entrance, [layer(entrance) for layer in layers])
    registry = equalize.GroupRegistry().link(model)
    model.compile(TiedOptimizer("sgd", registry), ["mse"] * 2)
    model.optimizer.build(model.trainable_variables)
    model.save(path)
    return model


def rewritten(path, change):
    """Changes the text of the config inside a file."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    parts["config.json"] = change(parts["config.json"].decode()).encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"equalize>Transpose"', '"equalize>Nothing"'),
        ('"equalize>Transpose"', '"equalize>Equal"'),
        ('"module": "keras.constraints", "class_name": "MaxNorm"', '"module": "bomb", "class_name": "F"'),
        ('"rate": 1.0', '"rate": 7.0'),
        ('"updated": [', '"updated": [-1, '),
        ('"reduction": "sum"', '"reduction": "max"'),
        ('"groups": []', '"groups": [{}]'),
    ],
)
@pytest.mark.sampled
def test_a_file_that_was_tampered_with_is_not_loaded(old, new, tmp_path, bomb):
    saved(tmp_path / "model.keras")

    def tamper(text):
        assert old in text
        text = text.replace(old, new)
        return text.replace('"module": "equalize.views"', '"module": "bomb"')

    rewritten(tmp_path / "model.keras", tamper)
    with pytest.raises((TypeError, ValueError), match=r".{40}"):
        keras.models.load_model(tmp_path / "model.keras")


def test_a_file_with_another_group_name_is_loaded_and_not_linked(tmp_path):
    saved(tmp_path / "model.keras")
    rewritten(tmp_path / "model.keras", lambda text: text.replace('"group": "t"', '"group": "u"', 1))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    registry = equalize.GroupRegistry()
    before = picture(registry, loaded)
    with pytest.raises(GroupMismatchError, match=r"has one member.*misspelt"):
        registry.link(loaded)
    assert picture(registry, loaded) == before


def test_a_truncated_file_is_not_loaded(tmp_path):
    path = tmp_path / "model.keras"
    saved(path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises((ValueError, OSError), match=r".{40}"):
            keras.models.load_model(path)
