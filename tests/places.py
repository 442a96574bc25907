"""Places where a model is trained, on one device or several, and what each copy of each member holds after a step."""

import contextlib
import functools
import json
import os
import pathlib
import pickle
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

import equalize
from equalize.constraints import Equal
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import MeanL2
from equalize.views import Scale, Transpose
from tests.conftest import BACKEND, data, in_new_processes, kernels, towers

SIZE, STEPS, BATCH = 4, 4, 16

WAYS = {
    "exact": {"constraint": lambda: Equal("towers")},
    "hard": {"constraint": lambda: Equal("towers")},
    "hard, one transposed": {"constraint": lambda: Equal("towers")},
    "hard, one frozen": {"constraint": lambda: Equal("towers"), "frozen": (1,)},
    "partial": {"constraint": lambda: Equal("towers", rate=0.25)},
    "soft": {"regularizer": lambda: MeanL2("towers", 0.3)},
}
APART = ("partial", "soft")  # ways whose members are not meant to be equal
DTYPES = ("float32", "float64", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")


@dataclass(frozen=True)
class Place:
    """Where a model is trained.

    `scope` makes the devices known, `settings` go to `compile`. A process has so many `devices`, and where there are
    several `processes`, each gives the model its own part of a batch, unless `whole` says that all give all of it.
    Some places cannot have variables of some dtypes, tied or not.
    """

    scope: Callable[[], Any] = contextlib.nullcontext
    settings: Mapping[str, Any] = field(default_factory=dict)
    devices: int = 1
    processes: int = 1
    whole: bool = False
    lacks: tuple[str, ...] = ()

    @property
    def several(self):
        return self.devices * self.processes > 1

    def pairs(self, ways, dtypes):
        return [(way, dtype) for dtype in dtypes for way in ways if dtype not in self.lacks]


@functools.cache
def _strategy(name, *arguments):
    """One strategy serves all runs of a process."""
    import tensorflow as tf

    return getattr(tf.distribute, name)(*arguments)


def mirrored():
    return _strategy("MirroredStrategy", ("CPU:0", "CPU:1")).scope()


def workers():
    return _strategy("MultiWorkerMirroredStrategy").scope()


def data_parallel():
    return keras.distribution.DataParallel(auto_shard_dataset=False).scope()


def model_parallel(shape, layouts):
    def scope():
        mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], keras.distribution.list_devices())
        layout_map = keras.distribution.LayoutMap(mesh)
        for path, layout in layouts.items():
            layout_map[path] = layout
        return keras.distribution.ModelParallel(layout_map=layout_map, auto_shard_dataset=False).scope()

    return scope


ALIKE = {"tower_./kernel": (None, "model")}
UNLIKE = {"tower_0/kernel": ("model", None), "tower_1/kernel": (None, "model")}  # and tower_2 whole on each device

PLACES = {
    "tensorflow": {
        "one device, graph": Place(settings={"jit_compile": False}),
        "one device, XLA": Place(settings={"jit_compile": True}),
        "one device, eager": Place(settings={"run_eagerly": True}),
        "MirroredStrategy": Place(mirrored, {"jit_compile": False}, devices=2),
        # TensorFlow 2.21 broadcasts no bfloat16 from process to process (`CollectiveBcastSend`).
        "MultiWorkerMirroredStrategy": Place(workers, processes=2, lacks=("bfloat16",)),
    },
    "jax": {
        "one device, compiled": Place(settings={"jit_compile": True}),
        "one device, eager": Place(settings={"run_eagerly": True}),
        "DataParallel": Place(data_parallel, devices=4),
        "ModelParallel, members sharded alike": Place(model_parallel((2, 2), ALIKE), devices=4),
        "ModelParallel, members sharded differently": Place(model_parallel((2, 2), UNLIKE), devices=4),
        "DataParallel, two processes": Place(data_parallel, devices=2, processes=2),
        "ModelParallel, two processes": Place(model_parallel((1, 2), UNLIKE), processes=2, whole=True),
    },
    "torch": {"one device": Place()},
}


def train(place, way, dtype, process=0):
    """The pieces of each member that this process has, after every step and at the end."""
    keras.utils.set_random_seed(1)
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    try:
        if dtype == "float64":  # TensorFlow adds no loss of floatx to a penalty of float64
            keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        with place.scope():
            return _train(place, way, process)
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def _train(place, way, process):
    model = towers(3, inputs=SIZE, units=SIZE, **WAYS[way])
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=tuple(variable.shape), scale=0.5))
    if way == "hard, one transposed":
        kernels(model)[1].constraint = Equal("towers", view=Transpose())
    registry = equalize.GroupRegistry().link(model)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(TiedOptimizer(optimizer, registry) if way == "exact" else optimizer, "mse", **place.settings)
    pieces = []

    def look(batch=None, logs=None):
        if BACKEND == "jax":
            model.jax_state_sync()
        pieces.append([pieces_of(kernel, process) for kernel in kernels(model)])

    x, y = data(STEPS * BATCH, SIZE)
    part = BATCH if place.whole else BATCH // place.processes
    if not place.whole:
        x, y = (a.reshape(STEPS, place.processes, part, -1)[:, process].reshape(STEPS * part, -1) for a in (x, y))
    if place.scope is workers:
        own_loop(model, x, y, part, look)
    else:
        watch = keras.callbacks.LambdaCallback(on_train_batch_end=look, on_train_end=look)
        model.fit(x, y, batch_size=part, shuffle=False, verbose=0, callbacks=[watch])
    assert (registry.spread()["towers"] == 0.0) == (way not in APART)
    first, second, third = kernels(model)
    assert (equalize.relation(first, third) == "equal") == (way not in APART)
    if way == "partial":  # a view that rounds
        registry.untie()
        registry.tie("scaled", [first, (second, Scale(3.0)), third], Equal(), initial="mean")
        assert registry.spread() == {"scaled": 0.0}
    return pieces


def own_loop(model, x, y, part, look):
    """What `fit` does, for a strategy that Keras's own does not know how to use."""
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    model.optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x=x, y=y, y_pred=model(x, training=True))
            loss = model.optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    @tf.function
    def distributed(x, y):
        strategy.run(step, args=(x, y))

    for start in range(0, len(x), part):
        batch = [tf.constant(a[start : start + part]) for a in (x, y)]
        distributed(*(strategy.experimental_distribute_values_from_function(lambda _, a=a: a) for a in batch))
        look()
    look()


def pieces_of(variable, process=0):
    """What is on the devices of this process: the number of the copy, which part of it, and its value."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        copies = tf.distribute.get_strategy().experimental_local_results(variable.value)
        return [(process * len(copies) + i, (), copy.numpy()) for i, copy in enumerate(copies)]
    if BACKEND == "jax":
        return [(shard.replica_id, shard.index, np.array(shard.data)) for shard in variable.value.addressable_shards]
    return [(0, (), np.array(ops.convert_to_numpy(variable.value)))]


@dataclass(frozen=True)
class Run:
    """What the copies of the members held: `copies[step][member]` is a list of arrays, as the common value is shown."""

    copies: Sequence[Sequence[Sequence[np.ndarray]]]

    @property
    def values(self):
        """The first copy of each member: (steps, members, ...)."""
        return np.array([[copies[0] for copies in step] for step in self.copies])

    @property
    def steps(self):
        """How many steps left values that no other did."""
        return len({step.tobytes() for step in self.values})

    def spread_of_members(self):
        return max(spread([copy for copies in step for copy in copies]) for step in self.copies)

    def spread_of_copies(self):
        return max(spread(copies) for step in self.copies for copies in step)


def spread(arrays):
    """How far apart arrays are; 0.0 only where they are equal bit for bit, and infinite where one has no number."""
    wide = np.stack(arrays).astype("float64")
    if not np.isfinite(wide).all():
        return float("inf")
    equal = len({array.tobytes() for array in arrays}) == 1
    return 0.0 if equal else max(float(np.ptp(wide, axis=0).max()), np.finfo("float64").tiny)


def _run(way, parts):
    """A run from the pieces of all processes."""
    steps = []
    for step in zip(*parts, strict=True):
        members = []
        for i, pieces in enumerate(zip(*step, strict=True)):
            copies = {}
            for number, index, value in (piece for part in pieces for piece in part):
                copy = copies.setdefault(number, np.full((SIZE, SIZE), np.nan, value.dtype))
                copy[index] = value
            transposed = way == "hard, one transposed" and i == 1
            members.append([copy.T if transposed else copy for _, copy in sorted(copies.items())])
        steps.append(members)
    return Run(steps)


def run_here(name, way, dtype):
    """One run on one device of this process."""
    return _run(way, [train(PLACES[BACKEND][name], way, dtype)])


def runs(backend, name, pairs):
    """A run for each pair of a way and a dtype, in new processes: devices are made before a backend starts."""
    place = PLACES[backend][name]
    environment = {"KERAS_BACKEND": backend}
    if backend == "jax":
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={place.devices}"
        environment["JAX_ENABLE_X64"] = str(int("float64" in {dtype for _, dtype in pairs}))
    with tempfile.TemporaryDirectory() as folder:
        addresses = json.dumps([f"127.0.0.1:{port}" for port in _free_ports(place.processes)])
        calls = [(name, json.dumps(pairs), process, addresses, folder) for process in range(place.processes)]
        in_new_processes(train_in_process, calls, timeout=900, **environment)
        files = [pathlib.Path(folder) / str(process) for process in range(place.processes)]
        parts = [pickle.loads(file.read_bytes()) for file in files]
    return {(way, dtype): _run(way, [part[way, dtype] for part in parts]) for way, dtype in parts[0]}


def make_devices(place):
    """Gives TensorFlow several devices, before it starts; JAX is told by its environment."""
    if BACKEND == "tensorflow" and place.devices > 1:
        import tensorflow as tf

        (device,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * place.devices)


def train_in_process(name, pairs, process, addresses, folder):
    """What a new process does."""
    place, process, addresses = PLACES[BACKEND][name], int(process), json.loads(addresses)
    keras.utils.set_random_seed(1)
    make_devices(place)
    if BACKEND == "tensorflow" and place.processes > 1:
        task = {"type": "worker", "index": process}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    elif BACKEND == "jax" and place.processes > 1:
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # later versions do so by themselves
        keras.distribution.initialize(addresses[0], place.processes, process)
    result = {(way, dtype): train(place, way, dtype, process) for way, dtype in json.loads(pairs)}
    (pathlib.Path(folder) / str(process)).write_bytes(pickle.dumps(result))


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
