"""`ft.rearrange`: axes transposed, split and merged by name, in the manner of einops.

Invariant: nothing moves. A layout depends on which names a tensor has, not on their order, so the axes lie alike on
both sides; a composite axis lies as its outermost part, and its other parts must be whole, or its shards would not be
contiguous.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

from einops import EinopsError
from einops.parsing import ParsedExpression
from torch import Tensor

from functitan.axes import Axes, check_pattern, parse_axes, write_axes
from functitan.errors import LayoutError, PatternError, nearest, report
from functitan.ops.operands import Operand, check_operands
from functitan.ops.order import zigzag_ranks
from functitan.ops.remembered import check_layouts, made
from functitan.ops.types import layout_here
from functitan.sharding.context import current
from functitan.sharding.cut import refuse_shards
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout
from functitan.sharding.mesh import MeshSizes

Groups = tuple[Axes, ...]  # one for each dimension of a tensor: its axes, outermost first; none is a size of 1


def rearrange(pattern: str, x: Tensor, **sizes: int) -> Tensor:
    """Transpose, split and merge axes: `"batch seq (heads head_dim) -> batch heads seq head_dim"`, with `head_dim=64`.

    An axis in parentheses is made of several, the outermost first; `1` is an axis of size 1 without a name. Both sides
    have the same names. `sizes` are global; of each composite on the left one may be left out. Views of torch wherever
    views do, and so is the transpose, the rearrangement back. A composite lies as its outermost part does, which alone
    may be sharded: so an axis with a name of its own, "mlp", is split where the table has it as the outermost part.
    Raises `PatternError`, and `LayoutError` for parts that are sharded inside a composite, or lie zigzag.

    >>> import torch
    >>> x = torch.arange(6).view(1, 6)
    >>> rearrange("batch (heads head_dim) -> batch head_dim heads", x, heads=2)
    tensor([[[0, 3],
             [1, 4],
             [2, 5]]])
    """
    (left, right), names, env = _parse(pattern), _parse(pattern).names, current()
    if not isinstance(x, Tensor):
        check_operands(f"rearrange({pattern!r})", Operand("x", x, names))
    if env.mesh is None:
        refuse_shards(f"rearrange({pattern!r})", [("x", x)])
    layout = None if env.mesh is None else layout_here(names, x, env)
    if env.remembers:
        check_layouts(f"rearrange({pattern!r})", [("x", x, names, left)], env)
    _check_order(pattern, env)
    mesh = None if env.mesh is None else env.mesh.sizes
    split, order, merged = _recipe(pattern, tuple(x.shape), tuple(sizes.items()), layout, mesh)
    y = x if split is None else x.reshape(split)
    y = y if order is None else y.permute(order)
    y = y if merged is None else y.reshape(merged)
    return made("rearrange", names, y, env, groups=right)


def _check_order(pattern: str, env: Env) -> None:
    """Raise `LayoutError` for a part of a composite that lies zigzag: its tokens do not stand together there."""
    axis, sides = env.sequence.axis, _parse(pattern)
    if zigzag_ranks(axis, env) == 1:
        return
    bad = [group for group in dict.fromkeys((*sides.left, *sides.right)) if axis in group and len(group) > 1]
    problems = [f"{axis!r} of {_write((group,))} lies in the order 'zigzag' of ft.context_parallel" for group in bad]
    if problems:
        fix = _FIX_ORDER.format(
            write_axes(sides.names), write_axes(tuple(f"whole_{a}" if a == axis else a for a in sides.names))
        )
        raise LayoutError(report(f"rearrange({pattern!r})", problems, fix))


class _Sides(NamedTuple):
    left: Groups
    right: Groups

    @property
    def names(self) -> Axes:
        """Those of the left."""
        return tuple(axis for group in self.left for axis in group)


class _Recipe(NamedTuple):
    """Local shapes and an order of axes; `None` where there is nothing to do."""

    split: tuple[int, ...] | None
    order: tuple[int, ...] | None
    merged: tuple[int, ...] | None


@cache
def _parse(pattern: str) -> _Sides:
    check_pattern(pattern, "ft.rearrange")
    what, sides = f"rearrange({pattern!r})", pattern.split("->")
    if len(sides) != 2:
        raise PatternError(report(what, [f"a pattern has one '->', this has {len(sides) - 1}"], _FIX))
    problems, found = [], []
    for side in map(str.strip, sides):
        try:
            expression = ParsedExpression(side)
            if expression.has_ellipsis:
                problems.append(f"{side!r} has an ellipsis: every axis has a name here")
            elif expression.has_non_unitary_anonymous_axes:
                problems.append(f"{side!r} has a number other than 1: give the axis a name, and its size")
            else:
                found.append(tuple(map(tuple, expression.composition)))
        except EinopsError as error:
            problems.append(f"{side!r}: {error}")
    if not problems:
        left, right = ([axis for group in groups for axis in group] for groups in found)
        problems += [
            f"axis {axis!r}{nearest(axis, right)} stands on the left only" for axis in left if axis not in right
        ]
        problems += [
            f"axis {axis!r}{nearest(axis, left)} stands on the right only" for axis in right if axis not in left
        ]
    if problems:
        raise PatternError(report(what, problems, _FIX))
    parse_axes(write_axes(tuple(left)))  # our own rules of names
    return _Sides(*found)


@lru_cache(maxsize=2**14)  # shapes are part of the key: lengths may vary without end
def _recipe(
    pattern: str,
    shape: tuple[int, ...],
    sizes: tuple[tuple[str, int], ...],
    layout: Layout | None,
    mesh: MeshSizes | None,
) -> _Recipe:
    (left, right), what = _parse(pattern), f"rearrange({pattern!r})"
    if len(left) != len(shape):
        problem = f"{_write(left)!r} has {len(left)} axes, the tensor {len(shape)}: {shape}"
        raise PatternError(report(what, [problem], "give each axis of the tensor a name, 1, or names in parentheses"))
    if layout is not None:
        _check_layout(what, left, right, layout)
    local = _local_sizes(what, left, shape, dict(sizes), layout, mesh)
    names, turned = (tuple(axis for group in side for axis in group) for side in (left, right))
    return _Recipe(
        None if all(len(group) == 1 for group in left) else tuple(local[axis] for axis in names),
        None if turned == names else tuple(names.index(axis) for axis in turned),
        None
        if all(len(group) == 1 for group in right)
        else tuple(math.prod(local[axis] for axis in group) for group in right),
    )


def _check_layout(what: str, left: Groups, right: Groups, layout: Layout) -> None:
    """Raise `LayoutError` for every part of a composite, but the outermost, that the table shards."""
    bad = [(group, axis) for group in dict.fromkeys((*left, *right)) for axis in group[1:] if layout.of(axis)]
    problems = [
        f"part {axis!r} of {_write((group,))} lies over {layout.of(axis)}, and the outermost {group[0]!r} over "
        f"{layout.of(group[0]) or 'no mesh dim'}: a rank's positions would not stand together in the composite"
        for group, axis in bad
    ]
    if problems:
        names = tuple(axis for group in left for axis in group)
        whole = tuple(f"whole_{axis}" if axis in {axis for _, axis in bad} else axis for axis in names)
        raise LayoutError(report(what, problems, _FIX_LAYOUT.format(write_axes(names), write_axes(whole))))


def _local_sizes(
    what: str,
    left: Groups,
    shape: tuple[int, ...],
    sizes: dict[str, int],
    layout: Layout | None,
    mesh: MeshSizes | None,
) -> dict[str, int]:
    """The size of each axis on this rank; one unknown part of each composite follows from the others."""
    known = [axis for group in left for axis in group]
    problems = [
        f"a size is given for {axis!r}{nearest(axis, known)}, no axis here" for axis in sizes if axis not in known
    ]
    problems += [f"axis {axis!r} has size {n!r}" for axis, n in sizes.items() if not isinstance(n, int) or n < 1]
    local: dict[str, int] = {}
    for group, size in zip(left, shape, strict=True) if not problems else ():
        ranks = mesh.size(layout.of(group[0])) if mesh and layout and group else 1
        whole, unknown = size * ranks, [axis for axis in group if axis not in sizes]
        given = math.prod(sizes[axis] for axis in group if axis in sizes)
        full = {axis: sizes.get(axis, whole // given) for axis in group}
        text = f"{_write((group,))!r} is {whole}" + (f" ({size} on each of {ranks} ranks)" if ranks > 1 else "")
        if len(unknown) > 1:
            problems.append(f"{text}, and its parts {', '.join(map(repr, unknown))} have no size: one may be left out")
        elif math.prod(full.values()) != whole:
            parts = " times ".join(f"{axis}={sizes[axis]}" for axis in group if axis in sizes) or "1"
            problems.append(f"{text}, which is no{' multiple of' if unknown else 't'} {parts}")
        elif group and full[group[0]] % ranks:
            problems.append(f"{text}, but {group[0]!r} of size {full[group[0]]} is not divisible by {ranks}")
        local |= {axis: n // ranks if axis == group[0] else n for axis, n in full.items()}
    if problems:
        raise PatternError(report(what, problems, "sizes are global, and the parts of an axis multiply to its size"))
    return local


def _write(groups: Groups) -> str:
    """
    >>> _write((("batch",), ("heads", "head_dim"), ()))
    'batch (heads head_dim) 1'
    """
    return " ".join(group[0] if len(group) == 1 else f"({write_axes(group)})" if group else "1" for group in groups)


_FIX = "write as in 'batch seq (heads head_dim) -> batch heads seq head_dim', with the same names on both sides"
_FIX_ORDER = (
    "put it in the order of positions first, by renaming it to an axis that the rules keep whole: "
    "ft.constrain('{0} -> {1}', x); or keep the contiguous order"
)
_FIX_LAYOUT = (
    "make the part whole first, by renaming it to an axis that the rules keep whole: ft.constrain('{0} -> {1}', x); "
    "or change its rule"
)
