"""Compute elementwise ops again where they are read far from where they were first made, as of forward in backward.

Invariant: only of what is alive there anyway, and only what no kernel must store: so nothing lives longer, and the
numbers are the same to the bit. A compiler stores what it finds with several readers; with one reader it need not.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from functitan.capture.kinds import CHAIN, base, elementwise, fuses, views
from functitan.capture.passes.order import Places
from functitan.capture.trace import Program


def compute_again(program: Program) -> Program:
    """The program where readers of an elementwise value beyond the next matmul make it again from what lives on."""
    graph = program.graph.graph
    stretch = _stretches(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or not fuses(node):
            continue
        made: dict[Node, Node] = {}
        for x in node.all_input_nodes:
            root = base(x)
            if root.op != "call_function" or views(root) or not elementwise(root) or stretch[root] == stretch[node]:
                continue
            if all(fuses(user) for user in _readers(root)):
                chain = _chain(x, stretch[node], stretch)
                if chain is not None:
                    _copy(graph, chain, node, made)
                    node.replace_input_with(x, made[x])
        stretch.update(dict.fromkeys(made.values(), stretch[node]))
    graph.eliminate_dead_code()
    return program


def _stretches(graph: Graph) -> Places:
    """For each node the number of ops before it that do not fuse: those between two such ops make few kernels."""
    found, count = {}, 0
    for node in graph.nodes:
        found[node] = count
        count += node.op == "call_function" and not fuses(node)
    return found


def _readers(node: Node) -> list[Node]:
    """What reads a node, or a view of it."""
    return [reader for user in node.users for reader in (_readers(user) if views(user) else [user])]


def _chain(x: Node, place: int, stretch: Places) -> list[Node] | None:
    """The ops that make `x` again in that stretch, in order; `None` where they read what does not live so long."""
    begun: set[Node] = {x}
    chain: list[Node] = []

    def visit(node: Node) -> None:
        for y in node.all_input_nodes:
            if y not in begun and elementwise(y) and (views(y) or not _lives(y, place, stretch, begun)):
                begun.add(y)
                visit(y)
        chain.append(node)

    visit(x)
    ends = {base(y) for node in chain for y in node.all_input_nodes if y not in begun}
    return chain if len(chain) <= CHAIN and all(_lives(end, place, stretch, begun) for end in ends) else None


def _lives(node: Node, place: int, stretch: Places, chain: set[Node]) -> bool:
    """Whether something outside the chain reads a node in that stretch or later, or the caller holds it."""
    return node.op == "placeholder" or any(stretch[reader] >= place for reader in _readers(node) if reader not in chain)


def _copy(graph: Graph, chain: list[Node], before: Node, made: dict[Node, Node]) -> None:
    with graph.inserting_before(before):
        for node in chain:
            if node not in made:
                made[node] = graph.node_copy(node, lambda y: made.get(y, y))
