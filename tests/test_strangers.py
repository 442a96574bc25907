"""Layers and models that were written without ties in mind: all that Keras has, and those of other libraries."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.errors import GroupMismatchError
from equalize.optimizers import TiedOptimizer
from tests.conftest import BACKEND, EveryStep


def inputs_like(model, samples=8):
    """Data for a model: small numbers, and indices where it takes integers."""
    random = np.random.default_rng(0)
    arrays = []
    for tensor in model.inputs:
        shape = (samples, *tensor.shape[1:])
        whole = keras.backend.is_int_dtype(tensor.dtype)
        arrays.append(random.integers(0, 5, shape) if whole else random.normal(size=shape).astype("float32"))
    return arrays if len(arrays) > 1 else arrays[0]


def compile_small(model, optimizer):
    """Compiles for a few steps. What traces cost TensorFlow grows with the layers, of which these models have many."""
    model.compile(optimizer, "mse", run_eagerly=BACKEND == "tensorflow")


def train(model, registry):
    """A `fit` of one step, and a look at the members after it."""
    x = inputs_like(model)
    y = np.random.default_rng(1).normal(size=(8, *model.output.shape[1:])).astype("float32")
    watch = EveryStep(registry)
    model.fit(x, y, verbose=0, callbacks=[watch])
    assert watch.steps == 1


def used_twice(first, second, *args):
    """One vector from two layers that are given the same, but count differently: so their gradients differ."""
    flatten = keras.layers.Flatten()
    return keras.layers.concatenate([flatten(first(*args)), 0.5 * flatten(second(*args))])


# ---- every layer of Keras that takes constraints

# What layers need to be given, and what makes them small.
GIVEN = {
    "units": 2,
    "filters": 2,
    "kernel_size": 2,
    "num_heads": 2,
    "key_dim": 2,
    "head_dim": 2,
    "num_query_heads": 2,
    "num_key_value_heads": 2,
    "input_dim": 5,
    "output_dim": 2,
    "equation": "abc,cd->abd",
    "output_shape": (3, 2),
}
MORE = {"EinsumDense": {"bias_axes": "d"}, "GroupNormalization": {"groups": 1}}
SHAPES = {"1D": (3, 2), "2D": (3, 3, 2), "3D": (2, 2, 2, 2)}
FAMILIES = ("dense", "convolution", "recurrent", "convolution with time")


def parameters(kind):
    """What a class can be given, also by the classes that it is made from."""
    found = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(base.__init__).parameters
            found = {**own, **found}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return found


def constraints(kind):
    """The arguments that take a constraint; attention passes that of its biases on to biases of unlike shapes."""
    found = [name for name in parameters(kind) if name.endswith("_constraint")]
    return [name for name in found if not (name == "bias_constraint" and kind.__name__.endswith("Attention"))]


def kinds_with_constraints():
    kinds = {kind for kind in vars(keras.layers).values() if inspect.isclass(kind) and issubclass(kind, keras.Layer)}
    return sorted((kind for kind in kinds if constraints(kind)), key=lambda kind: kind.__name__)


def family(kind):
    name = kind.__name__
    if name.startswith("ConvLSTM"):
        return "convolution with time"
    if name.endswith("Cell") or hasattr(keras.layers, f"{name}Cell"):
        return "recurrent"
    return "convolution" if "Conv" in name else "dense"


def make(kind):
    """A layer with a hard tie by each argument that takes a constraint."""
    needed = {
        name
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    } - {"self"}
    assert needed <= GIVEN.keys(), f"{kind.__name__} is new: say here what it is to be given"
    given = {name: GIVEN[name] for name in needed} | MORE.get(kind.__name__, {})
    layer = kind(**given, **{name: Equal(f"{kind.__name__}_{name}") for name in constraints(kind)})
    return keras.layers.RNN(layer) if kind.__name__.endswith("Cell") else layer


def inputs_for(kind):
    name = kind.__name__
    if "Embedding" in name:
        return [keras.Input((3,), dtype="int32")]
    if "Attention" in name:
        entrance = keras.Input((3, 2))
        return [entrance, entrance, entrance][: 3 if "Group" in name else 2]
    shape = SHAPES.get(name[-2:]) or SHAPES.get(name.replace("Transpose", "")[-2:]) or (3, 2)
    return [keras.Input((2, *shape) if name.startswith("ConvLSTM") else shape)]


def model_of_twins(kinds):
    """A model with each of the layers twice."""
    inputs, outputs = {}, []
    for kind in kinds:
        args = [inputs.setdefault((tensor.shape, tensor.dtype), tensor) for tensor in inputs_for(kind)]
        outputs.append(used_twice(make(kind), make(kind), *args))
    entrances = list(inputs.values())
    joined = keras.layers.concatenate(outputs)
    return keras.Model(entrances if len(entrances) > 1 else entrances[0], joined)


def test_every_kind_of_layer_is_in_a_family():
    assert {family(kind) for kind in kinds_with_constraints()} == set(FAMILIES)


def test_the_biases_of_attention_which_differ_in_shape_are_tied_as_layers():
    entrance = keras.Input((3, 2))

    def twins(rule):
        layers = [keras.layers.MultiHeadAttention(2, 2, bias_constraint=rule) for _ in range(2)]
        return keras.Model(entrance, used_twice(*layers, entrance, entrance)), layers

    with pytest.raises(GroupMismatchError, match=r"expected shape \(2, 2\), set by .*query/bias'; received \(2,\)"):
        equalize.GroupRegistry().link(twins(Equal("biases"))[0])
    model, layers = twins(None)
    registry = equalize.GroupRegistry()
    assert len(registry.tie("attention", layers, Equal())) == 8
    compile_small(model, keras.optimizers.RMSprop(0.01))
    train(model, registry)


@pytest.mark.parametrize("name", [*FAMILIES[:3], pytest.param(FAMILIES[3], marks=pytest.mark.slow)])
@pytest.mark.sampled
def test_each_layer_that_takes_constraints_is_trained_saved_linked_and_trained_again(name, tmp_path):
    kinds = [kind for kind in kinds_with_constraints() if family(kind) == name]
    model = model_of_twins(kinds)
    registry = equalize.GroupRegistry().link(model)
    declared = {f"{kind.__name__}_{argument}" for kind in kinds for argument in constraints(kind)}
    assert set(registry) == declared
    compile_small(model, keras.optimizers.RMSprop(0.01))
    train(model, registry)
    train(model, registry)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    again = equalize.GroupRegistry().link(loaded)
    assert set(again) == declared
    again.check()
    train(loaded, again)


# ---- a model of Keras's applications, twice


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "jax", reason="JAX compiles each operation of the two nets, for minutes")
def test_two_mobile_nets_under_other_names_are_tied_layer_by_layer_shared_and_saved(tmp_path):
    entrance = keras.Input((32, 32, 3))

    def net(rename):
        plain = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, include_top=False, pooling="avg")

        def renamed(layer):
            config = layer.get_config()
            return type(layer).from_config(config | {"name": rename(layer.name)})

        clone = keras.models.clone_model(plain, clone_function=renamed)
        return keras.Model(clone.input, clone.output, name=rename("net"))

    nets = [net(lambda name: f"left_{name}"), net(lambda name: f"{name}_right")]
    model = keras.Model(entrance, used_twice(*nets, entrance))
    registry = equalize.GroupRegistry()
    for index, pair in enumerate(zip(*(net.layers for net in nets), strict=True)):
        if pair[0].trainable_weights:
            registry.tie(f"layer_{index}", list(pair), Equal(), statistics=True)
    count = len(nets[0].weights)
    assert len(registry) == count
    compile_small(model, TiedOptimizer(keras.optimizers.SGD(0.01), registry))
    train(model, registry)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    train(loaded, loaded.optimizer.registry)
    assert len(loaded.optimizer.registry) == count
    assert len(keras.models.clone_model(model).optimizer.registry) == count
    registry.untie()
    equalize.share(*nets)
    relations = equalize.relation(*nets)
    assert {relations[name] for name in relations if "moving" not in name} == {"same"}
    x = inputs_like(model)
    model.save(path)
    loaded = keras.models.load_model(path, compile=False)
    for each in nets:  # one by one, since the model counts what they share once
        np.testing.assert_equal(loaded.get_layer(each.name).get_weights(), each.get_weights())
    # Two graphs of the same weights may add in two orders.
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_backbones_of_keras_hub_are_tied_saved_linked_and_shared(tmp_path):
    keras_hub = pytest.importorskip("keras_hub")

    def twins():
        sizes = {"vocabulary_size": 5, "num_layers": 2, "num_heads": 2, "hidden_dim": 4, "intermediate_dim": 6}
        nets = [keras_hub.models.T5Backbone(**sizes, dropout=0.0) for _ in range(2)]
        entrance = keras.Input((3,), dtype="int32")
        masks = {f"{side}_padding_mask": ops.ones_like(entrance) for side in ("encoder", "decoder")}
        tokens = {f"{side}_token_ids": entrance for side in ("encoder", "decoder")}

        def net(index):
            return lambda ids: nets[index](masks | tokens)["decoder_sequence_output"]

        return nets, keras.Model(entrance, used_twice(net(0), net(1), entrance))

    nets, model = twins()
    registry = equalize.GroupRegistry()
    groups = registry.tie("nets", nets, Equal())
    assert len(groups) == len(nets[0].trainable_weights)
    compile_small(model, TiedOptimizer(keras.optimizers.Adam(0.01), registry))
    train(model, registry)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    train(loaded, loaded.optimizer.registry)
    assert len(loaded.optimizer.registry) == len(groups)
    others, other_model = twins()
    linked = equalize.GroupRegistry.from_config(registry.get_config()).link(other_model)
    weights = [list(map(id, net.trainable_weights)) for net in others]
    found = [[id(member.variable) for member in group.members] for group in linked.values()]
    assert sorted(found) == sorted(map(list, zip(*weights, strict=True)))
    registry.untie()
    equalize.share(*nets)
    assert set(equalize.relation(*nets).values()) == {"same"}


def test_of_two_models_of_one_structure_the_paths_choose():
    def net(*names):
        return keras.Sequential([keras.Input((3,)), *(keras.layers.Dense(3, name=name) for name in names)], name="net")

    def around(inner):
        entrance = keras.Input((3,))
        return keras.Model(entrance, inner(entrance))

    first = net("one", "two")
    whole = around(first)  # holds the members at places of its own
    registry = equalize.GroupRegistry()
    registry.tie("pair", [layer.kernel for layer in first.layers], Equal())
    config = registry.get_config()
    other, second = net("three", "four"), net("one", "two")
    linked = equalize.GroupRegistry.from_config(config).link(other, around(second))
    assert [id(m.variable) for m in linked["pair"].members] == [id(layer.kernel) for layer in second.layers]
    assert len(whole.trainable_variables) == 4


# ---- modules and functions of other libraries


def tied_pair(first, second, inputs):
    model = keras.Model(inputs, used_twice(first, second, inputs))
    registry = equalize.GroupRegistry()
    registry.tie("pair", [first, second], Equal())
    return model, registry


def train_pair(layers, inputs, exact, *, groups):
    model, registry = tied_pair(*layers, inputs)
    assert len(registry) == groups
    optimizer = keras.optimizers.Adam(0.01)
    compile_small(model, TiedOptimizer(optimizer, registry) if exact else optimizer)
    train(model, registry)
    train(model, registry)


@pytest.mark.skipif(BACKEND != "torch", reason="a module of PyTorch is trained by PyTorch")
@pytest.mark.parametrize("exact", [False, True])
def test_modules_of_pytorch_are_tied(exact):
    import torch

    def module():
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.BatchNorm1d(3))

    layers = [keras.layers.TorchModuleWrapper(module(), output_shape=(None, 3)) for _ in range(2)]
    inputs = keras.Input((4,))
    train_pair(layers, inputs, exact, groups=4)
    parameters = zip(*(layer.module.parameters() for layer in layers), strict=True)
    assert all(torch.equal(one, other) for one, other in parameters)


def jax_function(params, inputs):
    import jax.numpy as jnp

    return jnp.tanh(inputs @ params["first"]["w"] + params["first"]["b"]) @ params["last"]


def jax_layer(seed):
    random = np.random.default_rng(seed)
    params = {
        "first": {name: random.normal(size=shape).astype("float32") for name, shape in (("w", (4, 3)), ("b", (3,)))},
        "last": random.normal(size=(3, 2)).astype("float32"),
    }
    return keras.layers.JaxLayer(jax_function, params=params)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch does not run functions of JAX")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.slow
def test_functions_of_jax_are_tied(exact):
    pytest.importorskip("jax")
    inputs = keras.Input((4,))
    layers = [jax_layer(0), jax_layer(1)]
    train_pair(layers, inputs, exact, groups=3)


# ---- models that keep their layers in lists and dictionaries


@keras.saving.register_keras_serializable(package="tests")
class Nested(keras.Model):
    """Layers in lists, dictionaries, tuples, and all of these in one another, with rules or without."""

    def __init__(self, rules=False, **kwargs):
        super().__init__(**kwargs)
        self.rules = rules

        def dense(group):
            return keras.layers.Dense(3, kernel_constraint=Equal(group) if rules else None)

        self.row = [dense("row"), dense("row")]
        self.towers = {
            "left": [dense("deep"), {"end": dense("end"), "side": (dense("side"), dense("side"))}],
            "right": [dense("deep"), {"end": dense("end"), "side": (dense("side"), dense("side"))}],
        }

    def call(self, x):
        for layer in self.row:
            x = layer(x)
        parts = []
        for scale, (first, rest) in zip((1.0, 0.5), self.towers.values(), strict=True):
            hidden = first(x)
            parts.append(scale * (rest["end"](hidden) + rest["side"][0](hidden) - rest["side"][1](x)))
        return ops.concatenate(parts, axis=-1)

    def get_config(self):
        return {**super().get_config(), "rules": self.rules}


def built_nested(rules):
    model = Nested(rules)
    model(np.zeros((1, 3), "float32"))
    return model


def train_nested(model, registry):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    watch = EveryStep(registry)
    model.fit(x, np.ones((8, 6), "float32"), verbose=0, callbacks=[watch])
    assert watch.steps == 1


def test_layers_in_lists_and_dictionaries_that_declare_rules(tmp_path):
    model = built_nested(True)
    registry = equalize.GroupRegistry().link(model)
    assert {name: len(group.members) for name, group in registry.items()} == {"row": 2, "deep": 2, "end": 2, "side": 4}
    compile_small(model, keras.optimizers.RMSprop(0.01))
    train_nested(model, registry)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    train_nested(loaded, equalize.GroupRegistry().link(loaded))


@pytest.mark.slow
def test_layers_in_lists_and_dictionaries_that_are_tied_and_found_again_in_a_copy(tmp_path):
    model = built_nested(False)
    registry = equalize.GroupRegistry()
    first, second = model.towers.values()
    for name, pair in {
        "start": (first[0], second[0]),
        "end": (first[1]["end"], second[1]["end"]),
        "side": (*first[1]["side"], *second[1]["side"]),
    }.items():
        registry.tie(name, list(pair), Equal())
    compile_small(model, TiedOptimizer(keras.optimizers.Adam(0.01), registry))
    train_nested(model, registry)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    train_nested(loaded, loaded.optimizer.registry)
    again = loaded.optimizer.registry
    assert set(again) == set(registry)
    ends = [tower[1]["end"].kernel for tower in loaded.towers.values()]
    assert [id(member.variable) for member in again["end/kernel"].members] == [id(kernel) for kernel in ends]
    copy = built_nested(False)
    linked = equalize.GroupRegistry.from_config(registry.get_config()).link(copy)
    sides = [layer.kernel for tower in copy.towers.values() for layer in tower[1]["side"]]
    assert [id(member.variable) for member in linked["side/kernel"].members] == [id(kernel) for kernel in sides]


def test_both_directions_of_a_bidirectional_layer_declare_rules(tmp_path):
    rules = {f"{name}_constraint": Equal(name) for name in ("kernel", "recurrent", "bias")}
    inputs = keras.Input((3, 2))
    outputs = keras.layers.Bidirectional(keras.layers.GRU(2, **rules))(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(outputs))
    registry = equalize.GroupRegistry().link(model)
    assert {name: len(group.members) for name, group in registry.items()} == {"kernel": 2, "recurrent": 2, "bias": 2}
    compile_small(model, keras.optimizers.RMSprop(0.01))
    train(model, registry)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    train(loaded, equalize.GroupRegistry().link(loaded))
