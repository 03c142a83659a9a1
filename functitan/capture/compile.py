"""From a captured program to a function of its inputs: Inductor, or the graph's plain ops.

Invariant: a result with a home is copied into that input's buffer, last of all; the function gives `None` in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule, Node

from functitan.capture.kinds import base
from functitan.capture.products import choose_products
from functitan.capture.sending import lower_collectives
from functitan.capture.trace import Program

Run = Callable[[list[Tensor]], list[Any]]


def compiled(program: Program, homes: tuple[int | None, ...], backend: str) -> Run:
    """A function of a list of inputs, which it empties, so that dead ones can be freed."""
    plain = backend == "graph" or any(not mesh.transport.compiles for mesh in program.meshes)
    graph = GraphModule(program.graph, copy.deepcopy(program.graph.graph))
    graph = lower_collectives(graph, program.meshes, not plain)
    if plain:
        _call_directly(graph, program)
    _copy_home(graph, homes, len(program.failures))
    return _interpreted(graph) if plain else _inductor(graph, program)


def _copy_home(graph: GraphModule, homes: tuple[int | None, ...], failures: int) -> None:
    """Copy results into their inputs' buffers, last of all, and only where no flag of a failure holds."""
    aten = torch.ops.aten
    nodes = list(graph.graph.nodes)
    placeholders, output = [node for node in nodes if node.op == "placeholder"], nodes[-1]
    results = list(output.args[0])
    flags = results[len(results) - failures :]

    def call(target: Any, *args: Any) -> Node:
        node = graph.graph.call_function(target, args)
        node.meta["val"] = args[-1].meta["val"]
        return node

    with graph.graph.inserting_before(output):
        overwritten = {
            placeholders[home]
            for r, home in enumerate(homes)
            if home is not None and results[r] is not placeholders[home]
        }
        for r, node in enumerate(results[: len(homes)]):  # views of what is overwritten keep their values
            home = homes[r]
            passed = home is not None and node is placeholders[home]
            if not passed and base(node) in overwritten:
                results[r] = call(aten.clone.default, node)
        failed = reduce(lambda x, y: call(aten.logical_or.default, x, y), flags) if flags else None
        for r, home in enumerate(homes):
            if home is None:
                continue
            new, old = results[r], placeholders[home]
            if new is not old:
                kept = new if failed is None else call(aten.where.self, failed, old, new)
                call(aten.copy_.default, old, kept)
            results[r] = None
    output.args = (tuple(results),)
    graph.recompile()


def _call_directly(graph: GraphModule, program: Program) -> None:
    """Let other captured programs run as they are, with what they do in sight of a caller's modes."""
    for node in graph.graph.nodes:
        if node.target in program.calls:
            node.target = program.calls[node.target].called
    graph.recompile()


def _interpreted(graph: GraphModule) -> Run:
    def run(xs: list[Tensor]) -> list[Any]:
        with torch.no_grad():
            return list(graph(*xs))

    return run


# private torch API: Inductor's inner compiler; tried on torch 2.13
def _inductor(graph: GraphModule, program: Program) -> Run:
    from torch._inductor import config  # two seconds to import
    from torch._inductor.compile_fx import compile_fx_inner

    mode = program.inputs[0].fake_mode if program.inputs else None  # type: ignore[attr-defined]
    keep_order = config.patch(reorder_for_locality=False, reorder_for_peak_memory=False)  # passes place collectives
    with tracing(TracingContext(mode)), keep_order:
        found = compile_fx_inner(choose_products(graph), list(program.inputs))

    def run(xs: list[Tensor]) -> list[Any]:
        return list(found(xs))

    return run
