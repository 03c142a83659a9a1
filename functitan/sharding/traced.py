"""Collectives in a captured program, and a rank's own part of a whole value: opaque ops that a graph can hold.

Invariant: a captured collective says all that `steps.send` knew when it was traced (kind, mesh, dims, label, phase), so
passes and ledgers read it from the graph alone. The ops have shapes and no kernels: they never run as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg
from torch.fx.node import has_side_effect

from functitan.sharding.ledger import FORMULAS, Entry
from functitan.sharding.mesh import Mesh
from functitan.sharding.passing import read_passing
from functitan.sharding.rules import Dims

# torch.library.Library and its Meta kernels as graph ops: tried on torch 2.13
_LIBRARY = torch.library.Library("functitan", "DEF")
_LIBRARY.define(
    "collective(Tensor x, str kind, int mesh, int size, str dims, str detail, str op, str pattern, str phase, "
    "bool recomputed) -> Tensor"
)
_LIBRARY.define("own(Tensor x, int axis, int mesh, str dim) -> Tensor")
COLLECTIVE = torch.ops.functitan.collective.default
has_side_effect(COLLECTIVE)  # the other ranks send theirs, also where this one uses nothing that comes
_PRODUCT = re.compile(r"aten\.(\w*mm|_scaled_dot_product\w*)\.|functitan_regions\.")  # what takes time to speak of
OWN = torch.ops.functitan.own.default  # the part of an axis that is of this rank's number along a mesh dim: of size 1


class Capture:
    """What a program meets while it is traced, besides tensors."""

    def __init__(self) -> None:
        self.meshes: list[Mesh] = []  # a graph names them by their place here
        # a bool `[]`, and what to raise where it holds
        self.failures: list[tuple[Tensor, Callable[[], Exception]]] = []
        self.calls: dict[Any, Any] = {}  # captured programs that it calls, by the op that stands for each
        self.notes: list[str] = []  # what a ledger of it should say
        self.compared = False  # whether ranks are to compare what becomes of it, before they run it
        self.recomputations = 0  # so far; the nodes of each are marked with its number

    def place(self, mesh: Mesh) -> int:
        if mesh not in self.meshes:
            self.meshes.append(mesh)
        return self.meshes.index(mesh)


class Collective(NamedTuple):
    """The arguments of the op, as a graph's node holds them."""

    x: Any
    kind: str
    mesh: int
    size: int
    dims: str
    detail: str  # the reduction of a reduce-scatter or all-reduce, a permute's `Passing`
    op: str
    pattern: str
    phase: str
    recomputed: bool

    @property
    def mesh_dims(self) -> Dims:
        return tuple(self.dims.split())


def collective(x: Tensor, *rest: Any) -> Tensor:
    """Put a collective into the graph that is being traced: `rest` are the fields of `Collective` after `x`."""
    return COLLECTIVE(x, *rest)


def emit(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node of a captured graph, where the graph inserts, with its fake value."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node


def is_collective(node: Node) -> bool:
    return node.op == "call_function" and node.target is COLLECTIVE


def is_uneven(node: Node) -> bool:
    """Whether ranks may use a collective differently: a ring's brings some what they need, and others nothing.

    What a pass finds out about its values holds on this rank alone, so it must stay as it is on all.
    """
    return is_collective(node) and collective_of(node).kind == "permute"


def collective_of(node: Node) -> Collective:
    """The collective that a node stands for."""
    fields: tuple[Any, ...] = node.args
    return Collective(*fields)


def entry_of(node: Node) -> Entry:
    """What a captured collective enters into a ledger; hidden where a product stands between it and its first use."""
    its = collective_of(node)
    x = its.x.meta["val"]
    sent = FORMULAS[its.kind](x.numel() * x.element_size(), its.size)
    after, hidden = node.next, False
    while after not in node.users and after.op != "output" and not hidden:
        hidden, after = _PRODUCT.search(str(after.target)) is not None, after.next
    of = its.kind, its.mesh_dims, sent, x.dtype, its.phase, its.recomputed, its.op, its.pattern
    return Entry(*of, hidden)


def options_of(its: Collective) -> tuple:
    """The arguments of the transport's function between dims and label."""
    if its.kind in ("reduce_scatter", "all_reduce"):
        return (its.detail,)
    return (read_passing(its.detail),) if its.kind == "permute" else ()


def unsent(kind: str, x: Tensor, size: int) -> Tensor:
    """An empty result of a collective of `size` ranks, on fake tensors or "meta": its shape, with nothing sent."""
    if kind == "all_gather":
        return x.new_empty((size, *x.shape))
    if kind == "reduce_scatter":
        return x.new_empty(x.shape[1:])
    return x.new_empty(x.shape)


def _own(x: Tensor, axis: int, mesh: int, dim: str) -> Tensor:
    view = x.narrow(axis, 0, 1)
    return x.new_empty_strided(view.shape, view.stride())


_LIBRARY.impl("own", _own, "Meta")
_LIBRARY.impl("collective", lambda x, kind, mesh, size, *rest: unsent(kind, x, size), "Meta")
