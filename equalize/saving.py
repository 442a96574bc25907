"""Files of tied models: what is equal is stored once, and the ties travel with the weights.

`save_model` and `save_weights` write the standard files of Keras, which Keras loads without `equalize`; `load_model`
ties what it loads, and `deduplicate` makes a file small that Keras wrote. HDF5, in which Keras keeps weights, can have
one array under many names (hard links), so twelve tied blocks take the space of one.
"""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from equalize._backend import hdf5, keras_private, wrapping
from equalize._inputs import arguments
from equalize._inputs.arguments import received
from equalize._linking.config import group_configs
from equalize._ties.bound import group_of, ties_on
from equalize.errors import EqualizeError
from equalize.optimizers import TiedOptimizer
from equalize.registry import GroupRegistry, checked_registry

__all__ = ["deduplicate", "load_model", "save_model", "save_weights"]

_WEIGHTS, _TIES = "model.weights.h5", "equalize.json"
_PIECE = 2**20  # bytes that are copied at once


def save_model(model: keras.Model, filepath: str | os.PathLike[str], registry: GroupRegistry | None = None) -> None:
    """Saves a model as a standard `.keras` file, with equal arrays stored once and the model's ties.

    Keras loads the file as it loads its own, weights and optimizer alike. It needs equalize for what names it: a
    `TiedOptimizer` (or load with `compile=False`), and rules that layers declare. `load_model` also restores the ties.
    A file of `model.save` lacks those made with `registry.tie`, unless the model was compiled with a `TiedOptimizer`.

    A new file is written beside the old one and replaces it in one step. If the process dies or the disk fills up, the
    old file is whole.

    Args:
        model: A built model.
        filepath: Where to save it, ending in `.keras`, on a local disk. A file that is there is replaced.
        registry: The registry whose ties to save; by default all ties of the model's weights.

    Raises:
        EqualizeError: The name does not end in `.keras`, the model is not built, or a tie has members outside it.
        TypeError: An argument is of the wrong type.

    Example:
    >>> import keras, os, tempfile, equalize
    >>> layers = [keras.layers.Dense(64, name=f"layer_{i}") for i in range(4)]
    >>> model = keras.Sequential([keras.Input((64,)), *layers])
    >>> registry = equalize.GroupRegistry()
    >>> groups = registry.tie("layers", layers, equalize.constraints.Equal())
    >>> folder = tempfile.TemporaryDirectory()
    >>> equalize.saving.save_model(model, f"{folder.name}/tied.keras", registry)
    >>> model.save(f"{folder.name}/plain.keras")
    >>> os.path.getsize(f"{folder.name}/tied.keras") < 0.5 * os.path.getsize(f"{folder.name}/plain.keras")
    True
    >>> loaded, ties = equalize.saving.load_model(f"{folder.name}/tied.keras")
    >>> sorted(ties)
    ['layers/bias', 'layers/kernel']
    >>> folder.cleanup()
    """
    target = _target(filepath, ".keras")
    ties = _ties_of(_built(model), None if registry is None else checked_registry(registry))
    with _beside(target) as folder, zipfile.ZipFile(folder / target.name, "w") as archive:
        if ties:
            archive.writestr(_TIES, json.dumps({"registry": {"groups": ties}}), zipfile.ZIP_DEFLATED)
        with hdf5.writing(folder / _WEIGHTS) as file:
            keras_private.write_archive(model, archive, file)
        _put(archive, folder / _WEIGHTS)


def load_model(filepath: str | os.PathLike[str], **kwargs: Any) -> tuple[keras.Model, GroupRegistry]:
    """Loads a model and ties it as it was when it was saved.

    It restores the ties that `save_model` wrote, those that layers declare, and those of a `TiedOptimizer`. All are
    data: nothing in a file is run. A file that `model.save` wrote has the last two kinds; with `compile=False`, those
    of its optimizer are not loaded.

    Args:
        filepath: A file that `save_model` or Keras wrote.
        **kwargs: As `keras.saving.load_model` takes them: `custom_objects`, `compile`, `safe_mode`.

    Returns:
        The model, and the registry that it is linked by; an empty one if nothing is tied. If the model was compiled
        with a `TiedOptimizer`, it is that optimizer's registry.

    Raises:
        EqualizeError: There is no such file, or the ties in it are damaged.
        TypeError: `filepath` is not a path.
        GroupMismatchError: They do not fit the model.

    Example:
    >>> import keras, tempfile, equalize
    >>> layers = [keras.layers.Dense(2) for _ in range(3)]
    >>> model = keras.Sequential([keras.Input((2,)), *layers])
    >>> group = equalize.GroupRegistry().tie("kernels", [l.kernel for l in layers], equalize.constraints.Equal())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     equalize.saving.save_model(model, f"{folder}/model.keras")
    ...     loaded, registry = equalize.saving.load_model(f"{folder}/model.keras")
    >>> registry["kernels"].spread()
    0.0
    """
    with keras.saving.custom_object_scope(kwargs.get("custom_objects") or {}):
        name = _existing(filepath)
        stored = GroupRegistry.from_config(_read_ties(name))
        model = keras.saving.load_model(name, **kwargs)
        optimizers = wrapping.everything(getattr(model, "optimizer", None))
        registries = [optimizer.registry for optimizer in optimizers if isinstance(optimizer, TiedOptimizer)]
        registry = registries[0] if registries else GroupRegistry()
        registry._expect(stored)
        declared = any(group_of(tie) is None for weight in model.weights for tie in ties_on(weight))
        if declared or registry.pending:
            registry.link(model)
    return model, registry


def save_weights(model: keras.Model, filepath: str | os.PathLike[str]) -> None:
    """Saves the weights of a model as a standard `.weights.h5` file, with equal arrays stored once.

    `model.load_weights` reads it. It is written beside its place and put there in one step, as by `save_model`.

    Args:
        model: A built model.
        filepath: Where to save them, ending in `.weights.h5`, on a local disk. A file that is there is replaced.

    Raises:
        EqualizeError: The name does not end in `.weights.h5`, or the model is not built.
        TypeError: An argument is of the wrong type.

    Example:
    >>> import keras, tempfile, equalize
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     equalize.saving.save_weights(model, f"{folder}/model.weights.h5")
    ...     model.load_weights(f"{folder}/model.weights.h5")
    """
    target = _target(filepath, ".weights.h5")
    _built(model)
    with _beside(target) as folder, hdf5.writing(folder / target.name) as file:
        keras_private.write_weights(model, file)


def deduplicate(filepath: str | os.PathLike[str]) -> tuple[int, int]:
    """Stores arrays of equal shape, dtype and bytes once, in a file that Keras wrote.

    Keras loads the file as before. It is replaced in one step. One array at a time is in memory.

    Args:
        filepath: A `.keras` or `.weights.h5` file.

    Returns:
        The size of the file before and after, in bytes.

    Raises:
        EqualizeError: There is no such file, or it is of another kind, or damaged.
        TypeError: `filepath` is not a path.

    Example:
    >>> import keras, tempfile, equalize
    >>> layers = [keras.layers.Dense(64, kernel_initializer="ones") for _ in range(2)]
    >>> model = keras.Sequential([keras.Input((64,)), *layers])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_weights(f"{folder}/model.weights.h5")
    ...     before, after = equalize.saving.deduplicate(f"{folder}/model.weights.h5")
    >>> after < before
    True
    """
    target = _target(_existing(filepath), ".keras", ".weights.h5")
    before = target.stat().st_size
    with _beside(target) as folder:
        if target.suffix == ".keras":
            _repack(target, folder)
        else:
            hdf5.compact(target, folder / target.name)
    return before, target.stat().st_size


def _existing(filepath: Any) -> str:
    """The name of a file that is there; of one elsewhere, Keras may know."""
    name = arguments.path("filepath", filepath)
    if "://" not in name and not os.path.exists(name):
        raise EqualizeError(f"There is no file {name!r}. Expected: one that `save_model` or Keras wrote.")
    return name


def _target(filepath: Any, *endings: str) -> Path:
    """A file on a local disk, and not a link to it."""
    return Path(os.path.realpath(arguments.file("filepath", filepath, endings)))


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder for files on the way to `target`; the one of its name is put in its place in the end.

    The name is always the same, so that what a killed process left is gone with the next file.
    """
    folder = target.parent / f".{target.name}.saving"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        with open(folder / target.name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _built(model: Any) -> keras.Model:
    if not arguments.model("model", model).built:
        raise EqualizeError(
            f"The model '{model.name}' has no weights to save, since it is not built. Expected: a built model. Build "
            "it, or call it once on data, before."
        )
    return model


def _ties_of(model: keras.Model, registry: GroupRegistry | None) -> list[dict[str, Any]]:
    """The ties of a model that no layer declares, as data."""
    weights = {id(weight) for weight in model.weights}
    if registry is None:
        tied = [group_of(tie) for weight in model.weights for tie in ties_on(weight)]
        groups = [group for group in dict.fromkeys(tied) if group is not None]
        groups += dict.fromkeys(statistics for group in groups for statistics in group.statistics)
    else:
        groups = list(registry.values())
    for group in groups:
        outside = [m for m in group.members if not m.constant and id(m.variable) not in weights]
        if outside:
            raise EqualizeError(
                f"Cannot save group '{group.name}' with the model '{model.name}': {outside[0]} is not one of its "
                "weights. Expected: a model that has all members. Save one model that holds both parts, or "
                f"`untie({group.name!r})` first."
            )
    if registry is not None:
        return registry.get_config()["groups"]
    return group_configs([group for group in groups if not group.declared])


def _read_ties(file: str) -> dict[str, Any]:
    """The config of a registry in a `.keras` file; without groups where there is none."""
    nothing: dict[str, Any] = {"groups": []}
    if not zipfile.is_zipfile(file):
        return nothing
    with zipfile.ZipFile(file) as archive:
        if _TIES not in archive.namelist():
            return nothing
        try:
            found = json.loads(archive.read(_TIES))
        except (ValueError, zipfile.BadZipFile) as error:
            raise EqualizeError(f"The ties in '{file}' are damaged: {error}. Expected: what was saved.") from error
    if not isinstance(found, dict) or set(found) != {"registry"}:
        raise EqualizeError(f"The ties in '{file}' are damaged: expected a registry; received {received(found)}.")
    return found["registry"]


def _put(archive: zipfile.ZipFile, file: Path) -> None:
    """Adds a file to an archive; `ZipFile.write` would copy 8 kB at a time."""
    with file.open("rb") as read, archive.open(zipfile.ZipInfo.from_file(file, file.name), "w") as written:
        shutil.copyfileobj(read, written, _PIECE)


def _repack(target: Path, folder: Path) -> None:
    """Writes an archive again, with its weights compact."""
    try:
        with zipfile.ZipFile(target) as source, zipfile.ZipFile(folder / target.name, "w") as archive:
            for info in source.infolist():
                if info.filename == _WEIGHTS:
                    source.extract(info, folder)
                    os.replace(folder / _WEIGHTS, folder / "whole.h5")
                    hdf5.compact(folder / "whole.h5", folder / _WEIGHTS)
                    _put(archive, folder / _WEIGHTS)
                else:
                    with source.open(info) as read, archive.open(info, "w") as written:
                        shutil.copyfileobj(read, written, _PIECE)
    except zipfile.BadZipFile as error:
        raise EqualizeError(f"'{target.name}' is damaged: {error}. Expected: a file that Keras wrote.") from error
