"""Attention on a mesh: where the work is done, how queries, keys and values get there, and the output back.

Invariant: queries stay with the rank that holds them, or are exchanged for heads; keys and values are broadcast over a
hidden replica axis to whom they must reach whole, so the planner makes the transposes of all that moves. What a ring
carries moves inside the op of blockwise attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functitan.attention.blockwise import Static, Types, blockwise
from functitan.attention.dense import dense
from functitan.attention.masks import Marks, Numbers, Rule, Side, check_rule, documents, seen
from functitan.attention.method import Method, Work, choose
from functitan.attention.route import Stop, route
from functitan.axes import Axes
from functitan.errors import LayoutError, PatternError, report
from functitan.ops.contraction import contract, lift, move
from functitan.ops.function import Hiddens, hidden_axes, needs_second_derivative, peeled
from functitan.ops.remembered import made
from functitan.ops.types import Type, layout_here, resolve
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout
from functitan.sharding.mesh import Mesh
from functitan.sharding.message import Label
from functitan.sharding.rules import Dims
from functitan.sharding.sequence import Run, Runs, positions_of

_REPLICA = "_replica"


class Asked(NamedTuple):
    """What a call asks for, besides its tensors. `marks` are of queries, `key_marks` of keys with their own places."""

    axes: Axes
    kv_axes: Axes
    marks: Marks
    key_marks: Marks | None
    rule: Rule
    scale: float | None
    label: Label

    @property
    def by_place(self) -> bool:
        """Whether a token's place in the sequence is its position."""
        return self.marks.positions is None and self.key_marks is None

    @property
    def by_restarts(self) -> bool:
        """Whether documents are told apart by positions that begin anew, since no segments do."""
        alone = self.marks.positions is not None and self.marks.segments is None
        return alone and self.rule.causal and self.key_marks is None


class _Layouts(NamedTuple):
    """Of queries and outputs in the work, of keys there, and of the marks of queries and of all keys."""

    q: Layout
    kv: Layout
    rows: Layout
    columns: Layout


def lowered(asked: Asked, q: Tensor, k: Tensor, v: Tensor, env: Env) -> Tensor:
    """Choose how attention meets a sequence that lies as the rules say, bring its operands there, and attend."""
    axes, kv_axes, label = asked.axes, asked.kv_axes, asked.label
    once = not needs_second_derivative(env)
    env = env.in_one_way(label, "blockwise" if once else "dense")
    assert env.mesh is not None
    given = [q, k, v, *(x for marks in (asked.marks, asked.key_marks or ()) for x in marks if x is not None)]
    every = tuple(sorted({hidden for x in given for hidden in hidden_axes(x, env)}))
    q, k, v = (lift(Type(its), x, every, env, label) for its, x in ((axes, q), (kv_axes, k), (kv_axes, v)))
    typed = Contraction((Type(axes), Type(kv_axes)), (Type(axes),), (Term(0, (0, 1)),), ())  # type: ignore[arg-type]
    full, _ = resolve(typed, (q, k), env, label)
    (lq, lk), sizes = full.operands, dict(full.sizes)
    group = check_heads(label, sizes[axes[-2]], sizes[kv_axes[-2]])
    _check_positions(asked, env)
    method = _method(asked, lq, lk, sizes, q, k, once, env)
    layouts, aligned = _layouts(asked, lq, lk, method)

    q = move(Type(axes), Type(axes, layout=layouts.q), q, env, label)
    k, v = (_spread(kv_axes, x, layouts.kv, env, label) for x in (k, v))
    if not aligned:
        first = env.mesh.index(lq.of(axes[-2])) * q.shape[-2]
        k, v = (_heads_of_group(x, first, q.shape[-2], group) for x in (k, v))
    rows = env.sequence.held(axes[-3], q.shape[-3], layouts.q.of(axes[-3]), env.mesh)
    if asked.key_marks is None and once:
        out = _blockwise(asked, layouts, method.ring, rows, every, q, k, v, env)
    else:
        out = _densely(asked, layouts, rows, q, k, v, env)
    return made("attention", axes, move(Type(axes, layout=layouts.q), Type(axes), out, env, label), env)


def check_heads(label: Label, heads: int, kv_heads: int) -> int:
    """How many heads each kv head serves; raises `PatternError` where that is no whole number."""
    if heads % kv_heads:
        problem = f"{heads} heads are not a multiple of {kv_heads} kv heads"
        fix = "each kv head serves the same number of heads: give a divisor of them"
        raise PatternError(report(f"attention({label.pattern!r})", [problem], fix))
    return heads // kv_heads


def _method(
    asked: Asked, lq: Layout, lk: Layout, sizes: dict[str, int], q: Tensor, k: Tensor, once: bool, env: Env
) -> Method:
    assert env.mesh is not None
    mesh, (seq, heads, _), kv_heads = env.mesh.sizes, asked.axes[-3:], asked.kv_axes[-2]
    dims = lq.of(seq)
    if not dims or asked.key_marks is not None:
        return Method((), (), dims)
    over = lq.of(heads)
    aligned = lk.of(kv_heads) == over
    nbytes = q.numel() * q.element_size(), k.numel() * k.element_size()
    split = mesh.size(over) if aligned else 1
    work = Work(dims, sizes[heads] // mesh.size(over), sizes[kv_heads] // split, aligned, *nbytes, once)
    counts = {dims[:at]: len(_route(asked, dims[:at], sizes[seq], env)) - 1 for at in range(1, len(dims) + 1)}
    return choose(work, counts, env.sequence, mesh, asked.label)


def _route(asked: Asked, dims: Dims, length: int, env: Env) -> tuple[Stop, ...]:
    assert env.mesh is not None
    mesh, rule = env.mesh.sizes, asked.rule
    ranks = env.sequence.ranks(asked.axes[-3], mesh)
    causal, window = (rule.causal, rule.window) if asked.by_place else (False, None)
    return route(length, mesh.size(dims), ranks, causal, window)


def _layouts(asked: Asked, lq: Layout, lk: Layout, method: Method) -> tuple[_Layouts, bool]:
    """Where the work is done, and whether kv heads lie there as heads do."""
    seq, heads, head_dim = asked.axes[-3:]
    kv_seq, kv_heads, _ = asked.kv_axes[-3:]
    aligned = lk.of(kv_heads) == lq.of(heads)
    of_heads = lq.of(heads) + method.exchange
    of_seq = tuple(dim for dim in lq.of(seq) if dim not in method.exchange)
    dims = {**dict(zip(lq.axes, lq.dims, strict=True)), heads: of_heads, seq: of_seq, head_dim: ()}
    work = Layout(lq.axes, tuple(dims[axis] for axis in lq.axes))
    batch = {axis: lq.of(axis) for axis in lq.axes if axis not in (seq, heads, head_dim)}
    replicas = method.gather + (() if aligned else lq.of(heads))
    of_keys = {**batch, kv_heads: of_heads if aligned else (), kv_seq: method.ring, _REPLICA: replicas}
    names = (_REPLICA, *lq.axes[:-3], *asked.kv_axes[-3:])
    rows = Layout(work.axes[:-2], work.dims[:-2])
    columns = Layout((*rows.axes[:-1], kv_seq), (*rows.dims[:-1], ()))
    return _Layouts(work, Layout(names, tuple(of_keys.get(axis, ()) for axis in names)), rows, columns), aligned


def _spread(axes: Axes, x: Tensor, layout: Layout, env: Env, label: Label) -> Tensor:
    """Keys or values in the work: one part of the replica axis for each rank that is to have them."""
    assert env.mesh is not None
    known = ((_REPLICA, env.mesh.sizes.size(layout.of(_REPLICA))),)
    typed = Contraction((Type(axes),), (Type((_REPLICA, *axes), layout=layout),), (Term(0, (0,)),), known)  # type: ignore[arg-type]
    return contract(typed, (x,), env, label)[0].squeeze(0)


def _heads_of_group(x: Tensor, first: int, count: int, group: int) -> Tensor:
    """The kv heads that queries' heads `first` ... `first + count` use, so that they group evenly again."""
    if count % group == 0 or group % count == 0:
        return x.narrow(-2, first // group, max(1, count // group))
    return x.index_select(-2, torch.arange(first, first + count, device=x.device) // group)


def _blockwise(
    asked: Asked, layouts: _Layouts, ring: Dims, rows: Runs, every: Hiddens, q: Tensor, k: Tensor, v: Tensor, env: Env
) -> Tensor:
    """Tile by tile, against keys that are here or come around the ring."""
    assert env.mesh is not None
    axes, kv_axes, label, marks = asked.axes, asked.kv_axes, asked.label, asked.marks
    n, me = env.mesh.sizes.size(ring), env.mesh.index(ring)
    stops = _route(asked, ring, k.shape[-3] * n, env)
    blocks = tuple((me - stop.shift) % n for stop in stops)
    columns = tuple(env.sequence.held(kv_axes[-3], k.shape[-3], ring, env.mesh, block) for block in blocks)
    if _is_plain(asked, rows, columns):
        return dense(q, k, v, None, asked.rule.causal, asked.scale, env, label)  # torch's own, as without a mesh
    at = (*layouts.q.axes[:-3], axes[-2], axes[-3])
    types = Types(
        Type(axes, layout=layouts.q), Type(kv_axes, layout=Layout(layouts.kv.axes[1:], layouts.kv.dims[1:])),
        Type((*axes[:-3], axes[-2], axes[-3]), layout=Layout(at, tuple(map(layouts.q.of, at)))),
        Type(axes[:-2], layout=layouts.rows), Type(kv_axes[:-2], layout=layouts.columns),
    )  # fmt: skip
    own = Type(axes[:-2])
    lifted = Marks(*(None if x is None else lift(own, x, every, env, label) for x in marks))
    of_rows, of_columns = _marks_there(asked, lifted, types.rows, types.columns, env)
    given = (*of_rows, *of_columns)
    moved, there = tuple(x for x in given if x is not None), tuple(x is not None for x in given)
    places = _numbered(asked, layouts, q, env.mesh)
    check_rule(asked.rule, label, places, rows, q)
    static = Static(types, asked.rule, rows, columns, blocks, stops, ring, places, there, asked.scale, label)
    return blockwise(static, q, k, v, moved, env)


def _densely(asked: Asked, layouts: _Layouts, rows: Runs, q: Tensor, k: Tensor, v: Tensor, env: Env) -> Tensor:
    """By one call of SDPA, whose math backend has every derivative; and for keys with places of their own."""
    assert env.mesh is not None
    axes, kv_axes, label = asked.axes, asked.kv_axes, asked.label
    columns = env.sequence.held(kv_axes[-3], k.shape[-3], (), env.mesh)
    if _is_plain(asked, rows, (columns,)):
        return dense(q, k, v, None, asked.rule.causal, asked.scale, env, label)
    kinds = Type(axes[:-2], layout=layouts.rows), Type(kv_axes[:-2], layout=layouts.columns)
    sides = []
    for held, marks in zip((rows, columns), _marks_there(asked, asked.marks, *kinds, env), strict=True):
        at, of_segment = (None if x is None else x.reshape(-1, x.shape[-1]) for x in marks)
        sides.append(Side(positions_of(held, q.device) if at is None else at, of_segment))
    places = _numbered(asked, layouts, q, env.mesh)
    check_rule(asked.rule, label, places, rows, q)
    of_rows, of_columns = sides
    return dense(q, k, v, seen(asked.rule, of_rows, of_columns, places, q), False, asked.scale, env, label)


def _marks_there(asked: Asked, marks: Marks, rows: Type, columns: Type, env: Env) -> tuple[Marks, Marks]:
    """The marks of queries and of all keys where the work is done; keys without marks of their own have those of q."""
    own, of_keys = Type(asked.axes[:-2]), Type(asked.kv_axes[:-2])

    def moved(kind: Type, now: Type, given: Marks) -> Marks:
        return Marks(*(None if x is None else move(now, kind, x, env, asked.label) for x in given))

    of_rows = moved(rows, own, marks)
    if asked.key_marks is not None:
        return of_rows, moved(columns, of_keys, asked.key_marks)
    of_columns = moved(columns, own, marks)
    if asked.by_restarts:
        at, axis = of_columns.positions, asked.axes[-3]
        assert at is not None and env.mesh is not None
        found = documents(at, env.sequence.held(axis, at.shape[-1], (), env.mesh))
        of_columns = of_columns._replace(segments=found)
        of_rows = of_rows._replace(segments=move(columns, rows, found, env, asked.label))
    return of_rows, of_columns


def _is_plain(asked: Asked, rows: Runs, columns: tuple[Runs, ...]) -> bool:
    """Whether SDPA's own causal mask, or none, will do."""
    if asked.key_marks is not None or any(x is not None for x in (*asked.marks, *asked.rule[1:])):
        return False
    whole = (Run(0, rows[0].size),)
    return columns == (whole,) == (rows,) if asked.rule.causal else len(columns) == 1


def _numbered(asked: Asked, layouts: _Layouts, q: Tensor, mesh: Mesh) -> Numbers:
    """Which examples and heads of all are here."""
    batch = []
    for axis, size in zip(asked.axes[:-3], q.shape, strict=False):
        dims = layouts.q.of(axis)
        batch.append((size * mesh.sizes.size(dims), mesh.index(dims) * size, size))
    return Numbers(tuple(batch), mesh.index(layouts.q.of(asked.axes[-2])) * q.shape[-2])


def _check_positions(asked: Asked, env: Env) -> None:
    """Raise `LayoutError` for positions in the contiguous order where data lies zigzag, if they can be read.

    Those that begin anew in each segment may be any.
    """
    assert env.mesh is not None
    axes, given = asked.axes[:-2], asked.marks.positions
    if given is None or asked.marks.segments is not None or env.sequence.ranks(axes[-1], env.mesh.sizes) == 1:
        return
    values, dims = peeled(given), layout_here(axes, given, env).of(axes[-1])
    if type(values) is not Tensor or values.device.type != "cpu" or not env.mesh.transport.has_values:
        return
    slots = torch.arange(given.shape[-1]) + env.mesh.index(dims) * given.shape[-1]
    held = positions_of(env.sequence.held(axes[-1], given.shape[-1], dims, env.mesh))
    if values.shape == given.shape and bool((values == slots).all()) and not torch.equal(slots, held):
        problem = "positions count the slots of this shard, but its tokens lie zigzag"
        raise LayoutError(report(f"attention({asked.label.pattern!r})", [problem], _FIX_POSITIONS))


_FIX_POSITIONS = "permute positions with the tokens, by one ft.zigzag of the whole batch; or give none"
