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

from functitan.capture.nodes import OWN, Sent, emit, is_collective, message_of, sent_by
from functitan.sharding.context import within
from functitan.sharding.mesh import Mesh
from functitan.sharding.message import Message, Passing


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
            sent = sent_by(node)._replace(message=message_of(node))
            mesh = meshes[sent.mesh]
            with graph.graph.inserting_before(node):
                new = _started(graph.graph, sent, mesh) if compiled else _called(graph.graph, sent, mesh)
            with graph.graph.inserting_before(_first_user(node)):
                new = _finished(graph.graph, sent, new, mesh) if compiled else _awaited(graph.graph, new, sent.message)
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


def _called(graph: Graph, sent: Sent, mesh: Mesh) -> Node:
    start, message = mesh.transport.start, sent.message
    return _call(graph, message.collective, lambda x: within(message.name, start, message, x), sent.x)


def _awaited(graph: Graph, started: Node, message: Message) -> Node:
    return _call(graph, "wait", lambda wait: within(message.wait, wait), started)


def _call(graph: Graph, name: str, run: Callable[..., Any], x: Node) -> Node:
    run.__name__ = name  # a graph's printed code wants one
    return graph.call_function(run, (x,))


def _started(graph: Graph, sent: Sent, mesh: Mesh) -> Node:
    """As `distributed` does it: shapes there and here must agree."""
    assert mesh.transport.group is not None
    ops, (x, _, message) = torch.ops._c10d_functional, sent
    name, n, me = mesh.transport.group(message.mesh_dims)
    call = partial(emit, graph)
    match message.collective, message.how:
        case "all_gather", _:
            return call(ops.all_gather_into_tensor.default, call(torch.ops.aten.unsqueeze.default, x, 0), n, name)
        case "reduce_scatter", op if not mesh.transport.exchanges:
            return call(ops.reduce_scatter_tensor.default, x, op, n, name)
        case "all_reduce", op:
            return call(ops.all_reduce.default, x, op, name)
        case "reduce_scatter" | "all_to_all", _:
            return call(ops.all_to_all_single.default, x, [1] * n, [1] * n, name)
        case "permute", Passing() as way:
            receive, send = way.splits(n, me)
            rows = call(torch.ops.aten.unsqueeze.default, x, 0)
            rows = rows if any(send) else call(torch.ops.aten.slice.Tensor, rows, 0, 0, 0)
            return call(ops.all_to_all_single.default, rows, receive, send, name)
    raise AssertionError(message)


def _finished(graph: Graph, sent: Sent, started: Node, mesh: Mesh) -> Node:
    done, message = emit(graph, torch.ops._c10d_functional.wait_tensor.default, started), sent.message
    if message.collective == "reduce_scatter" and mesh.transport.exchanges:
        reduction = torch.ops.aten.sum.dim_IntList if message.how == "sum" else torch.ops.aten.amax.default
        return emit(graph, reduction, done, [0])
    if isinstance(message.how, Passing) and not message.how.reaches(mesh.index(message.mesh_dims)):
        like = sent.x.meta["val"]
        return emit(graph, torch.ops.aten.full.default, like.shape, 0, dtype=like.dtype, device=like.device)
    is_row = message.collective in ("reduce_scatter", "permute")
    return emit(graph, torch.ops.aten.squeeze.dim, done, 0) if is_row else done
