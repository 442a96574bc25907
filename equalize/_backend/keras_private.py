"""Every private name of Keras that equalize relies on, one function each (Keras 3.15).

`tests/test_keras_private.py` calls each of them, and so says which one is gone when a new Keras drops it. What else
looks private in the package is our own, or an attribute that `TiedOptimizer` defines because Keras reads it.
"""

import io
import zipfile
from collections.abc import Iterator
from typing import Any

import keras


def stateless_scope() -> Any:
    """The `keras.StatelessScope` that is active, or None. Keras exports the class but not this getter."""
    from keras.src.backend.common.stateless_scope import get_stateless_scope

    return get_stateless_scope()


def in_symbolic_scope() -> bool:
    """Whether Keras only infers shapes, so that no value matters."""
    from keras.src.backend.common.symbolic_scope import in_symbolic_scope

    return in_symbolic_scope()


def applying() -> Any:
    """What stands for the call of an optimizer's `apply` that runs in this thread, one object a call; None outside.

    Keras holds a name scope, whose caller is the optimizer, while it updates variables and calls their constraints.
    """
    from keras.src.backend.common.global_state import get_global_attribute

    scopes = get_global_attribute("name_scope_stack")
    return scopes[-1] if scopes and isinstance(scopes[-1].caller, keras.optimizers.Optimizer) else None


def is_variable(x: Any) -> bool:
    """Whether something is a Keras variable; those of layers are no `keras.Variable` in Keras 3.5."""
    from keras.src.backend import Variable

    return isinstance(x, Variable)


def held_value(variable: keras.Variable) -> Any:
    """The value in a variable outside of all scopes; None while `fit` runs on JAX, when only the step holds it."""
    return variable._value


def own_variables(layer: keras.Layer) -> tuple[list[Any], list[Any]]:
    """The two lists in which a layer keeps its own variables, those made trainable and the others."""
    return layer._trainable_variables, layer._non_trainable_variables


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer tracks, in the order in which it got them."""
    return layer._layers


def flattened(layer: keras.Layer) -> Iterator[keras.Layer]:
    """A layer and all layers below it."""
    return layer._flatten_layers()


def is_initialized(layer: keras.Layer) -> bool:
    """Whether the constructor of `keras.Layer` has run."""
    return hasattr(layer, "_tracker")


def replace_variable(layer: keras.Layer, old: keras.Variable, new: keras.Variable) -> None:
    """Tracks `new` in the place of `old`, also in the order of the layer's weights, by which Keras saves."""
    store = next(store for store in own_variables(layer) if any(own is old for own in store))
    index = next(i for i, own in enumerate(store) if own is old)
    locked, trainable = layer._tracker.locked, new.trainable
    layer._tracker.unlock()
    try:
        layer._untrack_variable(old)
        new.trainable = store is layer._trainable_variables  # Keras chooses the list by this, not by the old place
        layer._track_variable(new)
        new.trainable = trainable
        store.insert(index, store.pop())
    finally:
        if locked:
            layer._tracker.lock()


def replace_torch_parameter(layer: keras.Layer, old: keras.Variable, new: keras.Variable) -> None:
    """Lists `new` for `old` among a layer's parameters; in PyTorch every layer lists those of the layers below it."""
    if getattr(layer, "_torch_params", {}).get(old.path) is old.value:
        layer._post_untrack_variable(old)
        layer._post_track_variable(new)


def steps_taken(optimizer: keras.optimizers.Optimizer) -> Any:
    """How often `apply` has run, with every micro-step of gradient accumulation, of which `iterations` counts none."""
    return optimizer._iterations


def updated_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built for."""
    return optimizer._trainable_variables


def slots(optimizer: Any) -> dict[str, dict[int, Any]]:
    """What an optimizer keeps for each variable, by attribute and by the variable's id; None where it keeps none.

    Keras's optimizers, and those written as its guide has them, keep a list for each kind, in the order of the
    variables.
    """
    variables = optimizer._trainable_variables
    known = {id(variable) for variable in (*variables, optimizer._iterations)}
    found = {}
    for name, value in vars(optimizer).items():
        kept = isinstance(value, (list, tuple)) and len(value) == len(variables) and any(x is not None for x in value)
        if kept and all(x is None or (is_variable(x) and id(x) not in known) for x in value):
            found[name] = {id(variable): slot for variable, slot in zip(variables, value, strict=True)}
    return found


DEGREES_OF_ALL = {"_accumulated_gradients": 1, "_model_variables_moving_average": 0}
"""By which power of the gradients those slots grow that an optimizer of any class may have."""


def own_values(optimizer: Any) -> dict[str, Any]:
    """The variables that an optimizer has besides slots, by attribute: its steps, a loss scale."""
    return {name: value for name, value in vars(optimizer).items() if is_variable(value)}


def unbuild(optimizer: Any) -> None:
    """Has an optimizer forget its variables and slots, so that it can be built for others; its settings stay."""
    kept = {id(optimizer._iterations), id(optimizer._learning_rate)}
    for variable in [variable for variable in optimizer._variables if id(variable) not in kept]:
        optimizer._untrack_variable(variable)
    optimizer._trainable_variables = []
    optimizer._trainable_variables_indices = {}
    optimizer.built = False


def decays(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether weight decay, where an optimizer has any, applies to a variable."""
    return bool(optimizer._use_weight_decay(variable))


def optimizer_for(optimizer: Any, variable: keras.Variable) -> Any:
    """The optimizer that a `MultiOptimizer` chooses for a variable; None for any other optimizer."""
    choose = getattr(optimizer, "_optimizer_map", None)
    return choose(variable) if callable(choose) else None


def uses_adamw(optimizer: Any, variable: keras.Variable) -> bool | None:
    """Whether Muon trains a variable by AdamW; None for any other optimizer."""
    return bool(optimizer._should_use_adamw(variable)) if hasattr(optimizer, "_should_use_adamw") else None


def build_for_training(model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None) -> None:
    """Makes the state of a compiled model's metrics, loss and optimizer, from the shapes of a batch.

    On JAX and PyTorch `fit` does so. On TensorFlow the step makes it, and is traced once more for that.
    """
    model._symbolic_build(data_batch=(x, y, sample_weight))


def write_weights(model: keras.Model, file: Any, assets: Any = None) -> None:
    """Has a model write its state, and its optimizer's, into what behaves as an `h5py.File`, in Keras's layout."""
    from keras.src.saving import saving_lib

    store = saving_lib.H5IOStore(io.BytesIO(), mode="w")
    store.h5_file.close()
    store.h5_file = file
    saving_lib._save_state(model, weights_store=store, assets_store=assets, inner_path="", visited_saveables=set())


def write_archive(model: keras.Model, archive: zipfile.ZipFile, file: Any) -> None:
    """Writes all of a `.keras` file but the weights into an archive, and these into `file`, as `write_weights`."""
    from keras.src.saving import saving_lib

    config, metadata = saving_lib._serialize_model_as_json(model)
    archive.writestr("metadata.json", metadata)
    archive.writestr("config.json", config)
    assets = saving_lib.DiskIOStore("assets", archive=archive, mode="w")
    try:
        write_weights(model, file, assets)
    finally:
        assets.close()
