"""What an op of a captured graph is: a view, elementwise, or something that a compiler fuses with its neighbours.

Invariant: read from the op's schema and tags alone, so every rank and every pass sees the same.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import Node

CHAIN = 8  # elementwise ops at most that make one value again

aten = torch.ops.aten


def views(node: Node) -> bool:
    """Whether an op gives, or may give, a view of its one tensor."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    return node.target.is_view or node.target in _MAY_VIEW


def base(node: Node) -> Node:
    """What a node is a view of: itself, if it is none."""
    while views(node):
        node = node.all_input_nodes[0]
    return node


def elementwise(node: Node) -> bool:
    """Whether an op computes so little that to do it again costs less than to keep what it gave: views too."""
    if views(node):
        return True
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return node.op == "get_attr"
    tags, random = node.target.tags, torch.Tag.nondeterministic_seeded  # tags as in torch 2.13
    return random not in tags and (torch.Tag.pointwise in tags or not node.all_input_nodes)


def fuses(node: Node) -> bool:
    """Whether a compiler makes one kernel of an op and those before it: what they gave is then never stored."""
    if elementwise(node):
        return True
    return isinstance(node.target, OpOverload) and torch.Tag.reduction in node.target.tags


_MAY_VIEW = aten._unsafe_view.default, aten.reshape.default, aten.contiguous.default
