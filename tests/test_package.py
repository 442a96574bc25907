import ast
import inspect
import os
import pathlib
import re
import subprocess
import sys
import types

import keras
import pytest

import equalize


def public_names():
    """Everything that a user can import, and what the registry's methods return, by its name."""
    names = {}
    for name in equalize.__all__:
        thing = getattr(equalize, name)
        if isinstance(thing, types.ModuleType):
            names |= {f"{name}.{inner}": getattr(thing, inner) for inner in thing.__all__}
        elif name != "__version__":
            names[name] = thing
    return names | {"Advice": equalize.registry.Advice, "Finding": equalize.registry.Finding}


PUBLIC = public_names()
CLASSES = [name for name, thing in PUBLIC.items() if inspect.isclass(thing) and not issubclass(thing, Exception)]
MODULES = [getattr(equalize, name) for name in equalize.__all__ if inspect.ismodule(getattr(equalize, name))]


def test_all_is_what_imports():
    for module in (equalize, *MODULES):
        assert all(hasattr(module, name) for name in module.__all__)
        assert sorted(module.__all__) == module.__all__


def test_a_module_lists_all_that_it_makes_for_users():
    for module in MODULES:
        made = {
            name
            for name, thing in vars(module).items()
            if inspect.isroutine(thing) or inspect.isclass(thing)
            if thing.__module__ == module.__name__ and not name.startswith("_")
        }
        assert made == set(module.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring_with_an_example(name):
    docstring = PUBLIC[name].__doc__
    assert docstring.strip()
    assert ">>> " in docstring
    assert "Example:" in docstring


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_docstring_of_a_module_names_what_it_holds(module):
    for name in module.__all__:
        assert f"`{name}`" in module.__doc__


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_methods_and_properties_are_documented(name):
    cls = PUBLIC[name]
    arguments = inspect.signature(cls).parameters
    if "Args:" in cls.__doc__:
        assert all(f"    {argument}: " in cls.__doc__.replace("*", "") for argument in arguments)
    else:  # what users do not make themselves, and what has nothing to give
        assert not arguments or cls in MADE_BY_EQUALIZE
    for attribute, member in inspect.getmembers(cls):
        own = inspect.isfunction(member) or isinstance(member, property)
        ours = str(getattr(getattr(member, "fget", member), "__module__", "")).startswith("equalize")
        if own and ours and not attribute.startswith("_"):
            assert inspect.getdoc(member) or hasattr(keras.optimizers.Optimizer, attribute), attribute


def test_each_method_of_the_registry_stands_alone_with_an_example():
    lookups = {"select"}  # what other modules call
    methods = {name for name, _ in inspect.getmembers(equalize.GroupRegistry, inspect.isroutine) if name[0] != "_"}
    for name in methods - lookups - set(dir(dict)):
        assert ">>> " in getattr(equalize.GroupRegistry, name).__doc__, name


BACKENDS = ("tensorflow", "jax", "torch")


def test_each_backend_has_the_same_functions():
    folder = pathlib.Path(equalize.__file__).parent / "_backend"
    trees = {name: ast.parse((folder / f"{name}.py").read_text("utf-8")) for name in BACKENDS}
    functions = {
        name: {node.name: ast.dump(node.args) for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name, tree in trees.items()
    }
    public = [{k: v for k, v in each.items() if not k.startswith("_")} for each in functions.values()]
    assert public[0] == public[1] == public[2]
    named = re.findall(r"^(\w+) = _native\.(\w+)$", (folder / "__init__.py").read_text("utf-8"), re.MULTILINE)
    assert {name for name, _ in named} == {name for _, name in named} == set(public[0])


@pytest.mark.slow
def test_a_backend_that_does_not_train_is_refused_at_the_import():
    environment = os.environ | {"KERAS_BACKEND": "numpy"}
    run = subprocess.run([sys.executable, "-c", "import equalize"], env=environment, capture_output=True, text=True)
    assert "ImportError: equalize needs a backend of Keras that trains: expected 'tensorflow'" in run.stderr


MADE_BY_EQUALIZE = (
    equalize.Comparison,
    equalize.Group,
    equalize.GroupRegistry,
    equalize.Member,
    equalize.registry.Advice,
    equalize.registry.Finding,
    equalize.views.View,
)
