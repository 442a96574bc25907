"""Objects from configs, which hold data only: nothing is imported and no function is looked up by its name."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import keras

from equalize._inputs.arguments import received
from equalize.errors import EqualizeError


def restored(config: Any, kind: type, what: str, builtin: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The object that a config of `keras.saving.serialize_keras_object` describes.

    Keras's own counterpart imports the module that a config names, which runs it (Keras 3.5). Here a class must be
    registered with Keras already, or be one of Keras's own.

    Args:
        config: The config.
        kind: The class that the object must have.
        what: What it is, for the message: "a view".
        builtin: Makes an object of Keras's own from its class name and config, `keras.constraints.get` for instance.
            Where it is given, a registered function will do as well.

    Raises:
        EqualizeError: The config is damaged, or describes something else, or its class is not registered.
    """
    entries = config if isinstance(config, dict) else {}
    class_name, data = entries.get("class_name"), entries.get("config")
    registered = data if class_name == "function" else entries.get("registered_name")
    found = keras.saving.get_registered_object(registered) if isinstance(registered, str) else None
    try:
        if isinstance(found, type) and issubclass(found, kind) and isinstance(data, dict):
            made = found.from_config(copy.deepcopy(data))  # type: ignore[attr-defined]
        elif builtin is not None and inspect.isfunction(found):
            return found
        elif builtin is not None and isinstance(class_name, str) and isinstance(data, dict):
            made = builtin({"class_name": class_name, "config": copy.deepcopy(data)})
        else:
            made = None
    except EqualizeError:
        raise
    except Exception as error:  # whatever a class raises about a config that is not its own
        problem = str(error).rstrip(".")
        raise EqualizeError(
            f"The config of {what} is damaged: {problem}. Expected: arguments that its class takes. Received: "
            f"{received(config)}."
        ) from error
    if not isinstance(made, kind):
        missing = ""
        if found is None and isinstance(registered, str):
            missing = f" Nothing is registered as '{registered}': decorate the class, or import its module."
        raise EqualizeError(
            f"Expected the config of {what}, of a class that is registered with "
            f"`keras.saving.register_keras_serializable`. Received: {received(config)}.{missing}"
        )
    return made


def optimizer(name: str, given: Any) -> Any:
    """The argument `name`: a Keras optimizer, from an object, a name or a config.

    Raises:
        EqualizeError: It is something else.
    """
    kind, get, problem = keras.optimizers.Optimizer, keras.optimizers.get, None
    try:
        found = restored(given, kind, "an optimizer", get) if isinstance(given, dict) else get(given)
    except Exception as error:  # whatever Keras raises about a name or a config that it does not know
        found, problem = None, error
    if not isinstance(found, kind):
        raise EqualizeError(
            f"`{name}` must be a Keras optimizer, its name or its config (of a class that is registered with "
            f"`keras.saving.register_keras_serializable`). Received: {received(given)}."
        ) from problem
    return found
