"""The op of blockwise attention: a rank's queries against keys that are here, or that come around a ring.

Invariant: keys and values travel in the dtype and with the heads that they have, the next block while this one is
computed; backward saves the queries, the rank's own keys and values, the output and its logsumexp, and lets the
gradients of keys and values travel home. A tile that nothing lets through is not computed, and a block
passes only ranks that need a tile of it, or on its way to one.

Liu et al., Ring Attention with Blockwise Transformers, 2023; Dao, FlashAttention-2, 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.attention.kernel import merged, tile, tile_gradients
from functitan.attention.masks import Numbers, Rule, Side, seen
from functitan.attention.route import Stop
from functitan.attention.tiles import Tile, tiles
from functitan.errors import FunctitanError, report
from functitan.ops.chunked_loss import high
from functitan.ops.contraction import lift
from functitan.ops.function import Call, Hidden, Op, apply, hidden_axes
from functitan.ops.types import Type, check_cotangents
from functitan.sharding.env import Env
from functitan.sharding.message import Label
from functitan.sharding.rules import Dims
from functitan.sharding.sequence import Runs, positions_of
from functitan.sharding.steps import start


class Types(NamedTuple):
    """The types of queries (and outputs), keys, logsumexps, marks of queries and of keys: with layouts outright."""

    q: Type
    kv: Type
    lse: Type
    rows: Type
    columns: Type


class Static(NamedTuple):
    """The static data of a call; `marks` names which of the marks of rows, then of columns, are among the operands."""

    types: Types
    rule: Rule
    rows: Runs  # the positions of this rank's queries
    columns: tuple[Runs, ...]  # those of each block of keys: its own, then as they come around the ring
    blocks: tuple[int, ...]  # the number of each, in the order of slots
    stops: tuple[Stop, ...]  # the way of each around the ring
    dims: Dims  # of the ring
    numbers: Numbers
    marks: tuple[bool, ...]
    scale: float | None
    label: Label
    wanted: tuple[int, ...] = ()  # of q, k, v, in backward


def blockwise(static: Static, q: Tensor, k: Tensor, v: Tensor, marks: tuple[Tensor, ...], env: Env) -> Tensor:
    """softmax(q k^T scale) v of tensors that lie as `static.types` say, and have the same hidden axes."""
    hidden = hidden_axes(q, env)
    operands = (q, k, v, *marks)
    return apply(Call(_ATTENTION, env, static, (hidden,) * len(operands), (hidden, hidden)), *operands)[0]


def _run(call: Call, q: Tensor, k: Tensor, v: Tensor, *marks: Tensor) -> tuple[Tensor, Tensor]:
    """(output, logsumexp [*batch, heads, rows]) of this rank's queries."""
    static, env = call.static, call.env
    own, keys = _heads_first(q), torch.stack([k, v]) if static.stops[1:] else (k, v)
    state = None
    for block, (kb, vb) in enumerate(_travelling(keys, static, env)):
        kb, vb = _heads_first(kb), _heads_first(vb)
        for part, hidden in _masked_tiles(static, block, own, marks):
            rows, cols = slice(part.begin, part.end), slice(part.left, part.right)
            kernel = own[:, :, rows], kb[:, :, cols], vb[:, :, cols], part.kind == "causal", hidden, static.scale
            state = merged(state, own, part.begin, tile(*kernel))
    if state is None:
        state = torch.zeros_like(own), own.new_full(own.shape[:-1], -torch.inf, dtype=high(q.dtype))
    out, lse = state
    return out.transpose(1, 2).to(q.dtype).reshape(q.shape), lse.view(*q.shape[:-3], *lse.shape[1:])


def _vjp(
    call: Call,
    tensors: tuple[Tensor, ...],
    results: tuple[Tensor, Tensor],
    grads: tuple[Tensor | None, ...],
    wanted: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, from one op whose keys and values go around the ring again."""
    static, env = call.static, call.transposed()
    g, of_lse = grads
    assert g is not None and of_lse is None, "the logsumexp is for backward alone"
    types = static.types
    every = (types.q, types.kv, types.kv, *_types_of_marks(static), types.q, types.lse, types.q)
    operands = (*tensors, *results, g)
    hidden = tuple(dict.fromkeys(h for x in operands for h in hidden_axes(x, env)))
    own = [t.resolve(hidden_axes(x, env), env) for t, x in zip(every, operands, strict=True)]
    check_cotangents(
        [(t.axes, it, t.resolve(hidden, env)) for t, it in zip(every, own, strict=True)], static.label, env
    )
    operands = tuple(lift(t, x, hidden, env, static.label) for t, x in zip(every, operands, strict=True))
    static = static._replace(wanted=wanted)
    return apply(Call(_GRADIENTS, env, static, (hidden,) * len(operands), (hidden,) * len(wanted)), *operands)


def _run_gradients(call: Call, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Each block's gradients travel with it, and get what each rank adds; from the last stop they go home."""
    static, env = call.static, call.env
    *marks, out, lse, g = rest
    own, out, g = _heads_first(q), _heads_first(out), _heads_first(g.to(q.dtype))
    lse = lse.masked_fill(lse == -torch.inf, 0.0).view(own.shape[:-1])
    keys, width = torch.stack([k, v]) if static.stops[1:] else (k, v), high(q.dtype)
    travels = q.dtype if env.precision is None else env.precision.reduces(static.dims, q.dtype)
    dq = torch.zeros_like(own, dtype=width)
    at_home: Tensor | None = None
    coming: Callable[[], Tensor] | None = None
    for block, (stop, (kb, vb)) in enumerate(zip(static.stops, _travelling(keys, static, env), strict=True)):
        kb, vb = _heads_first(kb), _heads_first(vb)
        added = torch.zeros((2, *kb.shape), dtype=width, device=kb.device)
        for part, hidden in _masked_tiles(static, block, own, tuple(marks)):
            rows, cols = slice(part.begin, part.end), slice(part.left, part.right)
            given = own[:, :, rows], kb[:, :, cols], vb[:, :, cols], out[:, :, rows], lse[:, :, rows], g[:, :, rows]
            of_q, of_k, of_v = tile_gradients(*given, part.kind == "causal", hidden, static.scale)
            dq[:, :, rows] += of_q
            added[0, :, :, cols] += of_k
            added[1, :, :, cols] += of_v
        if at_home is None:
            at_home = added
            continue
        added = added if coming is None else added + coming().to(width)
        assert stop.gradients is not None
        coming = start("permute", added.to(travels), static.dims, env, static.label, stop.gradients)
    assert at_home is not None
    total = at_home if coming is None else at_home + coming().to(width)
    found = (dq, *total)
    return tuple(
        found[i].transpose(1, 2).to(q.dtype).reshape(x.shape) for i, x in enumerate((q, k, v)) if i in static.wanted
    )


def _no_derivative(call: Call, *_: Any) -> Any:
    what = f"attention({call.static.label.pattern!r}), a derivative other than the first reverse one"
    raise FunctitanError(report(what, ["its kernels have none"], FIX_HIGHER))


def _show(call: Call, hidden: Hidden, operands: tuple[bool, ...], results: tuple[bool, ...]) -> Static:
    static: Static = call.static
    return static._replace(types=Types._make(t.shown(hidden, call.env) for t in static.types))


_ATTENTION = Op("attention", _run, _vjp, _no_derivative, _show, saves_results=True)
_GRADIENTS = Op("gradients of attention", _run_gradients, _no_derivative, _no_derivative, _show, saves_operands=False)


def _travelling(keys: Any, static: Static, env: Env) -> Iterator[tuple[Tensor, Tensor]]:
    """Each block of keys and values that some rank needs, the next on its way while this one is used."""
    for stop in static.stops:
        coming = stop.keys and start("permute", keys, static.dims, env, static.label, stop.keys)
        yield keys[0], keys[1]
        keys = coming and coming()


def _masked_tiles(
    static: Static, block: int, q: Tensor, marks: tuple[Tensor, ...]
) -> Iterator[tuple[Tile, Tensor | None]]:
    """The tiles of one block that are to be computed, with the mask of each that needs one.

    Where a mask's values are known at once, on the CPU, tiles that it empties are left out, and what hides nothing
    is no mask.
    """
    rule, columns, given = static.rule, static.columns[block], iter(marks)
    at, of_rows, key_at, of_columns = (next(given).reshape(q.shape[0], -1) if has else None for has in static.marks)
    marked = any(static.marks) or rule.mask is not None
    causal, window = (rule.causal, rule.window) if at is None else (False, None)  # places say nothing then
    plan = tiles(static.rows, columns, causal, window, marked)
    if all(part.kind != "masked" for part in plan):
        yield from ((part, None) for part in plan)
        return
    size, device = sum(run.size for run in columns), q.device
    here = slice(static.blocks[block] * size, (static.blocks[block] + 1) * size)
    rows = Side(positions_of(static.rows, device) if at is None else at, of_rows)
    keys = Side(
        positions_of(columns, device) if key_at is None else key_at[:, here],
        None if of_columns is None else of_columns[:, here],
    )
    for part in plan:
        if part.kind != "masked":
            yield part, None
            continue
        mask = seen(
            rule, rows.cut(part.begin, part.end), keys.cut(part.left, part.right), static.numbers, q.transpose(1, 2)
        )
        if mask is not None and type(mask) is Tensor and mask.device.type == "cpu":
            if not mask.any():
                continue
            mask = None if mask.all() else mask
        yield part, mask


def _types_of_marks(static: Static) -> list[Type]:
    kinds = (static.types.rows, static.types.rows, static.types.columns, static.types.columns)
    return [kind for kind, has in zip(kinds, static.marks, strict=True) if has]


def _heads_first(x: Tensor) -> Tensor:
    """[*batch, seq, heads, D] as [B, heads, seq, D]: a view, where numbers of one head stand side by side already."""
    x = x if x.stride(-1) == 1 else x.contiguous()  # the kernels read the others as neighbours, whatever the strides
    return x.reshape(-1, *x.shape[-3:]).transpose(1, 2)


FIX_HIGHER = "differentiate once, or let the sequence be gathered: ft.context_parallel(fn, method='all_gather')"
