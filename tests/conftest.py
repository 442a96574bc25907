"""What the tests share: small models, and a callback that looks at the members after every step."""

import contextlib
import gc
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# A worker runs on each core, and the tensors are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# What JAX has compiled once serves all workers and later runs; a changed program is another entry.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"equalize-jax-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import keras
import numpy as np
import pytest
from keras import ops

import equalize

BACKEND = keras.backend.backend()
KERAS_3_5 = keras.__version__.startswith("3.5.")

# The ways to run a step, the quickest first. PyTorch is always eager; torch.compile has a test of its own.
MODES = {
    "tensorflow": {"graph": {"jit_compile": False}, "jit": {"jit_compile": True}, "eager": {"run_eagerly": True}},
    "jax": {"jit": {"jit_compile": True}, "eager": {"run_eagerly": True}},
    "torch": {"eager": {"jit_compile": False}},
}[BACKEND]
QUICK = next(iter(MODES))
XLA = "jit" if "jit" in MODES else QUICK  # compiled, where anything is

# What is imported for good: each look for living models, and each collection, would go through half a million objects.
gc.freeze()

hypothesis.settings.register_profile("ci", deadline=None, max_examples=10, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=3000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_xdist_auto_num_workers(config):
    """Tests of one file or chosen by name, and tests whose output is shown, run in this process."""
    chosen = config.option.keyword or (len(config.args) == 1 and ".py" in config.args[0])
    return 0 if chosen or config.option.capture == "no" else None


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run only every N-th test")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Makes all cases of a `sampled` test slow but the first that is neither slow nor left out anyway.

    Then keeps every N-th test, where `--every N` asks for that.
    """
    seen = set()
    for item in items:
        if item.get_closest_marker("sampled") and not any(map(item.get_closest_marker, ("slow", "skip"))):
            function = item.nodeid.split("[")[0]
            if function in seen:
                item.add_marker("slow")
            seen.add(function)
    items[:] = items[:: config.option.every]


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(7)
    yield
    keras.backend.clear_session(free_memory=False)  # collecting garbage would take as long as the test


@pytest.fixture
def doubles():
    """JAX has float64 only where it is asked for."""
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
        yield
        jax.config.update("jax_enable_x64", False)
    else:
        yield


def bits(variable) -> bytes:
    """The variable's value, bit for bit."""
    return ops.convert_to_numpy(variable.value).tobytes()


def bitwise_equal(*variables) -> bool:
    return len({bits(variable) for variable in variables}) == 1


def towers(n=3, *, constraint=None, regularizer=None, dtype=None, frozen=(), units=4, inputs=5):
    """A model of `n` Dense towers side by side, whose kernels carry the rules that are given."""
    entrance = keras.Input((inputs,))
    layers = [
        keras.layers.Dense(
            units,
            activation="tanh",
            kernel_constraint=constraint and constraint(),
            kernel_regularizer=regularizer and regularizer(),
            dtype=dtype,
            name=f"tower_{i}",
        )
        for i in range(n)
    ]
    for i in frozen:
        layers[i].trainable = False
    joined = keras.layers.Concatenate()([layer(entrance) for layer in layers])
    return keras.Model(entrance, keras.layers.Dense(1, dtype=dtype, name="head")(joined))


def kernels(model, prefix="tower_"):
    return [layer.kernel for layer in model.layers if layer.name.startswith(prefix)]


def data(samples=32, inputs=5, outputs=1, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, inputs)).astype("float32")
    y = random.normal(size=(samples, outputs)).astype("float32")
    return x, y


class Recorder(keras.callbacks.Callback):
    """Keeps what the variables hold before training and after every step."""

    def __init__(self, variables):
        super().__init__()
        self.variables = variables
        self.values = [self._read()]

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        self.values.append(self._read())

    def _read(self):
        return np.stack([ops.convert_to_numpy(variable.value) for variable in self.variables])


def no_loss(y, prediction):
    """A loss that leaves a step to what regularizers and constraints do."""
    return 0.0 * ops.sum(prediction, axis=-1)


def shown_alike(group) -> bool:
    """Whether the members show one common value, bit for bit where their views lose none."""
    if not all(member.lossless for member in group.members):
        return group.spread() == 0.0
    values = (ops.convert_to_tensor(ops.convert_to_numpy(member.variable.value)) for member in group.members)
    pulled = (member.least_squares(value) for member, value in zip(group.members, values, strict=True))
    return len({ops.convert_to_numpy(common).tobytes() for common in pulled}) == 1


class Blocked(keras.layers.Layer):
    """Lets no gradient through to what comes before it."""

    def call(self, x):
        return ops.stop_gradient(x)


class EveryStep(keras.callbacks.Callback):
    """After every step, asserts that the members of every hard group are bitwise equal, and counts the steps."""

    def __init__(self, registry):
        super().__init__()
        self.registry = registry
        self.steps = 0

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        self.steps += 1
        for name, group in self.registry.items():
            if group.hard:
                assert shown_alike(group), f"{name} at step {self.steps}"


def compile_quickly(model, optimizer, *args, **kwargs):
    """Compiles a model whose first step TensorFlow then traces once: twice is for steps that make variables."""
    model.compile(optimizer, *args, **kwargs)
    if BACKEND == "tensorflow":
        model.optimizer.build(model.trainable_variables)


def fit(model, registry=None, *, x=None, y=None, epochs=2, batch_size=8, optimizer=None, **compile_args):
    """Compiles and trains a few steps, looking after every one."""
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)  # with slots, and quick to trace
    if x is None:
        x, y = data()
    compile_args.setdefault("loss", "mse")
    compile_quickly(model, optimizer, **compile_args)
    watch = EveryStep(registry if registry is not None else equalize.GroupRegistry())
    model.fit(x, y, epochs=epochs, batch_size=batch_size, verbose=0, shuffle=False, callbacks=[watch])
    assert watch.steps > 0
    return watch


def in_new_process(function, *arguments, timeout=300) -> int:
    """Runs a function of a test file in a new process with the same backend; returns the process's exit code."""
    (code,) = in_new_processes(function, [arguments], timeout=timeout)
    return code


def in_new_processes(function, calls, *, timeout=300, **environment) -> list[int]:
    """Runs a function side by side in new processes, one for each tuple of arguments; where one fails, all end."""
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in calls]
        processes = [_start(function, call, environment, log) for call, log in zip(calls, logs, strict=True)]
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        end = time.monotonic() + timeout
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            assert time.monotonic() < end, f"{function.__name__}{tuple(calls)} took more than {timeout} s"
            time.sleep(0.05)
        for code, log in zip(codes, logs, strict=True):
            if code is not None and code > 0:
                log.seek(0)
                raise AssertionError(log.read())
    return [process.returncode for process in processes]


def _start(function, arguments, environment, log):
    call = f"from {function.__module__} import {function.__name__} as f; f(*{[str(a) for a in arguments]!r})"
    root = pathlib.Path(__file__).parents[1]
    command, quiet = [sys.executable, "-c", call], subprocess.DEVNULL
    return subprocess.Popen(command, cwd=root, env=os.environ | environment, stdout=quiet, stderr=log, text=True)


def value_and_gradients(function, variables):
    """A scalar function of variables and its gradients, as arrays; None where there is no gradient."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = function()
        found = tape.gradient(value, [variable.value for variable in variables])
    elif BACKEND == "torch":
        import torch

        moving = [variable for variable in variables if variable.trainable]
        value = function()
        found = torch.autograd.grad(value, [variable.value for variable in moving], allow_unused=True)
        by_id = dict(zip(map(id, moving), found, strict=True))
        found = [by_id.get(id(variable)) for variable in variables]
    else:
        import jax

        def stateless(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function()

        value, found = jax.value_and_grad(stateless)([variable.value for variable in variables])
    arrays = [None if gradient is None else ops.convert_to_numpy(gradient) for gradient in found]
    return float(ops.convert_to_numpy(value)), arrays


def gradients(function, variables):
    return value_and_gradients(function, variables)[1]


def two_towers():
    """Two layers that see one input and have a target each, tied, and their registry."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    made = [keras.layers.Dense(3, name=f"tower_{i}") for i in range(2)]
    registry = equalize.GroupRegistry()
    model = keras.Model(inputs, [tower(inputs) for tower in made])
    registry.tie("towers", made, equalize.constraints.Equal())
    return model, registry
