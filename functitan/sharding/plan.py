"""The planner: from the layouts of a contraction's operands and results to its collectives.

Invariant: a plan depends on layouts and sizes alone, never on the order of the mesh's dims, on values or on the rank.
Everything named is planned here: einsum, sums, broadcasts, lookups, moves, and the cotangents of them all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from functitan.sharding.choice import FREE, Fixed, choose
from functitan.sharding.contraction import Contraction
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.moves import Step, operand_steps, result_steps


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
        of_results = (group.steps for groups in self.results for group in groups)
        return not any(steps for _, steps in self.moved) and not any(of_results)


@lru_cache(maxsize=2**14)  # sizes are part of the key: lengths may vary without end
def plan(contraction: Contraction, mesh: MeshSizes, fixed: Fixed = FREE) -> Plan:
    """Choose how every mesh dim splits every term, then emit the moves of operands and results.

    Operands that go to the same place move once; terms of one result that end alike are added before they move.
    """
    sizes = dict(contraction.sizes)
    moved: dict[tuple[int, tuple[Step, ...]], int] = {}
    groups: list[dict[tuple[Step, ...], list[Product]]] = [{} for _ in contraction.results]
    for term, (splits, frames) in zip(contraction.terms, choose(contraction, mesh, fixed), strict=True):
        operands = [contraction.operands[i] for i in term.operands]
        result = contraction.results[term.result]
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
