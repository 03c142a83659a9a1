"""Keep gathered: what forward gathered is not gathered again in backward, nor by remat.

Invariant: only when asked for: a weight stays whole from its first use to its last, which turns ZeRO-3 into ZeRO-2.
"""

from __future__ import annotations

from functitan.capture.nodes import is_collective, sent_by
from functitan.capture.passes.common import merge_equal
from functitan.capture.trace import Program


def keep_gathered(program: Program) -> Program:
    """The program with one gather for each shard, whatever the phase; best after `merge_equal`."""
    graph, seen = program.graph.graph, {}
    for node in list(graph.nodes):
        if is_collective(node) and (sent := sent_by(node)).message.collective == "all_gather":
            first = seen.setdefault((sent.x, sent.mesh, sent.message.mesh_dims), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
    return merge_equal(program)  # what was made of one weight twice
