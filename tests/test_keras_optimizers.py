"""Keras's own tests of its optimizers, with every optimizer inside a `TiedOptimizer`.

The tests run as they are installed with Keras. Only the calls that update variables are caught: each goes to a
`TiedOptimizer` around the optimizer that the test made. In one run no variable of the test is tied. In the other each
has a twin, tied to it, and each of the two gets half of the gradient. Every number that Keras's tests expect comes out.
"""

import contextlib
import functools
import importlib
import pathlib
import unittest
from unittest import mock

import keras
import pytest
from keras import ops

import equalize
from equalize import _backend as backend
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from tests.conftest import BACKEND, bitwise_equal

EAGER = mock.PropertyMock(return_value=True)
FOLDER = pathlib.Path(keras.__file__).parent / "src" / "optimizers"
METHODS = ("build", "apply", "stateless_apply", "finalize_variable_values", "exclude_from_weight_decay")

# What another optimizer around must do otherwise, and what more variables change.
LEFT_OUT = {
    "test_sparse_gradients": "it replaces the `assign` of every variable, by which twins follow",
    "test_mixed_with_tf_variables": "ties are between Keras's variables",
}
LEFT_OUT_UNTIED = {
    "test_empty_gradients": "the pair has a gradient",
    "test_multi_optimizer_with_model_fit": "the pair is trained by an optimizer that is given nothing else",
}


class Partners:
    """The variables that are trained besides those of a test, and their ties."""

    def __init__(self, twins):
        self.twins = twins
        self.registry = equalize.GroupRegistry()
        self.pair = []
        self.by_id = {}

    def of(self, variables):
        """The twins of variables; or a pair that has nothing to do with them."""
        with backend.eagerly():
            if not self.twins:
                if not self.pair:
                    self.pair = [keras.Variable(1.0, name=f"pair_{i}") for i in range(2)]
                    self.registry.tie("pair", self.pair, Equal())
                return self.pair
            for variable in variables:
                if id(variable) not in self.by_id:
                    self.by_id[id(variable)] = other = twin(variable)
                    self.registry.tie(f"twins_{len(self.by_id)}", [variable, other], Equal())
            return [self.by_id[id(variable)] for variable in variables]

    def gradients(self, given):
        """The gradients of a test, and those of the partners: halves, or zeros for a pair."""
        if self.twins:
            halves = [half(gradient) for gradient in given]
            return [*halves, *halves]
        return [*given, *(ops.zeros(()) for _ in self.pair)]

    def check(self):
        for group in self.registry.values():
            assert bitwise_equal(*(member.variable for member in group.members))


class Wrapped:
    """An optimizer of a test inside a `TiedOptimizer` that trains partners, too, of which the test does not know."""

    def __init__(self, optimizer, partners):
        self.tied = TiedOptimizer(optimizer, partners.registry)
        self.partners = partners

    def build(self, variables):
        if variables:
            self.tied.build([*variables, *self.partners.of(variables)])
        else:
            self.tied.inner_optimizer.build(variables)

    def apply(self, grads, trainable_variables=None):
        if trainable_variables is None:
            variables = None
        else:
            given = list(trainable_variables)
            variables = [*given, *self.partners.of(given)]
        self.tied.apply(self.partners.gradients(grads), variables)
        self.partners.check()

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        given = list(trainable_variables)
        added = given if self.partners.twins else [variable.value for variable in self.partners.pair]
        gradients = self.partners.gradients(grads)
        values, slots = self.tied.stateless_apply(optimizer_variables, gradients, [*given, *added])
        if self.partners.twins:
            for one, other in zip(values[: len(given)], values[len(given) :], strict=True):
                assert ops.convert_to_numpy(one).tobytes() == ops.convert_to_numpy(other).tobytes()
        return values[: len(given)], slots

    def finalize_variable_values(self, var_list):
        self.tied.finalize_variable_values([*var_list, *self.partners.of(var_list)])

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        given = list(var_list or ())
        self.tied.exclude_from_weight_decay([*given, *self.partners.of(given)] if given else None, var_names)


def twin(variable):
    other = keras.Variable(ops.convert_to_numpy(variable.value), dtype=variable.dtype, name=variable.name)
    other._path = variable.path  # Keras names it by the layer that makes it
    other.constraint = variable.constraint
    if hasattr(variable, "overwrite_with_gradient"):
        other.overwrite_with_gradient = variable.overwrite_with_gradient
    return other


def half(gradient):
    return None if gradient is None else ops.multiply(gradient, 0.5)


@contextlib.contextmanager
def every_optimizer_wrapped(twins):
    """While this lasts, updates of every Keras optimizer go to a `TiedOptimizer` around it."""
    wrapped = {}
    inside = []
    partners = Partners(twins)

    def caught(name, original):
        @functools.wraps(original)
        def call(self, *args, **kwargs):
            if inside:
                return original(self, *args, **kwargs)
            inside.append(self)
            try:
                if id(self) not in wrapped:
                    wrapped[id(self)] = Wrapped(self, partners)
                return getattr(wrapped[id(self)], name)(*args, **kwargs)
            finally:
                inside.pop()

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(keras.Model, "run_eagerly", EAGER))  # ties are not made in a trace
        for kind in kinds(keras.optimizers.Optimizer):
            for name in METHODS:
                if name in vars(kind):
                    stack.enter_context(mock.patch.object(kind, name, caught(name, vars(kind)[name])))
        yield


def kinds(kind):
    """A class of optimizers with all that it is made from and all that are made from it, without ours."""
    below = [each for child in kind.__subclasses__() if child is not TiedOptimizer for each in kinds(child)]
    return {*(base for base in kind.__mro__ if base is not object), *below}


def cases():
    """Keras's tests, each with and without twins, and with the marks that say when Keras runs them."""
    for path in sorted(FOLDER.glob("*_test.py")):
        module = importlib.import_module(f"keras.src.optimizers.{path.stem}")
        for case in vars(module).values():
            if isinstance(case, type) and issubclass(case, unittest.TestCase) and case.__module__ == module.__name__:
                for name in unittest.TestLoader().getTestCaseNames(case):
                    for twins in (True, False):
                        marks = list(marks_of(case, name, twins))
                        yield pytest.param(
                            case, name, twins, marks=marks, id=f"{path.stem}-{name}-{'twins' if twins else 'untied'}"
                        )


def marks_of(case, name, twins):
    for marked in (case, getattr(case, name)):
        yield from (mark for mark in getattr(marked, "pytestmark", ()) if mark.name == "skipif")
    for left, reason in (LEFT_OUT if twins else LEFT_OUT | LEFT_OUT_UNTIED).items():
        if name.startswith(left):
            yield pytest.mark.skip(reason=reason)
    slow = name.startswith("test_gradient_accumulation_with") or (BACKEND == "jax" and "Sparse" in case.__name__)
    if not twins or slow:
        yield pytest.mark.slow


@pytest.mark.sampled
@pytest.mark.parametrize(("case", "name", "twins"), list(cases()))
def test_the_numbers_of_keras_own_tests_come_out(case, name, twins):
    with every_optimizer_wrapped(twins):
        case(name).debug()
