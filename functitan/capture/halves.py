"""A differentiable function captured as two programs: one for forward, and one for backward.

Invariant: the cut is in time. What ran before the cotangents were there is forward's, collectives included; backward
gets what autograd saved, less what views and elementwise ops make again of the rest. So weights that forward gathered,
and what remat computes again, cross the cut no more than they do in eager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from functitan.capture.kinds import CHAIN, elementwise, views
from functitan.capture.trace import Program, trace
from functitan.errors import CaptureError, report
from functitan.sharding.context import current, using

# torch.library.Library and its Meta kernels as graph ops: tried on torch 2.13
_LIBRARY = torch.library.Library("functitan", "FRAGMENT")
_LIBRARY.define("cotangent(Tensor y) -> Tensor")
_LIBRARY.impl("cotangent", lambda y: y.new_empty(y.shape), "Meta")  # contiguous, whatever the result is
_COTANGENT = torch.ops.functitan.cotangent.default  # stands where a cotangent comes in; never runs


class Halves(NamedTuple):
    """The programs, and how they fit: all inputs of forward, then its outputs, are numbered in one row."""

    forward: Program  # gives the results, then what backward reads besides
    backward: Program | None  # of what was saved, then the cotangents; gives gradients
    saved: tuple[int, ...]  # the numbers of what backward reads
    differentiable: tuple[int, ...]  # results that have cotangents
    given: tuple[int, ...]  # inputs that have gradients


def trace_halves(
    fn: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    wanted: tuple[int, ...],
    what: str,
    names: Sequence[str],
) -> Halves:
    """Trace `fn` of flat tensors, and the gradients of the inputs `wanted`; without those, there is no backward.

    Raises `CaptureError` with the user's line for what a graph cannot hold.
    """
    known: dict[str, tuple[int, ...]] = {}

    def joint(*xs: Tensor) -> tuple[Tensor, ...]:
        leaves = {i: xs[i].detach().requires_grad_() for i in wanted}
        with torch.enable_grad(), using(current()._replace(differentiated=bool(wanted))):
            ys = fn(*(leaves.get(i, x) for i, x in enumerate(xs)))
            places = tuple(r for r, y in enumerate(ys) if y.requires_grad)
            with torch.no_grad():
                gs = [_COTANGENT(ys[r]) for r in places]
            found = (
                torch.autograd.grad([ys[r] for r in places], list(leaves.values()), gs, allow_unused=True) if gs else ()
            )
        grads = {i: g for i, g in zip(leaves, found, strict=bool(gs)) if g is not None}
        known.update(results=tuple(range(len(ys))), differentiable=places, given=tuple(grads))
        return (*ys, *gs, *grads.values())

    options = dict(what=what, names=names, fix="write out of place")
    try:
        program = trace(joint, inputs, **options)  # type: ignore[arg-type]
    except RuntimeError:
        trace(fn, inputs, **options)  # type: ignore[arg-type]  # autograd minds writes too, but names no line
        raise
    if program.failures:
        problem = "it checks whether values are finite, which one part of a step cannot stop at"
        raise CaptureError(report(what, [problem], "capture the whole step: ft.jit(fn)"))
    if not known["given"]:
        *nodes, output = program.graph.graph.nodes
        return Halves(_forward(program, nodes, output.args[0][: len(known["results"])]), None, (), (), ())
    return _cut(program, len(known["results"]), known["differentiable"], known["given"])


def _cut(program: Program, count: int, differentiable: tuple[int, ...], given: tuple[int, ...]) -> Halves:
    nodes = list(program.graph.graph.nodes)
    at = {node: place for place, node in enumerate(nodes)}
    outputs = nodes[-1].args[0]
    marks, grads = outputs[count : count + len(differentiable)], outputs[count + len(differentiable) :]
    border = min(at[mark] for mark in marks)
    late = [node for node in nodes[border:-1] if node.target is not _COTANGENT]
    reads = {x for node in late for x in node.all_input_nodes} | set(grads)
    kept, again = _kept([x for x in nodes[:border] if x in reads], at)
    inputs = [node for node in nodes if node.op == "placeholder"]
    results, extra = outputs[:count], []
    row = {node: place for place, node in reversed(list(enumerate([*inputs, *results])))}
    for node in kept:
        if node not in row:
            row[node] = len(inputs) + count + len(extra)
            extra.append(node)
    saved = sorted(kept, key=row.__getitem__)
    forward = _forward(program, nodes[:border], [*results, *extra])
    backward = Graph()
    new: dict[Node, Node] = {}
    for i, node in enumerate([*saved, *marks]):
        new[node] = backward.placeholder(f"{'saved' if i < len(saved) else 'cotangent'}_{i}")
        new[node].meta["val"] = node.meta["val"]
    for node in [*again, *late]:
        new[node] = backward.node_copy(node, new.__getitem__)
    backward.output(tuple(new[g] for g in grads))
    fakes = tuple(node.meta["val"] for node in [*saved, *marks])
    return Halves(forward, _part(program, backward, fakes), tuple(row[x] for x in saved), differentiable, given)


def _forward(program: Program, nodes: Sequence[Node], outputs: Sequence[Node]) -> Program:
    """These nodes alone, with these outputs: what they do not need falls away."""
    graph, new = Graph(), {}
    for node in nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[node] for node in outputs))
    graph.eliminate_dead_code()
    return _part(program, graph, program.inputs)


def _part(program: Program, graph: Graph, inputs: tuple[Tensor, ...]) -> Program:
    return program._replace(graph=GraphModule(program.graph, graph), inputs=inputs, written=())


def _kept(read: list[Node], at: dict[Node, int]) -> tuple[list[Node], list[Node]]:
    """What to save so that backward can read `read`, and what it makes again of that, both in order."""
    kept, again = set(), set()
    for node in read:  # views, and what is made of no tensor, are never saved
        _descend(node, kept, again, lambda x: views(x) or (not x.all_input_nodes and elementwise(x)))
    for node in sorted(kept, key=at.__getitem__, reverse=True):
        rest, chain = kept - {node}, set()
        ends: set[Node] = set()
        if elementwise(node):
            _descend(node, ends, chain, lambda x, rest=rest: x not in rest and elementwise(x))
            if ends <= rest and len(chain - again) <= CHAIN:
                kept, again = rest, again | chain
    return sorted(kept, key=at.__getitem__), sorted(again, key=at.__getitem__)


def _descend(node: Node, ends: set[Node], passed: set[Node], free: Callable[[Node], bool]) -> None:
    """Go from a node to what it is made of, through nodes that are `free`."""
    open_ = [node]
    while open_:
        x = open_.pop()
        if not free(x):
            ends.add(x)
        elif x not in passed:
            passed.add(x)
            open_ += x.all_input_nodes
