"""HDF5 files, as Keras keeps weights in, in which equal arrays are stored once, under several names (hard links)."""

import contextlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from equalize.errors import EqualizeError


@contextlib.contextmanager
def writing(path: Path) -> Iterator["Group"]:
    """A new file, as its root group.

    Raises:
        OSError: The disk is full, or broken.
    """
    with _File(path, "w+") as disk:
        with h5py.File(disk, "w", libver=("v108", "latest")) as file:
            yield Group(file, disk, {})
        disk.require_whole()


def compact(source: Path, target: Path) -> None:
    """Copies a file, with equal arrays as one.

    Raises:
        EqualizeError: The file is damaged, or refers to others.
    """
    try:
        opened = h5py.File(source, "r")
    except OSError as error:
        if error.errno is not None:  # the file may be whole, and not ours to read
            raise
        raise EqualizeError(f"'{source.name}' is damaged: {error}. Expected: a file that Keras wrote.") from error
    with opened, writing(target) as file:
        file.copy(opened, set())


class Group:
    """A group of a file in the making. It does what Keras asks of an `h5py.Group` that it writes to."""

    def __init__(self, group: h5py.Group, disk: "_File", known: dict[Any, list[h5py.Dataset]]):
        self._group, self._disk, self._known = group, disk, known

    def create_group(self, name: str) -> "Group":
        return Group(self._group.create_group(name), self._disk, self._known)

    def create_dataset(self, name: str, data: Any, attributes: Any = ()) -> h5py.Dataset:
        """Stores an array, or gives the one that is there already another name."""
        self._disk.require_whole()
        data = np.asarray(data) if isinstance(data, np.generic) else data
        if not isinstance(data, np.ndarray) or not data.nbytes or data.dtype.hasobject:
            return self._group.create_dataset(name, data=data)
        octets = _octets(data)
        known = self._known.setdefault((data.shape, data.dtype.name, attributes, zlib.crc32(octets.data)), [])
        for stored in known:
            if np.array_equal(_octets(stored[()]), octets):
                self._group[name] = stored
                return stored
        known.append(self._group.create_dataset(name, data=data))
        return known[-1]

    def copy(self, source: h5py.Group, seen: set[int]) -> None:
        """Takes over what is in a group, and in those below."""
        address = h5py.h5o.get_info(source.id).addr
        if address in seen:
            raise _foreign(source, "has one group in two places")
        seen.add(address)
        self._group.attrs.update(source.attrs)
        for name in source:
            item: Any = source[name] if isinstance(source.get(name, getlink=True), h5py.HardLink) else None
            if isinstance(item, h5py.Group):
                self.create_group(name).copy(item, seen)
            elif isinstance(item, h5py.Dataset) and not (item.external or item.is_virtual):
                self._take(name, item)
            else:
                raise _foreign(source, f"has no data of its own at '{name}'")

    def _take(self, name: str, item: h5py.Dataset) -> None:
        if item.id.get_storage_size() != item.nbytes:  # compressed, for instance
            self._group.file.copy(item, self._group, name)
            return
        attributes = tuple(sorted((key, repr(value)) for key, value in item.attrs.items()))
        self.create_dataset(name, item[()], attributes).attrs.update(item.attrs)

    def __setitem__(self, name: str, value: Any) -> None:
        self.create_dataset(name, value)

    def __getitem__(self, name: str) -> Any:
        return self._group[name]

    def __delitem__(self, name: str) -> None:
        del self._group[name]

    def __contains__(self, name: object) -> bool:
        return name in self._group

    def __len__(self) -> int:
        return len(self._group)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def _foreign(source: h5py.Group, problem: str) -> EqualizeError:
    return EqualizeError(f"'{Path(source.file.filename).name}' {problem}. Expected: a file that Keras wrote.")


def _octets(data: np.ndarray | np.generic) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


class _File(io.FileIO):
    """A file on a disk that may be full. HDF5 crashes where writing fails, so here it never does, but is known."""

    _problem: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self._problem is None:
            try:
                done += super().write(view[done:]) or 0
            except OSError as error:
                self._problem = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._problem = error
            return size or 0

    def require_whole(self) -> None:
        """Raises what has gone wrong, if anything."""
        if self._problem is not None:
            raise self._problem
