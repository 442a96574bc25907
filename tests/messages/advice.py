"""What advice, diagnosis and pictures say."""

import sys

import numpy as np
import pytest

import equalize
from equalize.callbacks import TieMonitor
from tests.messages import compiled, message, model_of, refusing, tied


@message(
    """
    `diagnose` expects Keras models. Received: 'model' of type <class 'str'>.
    """
)
def diagnosis_of_what_is_no_model():
    equalize.GroupRegistry().diagnose("model")


@message(
    """
    `model` must be a Keras model. Received: 'model' of type <class 'str'>.
    """
)
def advice_about_something_else():
    equalize.GroupRegistry().advise("model", np.ones((2, 4)), np.ones((2, 3)))


@message(
    """
    `batch_size` must be an integer in [1, 2147483648). Received: 0 of type <class 'int'>.
    """
)
def advice_from_batches_of_nothing():
    registry, model = compiled()
    registry.advise(model, np.ones((2, 4)), [np.ones((2, 3))] * 2, batch_size=0)


@message(
    """
    `advise` needs inputs and targets with one number of samples, at least one: arrays, or structures of
    them. Received: 'x' of type <class 'str'> and 'y' of type <class 'str'>.
    """
)
def advice_from_no_arrays():
    registry, model = compiled()
    registry.advise(model, "x", "y")


@message(
    """
    `advise` cannot compute the loss of 'model' on these data: expected inputs and targets as for
    `model.evaluate(x, y)`, which must run; received what led to RuntimeError: no.
    """
)
def advice_from_a_loss_that_fails():
    registry, model = compiled()
    model.compile("sgd", lambda y, y_pred: refusing(y))
    registry.advise(model, np.ones((2, 4)), [np.ones((2, 3))] * 2)


@message(
    """
    `advise` needs the loss of a model. Expected: a compiled model. Received: 'model', which is not
    compiled. Call `model.compile(optimizer, loss)` first.
    """
)
def advice_without_a_loss():
    registry, layers = tied()
    registry.advise(model_of(*layers), np.ones((2, 4)), [np.ones((2, 3))] * 2)


@message(
    """
    `advise` needs inputs and targets with one number of samples, at least one: arrays, or structures of
    them. Received: arrays with [2, 3, 3] samples.
    """
)
def advice_from_different_numbers_of_samples():
    registry, model = compiled()
    registry.advise(model, np.ones((2, 4)), [np.ones((3, 3))] * 2)


@message(
    """
    `advise` cannot judge group 'pair' by 'model': its member 'left/kernel' (4, 3) float32 is not a
    variable of that model. Expected: a model that all members belong to, or the names of groups that it
    has.
    """
)
def advice_from_another_model():
    registry, _layers = tied()
    registry.advise(compiled()[1], np.ones((2, 4)), [np.ones((2, 3))] * 2)


@message(
    """
    `path` must be the path of a file. Received: 3 of type <class 'int'>.
    """
)
def picture_of_another_type():
    equalize.GroupRegistry().plot(3)


@message(
    """
    `path` must be a file that ends with .png, .svg, .pdf, in a folder that exists. Received: 'ties.txt'
    of type <class 'str'>.
    """
)
def picture_in_another_format():
    equalize.GroupRegistry().plot("ties.txt")


@message(
    """
    `plot` has nothing to draw: expected a registry with groups, received one without. Call
    `registry.link(model)` or `registry.tie(...)` first.
    """
)
def picture_of_nothing():
    equalize.GroupRegistry().plot("ties.png")


@message(
    """
    TieMonitor has nothing to draw: expected at least one epoch of training, received none. Call
    `model.fit(..., callbacks=[monitor])` first.
    """
)
def picture_before_training():
    TieMonitor(equalize.GroupRegistry()).plot("spread.png")


@message(
    """
    Drawing needs matplotlib, which is not installed. Expected: the extra `plot` of equalize. Install
    it: pip install "equalize[plot]"
    """
)
def picture_without_matplotlib():
    registry, _layers = tied()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        registry.plot("ties.png")
