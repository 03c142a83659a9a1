"""Rows of plain local tensors with named axes: looked up, and added into. Each is the transpose of the other.

Invariant: nothing here knows of meshes; `inside` leaves out the rows that another rank holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import embedding

from functitan.axes import Axes


class LookupAxes(NamedTuple):
    """The visible axes of indices, table and result."""

    indices: Axes
    table: Axes
    result: Axes

    @property
    def looked_up(self) -> str:
        return next(axis for axis in self.table if axis not in self.result)


def take_rows(axes: LookupAxes, indices: Tensor, table: Tensor, inside: Tensor | None = None) -> Tensor:
    """Rows of a plain table; zeros where not `inside`. Plain torch ops, differentiable in the table."""
    shared, own, rest = _groups(axes)
    if not shared and axes.table[0] == axes.looked_up and len(axes.table) == 2 and table.is_floating_point():
        out = embedding(indices, table)
    elif not shared:
        rows = table.movedim(axes.table.index(axes.looked_up), 0)
        out = rows.index_select(0, indices.reshape(-1)).reshape(indices.shape + rows.shape[1:])
    else:
        flat, ids, shape = _flat_table(axes, table), _flat_indices(axes, indices), _shape(axes, indices, table)
        out = flat.gather(1, ids.unsqueeze(-1).expand(-1, -1, flat.shape[2])).reshape(shape)
    if inside is not None:
        turned = inside.permute([axes.indices.index(axis) for axis in shared + own])
        out = out * turned.reshape(turned.shape + (1,) * len(rest))
    made = shared + own + rest
    return out.permute([made.index(axis) for axis in axes.result])


def put_rows(axes: LookupAxes, indices: Tensor, g: Tensor, size: int, inside: Tensor | None = None) -> Tensor:
    """Cotangents added into the rows of a zero table with `size` rows; those not `inside` are left out."""
    shared, own, rest = _groups(axes)
    made = shared + own + rest
    g = g.permute([axes.result.index(axis) for axis in made])
    sizes = dict(zip(made, g.shape, strict=True))
    ids = _flat_indices(axes, indices)
    flat = g.reshape(ids.shape[0], ids.shape[1], math.prod(sizes[axis] for axis in rest))
    if inside is not None:
        flat = flat * _flat_indices(axes, inside).unsqueeze(-1)
    if shared:
        table = g.new_zeros(ids.shape[0], size, flat.shape[2]).scatter_add(1, ids.unsqueeze(-1).expand_as(flat), flat)
    else:
        table = g.new_zeros(size, flat.shape[2]).index_add(0, ids[0], flat[0])
    order = (*shared, axes.looked_up, *rest)
    table = table.reshape([size if axis == axes.looked_up else sizes[axis] for axis in order])
    return table.permute([order.index(axis) for axis in axes.table])


def _groups(axes: LookupAxes) -> tuple[Axes, Axes, Axes]:
    """Axes shared by indices and table, those of the indices alone, and those of the table that go along."""
    shared = tuple(axis for axis in axes.indices if axis in axes.table)
    own = tuple(axis for axis in axes.indices if axis not in shared)
    rest = tuple(axis for axis in axes.table if axis not in shared and axis != axes.looked_up)
    return shared, own, rest


def _flat_indices(axes: LookupAxes, indices: Tensor) -> Tensor:
    """[shared, own]"""
    shared, own, _ = _groups(axes)
    turned = indices.permute([axes.indices.index(axis) for axis in shared + own])
    return turned.reshape(math.prod(turned.shape[: len(shared)]), -1) if turned.numel() else turned.reshape(1, 0)


def _flat_table(axes: LookupAxes, table: Tensor) -> Tensor:
    """[shared, looked up, rest]"""
    shared, _, rest = _groups(axes)
    turned = table.permute([axes.table.index(axis) for axis in (*shared, axes.looked_up, *rest)])
    return turned.reshape(math.prod(turned.shape[: len(shared)]), turned.shape[len(shared)], -1)


def _shape(axes: LookupAxes, indices: Tensor, table: Tensor) -> list[int]:
    shared, own, rest = _groups(axes)
    return [indices.shape[axes.indices.index(a)] for a in shared + own] + [
        table.shape[axes.table.index(a)] for a in rest
    ]
