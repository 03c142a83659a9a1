"""`ft.attention`: softmax attention as a named op, the one op that mixes positions.

Invariant: it is one function however its sequence lies: over ranks, and in which order of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from functitan.attention.dense import dense
from functitan.attention.lowering import Asked, check_heads, lowered
from functitan.attention.masks import Marks, Rule
from functitan.axes import Axes, parse_operands, write_axes
from functitan.errors import PatternError, report
from functitan.ops.autocast import autocast_is_on, in_precision
from functitan.ops.operands import Operand, check_operands
from functitan.sharding.context import current
from functitan.sharding.mesh import is_size
from functitan.sharding.message import Label
from functitan.sharding.precision import in_compute


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
    window: int | None = None,
    mask: Callable[..., Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T scale) v: `"batch seq heads head_dim, batch seq kv_heads head_dim"` (queries; keys and values).

    Axes stand in this order: any number of batch axes, then positions, heads, and the axis of the dot product. `heads`
    is a multiple of `kv_heads` (grouped-query attention). `scale` is head_dim ** -0.5 by default.

    `causal` lets a query see keys at its position and before; `window` those less than so many positions away.
    `segments` (int64, the pattern of q without its last two axes) keep tokens of different segments apart, and
    `positions`, of the same pattern, replace the places in the sequence. Where they do not ascend, in the order of
    tokens, a new document begins that `causal` keeps apart, as `segments` would; where segments are given these alone
    say so, and within one positions may come in any order. `mask(b, h, q_idx, kv_idx)` is a function as
    FlexAttention takes it, true where a query sees a key: pure, elementwise, of tensors of global indices (`b` counts
    the examples of all batch axes, row-major; the last two are positions). All of them must let a key through; a
    query that sees none gets 0.

    Where `seq` is sharded, keys and values go around a ring, or are gathered, or heads are exchanged for sequence:
    `ft.context_parallel`. Blocks that causality and the window hide are neither computed nor sent; tiles that the
    other masks empty are not computed where their values are known at once, on the CPU outside `ft.jit`. Transpose:
    cotangents of keys and values go back around the ring, or are reduced. Where more than a first reverse derivative
    is asked for it runs on SDPA's math backend with keys gathered, and `explain` says so.

    With `key_positions` (int64, the pattern of k without its last two axes) keys have places of their own, as those of
    a cache: `"batch seq heads head_dim, batch cache kv_heads head_dim"`. `causal` then needs `positions` too, and
    compares the two, whatever their order.

    Raises `PatternError`, also for a mask function that is visibly not pure, and `LayoutError` for a method that cannot
    run, and for positions that are not in the order of the tokens.

    >>> import torch
    >>> q = k = v = torch.ones(1, 3, 2, 4)
    >>> attention("batch seq heads head_dim, batch seq kv_heads head_dim", q, k, v, causal=True).shape
    torch.Size([1, 3, 2, 4])
    """
    if autocast_is_on():
        options = dict(causal=causal, positions=positions, segments=segments, key_positions=key_positions)
        options |= dict(scale=scale, window=window, mask=mask)
        return in_precision(attention, q, pattern, q, k, v, **options)
    axes, kv_axes = _parse(pattern, key_positions is not None)
    env, label = current(), Label("attention", pattern)
    what, named = f"attention({pattern!r})", (("positions", positions), ("segments", segments))
    given = [Operand("queries", q, axes, "float"), Operand("keys", k, kv_axes), Operand("values", v, kv_axes)]
    given += [Operand(name, x, axes[:-2], "int") for name, x in named if x is not None]
    if key_positions is not None:
        given.append(Operand("key_positions", key_positions, kv_axes[:-2], "int"))
    check_operands(what, *given, alike=True)
    _check_options(what, causal, scale, window, mask)
    q, k, v = in_compute((q, k, v), env.precision)
    marks, rule = Marks(positions, segments), Rule(causal, window, mask)
    if key_positions is not None:
        _check_own_places(what, causal, marks)
    if env.mesh is None:
        check_heads(label, q.shape[-2], k.shape[-2])
        if key_positions is None and all(x is None for x in (*marks, *rule[1:])):
            return dense(q, k, v, None, causal, scale, env, label)
    keys = None if key_positions is None else Marks(key_positions, None)
    asked = Asked(axes, kv_axes, marks, keys, rule, scale, label)
    return lowered(asked, q, k, v, env.on_one_rank(tuple(dict.fromkeys((*axes, *kv_axes)))))


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
        elif q[:-3] != kv[:-3] or q[-1] != kv[-1]:
            problems.append(f"{write_axes(q)!r} and {write_axes(kv)!r} differ in more than the heads")
        elif q[-3] != kv[-3] and not own_places:
            problem = f"positions are {q[-3]!r} in queries, {kv[-3]!r} in keys, which have no positions of their own"
            fix = _FIX_PLACES.format(axes=write_axes(kv[:-2]), axis=kv[-3])
            raise PatternError(report(f"attention({pattern!r})", [problem], f"{_FIX}; {fix}"))
    if problems:
        raise PatternError(report(f"attention({pattern!r})", problems, _FIX))
    return operands  # type: ignore[return-value]


def _check_options(what: str, causal: Any, scale: Any, window: Any, mask: Any) -> None:
    problems = [] if isinstance(causal, bool) else [f"causal is {causal!r}: it is True or False"]
    problems += [] if scale is None or _is_number(scale) else [f"scale is {scale!r}: it is a finite number"]
    problems += (
        [] if window is None or is_size(window) else [f"window is {window!r}: a number of positions, at least 1"]
    )
    problems += [] if mask is None or callable(mask) else [f"mask is a {type(mask).__name__}, not a function"]
    if problems:
        raise PatternError(
            report(what, problems, "write causal=True, scale=0.125, window=1024, mask=lambda b, h, q, kv: q >= kv")
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, float | int) and not isinstance(x, bool) and math.isfinite(x)


def _check_own_places(what: str, causal: bool, marks: Marks) -> None:
    problems = [] if marks.segments is None else ["segments are of queries alone"]
    problems += ["causal, without positions of the queries"] if causal and marks.positions is None else []
    if problems:
        fix = "with key_positions= give positions= of the queries, and no segments"
        raise PatternError(report(what, problems, fix))


_FIX = "write 'batch seq heads head_dim, batch seq kv_heads head_dim'"
_FIX_PLACES = "where keys are other tokens, as of an encoder: key_positions=ft.iota({axes!r}, {axis!r}, sizes)"
