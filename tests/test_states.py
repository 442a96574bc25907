"""A registry through random sequences of what people do to it; the laws are looked at after every action."""

import itertools
import json
import tempfile

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import stateful
from hypothesis import strategies as st
from keras import ops

import equalize
from equalize.constraints import Equal, Follow
from equalize.errors import EqualizeError
from equalize.optimizers import TiedOptimizer
from equalize.regularizers import ChainL2, MeanL2, PairwiseL1, PairwiseL2, PairwiseNorm, TraceNorm
from equalize.views import Pattern, Scale, Slice, Transpose
from tests.conftest import bits

COUNT = 5
SOFT = [MeanL2, PairwiseL2, PairwiseNorm, PairwiseL1, ChainL2, TraceNorm]

rules = st.one_of(
    st.just(Equal()),
    st.just(Equal(inner="non_neg")),
    st.sampled_from([0.25, 0.5]).map(lambda rate: Equal(rate=rate)),
    st.sampled_from([0.5, 1.0]).map(lambda rate: Follow(rate=rate)),
    st.none(),
    st.sampled_from(SOFT).map(lambda rule: rule(factor=0.125)),
)
LEFT, RIGHT = Slice((0, 0), (2, 1)), Slice((0, 1), (2, 1))
REPEATED = Pattern([[0, 1], [1, 0]], (2, 1))
views = st.sampled_from([None, None, Transpose(), Scale(-2.0), LEFT, RIGHT, REPEATED])
names = st.sampled_from(["one", "two", "three"])
known_names = st.sampled_from(["one", "two", "three", "one/0", "two/0", "one/1"])  # the last three come from splits
weights = st.none() | st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=4)
places = st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=4)


def place_of(variable, variables):
    return [other is variable for other in variables].index(True)


class Registry(stateful.RuleBasedStateMachine):
    """Variables of layers, some of them tied; `self.groups` is what must be in the registry."""

    copied = loaded = 0  # how often a copy was tied, and a model loaded, in all lives

    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(0)
        self.layers = [keras.layers.Dense(2, use_bias=False, name=f"layer_{i}") for i in range(COUNT)]
        entrance = keras.Input((2,))
        self.model = keras.Model(entrance, [layer(entrance) for layer in self.layers])
        for kernel in self.kernels:
            kernel.assign(self.random.normal(size=(2, 2)))
        self.registry = equalize.GroupRegistry()
        self.groups = {}
        self.settled = set()  # hard groups that a step or a `sync` has made equal since something else wrote them

    @property
    def kernels(self):
        return [layer.kernel for layer in self.layers]

    def attempt(self, action, atomic=True):
        """Whether it was done; if it was refused, nothing may have changed, or at least nothing but kernels."""
        before, refused = self.picture(), None
        try:
            action()
        except EqualizeError as error:
            refused = str(error)
        seen = slice(None if atomic else 2)
        assert refused is None or (len(refused) > 40 and self.picture()[seen] == before[seen])
        return refused is None

    def picture(self):
        described = [
            (name, group.tying.describe(), [m.path for m in group.members]) for name, group in self.registry.items()
        ]
        on = [(repr(kernel.constraint), repr(kernel.regularizer)) for kernel in self.kernels]
        return described, on, [bits(kernel) for kernel in self.kernels]

    @stateful.rule(
        name=names,
        members=st.lists(st.tuples(st.integers(0, COUNT - 1), views), max_size=4),
        rule=rules,
        counts=weights,
    )
    def tie(self, name, members, rule, counts=None):
        given = [self.kernels[i] if view is None else (self.kernels[i], view) for i, view in members]
        initial = "mean" if len(members) % 2 else "first"
        counts = counts and (counts * 4)[: len(members)]
        if self.attempt(lambda: self.registry.tie(name, given, rule, initial=initial, weights=counts)):
            assert name not in self.groups
            self.groups[name] = [i for i, _ in members]
            self.wrote(self.groups[name])
            self.settled |= {name} if self.registry[name].hard else set()

    @stateful.rule(name=known_names)
    def untie(self, name):
        if self.attempt(lambda: self.registry.untie(name)):
            for key in self.meant(name):
                del self.groups[key]
                self.settled.discard(key)

    @stateful.rule(name=known_names, rule=rules)
    def replace(self, name, rule):
        if name in self.groups and self.attempt(lambda: self.registry.replace(name, rule)):
            self.settled.discard(name)

    @stateful.rule(name=known_names, i=st.integers(0, COUNT - 1), view=views, counts=weights)
    def extend(self, name, i, view, counts=None):
        member = self.kernels[i] if view is None else (self.kernels[i], view)
        counts = counts and counts[:1]
        if name in self.groups and self.attempt(lambda: self.registry.extend(name, [member], weights=counts)):
            self.groups[name].append(i)
            self.wrote(self.groups[name])
            self.settled |= {name} if self.registry[name].hard else set()

    @stateful.rule(name=names, atol=st.sampled_from([0.0, 1.0, 8.0]))
    def split(self, name, atol):
        """A group falls into hard groups of what is near, and variables of their own."""
        made = []
        if name in self.groups and self.attempt(lambda: made.extend(self.registry.split(name, atol=atol))):
            before = self.groups.pop(name)
            self.settled.discard(name)
            for group in made:
                self.groups[group.name] = [place_of(member.variable, self.kernels) for member in group.members]
                assert set(self.groups[group.name]) <= set(before)
            for group in made:
                self.wrote(self.groups[group.name])
            self.settled |= {group.name for group in made if self.alone(group.name)}

    @stateful.rule(name=st.none() | known_names, method=st.sampled_from(["first", "mean"]))
    def sync(self, name, method):
        if self.attempt(lambda: self.registry.sync(method, *([name] if name else []))):
            touched = self.meant(name) if name else [key for key, group in self.registry.items() if group.hard]
            for key in touched:
                self.wrote(self.groups[key])
            self.settled |= {key for key in touched if self.registry[key].hard and self.alone(key)}

    @stateful.rule(i=st.integers(0, COUNT - 1), value=st.floats(-4, 4, width=16))
    def assign(self, i, value):
        self.kernels[i].assign(np.full((2, 2), value) + self.random.normal(size=(2, 2)))
        self.wrote([i])

    @stateful.rule(i=st.integers(0, COUNT - 1))
    def freeze_or_thaw(self, i):
        self.layers[i].trainable = not self.layers[i].trainable

    @stateful.rule(moving=places, exact=st.booleans())
    def step(self, moving, exact):
        """One step of an optimizer with gradients for some variables."""
        variables = [self.kernels[i] for i in sorted(set(moving)) if self.layers[i].trainable]
        if not variables:
            return
        gradients = [ops.convert_to_tensor(self.random.normal(size=(2, 2)).astype("float32")) for _ in variables]
        still = [i for i in range(COUNT) if not self.layers[i].trainable and i not in self.followers()]
        frozen = {i: bits(self.kernels[i]) for i in still}
        optimizer = keras.optimizers.SGD(0.125)
        optimizer = TiedOptimizer(optimizer, self.registry) if exact else optimizer
        # Keras asks constraints when its own optimizers have written already: too late where anchors differ.
        done = self.attempt(lambda: optimizer.apply(gradients, variables), atomic=exact)
        assert {i: bits(self.kernels[i]) for i in frozen} == frozen
        if not done:
            self.wrote(range(COUNT))
        else:
            written = {i for i in range(COUNT) if any(self.kernels[i] is variable for variable in variables)}
            for name, members in self.groups.items():
                if self.registry[name].projects and written & set(members):
                    self.wrote([i for i in members if i in self.followers()] or members)
                    self.settled |= {name} if self.registry[name].hard else set()

    @stateful.initialize(rule=rules, count=st.integers(2, 4))
    def begin(self, rule, count):
        self.tie("one", [(i, None) for i in range(count)], rule)

    @stateful.precondition(lambda self: self.groups)
    @stateful.rule()
    def copy(self):
        """A registry from plain data ties a clone as the original is, and the original keeps every bit."""
        config = json.loads(json.dumps(self.registry.get_config()))
        clone = keras.models.clone_model(self.model)
        clone.set_weights(self.model.get_weights())
        before, copied = self.picture(), []
        # A clone has its model's optimizer, which has linked itself, and has been given other values since.
        itself = clone.compiled and isinstance(clone.optimizer, TiedOptimizer) and len(clone.optimizer.registry) > 0
        registry = clone.optimizer.registry if itself else equalize.GroupRegistry.from_config(config)
        done = self.attempt(lambda: copied.append(registry.link(clone)))
        assert self.picture() == before
        if not done:  # by members that do not move and differ
            assert any(self.registry[name].projects and self.frozen(name) > 1 for name in self.groups)
            return
        Registry.copied += 1
        kernels = [layer.kernel for layer in clone.layers if layer.weights]
        for name, members in self.groups.items():
            group = copied[0][name]
            assert group.tying.describe() == self.registry[name].tying.describe()
            assert [place_of(member.variable, kernels) for member in group.members] == members
            assert group.spread() == 0.0 or not group.hard or (itself and name not in self.settled)
        assert copied[0].keys() == self.registry.keys()

    @stateful.precondition(lambda self: self.groups)
    @stateful.rule(exact=st.booleans())
    def save_and_load(self, exact):
        """What can be saved can be loaded, again and again: the life goes on with the model that was loaded."""
        config = json.loads(json.dumps(self.registry.get_config()))
        self.model.compile(TiedOptimizer("sgd", self.registry) if exact else "sgd", "mse")
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(f"{folder}/model.keras")
            loaded = keras.models.load_model(f"{folder}/model.keras")
        registry = loaded.optimizer.registry if exact else equalize.GroupRegistry.from_config(config)
        if not self.attempt(lambda: registry.link(loaded)):  # members that do not move differ
            assert any(self.registry[name].projects and self.frozen(name) > 1 for name in self.groups)
            return
        Registry.loaded += 1
        before = [bits(kernel) for kernel in self.kernels]
        written = {i for name in self.groups if self.registry[name].hard for i in self.groups[name]}
        self.model, self.registry = loaded, registry
        self.layers = [loaded.get_layer(f"layer_{i}") for i in range(COUNT)]
        for i, kernel in enumerate(self.kernels):
            assert i in written or bits(kernel) == before[i]
        equal = {name for name, group in registry.items() if group.hard and self.alone(name)}
        # An optimizer that was loaded has linked itself before the values came.
        self.settled = equal & self.settled if exact else equal

    def meant(self, name):
        """The group of that name, or those that one of that name was split into."""
        return [name] if name in self.groups else [key for key in self.groups if key.startswith(f"{name}/")]

    def frozen(self, name):
        """How many values of a group do not move: a member that repeats entries has several."""
        members = zip(self.groups[name], self.registry[name].members, strict=True)
        return sum(1 + member.repeats for i, member in members if not self.layers[i].trainable)

    def followers(self):
        """The places of what follows, which moves though it is frozen."""
        members = [member for group in self.registry.values() for member in group.members if member.leads is False]
        return {place_of(member.variable, self.kernels) for member in members}

    def wrote(self, places):
        """Hard groups that share a variable with what was written may have come apart."""
        written = set(places)
        self.settled -= {name for name, members in self.groups.items() if written & set(members)}

    def alone(self, name):
        """Whether no other hard group has any of the members."""
        others = [set(m) for key, m in self.groups.items() if key != name and self.registry[key].projects]
        return not any(set(self.groups[name]) & other for other in others)

    @stateful.invariant()
    def the_registry_has_the_groups_that_were_made(self):
        found = {name: [m.path for m in group.members] for name, group in self.registry.items()}
        assert found == {name: [f"layer_{i}/kernel" for i in members] for name, members in self.groups.items()}

    @stateful.invariant()
    def hard_groups_are_equal(self):
        for name in self.settled:
            assert self.registry[name].spread() == 0.0

    @stateful.invariant()
    def no_entry_is_projected_by_two_groups_or_in_one_twice(self):
        groups = [group.members for group in self.registry.values() if group.projects]
        projected = [[member for member in members if not member.leads] for members in groups]
        for one, other in itertools.combinations(projected, 2):
            assert not any(a.overlaps(b) for a in one for b in other)
        for group in self.registry.values():
            assert not any(a.overlaps(b) for a, b in itertools.combinations(group.members, 2))

    @stateful.invariant()
    def penalties_are_finite_and_shares_add_up(self):
        soft = [name for name, group in self.registry.items() if group.penalizes]
        total = float(ops.convert_to_numpy(self.registry.penalty()))
        assert np.isfinite(total)
        assert total >= -1e-6
        if soft and all(layer.trainable for layer in self.layers):
            losses = sum(float(ops.convert_to_numpy(loss)) for loss in self.model.losses)
            assert losses == pytest.approx(total, rel=1e-4, abs=1e-5)


def run(examples, steps):
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=examples < 100,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    stateful.run_state_machine_as_test(Registry, settings=settings)


def test_laws_hold_through_what_people_do():
    run(6, 12)


@pytest.mark.parametrize("exact", [False, True])
def test_laws_hold_in_copies_and_after_loading(exact):
    """What the short lives do not draw for sure."""
    Registry.copied = Registry.loaded = 0
    life = Registry()
    life.begin(Equal(), 3)
    life.tie("two", [(2, None), (4, None)], MeanL2(factor=0.125))
    for _ in range(2):
        life.save_and_load(exact)
        life.step([0, 2, 4], exact)
        life.copy()
        life.the_registry_has_the_groups_that_were_made()
        life.hard_groups_are_equal()
        life.penalties_are_finite_and_shares_add_up()
    assert Registry.loaded == Registry.copied == 2


@pytest.mark.fuzz
def test_laws_hold_through_long_lives():
    Registry.copied = Registry.loaded = 0
    run(2000, 40)
    assert Registry.copied > 0
    assert Registry.loaded > 0
