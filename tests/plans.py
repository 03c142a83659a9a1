"""Contractions to be planned, and the oracle of the planner's choice: all ways, priced by the ledger's formulas."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import NamedTuple

from hypothesis import strategies as st

from functitan.sharding.contraction import Contraction, cotangents, terms_of
from functitan.sharding.layout import Layout, layout_of
from functitan.sharding.mesh import MeshSizes
from functitan.testing.strategies import AXES, axis_sizes, meshes, rules_tables, signatures

LARGEST_RATIO = 16  # of the elements moved to those of the cheapest way: more is not worth a saved latency


@st.composite
def contractions(draw, one_table: bool = False) -> tuple[Contraction, MeshSizes]:
    """A contraction on any mesh, or that of its cotangents: under one table, or each tensor laid out in its own way."""
    mesh = draw(meshes())
    known, signature = MeshSizes(tuple(mesh), tuple(mesh.values())), draw(signatures(AXES[: draw(st.integers(2, 5))]))
    if one_table or draw(st.booleans()):
        rules = draw(rules_tables(AXES))
        operands, results = (tuple(layout_of(axes, rules, known) for axes in side) for side in signature)
        sizes = draw(axis_sizes(rules, mesh))
    else:
        operands, results = (tuple(draw(_layouts(axes, tuple(mesh))) for axes in side) for side in signature)
        sizes = {axis: math.prod(mesh.values()) * draw(st.sampled_from([1, 2, 16])) for axis in AXES}
    terms = terms_of(len(signature.operands), len(signature.results))
    contraction = Contraction(operands, results, terms, tuple(sizes.items()))
    if draw(st.booleans()):
        contraction = cotangents(contraction, tuple(range(len(operands))), tuple(range(len(results))))
    return contraction, known


@st.composite
def _layouts(draw, axes: tuple[str, ...], dims: tuple[str, ...]) -> Layout:
    """A tensor of which each mesh dim shards any axis, or none, in any order."""
    taken = {dim: draw(st.sampled_from([*axes, None])) for dim in draw(st.permutations(dims))}
    return Layout(axes, tuple(tuple(dim for dim, axis in taken.items() if axis == own) for own in axes))


class Way(NamedTuple):
    """An axis (or none) for each term over one mesh dim, and what it costs; smaller is better, field by field."""

    collectives: int
    elements: Fraction
    exchanges: int
    repeats: int  # terms that every rank works out alike
    sums: int  # terms that are summed over ranks
    places: tuple[int, ...]  # of the axes in the order of the pattern; "none" is last
    axes: tuple[str | None, ...]


def ways(contraction: Contraction, mesh: MeshSizes, dim: str) -> list[Way]:
    """Every way to split the terms over one mesh dim, the best first: what the planner's rule says of it."""
    candidates = [_candidates(contraction, t, mesh, dim) for t in range(len(contraction.terms))]
    found = []
    for chosen in itertools.product(*(range(len(own)) for own in candidates)):
        axes = tuple(own[i] for own, i in zip(candidates, chosen, strict=True))
        moves: dict[tuple, Fraction] = {}  # terms share a move of one tensor from one place to another
        sums = 0
        for term, axis in zip(contraction.terms, axes, strict=True):
            result = contraction.results[term.result]
            for i in term.operands:
                layout = contraction.operands[i]
                now, then = layout.axis_of(dim), axis if axis in layout.axes else None
                if now not in (None, then):
                    moves[i, now, then] = _sent("all_to_all" if then else "all_gather", layout, contraction, mesh, dim)
            made, wanted = axis if axis in result.axes or axis is None else "a sum", result.axis_of(dim)
            sums += made == "a sum"
            if made not in (None, wanted):
                kind = ("reduce_scatter" if wanted else "all_reduce") if made == "a sum" else None
                kind = kind or ("all_to_all" if wanted else "all_gather of a part")
                moves["result", term.result, made, wanted] = _sent(kind, result, contraction, mesh, dim)
        exchanges = sum(None not in key[-2:] and "a sum" not in key for key in moves)
        found.append(Way(len(moves), sum(moves.values()), exchanges, axes.count(None), sums, chosen, axes))
    cheapest = min(way.elements for way in found)
    return sorted(way for way in found if way.elements <= LARGEST_RATIO * cheapest)


def _candidates(contraction: Contraction, t: int, mesh: MeshSizes, dim: str) -> list[str | None]:
    """The axes of a term that may be split over a mesh dim, in the order of the pattern.

    Their size is divided by all that may split them: the mesh dims that shard them in some tensor, or else all.
    """
    term, sizes = contraction.terms[t], dict(contraction.sizes)
    layouts = [*(contraction.operands[i] for i in term.operands), contraction.results[term.result]]
    every = {other for side in contraction[:2] for layout in side for dims in layout.dims for other in dims}
    found: list[str | None] = []
    for axis in dict.fromkeys(axis for layout in layouts for axis in layout.axes):
        sharding = {other for layout in layouts for other in layout.of(axis)}
        if sizes[axis] % math.prod(mesh.size(other) for other in (sharding if dim in sharding else every)) == 0:
            found.append(axis)
    return [*found, None]


def _sent(kind: str, layout: Layout, contraction: Contraction, mesh: MeshSizes, dim: str) -> Fraction:
    """The elements that one rank sends, by the ledger's formulas; `layout` is an operand's before, a result's after."""
    n, sizes = mesh.size(dim), dict(contraction.sizes)
    local = Fraction(math.prod(sizes[axis] for axis in layout.axes), math.prod(map(mesh.size, layout.dims)))
    return {
        "all_gather": (n - 1) * local,
        "all_gather of a part": (n - 1) * local / n,
        "all_to_all": (n - 1) * local / n,
        "reduce_scatter": (n - 1) * local,  # of `n * local` elements on each rank
        "all_reduce": 2 * (n - 1) * local / n,
    }[kind]
