"""Captured collectives made runnable: what the compiler knows on processes, a call of the transport elsewhere.

Invariant: the same messages travel, in the same order, as if `steps.send` had sent them one by one, and the same bytes;
on gloo a reduce-scatter is an all-to-all, and a sum that the compiler fuses with what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from functitan.sharding.context import within
from functitan.sharding.ledger import Entry
from functitan.sharding.mesh import Mesh
from functitan.sharding.passing import read_passing
from functitan.sharding.traced import OWN, Collective, collective_of, emit, entry_of, is_collective, options_of


def lower_collectives(graph: GraphModule, meshes: tuple[Mesh, ...], compiled: bool) -> GraphModule:
    """Replace each captured collective by what runs it on its mesh: functional c10d ops where `compiled`.

    It starts where the captured one stands, and is waited for where the result is first used.
    """
    for node in list(graph.graph.nodes):
        if node.target is OWN:
            x, axis, mesh, dim = node.args
            at = meshes[mesh].index((dim,))
            node.target, node.args = torch.ops.aten.slice.Tensor, (x, axis, at, at + 1)
        if is_collective(node):
            its, entry = collective_of(node), entry_of(node)
            mesh = meshes[its.mesh]
            with graph.graph.inserting_before(node):
                new = _started(graph.graph, its, mesh) if compiled else _called(graph.graph, its, entry, mesh)
            with graph.graph.inserting_before(_first_user(node)):
                new = _finished(graph.graph, its, new, mesh) if compiled else _awaited(graph.graph, new, entry)
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _first_user(node: Node) -> Node:
    after = node.next
    while after not in node.users and after.op != "output":
        after = after.next
    return after


def _called(graph: Graph, its: Collective, entry: Entry, mesh: Mesh) -> Node:
    start, rest = getattr(mesh.transport, its.kind), (its.mesh_dims, *options_of(its), (its.op, its.pattern))
    return _call(graph, its.kind, lambda x: within(entry.name, start, x, *rest), its.x)


def _awaited(graph: Graph, sent: Node, entry: Entry) -> Node:
    return _call(graph, "wait", lambda wait: within(entry.wait, wait), sent)


def _call(graph: Graph, name: str, run: Callable[..., Any], x: Node) -> Node:
    run.__name__ = name  # a graph's printed code wants one
    return graph.call_function(run, (x,))


def _started(graph: Graph, its: Collective, mesh: Mesh) -> Node:
    """As `distributed` does it: shapes there and here must agree."""
    assert mesh.transport.group is not None
    ops = torch.ops._c10d_functional
    name, n, me = mesh.transport.group(its.mesh_dims)
    call = partial(emit, graph)
    match its.kind:
        case "all_gather":
            return call(ops.all_gather_into_tensor.default, call(torch.ops.aten.unsqueeze.default, its.x, 0), n, name)
        case "reduce_scatter" if not mesh.transport.exchanges:
            return call(ops.reduce_scatter_tensor.default, its.x, its.detail, n, name)
        case "all_reduce":
            return call(ops.all_reduce.default, its.x, its.detail, name)
        case "reduce_scatter" | "all_to_all":
            return call(ops.all_to_all_single.default, its.x, [1] * n, [1] * n, name)
    receive, send = read_passing(its.detail).splits(n, me)
    sent = call(torch.ops.aten.unsqueeze.default, its.x, 0)
    sent = sent if any(send) else call(torch.ops.aten.slice.Tensor, sent, 0, 0, 0)
    return call(ops.all_to_all_single.default, sent, receive, send, name)


def _finished(graph: Graph, its: Collective, sent: Node, mesh: Mesh) -> Node:
    done = emit(graph, torch.ops._c10d_functional.wait_tensor.default, sent)
    if its.kind == "reduce_scatter" and mesh.transport.exchanges:
        reduction = torch.ops.aten.sum.dim_IntList if its.detail == "sum" else torch.ops.aten.amax.default
        return emit(graph, reduction, done, [0])
    if its.kind == "permute" and not read_passing(its.detail).reaches(mesh.index(its.mesh_dims)):
        like = its.x.meta["val"]
        return emit(graph, torch.ops.aten.full.default, like.shape, 0, dtype=like.dtype, device=like.device)
    return emit(graph, torch.ops.aten.squeeze.dim, done, 0) if its.kind in ("reduce_scatter", "permute") else done
