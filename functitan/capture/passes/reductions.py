"""Merge reductions: a sum of reductions is the reduction of a sum.

Invariant: reduction is linear, so only the order of summation changes. Both are of one phase: a sum over microbatches
is not taken before it is reduced, where it would be whole.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from functitan.capture.nodes import COLLECTIVE, emit, is_collective, sent_by
from functitan.capture.passes.order import alike, moves
from functitan.capture.trace import Program

aten = torch.ops.aten


def merge_reductions(program: Program) -> Program:
    """The program with `reduce(a) + reduce(b)` as `reduce(a + b)`, also through views, where nothing else uses them."""
    graph = program.graph.graph
    groups = {node: i for i, group in enumerate(alike(graph)) for node in group}
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        left, right = (reduction_of(x) for x in node.args)
        if left is None or right is None or left[1] != right[1] or groups[left[0]] != groups[right[0]]:
            continue
        first, second = sent_by(left[0]), sent_by(right[0])
        if first.x.meta["val"].shape != second.x.meta["val"].shape:
            continue
        with graph.inserting_before(node):
            total = emit(graph, aten.add.Tensor, first.x, second.x)
            new = emit(graph, COLLECTIVE, *first._replace(x=total).arguments)
            groups[new] = groups[left[0]]
            new = viewed(graph, new, left[1])
        node.replace_all_uses_with(new)
        erase(graph, node)
    return program


def erase(graph: Graph, node: Node) -> None:
    """Erase a node, and what only it used."""
    inputs = node.all_input_nodes
    if not node.users and node.op == "call_function":
        graph.erase_node(node)
        for x in inputs:
            erase(graph, x)


def viewed(graph: Graph, x: Node, views: tuple) -> Node:
    """The views, as `reduction_of` gives them, of another value."""
    for target, rest, kwargs in views:
        x = emit(graph, target, x, *rest, **dict(kwargs))
    return x


def reduction_of(x: object) -> tuple[Node, tuple] | None:
    """The summing collective that a value is a view of, and the views in order; `None` where others use it too."""
    views = []
    while isinstance(x, Node) and len(x.users) == 1:
        if is_collective(x):
            message = sent_by(x).message
            sums = message.collective in ("reduce_scatter", "all_reduce") and message.how == "sum"
            return (x, tuple(views[::-1])) if sums else None
        if not moves(x) or not (x.target.is_view or x.target is aten.clone.default):  # type: ignore[union-attr]
            return None
        views.append((x.target, x.args[1:], tuple(x.kwargs.items())))
        x = x.args[0]
    return None
