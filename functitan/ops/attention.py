"""`ft.attention`: softmax attention as a named op, the one op that mixes positions.

Invariant: each rank computes the queries that it holds; keys and values are broadcast (over a hidden replica axis)
from where they lie to the ranks whose queries need them, so their cotangents are reduced back by the planner.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from functitan.axes import Axes, parse_operands, write_axes
from functitan.errors import PatternError, report
from functitan.ops.contraction import contract, lift
from functitan.ops.function import hidden_axes, needs_higher_derivatives
from functitan.ops.operands import Operand, check_operands
from functitan.ops.types import Type, resolve
from functitan.sharding.context import Env, current
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.layout import Layout
from functitan.sharding.precision import in_compute
from functitan.sharding.steps import Label

_REPLICA = "_replica"
# The only backend with a second derivative and forward mode. Called outright, because `sdpa_kernel` sets flags of the
# whole process, which threads of a virtual mesh would leave set. Private: tried on torch 2.13.
_math = torch.ops.aten._scaled_dot_product_attention_math
_MATH = "attention runs on SDPA's math backend: the fused kernels have neither a second derivative nor forward mode"


def attention(
    pattern: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T scale) v: `"batch seq heads head_dim, batch seq kv_heads head_dim"` (queries; keys and values).

    Axes stand in this order: any number of batch axes, then positions, heads, and the axis of the dot product. `heads`
    is a multiple of `kv_heads` (grouped-query attention). `causal` lets a query see keys at its position and before.
    `positions` and `segments` (int64, the pattern of q without its last two axes) replace the places in the sequence,
    and keep tokens of different segments apart. `scale` is head_dim ** -0.5 by default. Raises `PatternError`.

    With `key_positions` (int64, the pattern of k without its last two axes) keys have places of their own, as those of
    a cache: `"batch seq heads head_dim, batch cache kv_heads head_dim"`. `causal` then needs `positions` too.

    >>> q = k = v = torch.ones(1, 3, 2, 4)
    >>> attention("batch seq heads head_dim, batch seq kv_heads head_dim", q, k, v, causal=True).shape
    torch.Size([1, 3, 2, 4])
    """
    axes, kv_axes = _parse(pattern, key_positions is not None)
    env, label = current(), Label("attention", pattern)
    what, marks = f"attention({pattern!r})", (("positions", positions), ("segments", segments))
    given = [Operand("queries", q, axes, "float"), Operand("keys", k, kv_axes), Operand("values", v, kv_axes)]
    given += [Operand(name, x, axes[:-2], "int") for name, x in marks if x is not None]
    if key_positions is not None:
        given.append(Operand("key_positions", key_positions, kv_axes[:-2], "int"))
    check_operands(what, *given, alike=True)
    q, k, v = in_compute((q, k, v), env.precision)
    own = keys = _Marks(positions, segments)
    if key_positions is not None:
        _check_own_places(pattern, causal, own)
        keys = _Marks(key_positions, None)
    if env.mesh is None:
        _check_heads(pattern, q.shape[-2], k.shape[-2])
        mask = _mask(own, keys, causal, q, 0, k.shape[-3])
        return _sdpa(q, k, v, mask, causal and mask is None, scale, env, label)
    return _sharded(axes, kv_axes, q, k, v, own, keys, causal, scale, env, label)


def _sharded(
    axes: Axes,
    kv_axes: Axes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    marks: _Marks,
    key_marks: _Marks,
    causal: bool,
    scale: float | None,
    env: Env,
    label: Label,
) -> Tensor:
    """Choose the layout of the local work from that of q, bring keys and values there, and attend."""
    assert env.mesh is not None
    seq, heads, head_dim = axes[-3:]
    kv_heads = kv_axes[-2]
    given = [q, k, v, *(x for x in (*marks, *key_marks) if x is not None)]
    every = tuple(sorted({hidden for x in given for hidden in hidden_axes(x, env)}))
    q, k, v = (lift(Type(its), x, every, env, label) for its, x in ((axes, q), (kv_axes, k), (kv_axes, v)))
    (lq, lk), sizes = _layouts(axes, kv_axes, q, k, env, label)
    _check_heads(label.pattern, sizes[heads], sizes[kv_heads])
    work = Layout(lq.axes, tuple(() if axis == head_dim else lq.of(axis) for axis in lq.axes))
    aligned = lk.of(kv_heads) == lq.of(heads)
    spread = lq.of(seq) + (() if aligned else lq.of(heads))
    wanted = {kv_heads: lq.of(heads) if aligned else (), _REPLICA: spread}
    batch = {axis: lq.of(axis) for axis in lq.axes if axis not in (seq, heads, head_dim)}
    names = (_REPLICA, *lq.axes[:-3], *kv_axes[-3:])
    kv_work = Layout(names, tuple({**batch, **wanted}.get(axis, ()) for axis in names))

    q = _to(axes, q, work, env, label)
    k, v = (_spread(kv_axes, x, kv_work, env, label) for x in (k, v))
    first = env.mesh.index(lq.of(seq)) * q.shape[-3]
    if not aligned:
        k, v = (
            _heads_of_group(x, env.mesh.index(lq.of(heads)) * q.shape[-2], q.shape[-2], sizes[heads] // sizes[kv_heads])
            for x in (k, v)
        )
    rows = Layout(work.axes[:-2], work.dims[:-2])
    columns = Layout((*rows.axes[:-1], kv_axes[-3]), (*rows.dims[:-1], ()))
    of_rows, of_columns = (
        _Marks(*(None if x is None else _to(names, x, layout, env, label) for x in its))
        for its, names, layout in ((marks, axes[:-2], rows), (key_marks, kv_axes[:-2], columns))
    )
    mask = _mask(of_rows, of_columns, causal, q, first, k.shape[-3], everywhere=bool(lq.of(seq)))
    out = _sdpa(q, k, v, mask, causal and mask is None, scale, env, label)
    typed = Contraction((Type(axes, layout=work),), (Type(axes),), (Term(0, (0,)),), ())  # type: ignore[arg-type]
    return contract(typed, (out,), env, label)[0]


def _layouts(
    axes: Axes, kv_axes: Axes, q: Tensor, k: Tensor, env: Env, label: Label
) -> tuple[tuple[Layout, ...], dict[str, int]]:
    typed = Contraction((Type(axes), Type(kv_axes)), (Type(axes),), (Term(0, (0, 1)),), ())  # type: ignore[arg-type]
    full, _ = resolve(typed, (q, k), env, label)
    return full.operands, dict(full.sizes)  # type: ignore[return-value]


def _to(axes: Axes, x: Tensor, layout: Layout, env: Env, label: Label) -> Tensor:
    typed = Contraction((Type(axes),), (Type(axes, layout=layout),), (Term(0, (0,)),), ())  # type: ignore[arg-type]
    return contract(typed, (x,), env, label)[0]


def _spread(axes: Axes, x: Tensor, layout: Layout, env: Env, label: Label) -> Tensor:
    """Keys or values where the queries are: one part of the replica axis for each rank that uses them."""
    assert env.mesh is not None
    known = ((_REPLICA, env.mesh.sizes.size(layout.of(_REPLICA))),)
    typed = Contraction((Type(axes),), (Type((_REPLICA, *axes), layout=layout),), (Term(0, (0,)),), known)  # type: ignore[arg-type]
    return contract(typed, (x,), env, label)[0].squeeze(0)


def _heads_of_group(x: Tensor, first: int, count: int, group: int) -> Tensor:
    """The kv heads that queries' heads `first` ... `first + count` use, so that they group evenly again."""
    if count % group == 0 or group % count == 0:
        return x.narrow(-2, first // group, max(1, count // group))
    return x.index_select(-2, torch.arange(first, first + count, device=x.device) // group)


class _Marks(NamedTuple):
    """What masks the queries or the keys, besides their places."""

    positions: Tensor | None
    segments: Tensor | None


def _mask(
    rows: _Marks, columns: _Marks, causal: bool, q: Tensor, first: int, length: int, everywhere: bool = False
) -> Tensor | None:
    """Which keys a query sees, [*batch, 1, queries, keys]; `None` where SDPA's own causal mask, or none, will do."""
    (positions, segments), (key_positions, key_segments) = rows, columns
    seen = None
    if causal and (positions is not None or everywhere):
        if positions is None or key_positions is None:
            positions = torch.arange(first, first + q.shape[-3], device=q.device)
            key_positions = torch.arange(length, device=q.device)
        seen = positions.unsqueeze(-1) >= key_positions.unsqueeze(-2)
    if segments is not None and key_segments is not None:
        if seen is None and causal:
            seen = torch.ones(q.shape[-3], length, dtype=torch.bool, device=q.device).tril()
        same = segments.unsqueeze(-1) == key_segments.unsqueeze(-2)
        seen = same if seen is None else seen & same
    return None if seen is None else seen.unsqueeze(-3) if seen.dim() > 2 else seen


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, env: Env, label: Label
) -> Tensor:
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    grouped = q.shape[-3] != k.shape[-3]
    with env.span(*label):
        if not needs_higher_derivatives(env):
            out = scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
            return out.transpose(-3, -2)
        env.note(_MATH)
        added = None if mask is None else torch.where(mask, 0.0, -torch.inf).to(q.dtype)
        return _math(q, k, v, added, 0.0, causal, scale=scale, enable_gqa=grouped)[0].transpose(-3, -2)


@cache
def _parse(pattern: str, own_places: bool) -> tuple[Axes, Axes]:
    operands = parse_operands(pattern)
    problems = []
    if len(operands) != 2:
        problems.append(f"{len(operands)} patterns: one of queries, one of keys and values")
    else:
        q, kv = operands
        if len(q) < 3 or len(q) != len(kv):
            problems.append(
                f"{write_axes(q)!r} and {write_axes(kv)!r}: each has batch axes, positions, heads, head_dim"
            )
        elif q[:-3] != kv[:-3] or q[-1] != kv[-1] or (q[-3] != kv[-3] and not own_places):
            problems.append(f"{write_axes(q)!r} and {write_axes(kv)!r} differ in more than the heads")
    if problems:
        raise PatternError(report(f"attention({pattern!r})", problems, _FIX))
    return operands  # type: ignore[return-value]


def _check_heads(pattern: str, heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        problem = f"{heads} heads are not a multiple of {kv_heads} kv heads"
        fix = "each kv head serves the same number of heads: give a divisor of them"
        raise PatternError(report(f"attention({pattern!r})", [problem], fix))


def _check_own_places(pattern: str, causal: bool, marks: _Marks) -> None:
    problems = [] if marks.segments is None else ["segments are of queries alone"]
    problems += ["causal, without positions of the queries"] if causal and marks.positions is None else []
    if problems:
        fix = "with key_positions= give positions= of the queries, and no segments"
        raise PatternError(report(f"attention({pattern!r})", problems, fix))


_FIX = "write 'batch seq heads head_dim, batch seq kv_heads head_dim'"
