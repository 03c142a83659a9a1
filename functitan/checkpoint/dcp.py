"""The format of torch.distributed.checkpoint: entries in its metadata, and items in its files.

Invariant: what is written here torch's own tools read. An item is what `torch.save` makes of a block of at most
`ITEM_BYTES`, so that who needs a part of a tensor never holds more of it than its own part and one item.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from types import SimpleNamespace
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor
from torch.utils.serialization import config

from functitan.checkpoint.leaves import SCALARS
from functitan.checkpoint.pickled import DTYPES, Made, Name, Pairs, records

METADATA = ".metadata"
VERSION = "1.0.0"  # CURRENT_DCP_VERSION of torch 2.13
ITEM_BYTES = 16 * 2**20


class Item(NamedTuple):
    """A stored block: of which leaf, where it begins in it (`None`: a scalar), its sizes, and where it lies."""

    path: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    crc: int = 0


class Entry(NamedTuple):
    """A leaf of a checkpoint: its global shape and dtype, `None` for a scalar, and its items."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    items: list[Item]


def pieces(offsets: Sequence[int], x: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A block that begins at `offsets`, cut along its longest axis until each part is at most `ITEM_BYTES`.

    >>> [(at, tuple(part.shape)) for at, part in pieces((0, 4), torch.zeros(2**13, 2**10))]
    [((0, 4), (4096, 1024)), ((4096, 4), (4096, 1024))]
    """
    if x.numel() * x.element_size() <= ITEM_BYTES:
        yield tuple(offsets), x
        return
    axis = max(range(x.dim()), key=lambda i: x.shape[i])
    half = -(-x.shape[axis] // 2)
    for start, part in zip((0, half), x.split(half, axis), strict=True):
        yield from pieces([at + start * (i == axis) for i, at in enumerate(offsets)], part)


def pack(value: Any, write: Callable[[memoryview], int]) -> None:
    """Write a tensor or a scalar as an item.

    Without torch.save's own checksums, which it works out while it keeps every other thread from running Python.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        if value.untyped_storage().nbytes() != value.numel() * value.element_size():
            value = value.clone()  # torch.save writes whole storages
    with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # of this thread; tried on torch 2.13
        torch.save(value, SimpleNamespace(write=write, flush=lambda: None))  # type: ignore[arg-type]


def unpacked(data: bytes) -> Any:
    """The tensor or scalar of an item. Raises `ValueError` for what holds neither; it runs nothing."""
    try:
        with ZipFile(BytesIO(data)) as archive:
            if any(part.compress_type != ZIP_STORED or part.file_size > len(data) for part in archive.infolist()):
                raise ValueError("it is compressed")  # a few bytes could become as many as the memory has
        value = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's and zipfile's own kinds
        raise ValueError(f"it holds no tensor or scalar that can be read: {str(error)[:200]}") from error
    if isinstance(value, SCALARS) or (type(value) is Tensor and value.layout == torch.strided and value.is_cpu):
        return value
    raise ValueError(f"it holds a {type(value).__name__}, neither a scalar nor a dense tensor")


# imported where a checkpoint is written: it takes half as long as torch, and most programs start without
def metadata_of(entries: dict[str, Entry]) -> bytes:
    """The metadata file."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo  # private; tried on torch 2.13

    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for path, (shape, dtype, items) in entries.items():
        if shape is None:
            described[path] = dcp.BytesStorageMetadata()
        else:
            assert dtype is not None
            chunks = [dcp.ChunkStorageMetadata(torch.Size(i.offsets or ()), torch.Size(i.sizes)) for i in items]
            described[path] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype), torch.Size(shape), chunks)
        for number, item in enumerate(items):
            index = dcp.MetadataIndex(path) if shape is None else dcp.MetadataIndex(path, item.offsets, number)
            stored[index] = StorageInfo(item.file, item.start, item.length)
    meta = dcp.StorageMeta(save_id="functitan")
    return pickle.dumps(dcp.Metadata(described, storage_data=stored, storage_meta=meta, version=VERSION))


def entries_of(metadata: bytes) -> dict[str, Entry]:
    """The entries of a metadata file, read without running it. Raises `ValueError` for what is no such file."""
    known = _fields(records(metadata), "Metadata")
    stored = {}
    for key, at in _pairs(known.get("storage_data"), "storage_data"):
        index, info = _fields(key, "MetadataIndex"), _fields(at, "_StorageInfo")
        offset = index.get("offset")
        place = _text(index.get("fqn")), None if offset is None else _sizes(offset)
        where = _text(info.get("relative_path")), _count(info.get("offset")), _count(info.get("length"))
        if info.get("transform_descriptors"):
            raise ValueError(f"{place[0]} is stored transformed")
        if stored.setdefault(place, where) != where:
            raise ValueError(f"{place[0]} has a block twice")
    found: dict[str, Entry] = {}
    for path, what in _pairs(known.get("state_dict_metadata"), "state_dict_metadata"):
        if _text(path) in found:
            raise ValueError(f"{path} is there twice")
        entry = Entry(None, None, []) if _is(what, "BytesStorageMetadata") else _tensor(path, what)
        blocks = [(None, ())] if entry.shape is None else list(_blocks(path, what, entry.shape, len(stored)))
        for offsets, sizes in blocks:
            if (path, offsets) not in stored:
                raise ValueError(f"the block of {path} at {offsets} is in no file")
            entry.items.append(Item(path, offsets, sizes, *stored.pop((path, offsets))))  # each is of one leaf
        found[path] = entry
    return found


def _tensor(path: str, what: Any) -> Entry:
    fields = _fields(what, "TensorStorageMetadata")
    properties = fields.get("properties")
    states = properties.states if isinstance(properties, Made) and _is(properties, "TensorProperties") else []
    state = states[0] if len(states) == 1 else None
    name = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(name, Name) or name.name not in DTYPES:
        raise ValueError(f"{path} has no dtype")
    return Entry(_sizes(fields.get("size")), DTYPES[name.name], [])


def _blocks(path: str, what: Any, shape: tuple[int, ...], most: int) -> Iterator[tuple[tuple[int, ...], Any]]:
    chunks = _fields(what, "TensorStorageMetadata").get("chunks")
    if not isinstance(chunks, list) or len(chunks) > most:
        raise ValueError(f"{path} has no list of its blocks")
    for chunk in chunks:
        fields = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(fields.get("offsets")), _sizes(fields.get("sizes"))
        if not len(offsets) == len(sizes) == len(shape) or any(
            start + size > whole for start, size, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise ValueError(f"{path} of shape {shape} has a block {sizes} at {offsets}")
        yield offsets, sizes


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Made) and value.by.name == name


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The fields of an object of this class, by name."""
    if not _is(value, name):
        raise ValueError(f"there is a {type(value).__name__} where DCP has a {name}")
    return {key: field for state in value.states for key, field in _pairs(state, name) if isinstance(key, str)}


def _pairs(value: Any, name: str) -> list[tuple[Any, Any]]:
    if not isinstance(value, Pairs):
        raise ValueError(f"{name} is a {type(value).__name__}, not a dict")
    return value.items


def _sizes(value: Any) -> tuple[int, ...]:
    """A `torch.Size`."""
    args = value.args if _is(value, "Size") else ()
    if len(args) != 1 or not isinstance(args[0], (tuple, list)):
        raise ValueError(f"there is a {type(value).__name__} where DCP has a torch.Size")
    return tuple(map(_count, args[0]))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"there is a {type(value).__name__} where DCP has a number of at least 0")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"there is a {type(value).__name__} where DCP has a name")
    return value
