"""The writing of a checkpoint: each rank its own file, then rank 0 what makes them one.

Invariant: ranks meet in the files alone. What runs here sends no message, so it may run on another thread than the
training, and a rank that fails, or is killed, leaves no checkpoint behind.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.checkpoint.dcp import METADATA, Entry, Item, metadata_of, pack, pieces
from functitan.checkpoint.files import (
    CHECKSUMS,
    Place,
    clear_errors,
    hidden,
    is_complete,
    publish,
    read,
    remove,
    remove_leftovers,
    sealed,
    unsealed,
    write,
    writing,
)
from functitan.checkpoint.leaves import Leaf, world_of
from functitan.errors import CheckpointError, PeerCheckpointError, report
from functitan.sharding.mesh import Mesh

GOES_ON = "__writing"


class Part(NamedTuple):
    """What one rank writes: blocks as (path, offsets, tensor or scalar), and what all leaves are."""

    rank: int
    world: int
    blocks: list[tuple[str, tuple[int, ...] | None, Any]]
    leaves: list[tuple[str, tuple[int, ...] | None, Any]]  # (name, global shape, dtype), those that it tells of
    marks: dict[str, bytes]  # small files that stay beside the checkpoint's own


def part_of(leaves: list[Leaf], mesh: Mesh | None, marks: dict[str, bytes]) -> Part:
    """The blocks of this rank that no other rank writes: of equal shards, each leaf's have a writer in turn."""
    stage = None if mesh is None else mesh.without(("pp",))
    blocks = []
    for number, leaf in enumerate(leaves):
        elsewhere = (mesh is not None and mesh.place != leaf.owner) or not _writes(leaf, stage, number)
        if elsewhere and not leaf.own:
            continue
        if leaf.shape is None:
            blocks.append((leaf.name(mesh), None, leaf.value))
        else:
            blocks.append((leaf.name(mesh), tuple(part.start for part in leaf.block(mesh)), leaf.value))
    speaks = stage is None or stage.rank == 0  # for the ranks of its pipeline stages, whose leaves are the same
    told = [(leaf.name(mesh), leaf.shape, leaf.dtype) for leaf in leaves if speaks or leaf.own]
    return Part(mesh.rank if mesh else 0, world_of(mesh), blocks, told, marks)


def announce(place: Place, marks: dict[str, bytes]) -> None:
    """An empty hidden directory, with the file that stands for a write that goes on: who fails removes it.

    `marks` are there from the beginning: what a killed run leaves can be told from other things.
    """
    remove_leftovers(place)
    place.fs.makedirs(hidden(place).path, exist_ok=True)
    for name, data in marks.items():
        write(hidden(place), name, data, durable=False)
    write(hidden(place), GOES_ON, b"", durable=False)


def write_part(place: Place, part: Part, timeout: float) -> None:
    """Write this rank's file and wait until the checkpoint is complete.

    Raises `CheckpointError` on every rank if one of them cannot write; nothing is left then.
    """
    try:
        with clear_errors(f"writing the checkpoint {place.name}", _FIX_WRITE):
            record = _write_blocks(hidden(place), part)
            write(hidden(place), _record_name(part.rank), sealed(record), durable=False)
            if part.rank == 0:
                _complete(place, part, timeout)
            else:
                _wait(place, timeout)
    except Exception as error:
        _give_up(place, part.rank, error)
        if part.rank and isinstance(error.__cause__, FileNotFoundError):  # rank 0 has removed everything
            raise _another_failed(place) from error
        raise


def _writes(leaf: Leaf, mesh: Mesh | None, number: int) -> bool:
    if mesh is None:
        return True
    sharded = () if leaf.layout is None else tuple(dim for dims in leaf.layout.dims for dim in dims)
    rest = tuple(dim for dim in mesh.sizes.dims if dim not in sharded)
    turn = (number + mesh.index(sharded)) % mesh.sizes.size(rest)
    return mesh.index(rest) == turn


def _write_blocks(place: Place, part: Part) -> dict[str, Any]:
    """This rank's file; what stands where in it."""
    name, items = f"__{part.rank}_0.distcp", []
    size = crc = 0
    failed: OSError | None = None
    with writing(place, name) as stream:

        def put(data: memoryview) -> int:
            nonlocal size, crc, failed
            try:
                stream.write(data)
            except OSError as error:  # torch.save would hide it behind one of its own
                failed = error
            size, crc = size + len(data), zlib.crc32(data, crc)
            return len(data)

        for path, offsets, block in part.blocks:
            for at, piece in pieces(offsets or (), block) if isinstance(block, Tensor) else [(None, block)]:
                start, crc = size, 0
                pack(piece, put)
                if failed is not None:
                    raise failed
                sizes = tuple(piece.shape) if isinstance(piece, Tensor) else ()
                items.append(Item(path, at, sizes, name, start, size - start, crc))
    said = [(path, shape, str(dtype).removeprefix("torch.")) for path, shape, dtype in part.leaves]
    return {"file": name, "size": size, "items": items, "leaves": said}


def _complete(place: Place, part: Part, timeout: float) -> None:
    records = _records(hidden(place), part.world, timeout)
    entries = _entries(place, records)
    files, checksums = {}, []
    for record in records:
        files[record["file"]] = record["size"]
        for path, offsets, sizes, *at in record["items"]:
            entries.setdefault(path, Entry(None, None, [])).items.append(Item(path, offsets, sizes, *at))
            checksums.append(at)
    problems = []
    for path, (shape, _, items) in entries.items():
        stored, size = sum(math.prod(item.sizes) for item in items), 1 if shape is None else math.prod(shape)
        if stored != size:
            problems.append(f"{path}: the ranks wrote {stored} of its {size} numbers")
    if problems:
        raise CheckpointError(report(f"writing the checkpoint {place.name}", problems, _FIX_LEAVES))
    for name, data in part.marks.items():
        write(hidden(place), name, data)
    metadata = metadata_of(entries)
    write(hidden(place), METADATA, metadata)
    files[METADATA] = len(metadata)
    checksums.append([METADATA, 0, len(metadata), zlib.crc32(metadata)])
    write(hidden(place), CHECKSUMS, sealed({"files": files, "items": checksums}))
    publish(place)
    for name in (*map(_record_name, range(part.world)), GOES_ON):
        with suppress(OSError):
            place.fs.rm(f"{place.path}/{name}")


def _entries(place: Place, records: list[Any]) -> dict[str, Entry]:
    """The leaves of all pipeline stages. Raises `CheckpointError` if two stages have one in different shapes."""
    entries: dict[str, Entry] = {}
    problems = []
    for record in records:
        for path, shape, dtype in record["leaves"]:
            mine = Entry(None, None, []) if shape is None else Entry(tuple(shape), getattr(torch, dtype), [])
            if entries.setdefault(path, mine) != mine:
                other = entries[path]
                problems.append(f"{path} is {other.shape} {other.dtype} in one stage, and {mine.shape} {mine.dtype}")
    if problems:
        raise CheckpointError(report(f"writing the checkpoint {place.name}", problems, _FIX_LEAVES))
    return entries


def _records(place: Place, world: int, timeout: float) -> list[Any]:
    """What every rank has written, once they have."""
    found: dict[int, Any] = {}
    for _ in _polls(timeout):
        for rank in range(world):
            if rank not in found:
                place.fs.invalidate_cache()
                with suppress(FileNotFoundError):
                    record = unsealed(read(place, _record_name(rank)))
                    if record is not None:  # else it is not yet written to its end
                        found[rank] = record
        failed = [f"rank {rank}: {record['error']}" for rank, record in found.items() if "error" in record]
        if failed:
            raise CheckpointError(report(f"writing the checkpoint {place.name}", failed, _FIX_WRITE))
        if len(found) == world:
            return [found[rank] for rank in range(world)]
        if not place.fs.exists(f"{place.path}/{GOES_ON}"):
            raise _another_failed(place)
    absent = [
        f"rank {rank} has not written its part within {timeout:g} s" for rank in range(world) if rank not in found
    ]
    raise CheckpointError(report(f"writing the checkpoint {place.name}", absent, "look for a rank that ended"))


def _wait(place: Place, timeout: float) -> None:
    """Until rank 0 has made all parts one checkpoint, or someone gave up."""
    mark = f"{hidden(place).path}/{GOES_ON}"
    for _ in _polls(timeout):
        place.fs.invalidate_cache()
        if not place.fs.exists(mark):
            if not is_complete(place):
                raise _another_failed(place)
            return
    late = f"rank 0 did not finish within {timeout:g} s"
    raise CheckpointError(report(f"writing the checkpoint {place.name}", [late], "look why rank 0 waits"))


def _give_up(place: Place, rank: int, error: Exception) -> None:
    """Tell rank 0, which removes everything. Who finds that it has done so already removes what came after that."""
    lines = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
    lines = lines or [f"{type(error).__name__}: {error}"]
    mark, record = (f"{hidden(place).path}/{name}" for name in (GOES_ON, _record_name(rank)))
    with suppress(OSError):
        if rank:
            with suppress(OSError):
                if not place.fs.exists(record):  # of what is written to its end rank 0 may be making the checkpoint
                    place.fs.rm(f"{hidden(place).path}/__{rank}_0.distcp")
            with suppress(OSError):
                write(hidden(place), _record_name(rank), sealed({"error": "; ".join(lines)}), durable=False)
                place.fs.invalidate_cache()
                if place.fs.exists(mark):
                    return
        with suppress(FileNotFoundError):
            place.fs.rm(mark)  # before the list of what to remove is made: what comes after finds no mark
        if place.local or not is_complete(place):
            remove(hidden(place))


def _polls(timeout: float) -> Iterable[None]:
    """Turns of a loop, farther and farther apart, until the time is over."""
    until, pause = time.monotonic() + timeout, 0.001
    while time.monotonic() < until:
        yield
        time.sleep(pause)
        pause = min(0.1, pause * 1.5)


def _another_failed(place: Place) -> PeerCheckpointError:
    what = f"writing the checkpoint {place.name}"
    return PeerCheckpointError(report(what, ["another rank failed to write its part"], "see its error"))


def _record_name(rank: int) -> str:
    return f"__{rank}.json"


_FIX_LEAVES = (
    "declare a shared leaf once, and save on the mesh, and by the rules and patterns, that the leaves lie under"
)
_FIX_WRITE = "nothing of it is left; make room or choose another place, and save again: earlier checkpoints are whole"
