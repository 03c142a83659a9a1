"""Ranks compare the collectives of a captured program: each has traced, and improved, its own.

Invariant: ranks whose programs hold the same collectives in the same order go on; others raise the first difference,
where they would hang, or send each other wrong data.
"""

from __future__ import annotations

from functitan.capture.trace import Program


def compare(program: Program) -> None:
    """Let the ranks of its mesh agree on each collective. Raises `CollectiveError`, on all of them."""
    for mesh in program.meshes[:1]:  # all that run the program are its ranks
        for number, entry in enumerate(program.entries()):
            name = entry._replace(hidden=False).name  # a rank may have less to compute beside it
            mesh.transport.agree(f"runs {name}, {entry.bytes} bytes of {entry.dtype}, as number {number} of its graph")
        mesh.transport.agree("runs the end of its graph")
