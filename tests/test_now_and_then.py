"""Ties that hold now and then: free groups, and members that are made equal every n-th step."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import equalize
from equalize.callbacks import PeriodicSync, TieMonitor
from equalize.constraints import Equal, Follow
from equalize.errors import EqualizeError, GroupMismatchError, NotLinkedError
from equalize.regularizers import MeanL2, PairwiseNorm
from equalize.saving import load_model, save_model
from equalize.views import Transpose
from tests.conftest import BACKEND, MODES, bits, bitwise_equal


def array(x):
    return ops.convert_to_numpy(x)


def replicas(n=3, seed=0):
    """Networks of one start, each with an input and an output of its own, in one model."""
    nets = [keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name=f"net_{i}") for i in range(n)]
    inputs = [keras.Input((4,)) for _ in nets]
    model = keras.Model(inputs, [net(x) for net, x in zip(nets, inputs, strict=True)])
    random = np.random.default_rng(seed)
    x = [random.normal(size=(48, 4)).astype("float32") for _ in nets]
    y = [random.normal(size=(48, 3)).astype("float32") for _ in nets]
    return nets, model, x, y


class Steps(keras.callbacks.Callback):
    """What the kernels hold after each step, and after what comes before this in the list of callbacks."""

    def __init__(self, nets):
        super().__init__()
        self.kernels = [net.weights[0] for net in nets]
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        self.seen.append([array(kernel.value).copy() for kernel in self.kernels])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled
def test_members_are_equal_after_every_third_step_and_apart_in_between(mode):
    nets, model, x, y = replicas()
    registry = equalize.GroupRegistry()
    registry.tie("nets", nets, None)
    registry.sync("first", "nets")
    before, after = Steps(nets), Steps(nets)
    model.compile(keras.optimizers.Adam(0.01), ["mse"] * 3, **MODES[mode])
    sync = PeriodicSync(registry, "nets", every=3)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[before, sync, after])
    assert len(after.seen) == 12
    for number, (apart, kernels) in enumerate(zip(before.seen, after.seen, strict=True), start=1):
        equal = all(np.array_equal(kernels[0], kernel) for kernel in kernels)
        assert equal == (number % 3 == 0)
        if equal:
            np.testing.assert_allclose(kernels[0], np.mean(apart, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras runs one step at a time there")
def test_steps_that_run_together_are_counted():
    nets, model, x, y = replicas()
    registry = equalize.GroupRegistry()
    registry.tie("nets", nets, None)
    steps = Steps(nets)
    model.compile("sgd", ["mse"] * 3, steps_per_execution=2)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[PeriodicSync(registry, every=3), steps])
    equal = [all(np.array_equal(kernels[0], kernel) for kernel in kernels) for kernels in steps.seen]
    assert equal == [False, True, True]  # after steps 2, 4 and 6, for steps 3 and 6


def test_an_outer_step_of_sgd_at_rate_one_is_the_mean():
    values = []
    for outer in (None, keras.optimizers.SGD(1.0)):
        nets, model, x, y = replicas()
        keras.utils.set_random_seed(0)
        for net in nets:
            net.set_weights([np.full(weight.shape, 0.1) for weight in net.weights])
        registry = equalize.GroupRegistry()
        registry.tie("nets", nets, None)
        model.compile("sgd", ["mse"] * 3)
        sync = PeriodicSync(registry, every=2, outer_optimizer=outer)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[sync])
        assert bitwise_equal(*[net.weights[0] for net in nets])
        values.append(array(nets[0].weights[0].value))
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6)


def test_outer_momentum_is_that_of_diloco():
    """The change of the mean is the gradient of what members agree on; checked against NumPy."""
    nets, model, x, y = replicas()
    registry = equalize.GroupRegistry()
    registry.tie("nets", nets, None, weights=[2, 1, 1])
    registry.sync("first", "nets")
    agreed, velocity = array(nets[0].weights[0].value).astype("float64"), 0.0
    before, after = Steps(nets), Steps(nets)
    outer = keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)
    sync = PeriodicSync(registry, every=2, outer_optimizer=outer)
    model.compile("sgd", ["mse"] * 3)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[before, sync, after])
    for number in (1, 3, 5):
        gradient = agreed - np.average(before.seen[number], axis=0, weights=[2, 1, 1])
        velocity = 0.9 * velocity - 0.7 * gradient
        agreed = agreed + 0.9 * velocity - 0.7 * gradient
        for kernel in after.seen[number]:
            np.testing.assert_allclose(kernel, agreed, rtol=1e-4, atol=1e-5)
        assert all(np.array_equal(after.seen[number][0], kernel) for kernel in after.seen[number])


def test_fedprox_is_a_soft_tie_to_a_server_that_follows_when_clients_agree():
    nets, model, x, y = replicas(2)
    (server,), *_ = replicas(1)
    server.trainable = False
    registry = equalize.GroupRegistry()
    registry.tie("clients", nets, None)
    registry.tie("server", [nets[0], server], Follow())
    registry.sync("first", "clients", "server")
    for i, net in enumerate(nets):
        registry.tie(f"proximal {i}", [net, server], MeanL2(factor=1.0))
    w, steps = array(nets[0].weights[0].value).astype("float64"), Steps([*nets, server])
    bias, agreed = np.zeros(3), None
    model.compile(keras.optimizers.SGD(0.1), ["mse"] * 2)
    sync = PeriodicSync(registry, ["clients", "server"], every=2)
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[sync, steps])
    clients = [(w.copy(), bias.copy()) for _ in nets]
    agreed = (w.copy(), bias.copy())
    for number, seen in enumerate(steps.seen):  # three steps, of which the second is followed by an agreement
        part = slice(16 * number, 16 * number + 16)
        for i, (w, b) in enumerate(clients):
            apart = 2 * (x[i][part] @ w + b - y[i][part]) / y[i][part].size
            clients[i] = (
                w - 0.1 * (x[i][part].T @ apart + (w - agreed[0])),
                b - 0.1 * (apart.sum(axis=0) + (b - agreed[1])),
            )
        if number == 1:
            agreed = tuple(np.mean(values, axis=0) for values in zip(*clients, strict=True))
            clients = [agreed, agreed]
        expected = [clients[0][0], clients[1][0], agreed[0]]
        for kernel, value in zip(seen, expected, strict=True):
            np.testing.assert_allclose(kernel, value, rtol=1e-4, atol=1e-5)


def test_an_outer_optimizer_goes_on_in_another_process_after_a_synchronization(tmp_path):
    """The state of the outer optimizer is put back when training has begun, which makes it."""

    def fit(model, registry, x, y, momentum=None, **epochs):
        sync = PeriodicSync(registry, every=3, outer_optimizer=keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True))

        def restore(logs):
            for variable, value in zip(sync.outer_optimizer.variables, momentum or (), strict=bool(momentum)):
                variable.assign(value)

        begin = keras.callbacks.LambdaCallback(on_train_begin=restore)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[sync, begin], **epochs)
        return [array(variable.value).copy() for variable in sync.outer_optimizer.variables]

    values = []
    for interrupted in (False, True):
        keras.utils.set_random_seed(0)
        nets, model, x, y = replicas()
        registry = equalize.GroupRegistry()
        registry.tie("nets", nets, None)
        registry.sync("first", "nets")
        model.compile(keras.optimizers.Adam(0.01), ["mse"] * 3)
        if interrupted:
            momentum = fit(model, registry, x, y, epochs=2)
            save_model(model, tmp_path / "model.keras", registry)
            model, registry = load_model(tmp_path / "model.keras")
            fit(model, registry, x, y, momentum, epochs=4, initial_epoch=2)
        else:
            fit(model, registry, x, y, epochs=4)
        values.append([array(weight.value) for weight in model.weights])
    for whole, parts in zip(*values, strict=True):
        np.testing.assert_array_equal(whole, parts)


def test_a_free_group_is_measured_saved_and_replaced(tmp_path):
    nets, model, x, y = replicas()
    registry = equalize.GroupRegistry()
    registry.tie("nets", nets, None)
    assert [(group.rule, group.hard, group.projects) for group in registry.values()] == [(None, False, False)] * 2
    assert all(weight.constraint is None and weight.regularizer is None for weight in model.weights)
    model.compile("sgd", ["mse"] * 3)
    monitor = TieMonitor(registry)
    model.fit(x, y, verbose=0, callbacks=[monitor])
    assert monitor.history["nets/dense/kernel"][0] > 0.0
    lines = []
    registry.summary(lines.append)
    assert "free" in lines[0]
    advice = registry.advise(model, x, y, print_fn=lines.append)
    assert set(advice) == set(registry)
    assert json.loads(json.dumps(registry.get_config()))["groups"][0]["rule"] is None
    save_model(model, tmp_path / "model.keras", registry)
    loaded, again = load_model(tmp_path / "model.keras")
    assert [group.rule for group in again.values()] == [None, None]
    again.replace("nets", Equal())
    again.sync("mean", "nets")
    assert bitwise_equal(*[net.weights[0] for net in loaded.layers if isinstance(net, keras.Sequential)])
    again.replace("nets", None)
    assert all(weight.constraint is None for weight in loaded.weights)
    registry.check()
    assert float(array(registry.penalty())) == 0.0


def test_a_picture_of_free_groups(tmp_path):
    pytest.importorskip("matplotlib")
    nets, *_ = replicas()
    registry = equalize.GroupRegistry()
    registry.tie("nets", nets, None)
    registry.plot(tmp_path / "free.svg")
    assert (tmp_path / "free.svg").read_text("utf-8").count("<path") > 1


def test_free_groups_refuse_what_needs_a_tie():
    nets, *_ = replicas()
    registry = equalize.GroupRegistry()
    registry.tie("nets", nets, None)
    with pytest.raises(EqualizeError, match="has no penalty"):
        registry.penalty("nets")
    with pytest.raises(EqualizeError, match="cannot be projected"):
        registry.project("nets")


def test_free_members_through_views():
    left, right = (keras.Variable(np.random.default_rng(seed).normal(size=(2, 2)).astype("float32")) for seed in (0, 1))
    registry = equalize.GroupRegistry()
    group = registry.tie("pair", [left, (right, Transpose())], None)
    mean = (array(left.value) + array(right.value).T) / 2
    np.testing.assert_allclose(array(group.value), mean, rtol=1e-6)
    registry.sync("mean", "pair")
    assert bits(left) == np.ascontiguousarray(array(right.value).T).tobytes()


def test_statistics_become_free_with_the_weights_and_tied_again():
    layers = [[keras.layers.Dense(3), keras.layers.BatchNormalization()] for _ in range(2)]
    nets = [keras.Sequential([keras.Input((4,)), *each]) for each in layers]
    registry = equalize.GroupRegistry()
    registry.tie("nets", nets, Equal(), statistics=True)
    registry.replace("nets", None)
    assert {group.rule for group in registry.values()} == {None}
    registry.replace("nets", Equal())
    assert all(group.hard for group in registry.values())
    nets[1].layers[1].moving_mean.assign(np.ones(3))
    registry.project()
    assert set(registry.spread().values()) == {0.0}


def test_a_model_without_members_is_an_error():
    _nets, model, x, y = replicas()
    registry = equalize.GroupRegistry()
    registry.tie("others", replicas()[0], None)
    model.compile("sgd", ["mse"] * 3)
    with pytest.raises(NotLinkedError, match="nothing to synchronize"):
        model.fit(x, y, verbose=0, callbacks=[PeriodicSync(registry, every=2)])


# ---- groups that fall apart, and weights that are anchored


def heads(*values):
    layers = [keras.layers.Dense(2) for _ in values]
    for layer, value in zip(layers, values, strict=True):
        layer.build((None, 3))
        layer.kernel.assign(np.full((3, 2), value))
    return layers


@pytest.mark.parametrize("rule", [None, MeanL2(factor=0.1), PairwiseNorm(factor=0.1, inner="l2")])
def test_clusters_become_hard_groups_of_their_means(rule):
    layers = heads(1.0, 5.0, 1.1, 9.0, 5.1, 1.2)
    registry = equalize.GroupRegistry()
    registry.tie("heads", [layer.kernel for layer in layers], rule)
    groups = registry.split("heads", atol=0.11)
    assert list(registry) == ["heads/0", "heads/1"] == [group.name for group in groups]
    chains = [[layers[i].kernel for i in places] for places in ((0, 2, 5), (1, 4))]
    for group, kernels, mean in zip(groups, chains, (1.1, 5.05), strict=True):
        assert [member.variable for member in group.members] == kernels
        assert group.hard
        assert bitwise_equal(*kernels)
        np.testing.assert_allclose(array(kernels[0].value), np.full((3, 2), mean), rtol=1e-6)
    alone = layers[3].kernel
    assert alone.constraint is None
    assert all(layer.kernel.regularizer is None or BACKEND == "jax" for layer in layers)
    assert (array(alone.value) == 9.0).all()


def test_whole_layers_fall_apart_with_their_statistics():
    def net(value):
        net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
        net.layers[0].kernel.assign(np.full((3, 2), value))
        return net

    nets = [net(value) for value in (1.0, 1.0, 2.0, 2.0)]
    nets[1].layers[0].bias.assign([0.0, 3.0])  # so the first two are near in one weight only
    registry = equalize.GroupRegistry()
    registry.tie("nets", nets, MeanL2(factor=0.1), statistics=True)
    registry.split("nets", atol=0.5)
    assert len(registry) == 6
    assert all(name.startswith("nets/0/") and len(group.members) == 2 for name, group in registry.items())
    assert registry["nets/0/dense/kernel"].members[0].variable is nets[2].layers[0].kernel
    assert sum(len(group.statistics) for group in registry.values()) == 4  # the two of gamma and of beta
    registry.untie("nets/0")
    assert not registry


def test_members_that_lie_apart_become_free_and_what_is_hard_does_not_fall_apart():
    layers = heads(1.0, 2.0, 3.0)
    registry = equalize.GroupRegistry()
    registry.tie("heads", [layer.kernel for layer in layers], None)
    assert registry.split("heads", atol=0.5) == []
    assert not registry
    for rule in (Equal(), Equal(rate=0.5)):
        registry.tie("heads", [layer.kernel for layer in layers], rule)
        with pytest.raises(GroupMismatchError, match="cannot be split"):
            registry.split("heads", atol=0.5)
        registry.untie()


def test_a_whole_model_is_anchored_in_one_line(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(4)])
    model.layers[0].bias.assign([1.0, 2.0, 3.0])
    registry = equalize.GroupRegistry()
    groups = registry.anchor("pretrained", model, MeanL2(factor=0.5))
    assert [group.name for group in groups] == [
        f"pretrained/dense{i}/{kind}" for i in ("", "_1") for kind in ("kernel", "bias")
    ]
    start = [array(weight.value).copy() for weight in model.weights]
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    model.fit(x, x, batch_size=4, verbose=0)
    expected = sum(0.25 * np.sum((array(w.value) - old) ** 2) for w, old in zip(model.weights, start, strict=True))
    assert float(array(registry.penalty())) == pytest.approx(expected, rel=1e-4)
    save_model(model, tmp_path / "model.keras", registry)
    _, again = load_model(tmp_path / "model.keras")
    assert float(array(again.penalty())) == pytest.approx(expected, rel=1e-4)


def test_what_weights_are_anchored_to_can_be_given():
    layers = heads(1.0, 2.0)
    layers[1].bias.trainable = False
    registry = equalize.GroupRegistry()
    values = [np.zeros((3, 2)), np.ones(2), np.full((3, 2), 2.0)]
    registry.anchor("zero", layers, MeanL2(factor=2.0), values=values)
    assert list(registry) == ["zero/0/kernel", "zero/0/bias", "zero/1/kernel"]
    assert float(array(registry.penalty())) == pytest.approx(6.0 + 2.0)
    with pytest.raises(EqualizeError, match="one array for each trainable weight"):
        equalize.GroupRegistry().anchor("more", layers, MeanL2(), values=values[:2])
    with pytest.raises(GroupMismatchError, match="expected shape"):
        equalize.GroupRegistry().anchor("more", layers, MeanL2(), values=[*values[:2], np.ones(3)])
    layers[0].trainable = False
    with pytest.raises(NotLinkedError, match="none that is trainable"):
        equalize.GroupRegistry().anchor("more", layers[0], MeanL2())
    with pytest.raises(TypeError, match="must be a layer"):
        equalize.GroupRegistry().anchor("more", layers[0].kernel, MeanL2())


def test_leaders_are_synchronized_before_what_follows_them():
    nets, model, x, y = replicas(2)
    (teacher,), *_ = replicas(1)
    teacher.trainable = False
    registry = equalize.GroupRegistry()
    registry.tie("nets", nets, None)
    registry.tie("teacher", [nets[0], teacher], Follow())
    model.compile("sgd", ["mse"] * 2)
    for outer in (None, keras.optimizers.SGD(0.5)):
        sync = PeriodicSync(registry, every=2, outer_optimizer=outer)
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[sync])
        assert bitwise_equal(nets[0].weights[0], nets[1].weights[0], teacher.weights[0])


def test_an_outer_optimizer_has_the_groups_that_it_began_with():
    nets, model, x, y = replicas(2)
    registry = equalize.GroupRegistry()
    registry.tie("kernels", [net.weights[0] for net in nets], None)
    sync = PeriodicSync(registry, every=6, outer_optimizer="sgd")
    model.compile("sgd", ["mse"] * 2)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[sync])
    nets[0].trainable = False  # so nothing is agreed on any more
    model.compile("sgd", ["mse"] * 2)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[sync])
    assert bitwise_equal(*[net.weights[0] for net in nets])
    nets[0].trainable = True
    registry.tie("biases", [net.weights[1] for net in nets], None)
    model.compile("sgd", ["mse"] * 2)
    with pytest.raises(EqualizeError, match="was built for the groups"):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[sync])
