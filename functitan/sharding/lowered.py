"""Captured collectives made runnable: what the compiler knows on processes, a call of the transport elsewhere.

Invariant: the same messages travel, in the same order, as if `steps.send` had sent them one by one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from functitan.sharding.mesh import Mesh
from functitan.sharding.traced import Collective, collective_of, is_collective, options_of


def lower_collectives(graph: GraphModule, meshes: tuple[Mesh, ...], compiled: bool) -> GraphModule:
    """Replace each captured collective by what runs it on its mesh: functional c10d ops, and waits, where `compiled`."""
    for node in list(graph.graph.nodes):
        if is_collective(node):
            its = collective_of(node)
            mesh = meshes[its.mesh]
            with graph.graph.inserting_before(node):
                new = _functional(graph, its, mesh) if compiled else _called(graph, its, mesh)
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _called(graph: GraphModule, its: Collective, mesh: Mesh) -> Node:
    call = partial(_run, mesh=mesh, its=its._replace(x=None))
    call.__name__ = its.kind  # type: ignore[attr-defined]  # a graph's printed code wants one
    return graph.graph.call_function(call, (its.x,))


def _run(x: Tensor, mesh: Mesh, its: Collective) -> Tensor:
    return getattr(mesh.transport, its.kind)(x, its.mesh_dims, *options_of(its), (its.op, its.pattern))


def _functional(graph: GraphModule, its: Collective, mesh: Mesh) -> Node:
    """As `distributed` does it: shapes there and here must agree."""
    assert mesh.transport.group is not None
    ops = torch.ops._c10d_functional
    name, n, me = mesh.transport.group(its.mesh_dims)
    call = partial(_node, graph)
    match its.kind:
        case "all_gather":
            sent = call(ops.all_gather_into_tensor.default, call(torch.ops.aten.unsqueeze.default, its.x, 0), n, name)
        case "reduce_scatter":
            sent = call(ops.reduce_scatter_tensor.default, its.x, its.detail, n, name)
        case "all_reduce":
            sent = call(ops.all_reduce.default, its.x, its.detail, name)
        case "all_to_all":
            sent = call(ops.all_to_all_single.default, its.x, [1] * n, [1] * n, name)
        case "permute":
            send, receive, shift = [0] * n, [0] * n, int(its.detail)
            send[(me + shift) % n] = receive[(me - shift) % n] = 1
            sent = call(
                ops.all_to_all_single.default, call(torch.ops.aten.unsqueeze.default, its.x, 0), receive, send, name
            )
    done = call(ops.wait_tensor.default, sent)
    if its.kind in ("reduce_scatter", "permute"):
        done = call(torch.ops.aten.squeeze.dim, done, 0)
    return done


def _node(graph: GraphModule, target: Any, *args: Any) -> Node:
    node = graph.graph.call_function(target, args)
    values = torch.fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values)
    return node
