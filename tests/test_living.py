"""Looking for living models and layers, without going through all objects each time."""

import gc
import weakref

import keras
import pytest

import equalize
from equalize._backend import living
from equalize.constraints import Equal


class Kept(keras.layers.Layer):
    pass


@pytest.fixture
def looks(monkeypatch):
    """Which generations of objects were gone through; None for all."""
    seen, get = [], gc.get_objects
    monkeypatch.setattr(living.gc, "get_objects", lambda generation=None: seen.append(generation) or get(generation))
    return seen


@pytest.mark.parametrize("generation", [None, 0, 1, 2])
def test_a_new_layer_is_found_wherever_the_collector_keeps_it(generation):
    kept = [Kept()]
    for _ in range(3):
        assert {id(layer) for layer in living.objects_of(Kept)} >= set(map(id, kept))
        kept.append(Kept())
        if generation is not None:
            gc.collect(generation)
    found = [layer for layer in living.objects_of(keras.layers.Layer) if isinstance(layer, Kept)]
    assert {id(layer) for layer in found} >= set(map(id, kept))
    assert len(found) == len({id(layer) for layer in found})


def test_a_class_that_is_new_is_looked_for_as_well():
    assert not any(type(layer).__name__ == "Newer" for layer in living.objects_of(Kept))

    class Newer(Kept):
        pass

    newer = Newer()
    assert living.objects_of(Kept).count(newer) == 1


def test_what_was_found_is_not_kept_alive():
    kept = Kept()
    assert kept in living.objects_of(Kept)
    reference = weakref.ref(kept)
    del kept
    gc.collect()
    assert reference() is None
    assert not any(isinstance(layer, Kept) for layer in living.objects_of(Kept))


def test_many_ties_go_through_all_objects_once(looks):
    layers = [keras.layers.Dense(2) for _ in range(40)]
    for layer in layers:
        layer.build((None, 2))
    living.objects_of(keras.Model)
    looks.clear()
    registry = equalize.GroupRegistry()
    gc.disable()
    try:
        for i in range(20):
            registry.tie(f"pair {i}", [layer.kernel for layer in layers[2 * i : 2 * i + 2]], Equal())
    finally:
        gc.enable()
    assert looks.count(None) <= 1


def test_a_collection_in_the_middle_of_a_look_hides_nothing(monkeypatch):
    living.objects_of(Kept)
    kept, get = Kept(), gc.get_objects

    def collecting(generation=None):
        gc.collect(1)  # moves what is new to the old objects
        return get(generation)

    monkeypatch.setattr(living.gc, "get_objects", collecting)
    assert kept in living.objects_of(Kept)
