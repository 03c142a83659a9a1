"""Remove what no result depends on. A collective is pure, and goes on every rank alike."""

from __future__ import annotations

from functitan.capture.trace import Program


def remove_dead(program: Program) -> Program:
    """The program without ops that no result depends on."""
    program.graph.graph.eliminate_dead_code()
    return program
