"""Two models that are tied and trained in two threads of one process."""

import threading

import keras
import numpy as np
import pytest

import equalize
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from tests.conftest import MODES, QUICK, bits, compile_quickly, data, kernels, towers


def build(kind):
    """A model with a tie, made before the threads start: Keras's naming and seeds are global."""
    keras.utils.set_random_seed(1)
    soft = {"regularizer": lambda: MeanL2("towers", 0.5)} if kind == "soft" else {"constraint": lambda: Equal("towers")}
    return towers(3, **soft)


def train(model, kind):
    registry = equalize.GroupRegistry().link(model)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer = TiedOptimizer(optimizer, registry) if kind == "exact" else optimizer
    compile_quickly(model, optimizer, "mse", **MODES[QUICK])
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=5, shuffle=False, verbose=0)
    registry.check()
    return [bits(kernel) for kernel in kernels(model)]


@pytest.mark.parametrize("kinds", [("hard", "hard"), ("hard", "exact"), ("soft", "exact")], ids=str)
@pytest.mark.slow
def test_two_threads_train_as_one_after_the_other(kinds):
    alone = [train(build(kind), kind) for kind in kinds]
    models = [build(kind) for kind in kinds]
    results, errors = {}, []

    def work(i):
        try:
            results[i] = train(models[i], kinds[i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert errors == []
    assert [results[i] for i in range(2)] == alone
    assert np.isfinite(np.frombuffer(alone[0][0], "float32")).all()
