"""Overlap communication with compute: start gathers early, and wait for reductions late.

Invariant: at most one message of a kind is under way ahead of its use, so memory grows by one bucket of each.
A captured collective starts where it stands in the graph, and is waited for where its result is first used.
"""

from __future__ import annotations

from itertools import pairwise

from torch.fx import Graph, Node

from functitan.capture.nodes import sent_by
from functitan.capture.passes.order import Places, alike, moves, needed_before, places
from functitan.capture.trace import Program


def overlap(program: Program) -> Program:
    """The program with each gather started when the one before it is first used, each reduction waited for at the next.

    A gather whose shard is computed just before, as of activations, stays where it is.
    """
    graph = program.graph.graph
    for group in alike(graph):
        kind = sent_by(group[0]).message.collective
        if kind == "all_gather":
            _start_early(group, places(graph))
        elif kind in ("reduce_scatter", "all_reduce"):
            _wait_late(graph, group)
    return program


def _start_early(group: list[Node], at: Places) -> None:
    for before, node in reversed(list(pairwise(group))):  # the last first: `before` still in place
        needed = needed_before(sent_by(node).x, at[before], at)
        if needed is not None:
            for other in needed:
                before.prepend(other)
            before.append(node)


def _wait_late(graph: Graph, group: list[Node]) -> None:
    at = places(graph)
    nodes = list(at)
    for node, after in zip(group, [*group[1:], nodes[-1]], strict=True):
        waiting, until = _until_used(node, at)
        place = nodes[min(until, at[after])]
        for user in waiting:
            if at[user] < at[place]:
                place.prepend(user)


def _until_used(node: Node, at: Places) -> tuple[list[Node], int]:
    """The ops of one tensor that follow a reduction, in order, and the place of the first other use."""
    found: dict[Node, None] = {}
    until, open_ = len(at) - 1, [node]
    while open_:
        for user in open_.pop().users:
            if not moves(user):
                until = min(until, at[user])
            elif user not in found:
                found[user] = None
                open_.append(user)
    return sorted(found, key=at.__getitem__), until
