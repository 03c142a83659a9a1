"""The files of a checkpoint, on a local path or an fsspec URL.

Invariant: a checkpoint is complete or invisible. Locally all is written and synced in a hidden directory, which is then
renamed; elsewhere the file of checksums comes last, and without it there is no checkpoint.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple, cast
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from functitan.errors import CheckpointError, FunctitanError, report
from functitan.reading import name_problem, parsed_json, path_text

CHECKSUMS = "checksums.json"  # written last
HIDDEN = ".partial"


class Place(NamedTuple):
    """A directory: its file system, its path there, and the text that named it."""

    fs: Any  # fsspec's AbstractFileSystem
    path: str
    name: str

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def child(self, name: str) -> Place:
        return Place(self.fs, f"{self.path}/{name}", f"{self.name.rstrip('/')}/{name}")

    def file(self, name: str) -> str:
        """The path of a file in it. Raises `CheckpointError` for a name that leads anywhere else."""
        problem = name_problem(name)
        if problem is not None:
            raise CheckpointError(
                report(self.name, [problem], "take a checkpoint from elsewhere only as it was written")
            )
        return f"{self.path}/{name}"


def locate(path: str | os.PathLike) -> Place:
    """The directory that a local path or a URL such as "s3://bucket/run" names. Raises `FunctitanError`."""
    try:
        fs, root = fsspec.core.url_to_fs(path_text("ft.checkpoint", path))
    except (ImportError, ValueError) as error:  # a scheme that fsspec does not know, or not without a package
        if isinstance(error, FunctitanError):
            raise
        raise CheckpointError(report(f"ft.checkpoint: {path}", [str(error)], _FIX_PLACE)) from error
    return Place(fs, root.rstrip("/"), str(path))


def hidden(place: Place) -> Place:
    """Where the files of a checkpoint are written before it is complete."""
    if not place.local:
        return place
    parent, _, name = place.path.rpartition("/")
    return Place(place.fs, f"{parent}/.{name}{HIDDEN}", place.name)


def is_complete(place: Place) -> bool:
    """True if there is a whole checkpoint."""
    place.fs.invalidate_cache()
    return place.fs.exists(f"{place.path}/{CHECKSUMS}")


def is_empty(place: Place) -> bool:
    """True if nothing is there, or a directory with nothing in it."""
    return not place.fs.exists(place.path) or (place.fs.isdir(place.path) and not place.fs.ls(place.path))


def publish(place: Place) -> None:
    """Make the hidden directory the checkpoint, whatever happens to the machine afterwards."""
    if place.local:
        sync(hidden(place).path)
        os.rename(hidden(place).path, place.path)
        sync(os.path.dirname(place.path))


def remove(place: Place) -> None:
    """Remove a directory, at once for all who look: another rank may still write files, and makes no new ones in it."""
    with suppress(FileNotFoundError):
        if place.local:
            gone = _removed(place) + uuid4().hex  # under a name that nobody else writes to
            os.rename(place.path, gone)
            _remove_tree(place, gone)
            return
        place.fs.rm(f"{place.path}/{CHECKSUMS}")  # first of all what makes it a checkpoint
    with suppress(FileNotFoundError):
        place.fs.rm(place.path, recursive=True)


def remove_leftovers(place: Place) -> None:
    """Remove what a killed run has left of a checkpoint that it wrote or removed."""
    remove(hidden(place))
    if place.local:
        for path in glob.glob(glob.escape(_removed(place)) + "*"):
            _remove_tree(place, path)


def _remove_tree(place: Place, path: str) -> None:
    for last in (False, False, True):  # the kernel may still add a file whose opening began under the former name
        try:
            return place.fs.rm(path, recursive=True)
        except OSError as error:
            if last or error.errno != errno.ENOTEMPTY:
                raise


def _removed(place: Place) -> str:
    path = place.path if place.path.endswith(HIDDEN) else hidden(place).path
    return f"{path}."


@contextmanager
def writing(place: Place, name: str, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, on the disk when the body ends if it is to be durable."""
    path = place.file(name)
    if not place.local:
        with place.fs.open(path, "wb") as stream:
            yield stream
        return
    with open(path, "wb") as stream:
        yield stream
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


def write(place: Place, name: str, data: bytes, durable: bool = True) -> None:
    """A small file, which is there whole or not at all."""
    if not place.local:
        place.fs.pipe_file(place.file(name), data)
        return
    with writing(place, f".{name}.new", durable) as stream:
        stream.write(data)
    os.replace(place.file(f".{name}.new"), place.file(name))


def read(place: Place, name: str) -> bytes:
    """A small file."""
    return place.fs.cat_file(place.file(name))


def opened(place: Place, name: str) -> BinaryIO:
    """A file to read parts of."""
    path = place.file(name)
    return cast(BinaryIO, open(path, "rb") if place.local else place.fs.open(path))


def size_of(place: Place, name: str) -> int | None:
    """Its size in bytes; `None` if it is not there."""
    try:
        return place.fs.size(place.file(name))
    except FileNotFoundError:
        return None


def sealed(content: Any) -> bytes:
    """JSON behind a line with its checksum.

    >>> unsealed(sealed({"a": [1]}))
    {'a': [1]}
    """
    text = json.dumps(content).encode()
    return f"{zlib.crc32(text):08x}\n".encode() + text


def unsealed(data: bytes) -> Any:
    """What was sealed; `None` for a file that is damaged."""
    head, _, text = data.partition(b"\n")
    if head != f"{zlib.crc32(text):08x}".encode():
        return None
    with suppress(ValueError):
        return parsed_json(text)
    return None


@contextmanager
def clear_errors(what: str, fix: str) -> Iterator[None]:
    """A file system's error as a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        problem = f"{error.strerror or error or type(error).__name__}{where}"
        raise CheckpointError(report(what, [problem], fix)) from error


def sync(path: str) -> None:
    """Put a file, or a directory's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_FIX_PLACE = "give a local path, or a URL that fsspec can open"
