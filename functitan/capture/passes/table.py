"""Passes over captured programs, by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from functitan.capture.passes.bucket import bucket_collectives
from functitan.capture.passes.common import merge_equal
from functitan.capture.passes.dead import remove_dead
from functitan.capture.passes.keep import keep_gathered
from functitan.capture.passes.overlap import overlap
from functitan.capture.passes.reductions import merge_reductions
from functitan.capture.passes.scatter import scatter_reductions
from functitan.capture.trace import Program, unseen

PASSES: dict[str, Callable[[Program], Program]] = {
    "merge_equal": merge_equal,
    "keep_gathered": keep_gathered,
    "scatter_reductions": scatter_reductions,
    "merge_reductions": merge_reductions,
    "remove_dead": remove_dead,
    "bucket_collectives": bucket_collectives,
    "overlap": overlap,
}
ASKED = ("keep_gathered",)  # only where an argument of `ft.jit` asks


def run_passes(program: Program, names: tuple[str, ...]) -> Program:
    """The program after these passes."""
    for name in names:
        with unseen():
            program = PASSES[name](program)
        program.graph.graph.lint()
        program.graph.recompile()
    return program
