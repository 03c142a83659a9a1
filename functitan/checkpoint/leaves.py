"""What the leaves of a tree of shards are: each one's path, global shape and dtype, and how it lies on a mesh.

Invariant: a leaf is known by its path, and its block of the global value follows from its pattern; nothing is asked of
other ranks. A leaf that is each rank's own is stored under its path and the rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # private; tried on torch 2.13

from functitan import tree
from functitan.errors import FunctitanError, LayoutError, MeshError, report
from functitan.param import Param
from functitan.sharding.context import as_mesh
from functitan.sharding.layout import Layout, block_of, check_leaves, global_shape
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules
from functitan.state import TrainState

Block = tuple[slice, ...]
SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class PerRank:
    """The type of `ft.checkpoint.per_rank`, which stands in `patterns=` for what each rank has of its own.

    >>> import functitan as ft
    >>> ft.checkpoint.per_rank
    ft.checkpoint.per_rank
    """

    def __repr__(self) -> str:
        return "ft.checkpoint.per_rank"


per_rank = PerRank()


class Leaf(NamedTuple):
    """One leaf. `shape` is global; without it, the leaf is a Python scalar; without `layout`, whole on every rank.

    Where the pattern is `per_rank`, it is this rank's own, and `shape` is of its value.
    """

    path: str
    value: Any  # this rank's shard, its declaration, or a scalar
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    layout: Layout | None
    pattern: Any  # a pattern, a `Param`, `per_rank`, or `None`

    @property
    def own(self) -> bool:
        """True if each rank has a value of its own."""
        return isinstance(self.pattern, PerRank)

    def name(self, mesh: Mesh | None) -> str:
        """What it is called in a checkpoint: its path, and for a value of each rank's own, whose it is."""
        return f"{self.path}[rank {mesh.rank if mesh else 0} of {world_of(mesh)}]" if self.own else self.path

    @property
    def owner(self) -> int:
        """The place along `pp` whose ranks write it."""
        return self.pattern.owner if isinstance(self.pattern, Param) else 0

    def block(self, mesh: Mesh | None) -> Block:
        """The part of the global shape that this rank holds."""
        assert self.shape is not None
        if mesh is None or self.layout is None:
            return tuple(slice(0, size) for size in self.shape)
        return block_of(self.layout, self.shape, mesh)


def leaves_of(
    what: str,
    values: tree.Tree,
    patterns: tree.Tree,
    mesh: Mesh | DeviceMesh | None,
    rules: AxisRules | None,
) -> tuple[list[Leaf], Mesh | None]:
    """The leaves of a tree of shards or of declarations, and the mesh they lie on.

    A leaf's pattern is that of `patterns` (a tree or a prefix), else its declaration: the leaf itself, or what a
    `TrainState` around it keeps. Mesh and rules are those given, else those of a `TrainState` in the tree.
    `per_rank` in place of a pattern says that each rank has a value of its own there, or a whole subtree.
    Raises errors that list every leaf of a kind that no checkpoint holds, or that does not fit its pattern.
    """
    described = tree.leaves(tree.map_nodes(TrainState.declared, TrainState, values))
    paths, found = tree.paths(values), tree.leaves(values)
    given = [None] * len(found) if patterns is None else tree.broadcast_prefix(patterns, values, f"{what}: patterns")
    if len(described) != len(found):
        raise FunctitanError(report(what, ["a TrainState has no declarations of its optimizer state"], _FIX_STATE))
    known, tables = mesh_of(values, mesh), (state.rules for state in states_of(values))
    table = next((its for its in tables if its is not None), None) if rules is None else rules
    if known is not None and not isinstance(table, AxisRules):
        raise MeshError(report(what, [f"rules is {table!r}"], "give a table: rules=ft.AxisRules({...})"))
    bad = [
        f"{path or 'the value'} is {kind}" for path, x in zip(paths, found, strict=True) if (kind := _unfit(path, x))
    ]
    if bad:
        raise FunctitanError(report(what, bad, _FIX_KINDS))
    declared = [
        pattern if pattern is not None else own if isinstance(own, Param) else None
        for pattern, own in zip(given, described, strict=True)
    ]
    shapes = [tuple(x.shape) if isinstance(x, (Tensor, Param)) else None for x in found]
    layouts: list[Layout | None] = [None] * len(found)
    if known is not None:
        assert table is not None
        patterned = [None if isinstance(pattern, PerRank) else pattern for pattern in declared]
        known_shapes = list(zip(paths, patterned, [shape or () for shape in shapes], strict=True))
        layouts = check_leaves(what, known_shapes, table, known.sizes, shapes_are_local=True)
        shapes = [
            shape if layout is None or isinstance(x, Param) else global_shape(layout, shape or (), known.sizes)
            for x, shape, layout in zip(found, shapes, layouts, strict=True)
        ]
        check_leaves(what, zip(paths, patterned, [s or () for s in shapes], strict=True), table, known.sizes)
    _check_shapes(what, paths, declared, shapes)
    dtypes = [getattr(x, "dtype", None) for x in found]
    return [Leaf(*each) for each in zip(paths, found, shapes, dtypes, layouts, declared, strict=True)], known


def described(shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> str:
    """A leaf's shape and dtype in words."""
    return "a scalar" if shape is None else f"{shape} {str(dtype).removeprefix('torch.')}"


def mesh_of(values: tree.Tree, mesh: Mesh | DeviceMesh | None) -> Mesh | None:
    """The mesh that is given, else that of a `TrainState` in the tree."""
    if mesh is not None:
        return as_mesh(mesh)
    return next((state.mesh for state in states_of(values) if state.mesh is not None), None)


def device_of(what: str, device: object) -> torch.device:
    """The device that is given. Raises `FunctitanError` for one that this machine lacks."""
    try:
        found = torch.device(device)  # type: ignore[arg-type]
        torch.empty(0, device=found)
    except Exception as error:  # torch has several kinds, an AssertionError among them
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FunctitanError(
            report(what, [f"device is {device!r}: {text}"], "give device='cpu', or one there is")
        ) from error
    return found


def world_of(mesh: Mesh | None) -> int:
    """The number of ranks."""
    return 1 if mesh is None else math.prod(mesh.sizes.sizes)


def whose(name: str) -> tuple[str, int, int] | None:
    """Path, rank and number of ranks of a value of one rank's own; `None` for other names in a checkpoint.

    >>> whose("loader.cursor[rank 1 of 4]"), whose("loader.cursor")
    (('loader.cursor', 1, 4), None)
    """
    match = re.fullmatch(r"(.*)\[rank (\d+) of (\d+)\]", name, re.DOTALL)
    return None if match is None else (match[1], int(match[2]), int(match[3]))


def device_among(values: Iterable[Any]) -> torch.device:
    """Where messages about these values are made: on the accelerator, if one of them lies there."""
    places = [x.device for x in values if isinstance(x, Tensor) and x.device.type != "meta"]
    return next((place for place in places if place.type != "cpu"), torch.device("cpu"))


def states_of(values: tree.Tree) -> list[TrainState]:
    """The `TrainState`s in a tree, in order."""
    found: list[TrainState] = []
    tree.map_nodes(found.append, TrainState, values)
    return found


def _check_shapes(what: str, paths: list[str], declared: list[Any], shapes: list[Any]) -> None:
    problems = [
        f"{path}: {pattern!r}, and the shards make {shape}"
        for path, pattern, shape in zip(paths, declared, shapes, strict=True)
        if isinstance(pattern, Param) and shape != pattern.shape
    ]
    if problems:
        raise LayoutError(report(what, problems, "give the mesh and the rules that the tensors lie under"))


def _unfit(path: str, x: Any) -> str:
    """What a leaf is that no checkpoint holds; empty for the others."""
    if whose(path):
        return "named as what each rank has of its own"
    if not isinstance(x, Tensor):
        return "" if isinstance(x, Param) or type(x) in SCALARS else f"a {type(x).__name__}"
    if is_traceable_wrapper_subclass(x):
        return f"a {type(x).__name__}"
    strided = x.layout is torch.strided and not x.is_nested
    return "" if strided and not x.is_quantized else "a tensor that is sparse, nested or quantized"


_FIX_KINDS = "a checkpoint holds tensors, and scalars: bool, int, float, str"
_FIX_STATE = "make it by ft.TrainState.create, or by ft.TrainState.declare"
