"""Steps of an optimizer on bare variables, in each way to run a step: what takes no model and no `fit` is quick."""

import numpy as np
from keras import ops

from tests.conftest import BACKEND, QUICK, bits

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax


def stepper(optimizer, variables, mode=QUICK):
    """A function that takes the gradients of one step, compiled as the mode says."""
    optimizer.build(variables)

    def step(gradients):
        optimizer.apply(gradients, variables)

    def stateless_step(gradients):
        changed = [variables, optimizer.variables]
        values, slots = compiled(*([variable.value for variable in part] for part in changed), gradients)
        for part, new in zip(changed, (values, slots), strict=True):
            for variable, value in zip(part, new, strict=True):
                variable.assign(value)

    if BACKEND == "tensorflow" and mode != "eager":
        return tf.function(step, autograph=False, jit_compile=mode == "jit")
    if BACKEND == "jax" and mode != "eager":
        compiled = jax.jit(lambda values, slots, gradients: optimizer.stateless_apply(slots, gradients, values))
        return stateless_step
    return step


def take_steps(optimizer, variables, gradients, mode=QUICK):
    """What each variable holds, bit for bit, before the first step, after every one and when training has ended.

    `gradients` has a list of arrays for each step, one a variable.
    """
    step = stepper(optimizer, variables, mode)
    seen = [[bits(variable) for variable in variables]]
    for arrays in gradients:
        step([ops.convert_to_tensor(array) for array in arrays])
        seen.append([bits(variable) for variable in variables])
    optimizer.finalize_variable_values(variables)
    return [*seen, [bits(variable) for variable in variables]]


def random_gradients(steps, *shapes, seed=0):
    """Gradients of the given shapes for so many steps."""
    random = np.random.default_rng(seed)
    return [[random.normal(size=shape, scale=0.5).astype("float32") for shape in shapes] for _ in range(steps)]
