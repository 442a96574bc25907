"""Law 1 in compiled steps, where a compiler may compute one thing twice and round it in two ways.

Many groups of random views, constraints, weights, shapes and dtypes train in one compiled step, and are compared bit
for bit after each. The compiled programs are read, too: the common value of a group must stand in them once.
"""

import pathlib
import re
import sys
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.constraints import Equal, Invariant
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import ChainL2, MeanL2
from equalize.views import Chain, Flip, Pattern, Rotate90, Scale, Slice, Transpose
from tests.conftest import BACKEND, bits, in_new_processes, shown_alike

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles no step on PyTorch")

INNER = [None, None, keras.constraints.UnitNorm(), keras.constraints.MaxNorm(0.5), keras.constraints.NonNeg()]
DTYPES = ["float32", "bfloat16", "float16", "float32", *(["float64"] if BACKEND == "tensorflow" else [])]
OPTIMIZERS = [
    lambda: keras.optimizers.SGD(0.1),
    lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    lambda: keras.optimizers.Adam(0.01),
    lambda: keras.optimizers.RMSprop(0.01, centered=True, momentum=0.5),
    lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    lambda: keras.optimizers.Lion(0.01),
]


# A pool, since JAX compiles what is done outside of the step for each shape anew.
SHAPES = [
    tuple(
        int(size) for size in np.random.default_rng(k).integers(1, 201 if k % 4 == 0 else 7, 1 if k % 4 == 0 else k % 4)
    )
    for k in range(24)
]


def random_view(random, shape):
    """A view, and the shape of a member that shows a common value of the given shape through it."""
    axis = int(random.integers(len(shape)))
    scale = Scale(float(random.choice([-1.0, 0.7, 3.0, -0.1, 2.0])))
    kind = random.choice(["none", "flip", "transpose", "rotate", "scale", "slice", "chain", "pattern"])
    if kind == "flip":
        return Flip(axis), shape
    if kind == "transpose":
        return Transpose(), shape[::-1]
    if kind == "rotate" and len(shape) > 1:
        turns = int(random.integers(1, 4))
        turned = (shape[1], shape[0], *shape[2:]) if turns % 2 else shape
        return Rotate90(turns), turned
    if kind == "scale":
        return scale, shape
    if kind == "slice":
        return Slice((0,) * len(shape), shape), tuple(size + 1 for size in shape)
    if kind == "pattern":
        size = int(np.prod(shape))
        indices = np.concatenate([np.arange(size), random.integers(size, size=2 * size)])
        return Pattern(random.permutation(indices), shape), (3 * size,)
    if kind == "chain":
        return Chain(scale, Flip(axis), Scale(0.3), Transpose()), shape[::-1]
    return None, shape


def random_group(random, registry, name, dtype):
    """Variables of one group, tied, each with a constant that gives it a gradient of its own."""
    shape = SHAPES[random.integers(len(SHAPES))]
    n = int(random.integers(2, 10))
    views = [(None, shape), *(random_view(random, shape) for _ in range(n - 1))]
    variables = [
        keras.Variable(random.normal(size=s), dtype=dtype, name=f"{name}_{i}") for i, (_, s) in enumerate(views)
    ]
    inner = INNER[random.integers(len(INNER))]
    members = [(v, view) if view else v for v, (view, _) in zip(variables, views, strict=True)]
    group = registry.tie(name, members, Equal(inner=inner))
    for member in group.members if random.random() < 0.3 else ():
        member.weight = float(random.uniform(0.2, 3.0))
    return variables


def compiled_step(optimizer, variables, loss):
    """A function that takes one step, compiled by XLA, and a function that reads the compiled program."""
    optimizer.build(variables)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True, autograph=False)
        def step():
            with tf.GradientTape() as tape:
                value = loss()
            optimizer.apply(tape.gradient(value, [variable.value for variable in variables]), variables)

        function: Any = step
        return step, lambda: function.experimental_get_compiler_ir()(stage="optimized_hlo")
    import jax

    def pure(values, slots):
        def stateless(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return loss()

        return optimizer.stateless_apply(slots, jax.grad(stateless)(values), values)

    jitted = jax.jit(pure)

    def state():
        return [v.value for v in variables], [v.value for v in optimizer.variables]

    def step():
        for held, new in zip((variables, optimizer.variables), jitted(*state()), strict=True):
            for variable, value in zip(held, new, strict=True):
                variable.assign(value)

    return step, lambda: str(jitted.lower(*state()).compile().as_text())


def wavy(variables, random):
    """A loss whose gradients fuse with whatever follows: each variable has waves of its own."""
    waves = [ops.convert_to_tensor(random.normal(size=v.shape), dtype=v.dtype) for v in variables]
    return lambda: sum(
        ops.cast(ops.sum(ops.sin(v * wave)), "float32") for v, wave in zip(variables, waves, strict=True)
    )


def train_random_groups(seed, groups, steps=3):
    """Trains random groups in one compiled step; returns those that were apart after any of the steps."""
    random = np.random.default_rng(seed)
    registry = equalize.GroupRegistry()
    dtypes = DTYPES * groups
    variables = [v for k in range(groups) for v in random_group(random, registry, f"group_{k}", dtypes[k])]
    optimizer = OPTIMIZERS[seed % len(OPTIMIZERS)]()
    if random.random() < 0.4:
        optimizer = TiedOptimizer(optimizer, registry)
    step, _ = compiled_step(optimizer, variables, wavy(variables, random))
    before = [bits(v) for v in variables]
    apart = {}
    for _ in range(steps):
        step()
        apart |= {name: (seed, group) for name, group in registry.items() if not shown_alike(group)}
    assert sum(bits(v) != old for v, old in zip(variables, before, strict=True)) > len(variables) // 2
    return list(apart.values())


def test_random_groups_are_equal_after_every_compiled_step():
    assert train_random_groups(0, 6) == []


def require_equal_groups(first, last):
    assert [found for seed in range(int(first), int(last)) for found in train_random_groups(seed, 16)] == []


@pytest.mark.fuzz
def test_two_thousand_random_groups_are_equal_after_every_compiled_step():
    """In several processes, since what XLA has compiled is never given back."""
    parts = [(first, first + 25) for first in range(1, 126, 25)]
    for two in (parts[:2], parts[2:4], parts[4:]):
        in_new_processes(require_equal_groups, two, timeout=7200)


class Waves(keras.layers.Layer):
    """Scales the mean of its inputs by a sum of waves over one weight."""

    def __init__(self, waves):
        super().__init__()
        self.waves = waves

    def build(self, input_shape):
        initializer = keras.initializers.RandomNormal(stddev=1.0)
        self.w = self.add_weight(shape=self.waves.shape, initializer=initializer, name="w")

    def call(self, x):
        return ops.mean(x, axis=1, keepdims=True) * ops.sum(ops.sin(self.w * self.waves))


def test_members_with_a_unit_norm_are_equal_after_every_compiled_step():
    random = np.random.default_rng(0)
    layers = [Waves(random.normal(size=(8, 1, 6)).astype("float32")) for _ in range(3)]
    entrance = keras.Input((5,))
    model = keras.Model(entrance, keras.layers.Add()([layer(entrance) for layer in layers]))
    first, second, third = (layer.w for layer in layers)
    rule = Equal(inner=keras.constraints.UnitNorm())
    group = equalize.GroupRegistry().tie("waves", [first, second, (third, Flip(2))], rule)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), "mse", jit_compile=True)
    x, y = random.normal(size=(16, 5)).astype("float32"), random.normal(size=(16, 1)).astype("float32")
    for _ in range(3):
        model.fit(x, y, batch_size=16, verbose=0)
        assert shown_alike(group)


SMALL, LARGE = (6, 5), (160, 130)


def count_of_means(n, rule, *, shape=LARGE, tied_optimizer=False):
    """How often a compiled step of n members compares nodes of the tree of means.

    One mean of large members takes n − 1 comparisons, of small ones as many as the tree has levels, or twice.
    """
    random = np.random.default_rng(0)
    variables = [keras.Variable(random.normal(size=shape), name=f"w_{i}") for i in range(n)]
    registry = equalize.GroupRegistry()
    registry.tie("group", variables, rule)
    optimizer = keras.optimizers.SGD(0.1)
    if tied_optimizer:
        optimizer = TiedOptimizer(optimizer, registry)
    step, program = compiled_step(optimizer, variables, wavy(variables, random))
    step()
    text = program()
    assert text.count(" conditional(") == 1
    return len(re.findall(rf"= pred\[(?:\d+,)?{shape[0]},{shape[1]}\]\S* compare\(.*direction=EQ", text))


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_compiled_step_computes_the_mean_once(rate):
    pulls = 10 if rate < 1.0 else 0  # a partial pull compares each member with the mean
    assert count_of_means(10, Equal(rate=rate)) == 9 + pulls


@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_compiled_step_computes_the_mean_of_small_members_level_by_level(rate, n):
    levels = int(np.ceil(np.log2(n)))
    pulls = n if rate < 1.0 else 0
    assert levels <= count_of_means(n, Equal(rate=rate), shape=SMALL) <= 2 * levels + pulls


@pytest.mark.parametrize("rule", [Equal(rate=0.5), MeanL2(factor=0.1), ChainL2(factor=0.1)])
def test_a_compiled_step_has_few_kernels_for_many_small_members(rule):
    """XLA compiles equal kernels once, but one that cuts a member out of a stack has the place in it."""
    n, random = 40, np.random.default_rng(0)
    variables = [keras.Variable(random.normal(size=SMALL), dtype="float32", name=f"w_{i}") for i in range(n)]
    registry = equalize.GroupRegistry()
    registry.tie("group", variables, rule)
    step, program = compiled_step(
        keras.optimizers.SGD(0.1), variables, lambda: registry.penalty() + sum(ops.sum(v * v) for v in variables)
    )
    step()
    levels = int(np.ceil(np.log2(n)))
    assert len(set(re.findall(r"slice=\{[^}]*\}", program()))) <= 4 * levels < n


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX looks at all members each time, which it does in one loop")
def test_tracing_the_shares_of_a_penalty_looks_at_each_member_a_few_times():
    import tensorflow as tf

    package = str(pathlib.Path(equalize.__file__).parent)  # the folder above it may be named equalize, too

    def calls(n):
        """How often functions of equalize are called while the shares of n members are traced."""
        layers = [keras.layers.Dense(2, use_bias=False) for _ in range(n)]
        entrance = keras.Input((2,))
        model = keras.Model(entrance, [layer(entrance) for layer in layers])
        equalize.GroupRegistry().tie("group", [layer.kernel for layer in layers], MeanL2(factor=0.1))
        count = 0

        def count_calls(frame, event, _):
            nonlocal count
            count += event == "call" and frame.f_code.co_filename.startswith(package)

        def traced():
            sys.setprofile(count_calls)
            try:
                return sum(model.losses)
            finally:
                sys.setprofile(None)

        tf.function(traced, autograph=False).get_concrete_function()
        return count

    assert calls(80) < 4.5 * calls(20)


def optimizer_that_writes(variable, value):
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([variable])
    return lambda tf: optimizer.apply([variable.value - value], [variable])


WRITES = {
    "assign": lambda v, value: lambda tf: v.assign(value),
    "assign_add": lambda v, value: lambda tf: v.value.assign_add(value - v.value),
    "a branch": lambda v, value: (
        lambda tf: tf.cond(
            tf.random.uniform(()) < 2.0, lambda: tf.identity(v.value.assign(value)), lambda: tf.identity(v.value)
        )
    ),
    "a function": lambda v, value: lambda tf: tf.function(lambda: v.value.assign(value))(),
    "an optimizer": optimizer_that_writes,
}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a graph that grows, and buffers, are TensorFlow's")
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_between_two_shares_counts_in_the_second(write, eager):
    import tensorflow as tf

    variables = [keras.Variable([float(i)], dtype="float32", name=f"w_{i}") for i in range(3)]
    equalize.GroupRegistry().tie("group", variables, MeanL2(factor=3.0))
    first, second, third = variables
    write_third = WRITES[write](third, tf.constant([30.0]))

    def shares():
        before = first.regularizer(first.value)
        write_third(tf)
        return before, second.regularizer(second.value), third.regularizer(third.value)

    expected = [np.var([0.0, 1.0, last]) * 3 for last in (2.0, 30.0, 30.0)]  # each a third of 3·Σ‖w_i − mean‖²
    found = shares() if eager else tf.function(shares, autograph=False)()
    np.testing.assert_allclose([float(share) for share in found], expected, rtol=1e-5)


def test_a_compiled_step_computes_a_constrained_mean_once():
    # A norm and the division by it read the mean, which may be computed for each; no member does.
    assert count_of_means(10, Equal(inner=keras.constraints.UnitNorm())) in (9, 18)


def test_a_compiled_step_copies_the_value_of_one_member():
    assert count_of_means(5, Equal(), tied_optimizer=True) == 0


def test_a_compiled_step_computes_the_mean_of_views_once():
    kernel = keras.Variable(np.random.default_rng(0).normal(size=(6, 6)), name="kernel")
    kernel.constraint = Invariant([Transpose()])
    step, program = compiled_step(keras.optimizers.SGD(0.1), [kernel], wavy([kernel], np.random.default_rng(1)))
    step()
    value = ops.convert_to_numpy(kernel.value)
    np.testing.assert_array_equal(value, value.T)
    assert program().count(" conditional(") == 1


def test_a_value_that_is_not_a_number_stays_one_in_a_compiled_step():
    variables = [keras.Variable(np.ones((2, 3)), name=f"w_{i}") for i in range(3)]
    variables[0].assign(np.array([[np.nan, 1.0, 4.0], [1.0, np.inf, 1.0]], "float32"))
    registry = equalize.GroupRegistry()
    registry.tie("group", variables, MeanL2(factor=0.0))
    group = registry["group"]
    registry.replace(group.name, Equal())
    step, _ = compiled_step(keras.optimizers.SGD(0.0), variables, wavy(variables, np.random.default_rng(0)))
    step()
    for variable in variables:
        value = ops.convert_to_numpy(variable.value)
        assert np.isnan(value[0, 0])
        np.testing.assert_allclose(value[0, 1:], [1.0, 2.0])
