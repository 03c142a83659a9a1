"""`ft.reduce` over named axes, and `ft.broadcast`, its transpose; `ft.count`, the sum of ones.

Invariant: a sum's transpose is a broadcast and a broadcast's a sum, so that gradients of what is shared are summed over
the ranks that share it. After a broadcast, plain elementwise torch ops are right.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from functitan.axes import Axes, parse_axes, parse_signature, write_axes
from functitan.errors import PatternError, nearest, report
from functitan.ops.contraction import contract, lift
from functitan.ops.function import vmaps_around
from functitan.ops.local import product
from functitan.ops.operands import Operand, check_operands
from functitan.ops.remembered import made
from functitan.ops.types import Type, global_sizes, resolve
from functitan.sharding.context import current
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.env import Env
from functitan.sharding.mesh import is_size
from functitan.sharding.message import Label
from functitan.sharding.precision import in_compute, widened

_OPS = ("sum", "mean", "max", "logsumexp")
_KINDS = {"sum": "any", "mean": "inexact"}


def reduce(pattern: str, x: Tensor, op: str = "sum") -> Tensor:
    """Sum, mean, max or logsumexp over the axes that the result lacks.

    `"batch seq embed -> batch seq"`. Transposes: of the sum, `broadcast`; of the mean, the same over the count; the
    others have vjps of their own (ties of a max share their cotangent equally, as in `torch.amax`). logsumexp is exact
    against overflow: the maximum is taken over all ranks first. Raises `PatternError`.

    >>> reduce("batch embed -> batch", torch.ones(2, 3), op="mean")
    tensor([1., 1.])
    """
    axes, result = _parse(pattern, "reduce")
    if op not in _OPS:
        raise PatternError(
            report(f"reduce({pattern!r})", [f"unknown op {op!r}{nearest(str(op), _OPS)}"], f"use one of {list(_OPS)}")
        )
    check_operands(f"reduce({pattern!r}, op={op!r})", Operand("x", x, axes, _KINDS.get(op, "float")))
    if op == "max" and isinstance(x, Tensor) and not x.numel():
        gone = [axis for axis, n in zip(axes, x.shape, strict=True) if n == 0]
        problem = f"axis {gone[0]!r} is empty, and nothing has no maximum"
        raise PatternError(report(f"reduce({pattern!r}, op='max')", [problem], "give every axis at least one element"))
    env, label = current(), Label("reduce", pattern)
    x = x if op == "max" else widened(x, env.precision)
    if op == "sum":
        found = _sum(axes, result, x, env, label)
    elif op == "mean":
        found = _sum(axes, result, x, env, label) / _count(axes, result, x, env, label)
    elif op == "max":
        found = _max(axes, result, x, env, label)
    else:
        found = _logsumexp(axes, result, x, env, label)
    return made("reduce", result, found, env)


def broadcast(pattern: str, x: Tensor, **sizes: int) -> Tensor:
    """Give a tensor axes that it lacks: `"embed -> batch seq embed"`. Transpose: the sum over them, over all ranks.

    A new axis has local size 1, which elementwise ops expand, unless `sizes` gives its global size. This is how a
    parameter meets an activation elementwise: with a plain `x * scale`, the scale's gradient lacks its sum over ranks.

    >>> broadcast("embed -> batch embed", torch.ones(3)).shape, broadcast("a -> b a", torch.ones(3), b=2).shape
    (torch.Size([1, 3]), torch.Size([2, 3]))
    """
    axes, result = _parse(pattern, "broadcast")
    check_operands(f"broadcast({pattern!r})", Operand("x", x, axes))
    env, label = current(), Label("broadcast", pattern)
    new = tuple(axis for axis in result if axis not in axes)
    problems = [f"axis {axis!r} of the operand is not in the result" for axis in axes if axis not in result]
    problems += [f"{axis}={sizes[axis]}: the new axes are {list(new)}" for axis in sizes if axis not in new]
    problems += [f"{axis}={n!r}: a size is a whole number of at least 1" for axis, n in sizes.items() if not is_size(n)]
    if problems:
        fix = "ft.broadcast gives new axes, and sizes to these alone; ft.reduce takes axes away"
        raise PatternError(report(f"broadcast({pattern!r})", problems, fix))
    if env.mesh is None:
        (x,) = in_compute((x,), env.precision)
        return product((axes,), result, (x,), tuple((axis, sizes.get(axis, 1)) for axis in new))
    x = lift(Type(axes), x, vmaps_around(env), env, label)  # it will meet tensors of each example
    typed = _contraction(axes, result)
    (layout,) = resolve(typed._replace(sizes=tuple((axis, 0) for axis in new)), (x,), env, label)[0].results
    known = tuple((axis, sizes.get(axis, env.mesh.sizes.size(layout.of(axis)))) for axis in new)
    compute = None if env.precision is None else env.precision.compute
    (found,) = contract(typed._replace(sizes=known), (x,), env, label, compute=compute)
    return made("broadcast", result, found, env)


def count(pattern: str, x: Tensor) -> Tensor:
    """The number of elements of the global tensor of which `x` is a shard: `[]`, int64, equal on every rank.

    What `reduce` of ones over all axes of the pattern would give, from shapes and the layout alone: nothing is sent.
    `x.numel()` is the number on this rank. So a loss of all elements counts them: `return total, ft.count("batch mlp",
    y)`; those that a mask keeps are counted by `reduce("batch mlp ->", mask)`. Inside `ft.vmap` it is the number of
    one example, inside `ft.accumulate` that of one replica's microbatch. Raises `PatternError`.

    >>> count("batch mlp", torch.ones(4, 3))
    tensor(12)
    """
    axes = parse_axes(pattern)
    check_operands(f"count({pattern!r})", Operand("x", x, axes))
    number = _count(axes, (), x, current(), Label("count", pattern))
    return torch.full((), number, dtype=torch.int64, device=x.device)


def _sum(axes: Axes, result: Axes, x: Tensor, env: Env, label: Label) -> Tensor:
    if env.mesh is not None:
        return contract(_contraction(axes, result), (x,), env, label)[0]
    with env.span(*label):
        return product((axes,), result, (x,))


def _spread(axes: Axes, result: Axes, x: Tensor, env: Env, label: Label, sizes: dict[str, int]) -> Tensor:
    """Back from the result's axes to the operand's, each rank with the part that it holds."""
    if env.mesh is None:
        return product((result,), axes, (x,), tuple((axis, 1) for axis in axes if axis not in result))
    return contract(_contraction(result, axes)._replace(sizes=tuple(sizes.items())), (x,), env, label)[0]


def _count(axes: Axes, result: Axes, x: Tensor, env: Env, label: Label) -> int:
    sizes = global_sizes(axes, x, env, label)
    return math.prod(sizes[axis] for axis in axes if axis not in result)


def _maximum(axes: Axes, result: Axes, x: Tensor, env: Env, label: Label) -> Tensor:
    """The maximum, without a derivative."""
    x = x.detach()
    if env.mesh is None:
        places = [i for i, axis in enumerate(axes) if axis not in result]
        kept = tuple(axis for axis in axes if axis in result)
        return product((kept,), result, (x.amax(places) if places else x,))
    return contract(_contraction(axes, result), (x,), env, label, reduction="max")[0]


def _max(axes: Axes, result: Axes, x: Tensor, env: Env, label: Label) -> Tensor:
    """The maximum as the mean of its ties, which gives it its derivative."""
    sizes = global_sizes(axes, x, env, label)
    top = _spread(axes, result, _maximum(axes, result, x, env, label), env, label, sizes)
    ties = x.detach() == top
    count = _sum(axes, result, ties.to(x.dtype), env, label)
    return _sum(axes, result, torch.where(ties, x, torch.zeros_like(x)), env, label) / count


def _logsumexp(axes: Axes, result: Axes, x: Tensor, env: Env, label: Label) -> Tensor:
    sizes = global_sizes(axes, x, env, label)
    top = _maximum(axes, result, x, env, label)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)  # all -inf gives -inf, not nan
    shifted = x - _spread(axes, result, top, env, label, sizes)
    return _sum(axes, result, shifted.exp(), env, label).log() + top


@cache
def _parse(pattern: str, op: str) -> tuple[Axes, Axes]:
    signature = parse_signature(pattern)
    if len(signature.operands) != 1 or len(signature.results) != 1:
        problem = f"{len(signature.operands)} operands and {len(signature.results)} results"
        raise PatternError(report(f"{op}({pattern!r})", [problem], f"ft.{op} takes one tensor and gives one"))
    (axes,), (result,) = signature
    missing = [axis for axis in result if axis not in axes]
    if op == "reduce" and missing:
        problems = [
            f"result {write_axes(result)!r} has axis {axis!r}{nearest(axis, axes)}, which the operand lacks"
            for axis in missing
        ]
        raise PatternError(
            report(f"reduce({pattern!r})", problems, "ft.broadcast gives a tensor an axis that it lacks")
        )
    return axes, result


@cache
def _contraction(axes: Axes, result: Axes) -> Contraction:
    return Contraction((Type(axes),), (Type(result),), (Term(0, (0,)),), ())  # type: ignore[arg-type]
