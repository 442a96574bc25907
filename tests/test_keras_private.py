"""Each private name of Keras that equalize relies on is there, and does what is expected of it."""

import ast
import inspect
import pathlib
import re
import tempfile
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize._backend import keras_private
from tests.conftest import BACKEND

FOLDER = pathlib.Path(equalize.__file__).parent


def model():
    return keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="inside"), keras.layers.BatchNormalization()]
    )


def built(optimizer):
    variables = model().trainable_variables
    optimizer.build(variables)
    return variables


def the_scope_that_is_active():
    assert keras_private.stateless_scope() is None
    with keras.StatelessScope() as scope:
        assert keras_private.stateless_scope() is scope


def the_scope_in_which_shapes_are_inferred():
    seen = []

    class Seeing(keras.layers.Layer):
        def call(self, x):
            seen.append(keras_private.in_symbolic_scope())
            return x

    Seeing()(keras.Input((2,)))
    assert set(seen) == {True}
    assert not keras_private.in_symbolic_scope()


def the_call_of_an_optimizer_that_runs():
    seen = []

    class Seeing(keras.constraints.Constraint):
        def __call__(self, w):
            seen.append(keras_private.applying())
            return w

    variables = [keras.Variable(1.0), keras.Variable(2.0)]
    for variable in variables:
        variable.constraint = Seeing()
    optimizer = keras.optimizers.SGD(0.1)
    for _ in range(2):
        assert keras_private.applying() is None
        optimizer.apply([ops.ones(())] * 2, variables)
    first, again, second, _ = seen
    assert first is again
    assert first is not second
    assert first.caller is optimizer


def the_class_of_variables():
    assert keras_private.is_variable(model().layers[0].kernel)
    assert not keras_private.is_variable(ops.ones(2))


def the_value_of_a_variable():
    variable = keras.Variable(1.0)
    held = keras_private.held_value(variable)
    assert held is not None
    if BACKEND == "torch":  # whatever is done with the variable, it is one tensor
        variable.assign(2.0)
        variable.assign_add(1.0)
        keras.optimizers.Adam().apply([ops.ones(())], [variable])
        assert keras_private.held_value(variable) is held


def the_lists_of_variables():
    trained, others = keras_private.own_variables(model().layers[1])
    assert ([v.name for v in trained], [v.name for v in others]) == (
        ["gamma", "beta"],
        ["moving_mean", "moving_variance"],
    )


def the_layers_inside():
    assert [type(layer).__name__ for layer in keras_private.sublayers(model())][-2:] == ["Dense", "BatchNormalization"]


def all_layers():
    assert "inside" in [layer.name for layer in keras_private.flattened(model())]


def layers_whose_constructor_has_run():
    assert keras_private.is_initialized(keras.layers.Dense(2))
    assert not keras_private.is_initialized(object.__new__(keras.layers.Dense))


def tracking_another_variable():
    one, two = (keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).layers[0] for _ in range(2))
    keras_private.replace_variable(two, two.kernel, one.kernel)
    assert two.weights[0] is one.kernel
    assert [weight.name for weight in two.weights] == ["kernel", "bias"]


def the_parameters_that_torch_knows():
    one, two = (keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).layers[0] for _ in range(2))
    old = two.kernel
    keras_private.replace_torch_parameter(two, old, one.kernel)
    if BACKEND == "torch":
        assert list(two.parameters())  # Keras lists them when it is asked first (3.15)
        keras_private.replace_torch_parameter(two, old, one.kernel)
        assert any(parameter is one.kernel.value for parameter in two.parameters())
        assert not any(parameter is old.value for parameter in two.parameters())


def how_often_an_optimizer_was_applied():
    """With every micro-step, of which `iterations` counts none."""
    variable = keras.Variable(ops.zeros(2))
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    for _ in range(4):
        optimizer.apply([ops.ones(2)], [variable])
    assert int(optimizer.iterations) == 1
    assert int(keras_private.steps_taken(optimizer)) == 4


def the_variables_of_an_optimizer():
    optimizer = keras.optimizers.SGD()
    variables = built(optimizer)
    assert [id(v) for v in keras_private.updated_variables(optimizer)] == [id(v) for v in variables]


def what_an_optimizer_keeps_for_each_variable():
    optimizer = keras.optimizers.Adam(use_ema=True, gradient_accumulation_steps=2)
    kernel, *_ = variables = built(optimizer)
    found = keras_private.slots(optimizer)
    assert {"_momentums", "_velocities", *keras_private.DEGREES_OF_ALL} == set(found)
    assert all([id(v) for v in variables] == list(of_variables) for of_variables in found.values())
    assert found["_momentums"][id(kernel)].shape == kernel.shape


def what_an_optimizer_keeps_besides():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Nadam())
    built(optimizer)
    assert {"step_counter", "dynamic_scale", "_iterations"} <= set(keras_private.own_values(optimizer))
    assert "_u_product" in keras_private.own_values(optimizer.inner_optimizer)


def building_an_optimizer_once_more():
    optimizer = keras.optimizers.Adam(0.25)
    variables = built(optimizer)
    count = len(optimizer.variables)
    optimizer.apply([ops.ones(v.shape) for v in variables], variables)
    keras_private.unbuild(optimizer)
    assert not optimizer.built
    assert len(optimizer.variables) == 2  # the steps and the learning rate
    optimizer.build(variables)
    assert len(optimizer.variables) == count
    assert (int(optimizer.iterations), float(optimizer.learning_rate)) == (1, 0.25)
    optimizer.apply([ops.ones(variables[1].shape)], variables[1:2])
    keras_private.unbuild(optimizer)
    optimizer.build(variables[:1])
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply([ops.ones(variables[1].shape)], variables[1:2])


def what_weight_decay_applies_to():
    optimizer = keras.optimizers.AdamW()
    kernel, bias, *_ = model().trainable_variables
    optimizer.exclude_from_weight_decay(var_list=[bias])
    assert (keras_private.decays(optimizer, kernel), keras_private.decays(optimizer, bias)) == (True, False)


def the_optimizer_that_several_leave_to_a_variable():
    kernel = model().trainable_variables[0]
    assert keras_private.optimizer_for(keras.optimizers.SGD(), kernel) is None
    if hasattr(keras.optimizers, "MultiOptimizer"):
        first, second = keras.optimizers.SGD(), keras.optimizers.Adam()
        several = keras.optimizers.MultiOptimizer(lambda v: first if v.ndim == 2 else second)
        assert keras_private.optimizer_for(several, kernel) is first


def what_muon_trains_by_adamw():
    kernel, bias, *_ = model().trainable_variables
    assert keras_private.uses_adamw(keras.optimizers.SGD(), kernel) is None
    if hasattr(keras.optimizers, "Muon"):
        muon = keras.optimizers.Muon()
        muon.build([kernel, bias])
        assert (keras_private.uses_adamw(muon, kernel), keras_private.uses_adamw(muon, bias)) == (False, True)


def building_before_training():
    one = model()
    one.compile("adam", "mse", metrics=["mae"])
    x, y = np.zeros((1, 3), "float32"), np.zeros((1, 2), "float32")
    values = one.get_weights()
    keras_private.build_for_training(one, x, y)
    assert one.optimizer.built
    assert len(one.metrics_variables) == 4  # a sum and a count for the loss, and for the error
    assert all((old == new).all() for old, new in zip(values, one.get_weights(), strict=True))


def what_keras_saves():
    one = model()
    with tempfile.TemporaryDirectory() as folder:
        with h5py.File(f"{folder}/ours.weights.h5", "w") as file:
            keras_private.write_weights(one, file)
        one.save_weights(f"{folder}/keras.weights.h5")
        names = []
        for name in ("ours", "keras"):
            names.append([])
            with h5py.File(f"{folder}/{name}.weights.h5") as file:
                file.visititems(lambda name, item: names[-1].append((name, list(item.attrs.items()))))
        assert names[0] == names[1] != []


def the_rest_of_what_keras_saves():
    with tempfile.TemporaryDirectory() as folder:
        model().save(f"{folder}/keras.keras")
        with zipfile.ZipFile(f"{folder}/ours.keras", "w") as archive, h5py.File(f"{folder}/weights.h5", "w") as file:
            keras_private.write_archive(model(), archive, file)
        found = []
        for name in ("ours", "keras"):
            with zipfile.ZipFile(f"{folder}/{name}.keras") as archive:
                found.append({name for name in archive.namelist() if name != "model.weights.h5"})
        assert found[0] == found[1] != set()


USES = {
    "stateless_scope": the_scope_that_is_active,
    "in_symbolic_scope": the_scope_in_which_shapes_are_inferred,
    "is_variable": the_class_of_variables,
    "held_value": the_value_of_a_variable,
    "own_variables": the_lists_of_variables,
    "sublayers": the_layers_inside,
    "flattened": all_layers,
    "is_initialized": layers_whose_constructor_has_run,
    "applying": the_call_of_an_optimizer_that_runs,
    "replace_variable": tracking_another_variable,
    "replace_torch_parameter": the_parameters_that_torch_knows,
    "steps_taken": how_often_an_optimizer_was_applied,
    "updated_variables": the_variables_of_an_optimizer,
    "slots": what_an_optimizer_keeps_for_each_variable,
    "own_values": what_an_optimizer_keeps_besides,
    "unbuild": building_an_optimizer_once_more,
    "decays": what_weight_decay_applies_to,
    "optimizer_for": the_optimizer_that_several_leave_to_a_variable,
    "uses_adamw": what_muon_trains_by_adamw,
    "build_for_training": building_before_training,
    "write_weights": what_keras_saves,
    "write_archive": the_rest_of_what_keras_saves,
}


@pytest.mark.parametrize("name", USES)
def test_it_is_there_and_does_what_is_expected(name):
    USES[name]()


def test_each_is_used_here():
    assert set(USES) == {name for name, _ in inspect.getmembers(keras_private, inspect.isfunction)}


def test_no_other_file_uses_private_names_of_keras():
    trees = {file: ast.parse(file.read_text("utf-8")) for file in FOLDER.rglob("*.py")}
    ours = {"_getframe", "_current_frames", "_version"}  # of Python, and of PyTorch's tensors
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                ours.add(node.name)
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                ours.add(node.attr)
        ours |= {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
    for file, tree in trees.items():
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and re.match("_[a-z]", n.attr)}
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        if file.name != "keras_private.py":
            assert used <= ours, file.name
            assert not any(module.startswith("keras.src") for module in imported), file.name
