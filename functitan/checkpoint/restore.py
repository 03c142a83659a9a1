"""`ft.checkpoint.restore`: a checkpoint as a tree of shards on any mesh, under any rules.

Invariant: a rank reads the stored blocks that meet its own shards, one at a time, and holds no other part of a tensor.
Every byte that it uses has been held against its checksum.
"""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import tree
from functitan.checkpoint import files
from functitan.checkpoint.dcp import METADATA, Entry, Item, entries_of, unpacked
from functitan.checkpoint.files import (
    CHECKSUMS,
    Place,
    clear_errors,
    unsealed,
)
from functitan.checkpoint.leaves import Block, Leaf, described, device_of, leaves_of, mesh_of, states_of, whose
from functitan.checkpoint.match import FIX_OTHER, check_same
from functitan.checkpoint.save import together
from functitan.errors import CheckpointError, report
from functitan.reading import name_problem, path_text
from functitan.sharding.context import current
from functitan.sharding.cut import mark_cut
from functitan.sharding.mesh import Mesh
from functitan.sharding.message import Label
from functitan.sharding.rules import AxisRules
from functitan.sharding.steps import send
from functitan.state import TrainState

Checksums = dict[tuple[str, int], int]


def restore(
    path: str | os.PathLike,
    like: tree.Tree,
    *,
    patterns: tree.Tree = None,
    mesh: Mesh | DeviceMesh | None = None,
    rules: AxisRules | None = None,
    device: torch.device | str | None = None,
    partial: bool = False,
) -> tree.Tree:
    """The tree of a checkpoint, each leaf this rank's shard on a mesh that need not be the one it was saved on.

    `like` has the structure that was saved, and in it shards, declarations (`Param`) or scalars, of which only shape
    and dtype count: a `TrainState`, or `ft.TrainState.declare(...)`, which allocates nothing. `patterns`, `mesh` and
    `rules` are those to restore under, as in `save`; a `TrainState` comes back with them. `device` is by default that
    of the first tensor in `like`. With `partial`, the checkpoint may have leaves that `like` does not have.

    What was saved as `per_rank` comes back by the same pattern, to the rank that had it, of as many ranks. `like=None`
    gives all that the checkpoint has, whole, by name: `{"train.step": ..., "cursor[rank 0 of 2]": ...}`. So come back
    lists that have grown, and what ranks had where their number is another.

    Raises `CheckpointError` on every rank: if there is no whole checkpoint, if a file is damaged, and if leaves differ
    in path, shape or dtype, or in whose they are; it lists each.

    >>> import tempfile
    >>> from functitan.checkpoint.save import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/first", {"w": torch.ones(2), "step": 7})
    ...     restore(f"{folder}/first", {"w": torch.empty(2), "step": 0})
    ...     restore(f"{folder}/first", None)
    {'w': tensor([1., 1.]), 'step': 7}
    {'step': 7, 'w': tensor([1., 1.])}
    """
    what = f"ft.checkpoint.restore from {path_text('ft.checkpoint.restore', path)}"
    known = mesh_of(like, mesh)

    def work() -> tuple[list[Leaf], list[Any], int]:
        place = files.locate(path)
        leaves = [] if like is None else leaves_of(what, like, patterns, mesh, rules)[0]
        with clear_errors(what, _FIX_DAMAGED):
            entries, checksums = _index(what, place)
            if like is None:
                leaves = [Leaf(name, None, entry.shape, entry.dtype, None, None) for name, entry in entries.items()]
            else:
                check_same(what, leaves, entries, known, partial or _has_stages(known))
            shared = sum(whose(name) is None for name in entries)
            return leaves, _read(what, place, leaves, entries, checksums, known, _device(what, leaves, device)), shared

    leaves, values, shared = together(known, f"restored {os.fspath(path)}", work)
    if like is None:
        return {leaf.path: value for leaf, value in zip(leaves, values, strict=True)}
    if known is not None and _has_stages(known) and not partial:
        _check_whole(what, leaves, shared, known, _device(what, leaves, device))
    for leaf, x in zip(leaves, values, strict=True):
        if known is not None and isinstance(x, Tensor) and not leaf.own:
            mark_cut(x, "ft.checkpoint.restore", leaf.layout, known.sizes)
    structure = tree.flatten(like)[1]
    own = [tree.leaves(state) for state in states_of(tree.unflatten(structure, [leaf.own for leaf in leaves]))]
    alone = iter([all(each) for each in own])  # states that lie on no mesh: each rank trains its own
    placed = lambda state: state if next(alone) else replace(state, mesh=known, rules=rules or state.rules)
    return tree.map_nodes(placed, TrainState, tree.unflatten(structure, values))


class _Use(NamedTuple):
    """What a stored item is read for: a part of it, and where that goes."""

    item: Item
    to: Tensor | None  # no tensor: a scalar
    source: Block
    target: Block
    leaf: int


def _index(what: str, place: Place) -> tuple[dict[str, Entry], Checksums]:
    """The entries of a checkpoint whose files are all there, in full length."""
    if not files.is_complete(place):
        raise CheckpointError(report(what, ["there is no complete checkpoint"], "look for others beside it"))
    sizes, checksums = _seal(what, place)
    problems = []
    for file, size in sizes.items():
        there = files.size_of(place, file)
        if there is None:
            problems.append(f"{file} is missing")
        elif there != size:
            problems.append(f"{file} has {there} bytes, {size} were written")
    if problems:
        raise CheckpointError(report(what, problems, _FIX_DAMAGED))
    metadata = files.read(place, METADATA)
    if zlib.crc32(metadata) != checksums.get((METADATA, 0)):
        raise CheckpointError(report(what, [f"{METADATA} is damaged: its checksum differs"], _FIX_DAMAGED))
    try:
        entries = entries_of(metadata)
    except ValueError as error:
        raise CheckpointError(
            report(what, [f"{METADATA} is damaged, or no checkpoint's: {error}"], _FIX_DAMAGED)
        ) from error
    problems = [
        f"{METADATA} has {item.path} in {item.file} from byte {item.start} to {item.start + item.length}"
        for entry in entries.values()
        for item in entry.items
        if item.start + item.length > sizes.get(item.file, -1) or item.length < _least(item, entry.dtype)
    ]
    if problems:
        lines = [*problems[:20], "these bytes are not there, or too few for its shape: nothing is allocated"]
        raise CheckpointError(report(what, lines, _FIX_DAMAGED))
    return entries, checksums


def _least(item: Item, dtype: torch.dtype | None) -> int:
    """The bytes that an item has at least: those of its numbers."""
    return 0 if dtype is None else math.prod(item.sizes) * dtype.itemsize


def _seal(what: str, place: Place) -> tuple[dict[str, int], Checksums]:
    """The size of each file, all of them in the checkpoint's own directory, and the checksum of each item."""
    match unsealed(files.read(place, CHECKSUMS)):
        case {"files": dict(sizes), "items": list(items)} if METADATA in sizes:
            numbers = [*sizes.values(), *(n for item in items if isinstance(item, list) for n in item[1:])]
            whole = all(isinstance(item, list) and len(item) == 4 and isinstance(item[0], str) for item in items)
            names = [problem for name in sizes if (problem := name_problem(name)) is not None]
            if names:
                raise CheckpointError(report(what, [f"{CHECKSUMS}: {name}" for name in names], _FIX_DAMAGED))
            if whole and all(type(n) is int and n >= 0 for n in numbers):
                return sizes, {(file, start): crc for file, start, _, crc in items}
    raise CheckpointError(report(what, [f"{CHECKSUMS} is damaged"], _FIX_DAMAGED))


def _device(what: str, leaves: list[Leaf], device: torch.device | str | None) -> torch.device:
    if device is not None:
        return device_of(what, device)
    there = (leaf.value.device for leaf in leaves if isinstance(leaf.value, Tensor) and not leaf.value.is_meta)
    return next(there, torch.device("cpu"))


def _has_stages(mesh: Mesh | None) -> bool:
    """True where a rank asks for the leaves of its pipeline stages alone."""
    return mesh is not None and mesh.sizes.size("pp") > 1


def _check_whole(what: str, leaves: list[Leaf], stored: int, mesh: Mesh, device: torch.device) -> None:
    """Raise on every rank unless the stages have all leaves of a checkpoint, each owned once."""
    own = torch.tensor([sum(not leaf.own and leaf.owner == mesh.place for leaf in leaves)], device=device)
    env = current()._replace(mesh=mesh)
    asked = int(send("all_reduce", own, ("pp",), env, Label("checkpoint.restore", ""), "sum").item())
    if asked != stored:
        problem = f"the pipeline's stages have {asked} leaves, the checkpoint has {stored}"
        raise CheckpointError(report(what, [problem], FIX_OTHER))


def _read(
    what: str,
    place: Place,
    leaves: list[Leaf],
    entries: dict[str, Entry],
    checksums: Checksums,
    mesh: Mesh | None,
    device: torch.device,
) -> list[Any]:
    values: list[Any] = []
    uses: list[_Use] = []
    problems: list[str] = []
    for leaf in leaves:
        block = leaf.block(mesh) if leaf.shape is not None else ()
        value = None
        if leaf.shape is not None:
            value = torch.empty([part.stop - part.start for part in block], dtype=leaf.dtype, device=device)
        needed = [_use(item, value, block, len(values)) for item in entries[leaf.name(mesh)].items]
        uses += [use for use in needed if use is not None]
        covered = sum(math.prod(p.stop - p.start for p in use.target) for use in needed if use is not None)
        if value is not None and covered != value.numel():
            problems.append(f"{METADATA}: the blocks of {leaf.path} cover {covered} of {value.numel()} elements")
        values.append(value)
    if problems:
        raise CheckpointError(report(what, problems, _FIX_DAMAGED))
    uses.sort(key=lambda use: (use.item.file, use.item.start))
    stream, name = None, ""
    try:
        for use in uses:
            if stream is None or name != use.item.file:
                if stream is not None:
                    stream.close()
                stream, name = files.opened(place, use.item.file), use.item.file
            stream.seek(use.item.start)
            data = stream.read(use.item.length)
            if zlib.crc32(data) != checksums.get((name, use.item.start)):
                problems.append(f"{name} is damaged: the checksum of {use.item.path} at byte {use.item.start} differs")
                continue
            try:
                found = unpacked(data)
                mine = described(None if use.to is None else use.item.sizes, leaves[use.leaf].dtype)
                if _described_of(found) != mine:
                    raise ValueError(f"it holds {_described_of(found)}, not {mine}")
            except ValueError as error:
                problems.append(f"{name}: {use.item.path} at byte {use.item.start}: {error}")
                continue
            if use.to is None:
                values[use.leaf] = found
            else:
                use.to[use.target] = found[use.source].to(use.to.device)
    finally:
        if stream is not None:
            stream.close()
    if problems:
        raise CheckpointError(report(what, problems, _FIX_DAMAGED))
    return values


def _use(item: Item, to: Tensor | None, block: Block, leaf: int) -> _Use | None:
    """How an item meets a rank's block of its leaf; `None` if it does not."""
    if item.offsets is None:
        return _Use(item, None, (), (), leaf)
    source, target = [], []
    for start, size, mine in zip(item.offsets, item.sizes, block, strict=True):
        low, high = max(start, mine.start), min(start + size, mine.stop)
        if low >= high:
            return None
        source.append(slice(low - start, high - start))
        target.append(slice(low - mine.start, high - mine.start))
    return _Use(item, to, tuple(source), tuple(target), leaf)


def _described_of(value: Any) -> str:
    return described(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else described(None, None)


_FIX_DAMAGED = "restore an earlier checkpoint, and remove this one"
