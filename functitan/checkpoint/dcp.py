"""The format of torch.distributed.checkpoint: entries in its metadata, and items in its files.

Invariant: what is written here torch's own tools read. An item is what `torch.save` makes of a block of at most
`ITEM_BYTES`, so that who needs a part of a tensor never holds more of it than its own part and one item.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo  # private; tried on torch 2.13
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config

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
    """The tensor or scalar of an item."""
    return torch.load(BytesIO(data), map_location="cpu", weights_only=True)


def metadata_of(entries: dict[str, Entry]) -> bytes:
    """The metadata file."""
    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, StorageInfo] = {}
    for path, (shape, dtype, items) in entries.items():
        if shape is None:
            described[path] = BytesStorageMetadata()
        else:
            assert dtype is not None
            chunks = [ChunkStorageMetadata(torch.Size(i.offsets or ()), torch.Size(i.sizes)) for i in items]
            described[path] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)
        for number, item in enumerate(items):
            index = MetadataIndex(path) if shape is None else MetadataIndex(path, item.offsets, number)
            stored[index] = StorageInfo(item.file, item.start, item.length)
    return pickle.dumps(
        Metadata(described, storage_data=stored, storage_meta=StorageMeta(save_id="functitan"), version=VERSION)
    )


def entries_of(metadata: bytes) -> dict[str, Entry]:
    """The entries of a metadata file."""
    known: Metadata = pickle.loads(metadata)
    found = {}
    for path, what in known.state_dict_metadata.items():
        if isinstance(what, TensorStorageMetadata):
            blocks: Iterable[Any] = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in what.chunks]
            shape, dtype = tuple(what.size), what.properties.dtype
        else:
            blocks, shape, dtype = [(None, ())], None, None
        items = []
        for offsets, sizes in blocks:
            at = known.storage_data[MetadataIndex(path, offsets)]
            items.append(Item(path, offsets, sizes, at.relative_path, at.offset, at.length))
        found[path] = Entry(shape, dtype, items)
    return found
