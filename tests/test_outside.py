"""Frozen members outside of the model that is trained: a teacher, a target network, the start of a fine-tuning."""

import gc
import weakref

import keras
import numpy as np
import pytest

import equalize
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.views import Transpose
from tests.conftest import BACKEND, MODES, no_loss

RATE = 0.1


def network(shape=(4, 2), **kwargs):
    model = keras.Sequential([keras.Input(shape[:1]), keras.layers.Dense(shape[1], use_bias=False)], **kwargs)
    model.set_weights([np.zeros(shape)])
    return model


def pair(rule, *, view=None):
    """A student, its teacher, and the registry that ties them."""
    student, teacher = network(), network((4, 2) if view is None else (2, 4))
    teacher.trainable = False
    registry = equalize.GroupRegistry()
    member = teacher.layers[0].kernel if view is None else (teacher.layers[0].kernel, view)
    registry.tie("pair", [student.layers[0].kernel, member], rule)
    return student, teacher, registry


def teach(teacher, value):
    teacher.set_weights([np.full(teacher.layers[0].kernel.shape, value)])


def held(student):
    (value,) = np.unique(student.get_weights()[0])
    return value


# What one step of SGD makes of a student at w whose teacher is at t. Σ |w − mean|² of the two is |w − t|² / 2.
STEPS = {
    "hard": (Equal(), lambda w, t: t),
    "partial": (Equal(rate=0.5), lambda w, t: (w + t) / 2),
    "soft": (MeanL2(factor=1.0), lambda w, t: w - RATE * (w - t)),
}


class Move(keras.callbacks.Callback):
    """Moves a teacher before every step."""

    def __init__(self, teacher, values):
        super().__init__()
        self.teacher, self.values = teacher, values

    def on_train_batch_begin(self, batch, logs=None):
        teach(self.teacher, self.values[batch])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", STEPS)
@pytest.mark.sampled
def test_every_step_sees_the_value_that_the_teacher_has_then(way, mode):
    rule, step = STEPS[way]
    student, teacher, _ = pair(rule, view=Transpose() if way == "hard" else None)
    student.compile(keras.optimizers.SGD(RATE), no_loss, **MODES[mode])
    x, expected = np.zeros((6, 4), "float32"), 0.0
    for values in ([1.0, -5.0, 3.0], [2.0, 0.5, -1.0]):
        student.fit(x, x[:, :2], batch_size=2, epochs=1, verbose=0, callbacks=[Move(teacher, values)])
        for value in values:
            expected = step(expected, value)
        assert held(student) == pytest.approx(expected, rel=1e-6)


def test_a_tied_optimizer_sees_the_value_that_the_teacher_has_then():
    student, teacher, registry = pair(Equal())
    student.compile(TiedOptimizer(keras.optimizers.SGD(RATE), registry), no_loss)
    x = np.zeros((4, 4), "float32")
    student.fit(x, x[:, :2], verbose=0)
    student.fit(x, x[:, :2], batch_size=2, verbose=0, callbacks=[Move(teacher, [1.0, -5.0])])
    assert held(student) == -5.0


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch runs one step in a call")
def test_several_steps_in_one_call_see_the_teacher():
    student, teacher, _ = pair(MeanL2(factor=1.0))
    student.compile(keras.optimizers.SGD(RATE), no_loss, steps_per_execution=3)
    x, expected = np.zeros((6, 4), "float32"), 0.0
    for value in (1.0, -5.0):
        teach(teacher, value)
        student.fit(x, x[:, :2], batch_size=2, epochs=1, verbose=0)
        for _ in range(3):
            expected -= RATE * (expected - value)
        assert held(student) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rule", [Equal(rate=0.5), MeanL2(factor=1.0)], ids=["partial", "soft"])
@pytest.mark.sampled
def test_a_teacher_that_is_deleted_pulls_on_and_goes_with_its_student(rule):
    student, teacher, registry = pair(rule)
    teach(teacher, 8.0)
    kernel, gone = weakref.ref(teacher.layers[0].kernel), weakref.ref(teacher)
    del teacher
    gc.collect()
    assert gone() is None
    student.compile(keras.optimizers.SGD(RATE), no_loss)
    x = np.zeros((4, 4), "float32")
    student.fit(x, x[:, :2], batch_size=4, verbose=0)
    assert held(student) == pytest.approx(4.0 if registry["pair"].projects else 0.8)
    del student, registry
    keras.backend.clear_session()
    gc.collect()
    assert kernel() is None


def test_a_member_whose_variable_is_gone_says_so():
    variable = keras.Variable(1.0, name="fleeting")
    member = equalize.Member(variable)
    assert repr(member) == "<Member 'fleeting' () float32>"
    del variable
    gc.collect()
    assert repr(member) == "<Member 'fleeting' (deleted)>"
