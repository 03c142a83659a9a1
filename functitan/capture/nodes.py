"""Collectives in a captured program, and a rank's own part of a whole value: opaque ops that a graph can hold.

Invariant: a captured collective holds the whole message that would have been sent, so passes and ledgers read it from
the graph alone. The ops have shapes and no kernels: they never run as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg
from torch.fx.node import has_side_effect
from torch.fx.traceback import annotate  # not stable: tried on torch 2.13

from functitan.sharding.around import Around, noting
from functitan.sharding.mesh import Mesh, Transport, Wait
from functitan.sharding.message import Message, Passing
from functitan.sharding.shapes import shape_of_result

# torch.library.Library and its Meta kernels as graph ops: tried on torch 2.13
_LIBRARY = torch.library.Library("functitan", "DEF")
_LIBRARY.define(
    "collective(Tensor x, int mesh, str collective, str[] mesh_dims, int ranks, str reduction, int shift, int[]? to, "
    "str op, str pattern, str phase, bool recomputed) -> Tensor"
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
        """The number by which the graph names a mesh."""
        if mesh not in self.meshes:
            self.meshes.append(mesh)
        return self.meshes.index(mesh)

    def transport(self, mesh: Mesh) -> Transport:
        """The transport of a mesh while its program is traced: messages become nodes of the graph."""
        place = self.place(mesh)

        def start(message: Message, x: Tensor) -> Wait:
            result = COLLECTIVE(*Sent(x, place, message).arguments)
            return lambda: result

        return mesh.transport._replace(start=start, own=lambda x, axis, dim, _: OWN(x, axis, place, dim))


def capturing(capture: Capture) -> Around:
    """The hooks of a capture: messages become nodes of its graph, and it keeps notes for a ledger."""

    def recomputation() -> AbstractContextManager[Any]:
        """Number the nodes of one recomputation, which passes keep apart from those of forward."""
        capture.recomputations += 1
        return annotate({"recomputation": capture.recomputations})

    return Around(
        capture,
        transport=capture.transport,
        note=noting(capture.notes),
        recomputation=recomputation,
        remembers=True,
        changes_programs=True,
    )


class Sent(NamedTuple):
    """A collective as a graph's node holds it: its tensor, which mesh carries it, and the message."""

    x: Any
    mesh: int
    message: Message

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What a node is made of. The shape and dtype of a message are those of its tensor."""
        m = self.message
        way = m.how if isinstance(m.how, Passing) else Passing(0)
        op = "" if isinstance(m.how, Passing) else m.how
        of = m.collective, list(m.mesh_dims), m.ranks, op, way.shift, None if way.to is None else list(way.to)
        return (self.x, self.mesh, *of, m.op, m.pattern, m.phase, m.recomputed)


def sent_by(node: Node) -> Sent:
    """The collective that a node stands for."""
    fields: tuple[Any, ...] = node.args
    x, mesh, kind, dims, ranks, reduction, shift, to, *asked = fields
    how = Passing(shift, None if to is None else tuple(to)) if kind == "permute" else reduction
    value = x.meta["val"]
    return Sent(x, mesh, Message(kind, tuple(dims), ranks, tuple(value.shape), value.dtype, how, *asked))


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
    return is_collective(node) and sent_by(node).message.collective == "permute"


def message_of(node: Node) -> Message:
    """The message of a node; hidden where a product stands between it and its first use."""
    after, hidden = node.next, False
    while after not in node.users and after.op != "output" and not hidden:
        hidden, after = _PRODUCT.search(str(after.target)) is not None, after.next
    return sent_by(node).message._replace(hidden=hidden)


def _own(x: Tensor, axis: int, mesh: int, dim: str) -> Tensor:
    view = x.narrow(axis, 0, 1)
    return x.new_empty_strided(view.shape, view.stride())


_LIBRARY.impl("own", _own, "Meta")
_LIBRARY.impl("collective", lambda x, mesh, kind, dims, ranks, *rest: shape_of_result(kind, x, ranks), "Meta")
