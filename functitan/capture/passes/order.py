"""Where in a graph a collective may stand, and what moves with it.

Invariant: only ops of one tensor (views, casts, copies), and a bucket's concatenation, move along with a collective;
what computes stays in its place, so a pass keeps alive for longer only what it says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from functitan.capture.nodes import is_collective, sent_by

Places = dict[Node, int]


def places(graph: Graph) -> Places:
    """The place of each node in the order of execution."""
    return {node: i for i, node in enumerate(graph.nodes)}


def alike(graph: Graph) -> list[list[Node]]:
    """The collectives that one message could carry, by kind, mesh, dims, reduction, dtype and stretch of a phase.

    A phase may come again, as forward does in a step with two gradients: those are two stretches.
    """
    groups: dict[Any, list[Node]] = {}
    stretch, before = 0, ""
    for node in graph.nodes:
        if is_collective(node):
            _, mesh, message = sent_by(node)
            stretch += before != message.phase and not message.recomputed
            before = before if message.recomputed else message.phase
            kind = message._replace(shape=(), op="", pattern="")
            groups.setdefault((kind, mesh, stretch), []).append(node)
    return list(groups.values())


def needed_before(x: Node, place: int, at: Places) -> list[Node] | None:
    """What must move up for `x` to be known at `place`, in order; `None` where that is more than may move."""
    found: dict[Node, None] = {}
    open_ = [x]
    while open_:
        node = open_.pop()
        if at[node] >= place and node not in found:
            if not moves(node):
                return None
            found[node] = None
            open_ += node.all_input_nodes
    return sorted(found, key=at.__getitem__)


def used_before(node: Node, place: int, at: Places) -> list[Node] | None:
    """What must move down for `node` to come at `place`, in order; `None` where that is more than may move."""
    found: dict[Node, None] = {}
    open_ = [node]
    while open_:
        for user in open_.pop().users:
            if at[user] < place and user not in found:
                if not moves(user):
                    return None
                found[user] = None
                open_.append(user)
    return sorted(found, key=at.__getitem__)


def last_use(node: Node, at: Places) -> int:
    """The place of the last op that reads a node or a view or copy of it: a compiler may read through copies."""
    return max((max(at[user], last_use(user, at) if moves(user) else 0) for user in node.users), default=at[node])


def moves(node: Node) -> bool:
    """Whether an op may move along with a collective: it takes one tensor and computes nothing to speak of."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or is_collective(node):
        return False
    joins = node.target is torch.ops.aten.cat.default  # of a bucket
    return not node.target._schema.is_mutable and (joins or len(node.all_input_nodes) == 1)
