"""`ft.take` and `ft.select`: lookups along an axis, and `ft.iota`, the indices to look up.

Invariant: a lookup is a contraction of the table with one-hot rows, planned as one, except that the indices move and
the table never does: a rank answers for the rows it holds. Its transpose adds cotangents into the table's shard.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.axes import Axes, parse_axes, parse_signature, write_axes
from functitan.errors import PatternError, nearest, report
from functitan.ops.contraction import lift
from functitan.ops.function import Call, Hidden, Hiddens, Op, apply, hidden_axes, hide, peeled
from functitan.ops.operands import Operand, check_operands
from functitan.ops.order import slots_of, zigzag_ranks
from functitan.ops.remembered import made
from functitan.ops.rows import LookupAxes, put_rows, take_rows
from functitan.ops.types import Type, check_cotangents, global_sizes, resolve
from functitan.sharding.choice import Fixed
from functitan.sharding.context import current
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout, check_leaves, local_shape, whole
from functitan.sharding.mesh import is_size
from functitan.sharding.message import Label
from functitan.sharding.plan import Plan, plan
from functitan.sharding.sequence import positions_of
from functitan.sharding.steps import run_step, settle


def take(pattern: str, indices: Tensor, table: Tensor) -> Tensor:
    """Look up rows of a table: `"batch seq, vocab embed -> batch seq embed"`.

    The looked-up axis is the table's axis that neither indices nor result have; axes that indices and table share are
    looked up row by row. `indices` are global, int64, in range: on a mesh that shards the looked-up axis an index out
    of range gives zeros. Transpose (of `table`): cotangents added into the rows. Raises `PatternError`.

    >>> take("batch, vocab embed -> batch embed", torch.tensor([2, 0]), torch.arange(6.0).view(3, 2))
    tensor([[4., 5.],
            [0., 1.]])
    """
    ids, rows, result = _parse(pattern, f"take({pattern!r})")
    check_operands(f"take({pattern!r})", Operand("indices", indices, ids, "int"), Operand("table", table, rows))
    env, types, label = current(), _Types(Type(ids), Type(rows), Type(result)), Label("take", pattern)
    if env.sequence.zigzag and (ranks := zigzag_ranks(axis := types.axes.looked_up, env)) > 1:
        indices = slots_of(indices, ranks, global_sizes(rows, table, env, label)[axis])
    dtype = env.precision.compute if env.precision is not None and table.is_floating_point() else None
    return made("take", result, _lookup("take", types, indices, table, env, label, (), dtype=dtype), env)


def select(pattern: str, x: Tensor, index: int | Tensor) -> Tensor:
    """Positions along an axis: `select("batch seq embed -> batch embed", x, -1)`, one for all.

    A tensor of indices has the axes of a second operand: `select("batch seq embed, batch -> batch embed", x, last)`.
    Negative indices count from the end. The axis goes, and the layout of the others is that of the result's pattern.
    Along the axis that `ft.context_parallel` orders, indices here and in `take` are positions: -1 is the last token.

    >>> select("batch seq -> batch", torch.arange(6).view(2, 3), -1)
    tensor([2, 5])
    """
    signature = parse_signature(pattern)
    if len(signature.operands) == 1 and isinstance(index, int) and not isinstance(index, bool):
        turned = f", {write_axes(signature.operands[0])} -> {write_axes(signature.results[0])}"
    elif len(signature.operands) == 2 and isinstance(index, Tensor):
        rows, ids = map(write_axes, signature.operands)
        turned = f"{ids}, {rows} -> {write_axes(signature.results[0])}"
    else:
        problem = f"the pattern has {len(signature.operands)} operands, and the index is a {type(index).__name__}"
        fix = "write 'batch seq -> batch' for an int, 'batch seq, batch -> batch' for a tensor of indices"
        raise PatternError(report(f"select({pattern!r})", [problem], fix))
    ids, rows, result = _parse(turned, f"select({pattern!r})")
    named = [Operand("index", index, ids, "int")] if isinstance(index, Tensor) else []
    check_operands(f"select({pattern!r})", Operand("x", x, rows), *named)
    env, label, axes = current(), Label("select", pattern), LookupAxes(ids, rows, result)
    size = global_sizes(axes.table, x, env, label)[axes.looked_up]
    if isinstance(index, Tensor):
        indices = torch.where(index < 0, index + size, index)
        if env.mesh is not None and not _all_inside(peeled(indices), size):
            raise PatternError(report(f"select({pattern!r})", [_out_of(indices, size, axes)], _FIX_RANGE))
    elif -size <= index < size:
        indices = torch.full((), index % size, dtype=torch.int64, device=x.device)
    else:
        problem = f"index {index} is out of range for axis {axes.looked_up!r} of size {size}"
        raise PatternError(report(f"select({pattern!r})", [problem], f"give one from {-size} to {size - 1}"))
    indices = slots_of(indices, zigzag_ranks(axes.looked_up, env), size)
    found = _lookup("take", _Types(Type(ids), Type(rows), Type(result)), indices, x, env, label, ())
    return made("select", result, found, env)


def sizes(pattern: str, x: Tensor) -> dict[str, int]:
    """The global size of each axis of a tensor; `x.shape` has those of this rank's shard.

    >>> sizes("batch seq", torch.ones(2, 3))
    {'batch': 2, 'seq': 3}
    """
    axes = parse_axes(pattern)
    check_operands(f"sizes({pattern!r})", Operand("x", x, axes))
    return global_sizes(axes, x, current(), Label("sizes", pattern))


def iota(pattern: str, axis: str, like: Tensor | None = None, **sizes: int) -> Tensor:
    """Global indices along one axis, int64, in the layout of the pattern; nothing is sent.

    Along the axis that `ft.context_parallel` orders they are positions: where in the sequence each token belongs.

    The sizes come from `like`, a local tensor of that pattern, or by name, global: `iota("batch seq", "seq", batch=8,
    seq=128)`. With `like` it has the axes that an `ft.vmap` hides in it, and so may meet tensors like it in any op.
    Raises `LayoutError` for a size that its mesh dims do not divide.

    >>> iota("batch seq", "seq", batch=2, seq=3)
    tensor([[0, 1, 2],
            [0, 1, 2]])
    """
    axes, env = parse_axes(pattern), current()
    what = f"iota({pattern!r}, {axis!r})"
    problems = [f"axis {axis!r} is not in the pattern{nearest(str(axis), axes)}"] if axis not in axes else []
    if like is None:
        problems += [f"axis {name!r} has no size" for name in axes if name not in sizes]
        problems += [f"{a}={n!r}: a size is a whole number of at least 1" for a, n in sizes.items() if not is_size(n)]
        problems += [
            f"{a}={n}: the pattern has no such axis{nearest(a, axes)}" for a, n in sizes.items() if a not in axes
        ]
    elif sizes:
        problems.append(f"both like= and the sizes {sizes} are given")
    if problems:
        raise PatternError(report(what, problems, "give the size of every axis by name, or like="))
    if like is not None:
        check_operands(what, Operand("like", like, axes))
    elif env.mesh is not None and env.rules is not None:
        check_leaves(what, [("result", pattern, tuple(sizes[a] for a in axes))], env.rules, env.mesh.sizes)
    hidden: Hiddens = () if env.mesh is None or like is None else hidden_axes(like, env, frozenset(axes))
    layout = whole(axes) if env.mesh is None else Type(axes).resolve(hidden, env)
    shape = tuple(sizes[a] for a in axes) if like is None else tuple(like.shape)
    if like is None and env.mesh is not None:
        shape = local_shape(layout, shape, env.mesh.sizes)
    place = axes.index(axis)
    device = like.device if like is not None else None
    held = None if env.mesh is None else env.sequence.held(axis, shape[place], layout.of(axis), env.mesh)
    row = torch.arange(shape[place], device=device) if held is None else positions_of(held, device)
    return made("iota", axes, hide(row.view([-1 if a == axis else 1 for a in axes]).expand(shape), hidden), env)


class _Types(NamedTuple):
    """The types of indices, table and result."""

    indices: Type
    table: Type
    result: Type

    @property
    def axes(self) -> LookupAxes:
        return LookupAxes(self.indices.axes, self.table.axes, self.result.axes)


class _Static(NamedTuple):
    kind: str  # "take": (indices, table) -> result; "put", its transpose: (indices, result) -> table
    types: _Types
    full: Contraction
    plan: Plan
    label: Label
    dtype: torch.dtype  # of the result


def _lookup(
    kind: str,
    types: _Types,
    indices: Tensor,
    x: Tensor,
    env: Env,
    label: Label,
    known: tuple[tuple[str, int], ...],
    own: Layout | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    axes, dtype = types.axes, dtype or x.dtype
    if env.mesh is None:
        try:
            with env.span(*label):
                return take_rows(axes, indices, x).to(dtype)
        except (IndexError, RuntimeError):  # torch's own names neither op nor axis
            size = x.shape[axes.table.index(axes.looked_up)]
            if _all_inside(peeled(indices), size):
                raise
            problem = _out_of(indices, size, axes)
            raise PatternError(report(f"{label.op}({label.pattern!r})", [problem], _FIX_RANGE)) from None
    if kind == "put":  # each position of the indices' hidden axes has a table of its own
        x = lift(types.result, x, hidden_axes(indices, env), env, label)
    source, target = (types.table, types.result) if kind == "take" else (types.result, types.table)
    typed = Contraction((types.indices, source), (target,), (Term(0, (0, 1)),), known)
    full, hidden = resolve(typed, (indices, x), env, label)
    table = full.operands[1] if kind == "take" else full.results[0]
    if own is not None:
        check_cotangents([(axes.table, own, table)], label, env)
    fixed = Fixed(
        tuple((dim, axis) for axis, dims in zip(table.axes, table.dims, strict=True) for dim in dims), (axes.looked_up,)
    )
    static = _Static(kind, types, full, plan(full, env.mesh.sizes, fixed), label, dtype)
    return apply(Call(_LOOKUP, env, static, *hidden), indices, x)[0]


def _run(call: Call, *tensors: Tensor) -> tuple[Tensor]:
    static: _Static = call.static
    assert call.env.mesh is not None
    call.env.rewritten(static.full, static.plan, static.label)  # says why not: a lookup is no product of matrices
    ((group,),) = static.plan.results
    (item,) = group.products
    moved = []
    for i in item.moved:
        place, steps = static.plan.moved[i]
        x = tensors[place]
        for step in steps:
            x = run_step(x, step, call.env, static.label)
        moved.append(x)
    layouts = (*static.full.operands, *static.full.results)
    ids, table, result = layouts if static.kind == "take" else (layouts[0], layouts[2], layouts[1])
    full = LookupAxes(ids.axes, table.axes, result.axes)
    shards = table.of(full.looked_up)
    size = dict(static.full.sizes)[full.looked_up] // call.env.mesh.sizes.size(shards)
    local = moved[0] - call.env.mesh.index(shards) * size if shards else moved[0]
    inside = (local >= 0) & (local < size) if shards else None
    local = local if inside is None else local.clamp(0, size - 1)
    if static.kind == "take":
        out = take_rows(full, local, moved[1], inside).to(static.dtype)
        own = static.dtype
    else:
        own = moved[1].dtype
        out = put_rows(full, local, moved[1].to(torch.promote_types(own, static.dtype)), size, inside)
    return (settle(out, own, static.dtype, group.steps, call.env, static.label),)


def _vjp(call: Call, tensors: tuple[Tensor, ...], _: Any, grads: tuple[Tensor | None, ...], wanted: tuple[int, ...]):
    static: _Static = call.static
    assert wanted == (1,) and grads[0] is not None, "indices have no cotangent"
    back = "put" if static.kind == "take" else "take"
    own = static.full.operands[1] if back == "put" else None
    label, known = static.label, static.full.sizes
    x = _lookup(back, static.types, tensors[0], grads[0], call.transposed(), label, known, own, tensors[1].dtype)
    return (x,)


def _jvp(call: Call, tensors: tuple[Tensor, ...], _: Any, given: tuple[Tensor | None, ...]):
    static: _Static = call.static
    assert given[1] is not None
    label, known = static.label, static.full.sizes
    return (_lookup(static.kind, static.types, tensors[0], given[1], call.env, label, known, dtype=static.dtype),)


def _show(call: Call, hidden: Hidden, operands: tuple[bool, bool], results: tuple[bool]) -> _Static:
    static: _Static = call.static
    here = (*operands, *results) if static.kind == "take" else (operands[0], results[0], operands[1])
    types = (t.shown(hidden if shows else None, call.env) for t, shows in zip(static.types, here, strict=True))
    return static._replace(types=_Types(*types))


_LOOKUP = Op("lookup", _run, _vjp, _jvp, _show)


@cache
def _parse(pattern: str, what: str) -> tuple[Axes, Axes, Axes]:
    signature = parse_signature(pattern)
    if len(signature.operands) != 2 or len(signature.results) != 1:
        problem = f"{len(signature.operands)} operands and {len(signature.results)} results"
        raise PatternError(report(what, [problem], "write 'indices, table -> result'"))
    (ids, table), (result,) = signature
    gone = [axis for axis in table if axis not in result and axis not in ids]
    problems = [] if len(gone) == 1 else [f"one axis of the table is looked up and goes, not {len(gone)}: {gone}"]
    lost = [axis for axis in ids if axis not in result] + [
        axis for axis in result if axis not in ids and axis not in table
    ]
    problems += [f"axis {axis!r} must be in the result, and come from indices or table" for axis in lost]
    if problems:
        raise PatternError(report(what, problems, _FIX[what.partition("(")[0]]))
    return ids, table, result


def _all_inside(indices: Tensor, size: int) -> bool:
    """Whether no index is out of range, where they are real values on the CPU; else it is not known, and True."""
    if type(indices) is not Tensor or indices.device.type != "cpu" or not indices.numel():
        return True
    least, most = indices.aminmax()
    return least.item() >= 0 and most.item() < size


def _out_of(indices: Tensor, size: int, axes: LookupAxes) -> str:
    indices = peeled(indices)
    bad = indices[(indices < 0) | (indices >= size)].unique().tolist()
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    return f"indices out of range for axis {axes.looked_up!r} of size {size}: {shown}"


_FIX_RANGE = "indices are global, and count from 0; those of ft.select may count from the end, from -1"
_FIX = {
    "take": "write as in 'batch seq, vocab embed -> batch seq embed'",
    "select": "write as in 'batch seq embed -> batch embed': the axis that goes is the one that is looked up",
}
