"""The planner: from the layouts of a contraction's operands and results to its collectives.

Invariant: a plan depends on layouts and sizes alone, never on the order of the mesh's dims, on values or on the rank.
Everything named is planned here: einsum, sums, broadcasts, lookups, moves, and the cotangents of them all.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from functitan.axes import Axes
from functitan.sharding.layout import Layout
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.moves import Frames, Splits, Step, operand_steps, result_steps

FACTOR = 16  # a candidate that moves more than this times the cheapest one's elements is not worth a saved latency


class Term(NamedTuple):
    """One product: `results[result] += product of the operands, summed over the axes that the result lacks`."""

    result: int
    operands: tuple[int, ...]


class Contraction(NamedTuple):
    """Sums of products of tensors with named axes, and the layout each tensor has. Closed under differentiation.

    Several results share the operands they share; several terms of one result are added before its reduction. An axis
    that only a result has is broadcast. `sizes` gives the global size of each axis.
    """

    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    terms: tuple[Term, ...]
    sizes: tuple[tuple[str, int], ...]


class Fixed(NamedTuple):
    """Choices that are not the planner's: the axis of some mesh dims (a table never moves), and axes no other dim splits."""

    splits: tuple[tuple[str, str], ...] = ()
    barred: tuple[str, ...] = ()


class Product(NamedTuple):
    """One local product: indices into `Plan.moved`, and the local sizes of the axes it broadcasts."""

    moved: tuple[int, ...]
    broadcast: tuple[tuple[str, int], ...]


class Group(NamedTuple):
    """Local products that are added before the steps that bring their sum to the result's layout."""

    products: tuple[Product, ...]
    steps: tuple[Step, ...]


class Plan(NamedTuple):
    """What one rank does: move operands (each once, when first used), multiply locally, move results."""

    moved: tuple[tuple[int, tuple[Step, ...]], ...]
    results: tuple[tuple[Group, ...], ...]

    @property
    def is_local(self) -> bool:
        """True when nothing moves: the plain torch operation on the shards is the whole operation."""
        return not any(self.steps())

    def steps(self) -> list[Step]:
        """Every step in the order of execution."""
        done: set[int] = set()
        steps: list[Step] = []
        for groups in self.results:
            for group in groups:
                used = [index for product in group.products for index in product.moved]
                for index in dict.fromkeys(used):
                    steps += [] if index in done else self.moved[index][1]
                    done.add(index)
                steps += group.steps
        return steps


@lru_cache(maxsize=None)
def plan(contraction: Contraction, mesh: MeshSizes, fixed: Fixed = Fixed()) -> Plan:
    """Choose, for each term and mesh dim, the axis that splits the local work; then emit the moves.

    For each mesh dim every axis of the term is a candidate, and so is "none". Candidates that move more than 16 times
    the elements of the cheapest are dropped; of the rest the fewest collectives win, then the fewest elements, counted
    from the layouts before any move; ties go to gathers and reductions before exchanges, a split before none, an output
    axis before a contracted one, then to the order in the pattern.
    """
    sizes = dict(contraction.sizes)
    moved: dict[tuple[int, tuple[Step, ...]], int] = {}
    groups: list[dict[tuple[Step, ...], list[Product]]] = [{} for _ in contraction.results]
    for term in contraction.terms:
        result = contraction.results[term.result]
        operands = [contraction.operands[i] for i in term.operands]
        splits, frames = _split(operands, result, sizes, mesh, fixed)
        indices = []
        for i, layout in zip(term.operands, operands, strict=True):
            key = (i, operand_steps(layout, splits, frames, mesh))
            indices.append(moved.setdefault(key, len(moved)))
        known = {axis for layout in operands for axis in layout.axes}
        new = [axis for axis in result.axes if axis not in known]
        broadcast = tuple((axis, sizes[axis] // mesh.size(tuple(splits.get(axis, ())))) for axis in new)
        steps = result_steps(result, splits, frames, mesh)
        groups[term.result].setdefault(steps, []).append(Product(tuple(indices), broadcast))
    return Plan(
        tuple(moved),
        tuple(tuple(Group(tuple(products), steps) for steps, products in group.items()) for group in groups),
    )


def terms_of(num_operands: int, num_results: int) -> tuple[Term, ...]:
    """The terms of a signature: the last operands belong to one result each, those before them to every result.

    >>> terms_of(3, 2)  # q and k of one x
    (Term(result=0, operands=(0, 1)), Term(result=1, operands=(0, 2)))
    """
    shared = tuple(range(num_operands - num_results))
    return tuple(Term(i, (*shared, len(shared) + i)) for i in range(num_results))


def cotangents(contraction: Contraction, wanted: tuple[int, ...], given: tuple[int, ...]) -> Contraction:
    """The contraction that gives the cotangents of the operands `wanted`, from the cotangents of the results `given`.

    Its operands are those of `contraction`, then the given cotangents; its results stand in the order of `wanted`.
    The transpose of a product is the product of the cotangent with the other operands.
    """
    place = {result: len(contraction.operands) + i for i, result in enumerate(given)}
    terms = tuple(
        Term(wanted.index(x), (*(other for other in term.operands if other != x), place[term.result]))
        for x in wanted
        for term in contraction.terms
        if x in term.operands and term.result in place
    )
    return Contraction(
        (*contraction.operands, *(contraction.results[i] for i in given)),
        tuple(contraction.operands[i] for i in wanted),
        terms,
        contraction.sizes,
    )


def tangents(contraction: Contraction, given: tuple[int, ...]) -> Contraction:
    """The contraction that gives the tangents of the results from those of the operands `given` (the last operands)."""
    place = {operand: len(contraction.operands) + i for i, operand in enumerate(given)}
    terms = tuple(
        Term(term.result, tuple(place[x] if other == x else other for other in term.operands))
        for term in contraction.terms
        for x in term.operands
        if x in place
    )
    operands = (*contraction.operands, *(contraction.operands[i] for i in given))
    return Contraction(operands, contraction.results, terms, contraction.sizes)


# --- the choice ---------------------------------------------------------------------------------------------------


def _split(
    operands: list[Layout], result: Layout, sizes: dict[str, int], mesh: MeshSizes, fixed: Fixed
) -> tuple[Splits, Frames]:
    """The mesh dims that split each axis of one term's local work, and the order of each axis's shards in it."""
    axes = tuple(dict.fromkeys(axis for layout in (*operands, result) for axis in layout.axes))
    dims = sorted({dim for layout in (*operands, result) for dims in layout.dims for dim in dims})
    forced = dict(fixed.splits)
    banned = {(dim, axis) for dim in dims for axis in fixed.barred}
    while True:
        splits: dict[str, tuple[str, ...]] = {}
        for dim in dims:
            free = [axis for axis in axes if (dim, axis) not in banned]
            axis = forced[dim] if dim in forced else _choose(dim, free, operands, result, sizes, mesh)
            if axis is not None:
                splits[axis] = (*splits.get(axis, ()), dim)
        frames: dict[str, tuple[str, ...]] = {}
        for axis, split in splits.items():
            frame = _frame(axis, split, operands, result, sizes, mesh)
            if frame is None:  # the sizes of these dims together do not divide the axis: one of them goes elsewhere
                longest = max((layout.of(axis) for layout in (*operands, result)), key=lambda t: (len(t), t))
                banned.add((next(dim for dim in split if dim not in longest), axis))
                break
            frames[axis] = frame
        else:
            return splits, frames


def _choose(
    dim: str, axes: list[str], operands: list[Layout], result: Layout, sizes: dict[str, int], mesh: MeshSizes
) -> str | None:
    """The axis along which one mesh dim splits a term, or `None` for work that is repeated on its ranks."""
    n = mesh.size(dim)
    costs = {}
    for axis in (*axes, None):
        if axis is not None and not _may_split(dim, axis, (*operands, result), sizes, mesh):
            continue
        count, moved, exchanges = 0, 0.0, 0
        for layout in operands:
            now, then = layout.axis_of(dim), axis if axis in layout.axes else None
            if now is not None and now != then:
                count += 1
                exchanges += then is not None
                moved += _elements(layout, sizes, mesh) * ((n - 1) if then is None else (n - 1) / n)
        local, wanted = _elements(result, sizes, mesh), result.axis_of(dim)
        summed = axis is not None and axis not in result.axes
        if summed:
            count += 1
            moved += local * ((n - 1) if wanted is not None else 2 * (n - 1) / n)
        elif axis is not None and axis != wanted:
            count += 1
            exchanges += wanted is not None
            moved += local * (n - 1) / n
        costs[axis] = (count, moved, exchanges, axis is None, summed)
    cheapest = min(cost[1] for cost in costs.values())
    kept = [axis for axis, cost in costs.items() if cost[1] <= FACTOR * cheapest]
    return min(kept, key=lambda axis: costs[axis])  # min keeps the first of equals: the order in the pattern


def _may_split(dim: str, axis: str, layouts: tuple[Layout, ...], sizes: dict[str, int], mesh: MeshSizes) -> bool:
    """An axis that no tensor shards over `dim` may be split by it where all dims that shard it still divide it."""
    sharding = {other for layout in layouts for other in layout.of(axis)}
    return dim in sharding or sizes[axis] % (mesh.size(dim) * mesh.size(tuple(sharding))) == 0


def _frame(
    axis: str, split: tuple[str, ...], operands: list[Layout], result: Layout, sizes: dict[str, int], mesh: MeshSizes
) -> tuple[str, ...] | None:
    """The order of shards of one axis inside a term: that of the tensors which are costly to bring to another order."""
    tensors = [layout for layout in (*operands, result) if layout.of(axis)]
    best: tuple[float, int, tuple[str, ...]] | None = None
    for order in {layout.of(axis) for layout in tensors} | {()}:
        frame = order + tuple(dim for dim in sorted(split) if dim not in order)
        if sizes[axis] % mesh.size(frame):
            continue
        cost = 0.0
        for layout in tensors:
            dims = layout.of(axis)
            gathered = dims if dims != frame[: len(dims)] else tuple(dim for dim in dims if dim not in split)
            cost += _elements(layout, sizes, mesh) * (mesh.size(gathered) - 1)
        if best is None or (cost, -len(frame), frame) < best:
            best = (cost, -len(frame), frame)
    return best and best[2]


def _elements(layout: Layout, sizes: dict[str, int], mesh: MeshSizes) -> float:
    """Number of elements of one rank's shard."""
    return math.prod(sizes[axis] / mesh.size(dims) for axis, dims in zip(layout.axes, layout.dims, strict=True))
