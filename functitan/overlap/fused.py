"""Rings that one fused op runs, on CUDA: where a product is one matmul of plain tensors.

Invariant: what fits no fused op gives `None`, and runs as the ring. Ledgers have the ring's messages either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from functitan.axes import Axes
from functitan.ops.arithmetic import Arithmetic, Value
from functitan.ops.local import product
from functitan.ops.schedule import Work
from functitan.overlap.ring import Ring
from functitan.overlap.symmetric import fits, gather_matmul, matmul_scatter
from functitan.sharding.steps import enter_fused, summed_in


class _Matrices(NamedTuple):
    """A product as x [*rows, K] times a weight [K, N]: the axes of each group."""

    rows: Axes
    summed: Axes
    columns: Axes

    def left(self, axes: Axes, x: Tensor) -> Tensor:
        return product((axes,), self.rows + self.summed, (x,)).flatten(len(self.rows))

    def right(self, axes: Axes, w: Tensor) -> Tensor:
        y = product((axes,), self.summed + self.columns, (w,))
        return y.flatten(len(self.summed)).flatten(0, len(self.summed) - 1)

    def result(self, axes: Axes, y: Tensor, w: Tensor, of_w: Axes) -> Tensor:
        sizes = [w.shape[of_w.index(axis)] for axis in self.columns]
        return product((self.rows + self.columns,), axes, (y.unflatten(-1, sizes),))


def fused_gather(ring: Ring, x: Value, works: Sequence[tuple[int, Work]], how: Arithmetic) -> list[Tensor] | None:
    """The products of a gathered operand with weights; `None` where one of them is another kind of product."""
    if not _runs(ring, x):
        return None
    assert ring.env.mesh is not None
    x = how.arrive(x)
    found = [_matrices(work, place, ring.axis) for place, work in works]
    first = found[0]
    if first is None or any(its is None or its[:2] != first[:2] for its in found):
        return None
    place, work = works[0]
    weights = [(other.axes[1 - at], other.values[1 - at]) for at, other in works]
    matrices = [its.right(*w) for its, w in zip(found, weights, strict=True) if its is not None]
    _enter(ring, x, work.axes[place].index(ring.axis))
    ys = gather_matmul(first.left(work.axes[place], x), first.rows.index(ring.axis), matrices, ring.env.mesh, ring.dims)
    each = zip(found, works, ys, weights, strict=True)
    return [its.result(own.result, y, w, of_w) for its, (_, own), y, (of_w, w) in each if its is not None]


def fused_scatter(ring: Ring, works: Sequence[Work]) -> Tensor | None:
    """This rank's part of one product's sum; `None` where there are several, or sums are of another dtype."""
    work = works[0]
    at = next((i for i, axes in enumerate(work.axes) if ring.axis in axes), 0)
    x, its = work.values[at], _matrices(work, at, ring.axis)
    if len(works) > 1 or its is None or not _runs(ring, x) or summed_in(x.dtype, ring.dims, ring.env) != x.dtype:
        return None
    assert ring.env.mesh is not None
    of_w, w = work.axes[1 - at], work.values[1 - at]
    rows, place = its.left(work.axes[at], x), its.rows.index(ring.axis)
    y = its.result(work.result, matmul_scatter(rows, its.right(of_w, w), place, ring.env.mesh, ring.dims), w, of_w)
    _enter(ring, y, work.result.index(ring.axis))
    return y


def _runs(ring: Ring, x: object) -> bool:
    mesh = ring.env.mesh
    return mesh is not None and not ring.env.is_captured and isinstance(x, Tensor) and fits(x, mesh)


def _matrices(work: Work, place: int, axis: str) -> _Matrices | None:
    """The product as a matmul whose rows hold the ring's axis."""
    if len(work.axes) != 2 or work.broadcast:
        return None
    a, b, made = work.axes[place], work.axes[1 - place], work.result
    rows, columns = (tuple(x for x in own if x not in other) for own, other in ((a, b), (b, a)))
    summed = tuple(x for x in a if x in b)
    fine = set(made) == {*rows, *columns} and axis in rows and summed and columns
    return _Matrices(rows, summed, columns) if fine else None


def _enter(ring: Ring, part: Tensor, axis: int) -> None:
    """The messages of the ring: all pieces of a rank's part, to each other rank."""
    for _ in range(ring.place[0] - 1):
        for piece in ring.pieces:
            enter_fused(part.narrow(axis, *piece), ring.dims, ring.env, ring.label)
