"""Passes over captured programs, by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from functitan.capture.passes.again import compute_again
from functitan.capture.passes.attention import unfuse_attention
from functitan.capture.passes.bucket import bucket_collectives
from functitan.capture.passes.common import merge_equal
from functitan.capture.passes.dead import remove_dead
from functitan.capture.passes.keep import keep_gathered
from functitan.capture.passes.overlap import overlap
from functitan.capture.passes.reductions import merge_reductions
from functitan.capture.passes.scatter import scatter_reductions
from functitan.capture.trace import Program, unseen
from functitan.errors import CaptureError, nearest, report

PASSES: dict[str, Callable[[Program], Program]] = {
    "merge_equal": merge_equal,
    "keep_gathered": keep_gathered,
    "scatter_reductions": scatter_reductions,
    "merge_reductions": merge_reductions,
    "compute_again": compute_again,
    "remove_dead": remove_dead,
    "bucket_collectives": bucket_collectives,
    "overlap": overlap,
    "unfuse_attention": unfuse_attention,
}
ASKED = ("keep_gathered",)  # only where an argument of `ft.jit` asks


def chosen_passes(what: str, skip: Sequence[str], backend: str, asked: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The passes that run, in order. Raises `CaptureError` for unknown names and backends."""
    problems = [f"no pass is called {name!r}{nearest(name, PASSES)}" for name in skip if name not in PASSES]
    if backend not in ("inductor", "graph"):
        problems.append(f"backend is {backend!r}: 'inductor' or 'graph'")
    if problems:
        raise CaptureError(report(what, problems, f"the passes are {list(PASSES)}"))
    return tuple(name for name in PASSES if name not in skip and (name not in ASKED or name in asked))


def run_passes(program: Program, names: tuple[str, ...]) -> Program:
    """The program after these passes."""
    for name in names:
        with unseen():
            program = PASSES[name](program)
        program.graph.graph.lint()
        program.graph.recompile()
    return program
