"""Remove what no result depends on.

Invariant: every rank keeps the same collectives. A collective goes on all alike, but for a ring's: a rank may have no
use for what comes, where the others do.
"""

from __future__ import annotations

from torch.fx import Node

from functitan.capture.trace import Program
from functitan.sharding.traced import collective_of, is_collective


def remove_dead(program: Program) -> Program:
    """The program without ops that no result depends on."""
    program.graph.graph.eliminate_dead_code(_stays)
    return program


def _stays(node: Node) -> bool:
    return collective_of(node).kind == "permute" if is_collective(node) else node.is_impure()
