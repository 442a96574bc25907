"""Training loops written by hand, the penalty in them, and how often a step projects."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize._math import means
from equalize.constraints import Equal
from equalize.errors import EqualizeError
from equalize.regularizers import MeanL2, PairwiseL2
from tests import bare
from tests.conftest import BACKEND, MODES, QUICK, bits, bitwise_equal, data, fit, kernels, towers, value_and_gradients

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
else:
    import torch

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="GradientTape and tf.function are TensorFlow's")
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="only JAX trains without state")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="torch.optim and torch.compile are PyTorch's")


def tied_towers(n=3, *, rate=1.0, **kwargs):
    model = towers(n, constraint=lambda: Equal("towers", rate=rate), **kwargs)
    return model, equalize.GroupRegistry().link(model)


def batches(steps=4):
    x, y = data(8 * steps)
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 8 * steps, 8)]


def squared_error(model, x, y):
    return ops.mean(ops.square(model(x, training=True) - ops.convert_to_tensor(y)))


def mode_of_tensorflow(name, step):
    """The step as it is, as a graph, or compiled."""
    return step if name == "eager" else tf.function(step, jit_compile=name == "jit")


class Steps:
    """Looks at the members after every step of a loop, and at the end whether the steps meant anything."""

    def __init__(self, model, n=3):
        self.members = kernels(model)
        self.biases = [model.get_layer(f"tower_{i}").bias for i in range(n)]
        self.seen = [bits(self.members[0])]

    def look(self):
        assert bitwise_equal(*self.members)
        self.seen.append(bits(self.members[0]))

    def end(self):
        """Every step moved the members, and the biases, which are not tied, came apart."""
        assert len(set(self.seen)) == len(self.seen) > 1
        assert not bitwise_equal(*self.biases)


class Count:
    """Counts the means that are taken, and the applications of optimizers; in a graph, when they are traced."""

    def __init__(self, monkeypatch):
        self.means = self.applied = 0
        mean, apply = means.mean, keras.optimizers.Optimizer.apply

        def counting_mean(*args):
            self.means += 1
            return mean(*args)

        def counting_apply(optimizer, *args, **kwargs):
            self.applied += 1
            return apply(optimizer, *args, **kwargs)

        monkeypatch.setattr(means, "mean", counting_mean)
        # A `LossScaleOptimizer` has an `apply` of its own, which calls that of its inner optimizer.
        monkeypatch.setattr(keras.optimizers.Optimizer, "apply", counting_apply)


@pytest.fixture
def count(monkeypatch):
    return Count(monkeypatch)


# ---- loops


@on_tensorflow
@pytest.mark.parametrize(
    ("optimizer", "mode"), [("adam", "graph"), *(("sgd", mode) for mode in ("graph", "jit", "eager"))]
)
@pytest.mark.sampled
def test_a_loop_with_a_gradient_tape_projects_once_a_step(count, optimizer, mode):
    model, _ = tied_towers()
    optimizer = keras.optimizers.get(optimizer)
    optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = squared_error(model, x, y)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step = mode_of_tensorflow(mode, step)
    steps = Steps(model)
    for x, y in batches():
        step(x, y)
        steps.look()
    steps.end()
    assert count.means == count.applied == (4 if mode == "eager" else 1)


@on_tensorflow
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.sampled
def test_a_loop_inside_a_graph(jit):
    model, _ = tied_towers()
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer.build(model.trainable_variables)
    x, y = data()

    @tf.function(jit_compile=jit)
    def run(count):
        for _ in tf.range(count):
            with tf.GradientTape() as tape:
                loss = squared_error(model, x, y)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    steps = Steps(model)
    for count in (1, 3):
        run(tf.constant(count))
        steps.look()
    steps.end()
    assert int(optimizer.iterations.numpy()) == 4


def jax_state(model, optimizer):
    """The variables that a step of JAX changes, and their values."""
    places = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    return places, tuple([variable.value for variable in variables] for variables in places)


def jax_step(model, optimizer, donate=True):
    """A step of JAX on the state of a model and an optimizer, whose buffers it may take over."""

    def loss_of(trainable, others, x, y):
        prediction, others, losses = model.stateless_call(trainable, others, x, training=True, return_losses=True)
        return ops.mean(ops.square(prediction - y)) + sum(losses), others

    @functools.partial(jax.jit, donate_argnums=0 if donate else ())
    def step(state, x, y):
        trainable, others, slots = state
        gradients, others = jax.grad(loss_of, has_aux=True)(trainable, others, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return trainable, others, slots

    return step


def place_of(variable, variables):
    return [other is variable for other in variables].index(True)


@on_jax
@pytest.mark.parametrize("donate", [False, True])
def test_a_loop_without_state(donate):
    model, _ = tied_towers()
    optimizer = keras.optimizers.Adam(0.05)
    optimizer.build(model.trainable_variables)
    step = jax_step(model, optimizer, donate)
    places, state = jax_state(model, optimizer)
    members = [place_of(kernel, places[0]) for kernel in kernels(model)]
    seen = [np.asarray(state[0][members[0]]).tobytes()]
    for x, y in batches():
        state = step(state, x, y)
        values = {np.asarray(state[0][i]).tobytes() for i in members}
        assert len(values) == 1
        seen += values
    assert len(set(seen)) == 5
    for variables, values in zip(places, state, strict=True):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    fit(model, epochs=1)  # which gives all buffers away once more
    assert bitwise_equal(*kernels(model))
    assert bits(kernels(model)[0]) not in seen


class HeldLoop:
    """A loop on JAX, written out of its parts, over three towers of which the second is frozen."""

    def __init__(self):
        self.model = towers(3, constraint=lambda: Equal("towers"), frozen=(1,))
        equalize.GroupRegistry().link(self.model)
        self.optimizer = keras.optimizers.Adam(0.05)
        self.optimizer.build(self.model.trainable_variables)
        self.places, self.state = jax_state(self.model, self.optimizer)
        self.anchor = place_of(kernels(self.model)[1], self.places[1])
        self.members = [place_of(kernels(self.model)[i], self.places[0]) for i in (0, 2)]

    def gradients(self, trainable, others, *, losses=True):
        x, y = batches()[0]

        def loss_of(trainable):
            prediction, _, *more = self.model.stateless_call(trainable, others, x, training=True, return_losses=losses)
            return ops.mean(ops.square(prediction - y)) + sum(more[0] if losses else [])

        return jax.grad(loss_of)(trainable)

    def apply(self, gradients, trainable, slots):
        return self.optimizer.stateless_apply(slots, gradients, trainable)

    def apply_in_a_scope_over_all(self, gradients, *state):
        mapping = [pair for pairs in zip(self.places, state, strict=True) for pair in zip(*pairs, strict=True)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self.optimizer.apply(gradients, self.places[0])
        return [scope.get_current_value(v) for v in self.places[0]], [
            scope.get_current_value(v) for v in self.places[2]
        ]

    def follows(self, step):
        """Runs steps on states that give the frozen member other values than its variable holds."""
        trainable, others, slots = self.state
        for given in (others[self.anchor], jax.numpy.ones((5, 4)), jax.numpy.zeros((5, 4))):
            others = [given if i == self.anchor else value for i, value in enumerate(others)]
            trainable, slots = step(trainable, others, slots)
            assert {np.asarray(trainable[i]).tobytes() for i in self.members} == {np.asarray(given).tobytes()}


@on_jax
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("scope_over_all", [True, False])
def test_a_loop_without_state_takes_the_value_that_its_state_gives_to_a_frozen_member(scope_over_all, jit):
    loop = HeldLoop()

    def step(trainable, others, slots):
        gradients = loop.gradients(trainable, others, losses=not scope_over_all)
        if scope_over_all:
            return loop.apply_in_a_scope_over_all(gradients, trainable, others, slots)
        return loop.apply(gradients, trainable, slots)

    loop.follows(jax.jit(step) if jit else step)


@on_jax
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("before", ["nothing", "losses", "a step with losses", "validation", "fit"])
def test_a_loop_that_computes_no_losses_does_not_guess_the_value_of_a_frozen_member(before, jit):
    loop = HeldLoop()
    trainable, others, slots = loop.state
    if before == "losses":
        assert loop.model.losses
    elif before == "a step with losses":
        loop.apply(loop.gradients(trainable, others), trainable, slots)
    elif before == "validation":
        loop.model.stateless_call(trainable, others, batches()[0][0], return_losses=True)
    elif before == "fit":
        fit(loop.model, epochs=1)
        trainable, others, slots = jax_state(loop.model, loop.optimizer)[1]

    def step(trainable, others, slots):
        return loop.apply(loop.gradients(trainable, others, losses=False), trainable, slots)

    values = [np.asarray(value) for value in trainable]
    with pytest.raises(EqualizeError, match=r"cannot take the value of 'tower_1/kernel'.*return_losses=True"):
        (jax.jit(step) if jit else step)(trainable, others, slots)
    assert all(np.array_equal(value, old) for value, old in zip(trainable, values, strict=True))


@on_jax
@pytest.mark.parametrize("jit_gradients", [True, False])
def test_a_value_that_a_loss_saw_is_not_compiled_into_a_step_of_its_own(jit_gradients):
    loop = HeldLoop()
    trainable, others, slots = loop.state
    gradients = (jax.jit(loop.gradients) if jit_gradients else loop.gradients)(trainable, others)
    with pytest.raises(EqualizeError, match=r"cannot take the value of 'tower_1/kernel'"):
        jax.jit(loop.apply)(gradients, trainable, slots)


@on_jax
@pytest.mark.parametrize("jit", [True, False])
def test_a_loop_that_computes_no_losses_knows_a_constant(jit):
    model = towers(2)
    registry = equalize.GroupRegistry()
    registry.tie("held", [*kernels(model), np.full((5, 4), 0.5, "float32")], Equal())
    optimizer = keras.optimizers.Adam(0.05)
    optimizer.build(model.trainable_variables)
    _, (trainable, _, slots) = jax_state(model, optimizer)
    apply = jax.jit(optimizer.stateless_apply) if jit else optimizer.stateless_apply
    trainable, _ = apply(slots, [ops.ones_like(value) for value in trainable], trainable)
    for kernel in kernels(model):
        assert np.all(np.asarray(trainable[place_of(kernel, model.trainable_variables)]) == 0.5)


@on_torch
@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam, keras.optimizers.SGD])
def test_a_loop_with_a_keras_optimizer_on_torch(optimizer):
    model, _ = tied_towers()
    optimizer = optimizer(0.05)
    steps = Steps(model)
    for x, y in batches():
        model.zero_grad()
        squared_error(model, x, y).backward()
        with torch.no_grad():
            optimizer.apply([variable.value.grad for variable in model.trainable_variables], model.trainable_variables)
        steps.look()
    steps.end()


@on_torch
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_a_loop_with_a_torch_optimizer_projects_when_it_is_told_to(optimizer):
    model, registry = tied_towers()
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05)
    steps = Steps(model)
    for x, y in batches():
        optimizer.zero_grad()
        squared_error(model, x, y).backward()
        optimizer.step()
        assert registry.spread()["towers"] > 0.0  # torch.optim knows no constraints
        registry.project()
        steps.look()
    steps.end()


@on_torch
def test_a_projection_leaves_the_parameters_of_a_torch_optimizer_in_place():
    model, registry = tied_towers()
    parameters = [kernel.value for kernel in kernels(model)]
    squared_error(model, *batches()[0]).backward()
    gradients = [parameter.grad.clone() for parameter in parameters]
    with torch.no_grad():
        parameters[0].add_(1.0)
    registry.project()
    assert [kernel.value for kernel in kernels(model)] == parameters
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in parameters)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))


def apply(optimizer, pairs):
    """One step of a Keras optimizer with the gradients that are given."""
    optimizer.apply([ops.convert_to_tensor(gradient) for gradient, _ in pairs], [variable for _, variable in pairs])


@pytest.mark.parametrize(
    ("gradient", "accumulation"), [(1.0, None), (0.0, None), (1.0, 2)], ids=["moves", "moves by zero", "only gathers"]
)
def test_a_step_makes_equal_what_was_written_by_hand_before_it(gradient, accumulation):
    model, _ = tied_towers(2)
    left, right = kernels(model)
    apply(keras.optimizers.SGD(0.1), [(np.ones((5, 4), "float32"), left)])
    left.assign(np.full((5, 4), 3.0))
    second = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulation)
    apply(second, [(np.full((5, 4), gradient, "float32"), right)])
    assert bitwise_equal(left, right)


@pytest.mark.parametrize(("gradient", "spreads"), [(0.0, (8.0, 4.0)), (1.0, (8.5, 3.75))])
def test_each_of_two_optimizers_pulls_a_partial_tie_once(gradient, spreads):
    model, registry = tied_towers(2, rate=0.5)
    left, right = kernels(model)
    left.assign(np.zeros((5, 4)))
    right.assign(np.full((5, 4), 16.0))
    for variable, spread in zip((left, right), spreads, strict=True):
        apply(keras.optimizers.SGD(1.0), [(np.full((5, 4), gradient, "float32"), variable)])
        assert registry.spread() == {"towers": spread}


def test_a_partial_tie_is_pulled_by_its_rate_when_it_is_projected_by_hand():
    model, registry = tied_towers(3, rate=0.5)
    for kernel, number in zip(kernels(model), (0.0, 3.0, 9.0), strict=True):
        kernel.assign(np.full((5, 4), number))
    for numbers in ([2.0, 3.5, 6.5], [3.0, 3.75, 5.25]):
        registry.project("towers")
        found = [float(ops.convert_to_numpy(kernel.value)[0, 0]) for kernel in kernels(model)]
        assert found == pytest.approx(numbers, rel=1e-6)


@on_tensorflow
@pytest.mark.parametrize("jit", [False, True])
def test_writes_between_the_projections_of_one_graph_are_seen(jit):
    model, _ = tied_towers(3)
    members = kernels(model)
    optimizers = [keras.optimizers.SGD(1.0) for _ in range(3)]
    for optimizer in optimizers:
        optimizer.build(members)
    gradient = tf.ones((5, 4))

    @tf.function(jit_compile=jit)
    def step(write):
        optimizers[0].apply([gradient], members[:1])
        members[1].assign_add(5.0 * gradient)  # its constraint has not been called since the projection
        optimizers[1].apply([2.0 * gradient], members[1:2])
        if write:
            members[0].assign_add(7.0 * gradient)
            members[2].assign_add(9.0 * gradient)
        optimizers[2].apply([3.0 * gradient, 4.0 * gradient], members[1:])

    value = members[0].numpy()
    for write in (True, False):
        step(tf.constant(write))
        value = value + ((5.0 - 1.0 - 2.0) + write * (7.0 + 9.0) - (3.0 + 4.0)) / 3.0
        assert bitwise_equal(*members)
        np.testing.assert_allclose(members[0].numpy(), value, rtol=1e-5, atol=1e-5)


def test_a_step_of_one_member_gives_the_value_of_a_frozen_one_to_all():
    model, _ = tied_towers(3)
    members = kernels(model)
    model.get_layer("tower_1").trainable = False
    anchor = bits(members[1])
    members[2].assign(np.ones((5, 4)))
    apply(keras.optimizers.SGD(0.1), [(np.ones((5, 4), "float32"), members[0])])
    assert [bits(member) for member in members] == [anchor] * 3


# ---- the penalty


def soft_towers(rule, frozen=()):
    model = towers(4, regularizer=lambda: rule("towers", 0.3), frozen=frozen)
    return model, equalize.GroupRegistry().link(model)


PENALTIES = {
    "model.losses": lambda model, registry: sum(model.losses),
    "registry.penalty": lambda model, registry: registry.penalty(),
}


@pytest.mark.parametrize("source", PENALTIES)
@pytest.mark.parametrize("frozen", [(), (1, 2)], ids=str)
@pytest.mark.parametrize("rule", [MeanL2, PairwiseL2])
def test_the_penalty_of_a_loop_and_its_gradient_in_every_member_are_those_of_the_formula(rule, frozen, source):
    model, registry = soft_towers(rule, frozen)
    values = np.stack([ops.convert_to_numpy(kernel.value) for kernel in kernels(model)]).astype("float64")
    times = 0.3 * (4 if rule is PairwiseL2 else 1)
    free = [i for i in range(4) if i not in frozen]
    penalty, gradients = value_and_gradients(
        lambda: PENALTIES[source](model, registry), [kernels(model)[i] for i in free]
    )
    np.testing.assert_allclose(penalty, times * np.square(values - values.mean(0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradients, 2 * times * (values - values.mean(0))[free], rtol=1e-5, atol=1e-6)


def test_pairwise_is_the_sum_over_all_pairs():
    model, registry = soft_towers(PairwiseL2)
    values = [ops.convert_to_numpy(kernel.value).astype("float64") for kernel in kernels(model)]
    pairs = sum(np.square(values[i] - values[j]).sum() for i in range(4) for j in range(i))
    np.testing.assert_allclose(float(ops.convert_to_numpy(registry.penalty())), 0.3 * pairs, rtol=1e-5)


@pytest.mark.parametrize("rule", [MeanL2, PairwiseL2])
def test_both_sources_of_the_penalty_agree_beside_a_loss_of_the_model(rule):
    model, registry = soft_towers(rule)
    x, y = data()
    found = [
        value_and_gradients(
            lambda source=source: squared_error(model, x, y) + source(model, registry), model.trainable_variables
        )
        for source in PENALTIES.values()
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@on_tensorflow
@pytest.mark.parametrize(
    ("source", "mode"),
    [*((source, "graph") for source in PENALTIES), ("model.losses", "jit"), ("model.losses", "eager")],
)
@pytest.mark.sampled
def test_a_loop_with_a_penalty_pulls_the_members_as_the_formula_does(source, mode):
    model, registry = soft_towers(MeanL2)
    members = kernels(model)
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.build(members)

    def step():
        with tf.GradientTape() as tape:
            loss = PENALTIES[source](model, registry)
        optimizer.apply_gradients(zip(tape.gradient(loss, members), members, strict=True))

    step = mode_of_tensorflow(mode, step)
    values = np.stack([kernel.numpy() for kernel in members])
    for _ in range(3):
        step()
        values = values - 0.5 * 2 * 0.3 * (values - values.mean(0))
        np.testing.assert_allclose([kernel.numpy() for kernel in members], values, rtol=1e-5, atol=1e-6)


@on_jax
@pytest.mark.parametrize("source", PENALTIES)
def test_a_compiled_loop_with_a_penalty_pulls_the_members_as_the_formula_does(source):
    model, registry = soft_towers(MeanL2)
    members = kernels(model)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        def penalty(state):
            with keras.StatelessScope(state_mapping=list(zip(members, state, strict=True))):
                return PENALTIES[source](model, registry)

        return [w - 0.5 * g for w, g in zip(state, jax.grad(penalty)(state), strict=True)]

    state = [kernel.value + 0.0 for kernel in members]
    values = np.stack(state)
    for _ in range(3):
        state = step(state)
        values = values - 0.5 * 2 * 0.3 * (values - values.mean(0))
        np.testing.assert_allclose(np.stack(state), values, rtol=1e-5, atol=1e-6)


@on_torch
@pytest.mark.parametrize("source", PENALTIES)
def test_a_torch_loop_with_a_penalty_pulls_the_members_as_the_formula_does(source):
    model, registry = soft_towers(MeanL2)
    members = kernels(model)
    optimizer = torch.optim.SGD([kernel.value for kernel in members], lr=0.5)
    values = np.stack([ops.convert_to_numpy(kernel.value) for kernel in members])
    for _ in range(3):
        optimizer.zero_grad()
        PENALTIES[source](model, registry).backward()
        optimizer.step()
        values = values - 0.5 * 2 * 0.3 * (values - values.mean(0))
        found = [ops.convert_to_numpy(kernel.value) for kernel in members]
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)


# ---- how often a step projects


def test_a_step_of_fit_projects_a_group_once(count):
    model, registry = tied_towers()
    fit(model, registry, epochs=1, **MODES[QUICK])
    assert count.means == count.applied > 0


def counted_steps(count, optimizer, mode=QUICK, n=4):
    members = [keras.Variable(np.full((5, 4), 0.5, "float32"), name=f"member_{i}") for i in range(n)]
    equalize.GroupRegistry().tie("members", members, Equal())
    seen = bare.take_steps(optimizer, members, bare.random_gradients(4, *[(5, 4)] * n), mode)
    assert all(len(set(step)) == 1 for step in seen[:-1])
    assert seen[0] != seen[-1]
    return count.means, count.applied


OPTIMIZERS = {
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.9, centered=True),
    "adafactor": lambda: keras.optimizers.Adafactor(0.1),
    "weight decay": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "clipping": lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.1),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=8.0),
}


@pytest.mark.parametrize(("n", "mode"), [(2, QUICK), *((8, mode) for mode in MODES)])
def test_a_step_projects_a_group_once_however_many_members_it_has(count, n, mode):
    means, applied = counted_steps(count, keras.optimizers.SGD(0.1), mode, n)
    assert means == applied > 0
    if mode == "eager":
        assert applied == 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_projects_once_with_each_optimizer(count, optimizer):
    means, applied = counted_steps(count, OPTIMIZERS[optimizer]())
    assert means == applied > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_a_step_projects_once_inside_loss_scaling_in_each_way_to_run_it(count, mode):
    model, registry = tied_towers(2)  # Keras's own scaling needs the scope of `fit` on JAX
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=8.0)
    fit(model, registry, epochs=1, optimizer=scaled, **MODES[mode])
    assert count.means == count.applied > 0


def test_a_step_projects_two_small_groups_at_once(count):
    entrance = keras.Input((5,))
    layers = [
        keras.layers.Dense(4, kernel_constraint=Equal("kernels"), bias_constraint=Equal("biases")) for _ in range(4)
    ]
    joined = keras.layers.Concatenate()([layer(entrance) for layer in layers])
    model = keras.Model(entrance, keras.layers.Dense(1)(joined))
    fit(model, equalize.GroupRegistry().link(model), epochs=1, **MODES[QUICK])
    assert count.means == count.applied > 0  # of both at once: they are small and of one kind


# SGD and RMSprop write rows only, if run eagerly.
@pytest.mark.parametrize(
    ("optimizer", "mode"),
    [*(("sgd", mode) for mode in MODES if mode != "eager"), *((name, "eager") for name in ("sgd", "rmsprop", "adam"))],
)
@pytest.mark.sampled
def test_a_step_with_the_sparse_gradients_of_embeddings_projects_once(count, optimizer, mode):
    entrance = keras.Input((2,), dtype="int32")
    layers = [keras.layers.Embedding(6, 3, embeddings_constraint=Equal("words")) for _ in range(4)]
    rows = [keras.layers.Flatten()(layer(entrance)) for layer in layers]
    model = keras.Model(entrance, keras.layers.Dense(1)(keras.layers.Concatenate()(rows)))
    registry = equalize.GroupRegistry().link(model)
    x, y = np.random.default_rng(0).integers(0, 6, (16, 2)), np.ones((16, 1))
    fit(model, registry, x=x, y=y, epochs=1, optimizer=optimizer, **MODES[mode])
    assert count.means == count.applied > 0


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam"])
def test_a_partial_tie_of_tables_pulls_once_a_step(optimizer):
    tables = [keras.Variable(np.full((6, 2), value, "float32"), name=f"table_{value:g}") for value in (0.0, 8.0)]
    equalize.GroupRegistry().tie("tables", tables, Equal(rate=0.5))
    made = keras.optimizers.get({"class_name": optimizer, "config": {"learning_rate": 0.0}})
    gradient = ops.ones((6, 2))
    if BACKEND == "tensorflow":
        gradient = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([0, 3]), tf.constant((6, 2)))
    for spread in (4.0, 2.0, 1.0):
        made.apply([gradient, gradient], tables)
        np.testing.assert_array_equal(ops.convert_to_numpy(tables[1].value - tables[0].value), spread)


@on_tensorflow
def test_the_gradients_of_embeddings_are_sparse_where_these_tests_rely_on_it():
    layer = keras.layers.Embedding(6, 3)
    with tf.GradientTape() as tape:
        loss = ops.sum(layer(np.array([1, 2])))
    assert isinstance(tape.gradient(loss, layer.trainable_variables)[0], tf.IndexedSlices)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_each_of_two_optimizers_projects_once_a_step(count, mode):
    model, _ = tied_towers(4)
    members = kernels(model)
    optimizers = [keras.optimizers.Adam(0.1) for _ in range(2)]
    for i, optimizer in enumerate(optimizers):
        optimizer.build(members[2 * i : 2 * i + 2])
    variables = [*members, *optimizers[0].variables, *optimizers[1].variables]
    gradients = [ops.full((5, 4), float(i)) for i in range(1, 5)]

    def step():
        optimizers[0].apply(gradients[:2], members[:2])
        optimizers[1].apply(gradients[2:], members[2:])

    def stateless(values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))) as scope:
            step()
        return [scope.get_current_value(variable) for variable in variables]

    before = bits(members[0])
    if BACKEND == "tensorflow":
        mode_of_tensorflow(mode, step)()
    elif (BACKEND, mode) == ("jax", "jit"):
        values = jax.jit(stateless)([variable.value for variable in variables])
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    else:
        step()
    assert bitwise_equal(*members)
    assert bits(members[0]) != before
    assert count.means == count.applied > 0


@on_jax
def test_a_loop_without_state_projects_once_a_trace(count):
    model, _ = tied_towers(4)
    optimizer = keras.optimizers.Adam(0.05)
    optimizer.build(model.trainable_variables)
    _, state = jax_state(model, optimizer)
    step = jax_step(model, optimizer)
    for x, y in batches():
        state = step(state, x, y)
    assert count.means == count.applied == 1


@on_torch
def test_a_torch_loop_projects_once_a_step(count):
    model, registry = tied_towers(4)
    keras_optimizer = keras.optimizers.Adam(0.05)
    for x, y in batches():
        model.zero_grad()
        squared_error(model, x, y).backward()
        with torch.no_grad():
            gradients = [variable.value.grad for variable in model.trainable_variables]
            keras_optimizer.apply(gradients, model.trainable_variables)
        assert bitwise_equal(*kernels(model))
    assert count.means == count.applied == 4
    registry.project()
    assert count.means == 5


@on_torch
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_step_under_torch_compile_projects_by_the_rate(rate):
    model, _ = tied_towers(3, rate=rate)
    members = kernels(model)
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(members)

    def step(gradients):
        with torch.no_grad():
            optimizer.apply(gradients, members)

    compiled = torch.compile(step, backend="eager")
    values = np.stack([ops.convert_to_numpy(kernel.value) for kernel in members])
    for number in (1.0, 2.0):
        gradients = [torch.full((5, 4), number * i) for i in range(3)]
        compiled(gradients)
        values = values - np.stack(gradients)
        values = (1 - rate) * values + rate * values.mean(0)
        found = [ops.convert_to_numpy(kernel.value) for kernel in members]
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-5)
        assert bitwise_equal(*members) == (rate == 1.0)


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_step_in_which_no_member_has_a_gradient_does_not_project(count):
    model, _ = tied_towers(3)
    head = model.get_layer("head").kernel
    kernels(model)[0].assign(np.ones((5, 4)))
    apply(keras.optimizers.SGD(0.1), [(np.ones((12, 1), "float32"), head)])
    assert (count.means, count.applied) == (0, 1)
    assert not bitwise_equal(*kernels(model))


@pytest.mark.parametrize("rule", [Equal(), Equal(rate=0.5), MeanL2(factor=0.5)])
@pytest.mark.sampled
def test_a_step_leaves_no_tensors_with_the_group(rule):
    layers = [keras.layers.Dense(2, use_bias=False) for _ in range(3)]
    entrance = keras.Input((3,))
    model = keras.Model(entrance, keras.layers.Add()([layer(entrance) for layer in layers]))
    registry = equalize.GroupRegistry()
    group = registry.tie("layers", [layer.kernel for layer in layers], rule)
    for mode in MODES.values():
        model.compile("sgd", "mse", **mode)
        model.fit(np.ones((4, 3), "float32"), np.ones((4, 2), "float32"), verbose=0)
        assert not group._projections
        assert group._penalty is None
