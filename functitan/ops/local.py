"""Products of plain local tensors with named axes, lowered to few kernels and cached.

Invariant: a product of two tensors is one matmul, one multiply, or one multiply-and-sum, on views wherever views do:
`torch.einsum` is never called. Nothing here knows of meshes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.axes import Axes

Product = Callable[..., Tensor]


def product(
    operands: tuple[Axes, ...], result: Axes, tensors: tuple[Tensor, ...], new: tuple[tuple[str, int], ...] = ()
) -> Tensor:
    """The product of the tensors, summed over the axes that the result lacks, expanded by `new` (axis, size)."""
    return _recipe(operands, result, new)(*tensors)


def add_product(
    total: Tensor,
    operands: tuple[Axes, ...],
    result: Axes,
    tensors: tuple[Tensor, ...],
    new: tuple[tuple[str, int], ...] = (),
) -> None:
    """Add the product to `total`: by one matmul that writes no product of its own, where that can be."""
    add = _adding(operands, result) if len(operands) == 2 and not new else None
    if add is None or not total.is_contiguous() or any(x.dtype != total.dtype for x in tensors):
        total.add_(product(operands, result, tensors, new))
    else:
        add(total, *tensors)


def maximum(axes: Axes, result: Axes, x: Tensor) -> Tensor:
    """The maximum over the axes that the result lacks."""
    kept = tuple(axis for axis in axes if axis in result)
    places = [i for i, axis in enumerate(axes) if axis not in result]
    return product((kept,), result, (x.amax(places) if places else x,))


@cache
def _recipe(operands: tuple[Axes, ...], result: Axes, new: tuple[tuple[str, int], ...]) -> Product:
    if new:
        inner = _recipe(operands, tuple(axis for axis in result if axis not in dict(new)), ())
        return _expanded(inner, result, dict(new))
    if len(operands) == 1:
        return _single(operands[0], result)
    if len(operands) == 2:
        return _pair(*operands, result)
    first, second, *rest = operands
    needed = set(result).union(*rest)
    kept = tuple(axis for axis in dict.fromkeys(first + second) if axis in needed)
    head, tail = _pair(first, second, kept), _recipe((kept, *rest), result, ())
    return lambda a, b, *others: tail(head(a, b), *others)


def _single(axes: Axes, result: Axes) -> Product:
    summed = [i for i, axis in enumerate(axes) if axis not in result]
    kept = tuple(axis for axis in axes if axis in result)
    order = _order(kept, result)
    if not summed:
        return (lambda x: x) if order is None else (lambda x: x.permute(order))
    return (lambda x: _sum(x, summed)) if order is None else (lambda x: _sum(x, summed).permute(order))


def _sum(x: Tensor, places: list[int]) -> Tensor:
    """The sum; a view where there is nothing to add, as on the one replica of a weight's gradient that a rank has."""
    alone = x.is_floating_point() and all(x.shape[i] == 1 for i in places)
    return x.squeeze(places) if alone else x.sum(places)


def _pair(a: Axes, b: Axes, result: Axes) -> Product:
    alone_a, alone_b = set(a) - set(b) - set(result), set(b) - set(a) - set(result)
    if alone_a or alone_b:  # what one operand alone sums is summed first
        a_kept, b_kept = tuple(x for x in a if x not in alone_a), tuple(x for x in b if x not in alone_b)
        first, second, rest = _single(a, a_kept), _single(b, b_kept), _pair(a_kept, b_kept, result)
        return lambda x, y: rest(first(x), second(y))
    contracted = [axis for axis in a if axis in b and axis not in result]
    if not contracted:
        left, right = _aligned(a, result), _aligned(b, result)
        return lambda x, y: left(x) * right(y)
    if set(a) == set(b):
        summed, order = [a.index(axis) for axis in contracted], _order(b, a)
        out = _single(tuple(axis for axis in a if axis in result), result)
        if order is None:
            return lambda x, y: out((x * y).sum(summed))
        return lambda x, y: out((x * y.permute(order)).sum(summed))
    return _matmul(a, b, result, contracted)


def _matmul(a: Axes, b: Axes, result: Axes, contracted: list[str]) -> Product:
    batch = [axis for axis in result if axis in a and axis in b]
    rows, columns = [axis for axis in result if axis not in b], [axis for axis in result if axis not in a]
    if [axis for axis in result if axis not in batch] == columns + rows and rows and columns:
        swapped = _matmul_in_order(b, a, result, batch, columns, rows, contracted)
        return lambda x, y: swapped(y, x)
    return _matmul_in_order(a, b, result, batch, rows, columns, contracted)


def _matmul_in_order(
    a: Axes, b: Axes, result: Axes, batch: list[str], rows: list[str], columns: list[str], contracted: list[str]
) -> Product:
    left, right, fold = _matrices(a, b, result, batch, rows, columns, contracted)
    multiply = torch.bmm if batch else torch.mm
    return lambda x, y: fold(multiply(left(x), right(y)), x, y)


class Matrices(NamedTuple):
    """A product of two tensors as one of matrices: [rows, contracted] by [contracted, columns], with a batch before."""

    left: Product
    right: Product
    fold: Product  # (product of the matrices, x, y) -> the result


@cache
def matrices(a: Axes, b: Axes, result: Axes) -> Matrices:
    """The matrices of a product with rows and columns; tensors of size 1 along axes that they share a number on fit."""
    batch = [axis for axis in result if axis in a and axis in b]
    rows, columns = [axis for axis in result if axis not in b], [axis for axis in result if axis not in a]
    return _matrices(a, b, result, batch, rows, columns, [axis for axis in a if axis in b and axis not in result])


def _matrices(
    a: Axes, b: Axes, result: Axes, batch: list[str], rows: list[str], columns: list[str], contracted: list[str]
) -> Matrices:
    order = _order(tuple(batch + rows + columns), result)
    from_a, from_b = [a.index(axis) for axis in batch + rows], [b.index(axis) for axis in columns]

    def fold(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        z = z.view([x.shape[i] for i in from_a] + [y.shape[i] for i in from_b])
        return z if order is None else z.permute(order)

    return Matrices(_matrix(a, (batch, rows, contracted)), _matrix(b, (batch, contracted, columns)), fold)


@cache
def _adding(operands: tuple[Axes, ...], result: Axes) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    a, b = operands
    contracted = [axis for axis in a if axis in b and axis not in result]
    rows, columns = [axis for axis in result if axis not in b], [axis for axis in result if axis not in a]
    if {*rows, *contracted} != set(a) or {*columns, *contracted} != set(b) or not (rows and columns and contracted):
        return None
    if tuple(columns + rows) == result:
        swapped = _adding((b, a), result)
        return None if swapped is None else lambda total, x, y: swapped(total, y, x)
    if tuple(rows + columns) != result:
        return None
    left, right = _matrix(a, ([], rows, contracted)), _matrix(b, ([], contracted, columns))

    def run(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
        x, y = left(x), right(y)
        return total.view(x.shape[0], y.shape[1]).addmm_(x, y)

    return run


def _matrix(axes: Axes, groups: tuple[list[str], list[str], list[str]]) -> Product:
    """A view of a tensor as [batch, rows, columns] (no batch: two dims), copied only if its axes interleave."""
    used = groups if groups[0] else groups[1:]
    native = sorted(used, key=lambda group: min((axes.index(axis) for axis in group), default=-1))
    flat = [axis for group in native for axis in group]
    order = _order(axes, tuple(flat))
    turn = [next(i for i, other in enumerate(native) if other is group) for group in used]
    turned = None if turn == sorted(turn) else turn
    places = [[axes.index(axis) for axis in group] for group in native]

    def run(x: Tensor) -> Tensor:
        shape = [math.prod([x.shape[i] for i in group]) for group in places]
        x = (x if order is None else x.permute(order)).reshape(shape)
        return x if turned is None else x.permute(turned)

    return run


def _aligned(axes: Axes, result: Axes) -> Product:
    """A view with the result's axes in order, of size 1 where the tensor lacks them."""
    order = _order(axes, tuple(axis for axis in result if axis in axes))
    missing = [i for i, axis in enumerate(result) if axis not in axes]

    def run(x: Tensor) -> Tensor:
        x = x if order is None else x.permute(order)
        for i in missing:
            x = x.unsqueeze(i)
        return x

    return run


def _expanded(inner: Product, result: Axes, new: dict[str, int]) -> Product:
    places = [i for i, axis in enumerate(result) if axis in new]

    def run(*tensors: Tensor) -> Tensor:
        x = inner(*tensors)
        for i in places:
            x = x.unsqueeze(i)
        return x.expand([new.get(axis, -1) for axis in result])

    return run


def _order(now: Axes, then: Axes) -> list[int] | None:
    return None if now == then else [now.index(axis) for axis in then]
