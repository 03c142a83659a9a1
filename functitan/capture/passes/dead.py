"""Remove what no result depends on.

Invariant: every rank keeps the same collectives: one that all use alike goes on all, and the others stay.
"""

from __future__ import annotations

from torch.fx import Node

from functitan.capture.nodes import is_collective, is_uneven
from functitan.capture.trace import Program


def remove_dead(program: Program) -> Program:
    """The program without ops that no result depends on."""
    program.graph.graph.eliminate_dead_code(_stays)
    return program


def _stays(node: Node) -> bool:
    return is_uneven(node) if is_collective(node) else node.is_impure()
