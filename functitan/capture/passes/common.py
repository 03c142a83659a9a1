"""Compute equal values once: equal ops of equal operands, gathers among them.

Invariant: forward and backward stay apart where a collective is concerned: merging a weight's gather with its regather
would keep the whole weight alive, and turn ZeRO-3 into ZeRO-2. What remat computes again stays computed again. Every
rank merges the same collectives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from functitan.capture.nodes import is_collective, is_uneven, sent_by
from functitan.capture.trace import Program


def merge_equal(program: Program) -> Program:
    """The program with one node for each set of equal ones."""
    graph, seen = program.graph.graph, {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _keeps(node):
            continue
        first = seen.setdefault(_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    return program


def _key(node: Node) -> tuple[Any, ...]:
    args, again = node.args, node.meta.get("custom", {}).get("recomputation")
    if is_collective(node):  # which op asked does not matter
        sent = sent_by(node)
        message = sent.message._replace(op="", pattern="")
        if again is not None:  # the regather of a backward may be that of its recomputation
            message = message._replace(recomputed=True)
        args = sent._replace(message=message)
    return node.target, again, repr((tuple(args), sorted(node.kwargs.items())))  # a node is written as its name


def _keeps(node: Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    return is_uneven(node) or target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
