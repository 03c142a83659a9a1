"""Scatter reductions: of an all-reduce that each rank takes its own part of, only that part is reduced.

Invariant: only where nothing else uses the whole, so half the bytes travel, and the sums are the same.
"""

from __future__ import annotations

from math import prod
from typing import cast

import torch
from torch.fx import Node

from functitan.capture.nodes import COLLECTIVE, OWN, Sent, emit, sent_by
from functitan.capture.passes.reductions import erase, reduction_of, viewed
from functitan.capture.trace import Program

aten = torch.ops.aten


def scatter_reductions(program: Program) -> Program:
    """The program with `own part of all_reduce(x)` as a reduce-scatter, over those mesh dims that the part is of."""
    graph = program.graph.graph
    for node in list(graph.nodes):
        if node.target is not OWN or any(user.target is OWN for user in node.users):
            continue
        parts = _parts(node)
        found = reduction_of(parts[0].args[0])
        if found is None or sent_by(found[0]).message.collective != "all_reduce":
            continue
        (summed, mesh, message), place = sent_by(found[0]), cast(int, node.args[2])
        sizes = program.meshes[place].sizes
        dims = tuple(str(part.args[3]) for part in parts)
        rest = tuple(dim for dim in message.mesh_dims if dim not in dims)
        if mesh != place or not set(dims) <= {*message.mesh_dims}:
            continue
        axes = [cast(int, part.args[1]) for part in parts]
        with graph.inserting_before(node):
            x = viewed(graph, summed, found[1])  # views commute with a reduction
            shape = list(x.meta["val"].shape)
            others = [axis for axis in range(len(shape)) if axis not in axes]
            x = emit(graph, aten.permute.default, x, [*axes, *others])
            lead = prod(shape[axis] for axis in axes)
            x = emit(graph, aten.reshape.default, x, [lead, *(shape[axis] for axis in others)])
            scatter = message._replace(collective="reduce_scatter", ranks=sizes.size(dims), mesh_dims=dims)
            x = emit(graph, COLLECTIVE, *Sent(x, mesh, scatter).arguments)
            if rest:
                message = message._replace(ranks=sizes.size(rest), mesh_dims=rest)
                x = emit(graph, COLLECTIVE, *Sent(x, mesh, message).arguments)
            x = emit(graph, aten.reshape.default, x, list(node.meta["val"].shape))
        node.replace_all_uses_with(x)
        erase(graph, node)
    return program


def _parts(node: Node) -> list[Node]:
    """The nodes that take a part of a part, in order: the last is `node`."""
    parts = [node]
    while isinstance(x := parts[0].args[0], Node) and x.target is OWN and len(x.users) == 1:
        parts.insert(0, x)
    return parts
