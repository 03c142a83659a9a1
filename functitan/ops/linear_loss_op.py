"""The op of `ft.linear_cross_entropy`: its forward, and the gradients of `x` and `w`, on shards.

Invariant: what it saves are shards: of `x` and `w` as they came, and of rows where the logits would lie. Replica axes
say which ranks share a row and which a column, so that the planner brings operands and adds up partial gradients.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.errors import FunctitanError, report
from functitan.ops.chunked_loss import Cotangents, Rows, default_chunk, gradients, high, statistics
from functitan.ops.contraction import Sizes, lift, move
from functitan.ops.function import Call, Hidden, Op, apply, hidden_axes
from functitan.ops.labels import own_labels, poisoned
from functitan.ops.local import product
from functitan.ops.types import Type, check_cotangents, resolve
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout
from functitan.sharding.message import Label
from functitan.sharding.moves import Step
from functitan.sharding.steps import run_step

_REPLICA = "_replica"


class Options(NamedTuple):
    """Rows of a chunk (`None`: the default), the z-loss's weight, the label of rows that do not count, real columns."""

    chunk: int | None
    z_loss: float
    ignore_index: int
    vocab_size: int


class _Places(NamedTuple):
    """Full layouts: of the operands and the weight's gradient, of the logits, and of both operands in the matmuls.

    There is one matmul for each position of the axes that the weight's gradient shares with rows. In it `x` has a
    replica for each part of the vocabulary and `w` one for each part of the rows: copies in, partial sums out.
    """

    x: Layout
    w: Layout
    dw: Layout
    logits: Layout
    work_x: Layout  # (replicas, *shared, *other rows, embed)
    work_w: Layout  # (replicas, *shared, embed and vocab as they stand in w)


class _Static(NamedTuple):
    x: Type
    w: Type
    logits: Type  # with a layout outright
    places: _Places
    embed: str
    vocab: str
    sizes: Sizes
    options: Options
    label: Label
    wanted: tuple[int, ...] = ()  # of x and w, in backward

    @property
    def rows(self) -> Type:
        """Labels, losses and the like: where the logits would lie, without the vocabulary."""
        return self.logits._replace(axes=tuple(axis for axis in self.logits.axes if axis != self.vocab), lookup=None)


def static_of(typed: Contraction, full: Contraction, embed: str, vocab: str, options: Options, label: Label) -> _Static:
    """The static data of a call on (x, w, labels), from the contraction that would give the logits."""
    (x, w, _), (logits,) = full.operands, full.results
    seen, places = typed.results[0]._replace(layout=logits), _places(x, w, w, logits, embed, vocab)
    return _Static(typed.operands[0], typed.operands[1], seen, places, embed, vocab, full.sizes, options, label)


def _run(call: Call, x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, logsumexp) of rows. Ranks with parts of the vocabulary exchange maxima, then two sums, of all rows."""
    static, env, options = call.static, call.env, call.static.options
    step = Step("all_reduce", static.places.logits.of(static.vocab))
    matmuls = _matmuls(static, x, w, labels, env)
    best, total, picked = torch.stack([statistics(rows, w, _chunk(static, rows, w)) for rows, w in matmuls], 1)
    if step.dims:
        own, best = best, run_step(best, step, env, static.label, "max")
        total = total * (own - torch.where(best.isinf(), 0.0, best)).exp()
        total, picked = run_step(torch.stack([total, picked]), step, env, static.label)
    labels = _flat(static, labels)
    lse = total.log() + torch.where(best.isinf(), 0.0, best)
    lse = poisoned(lse, labels, options.vocab_size, options.ignore_index)
    loss = lse - picked + options.z_loss * lse**2 if options.z_loss else lse - picked
    loss = torch.where(labels == options.ignore_index, 0.0, loss)
    return _unflat(static, loss, env), _unflat(static, lse, env)


def _vjp(
    call: Call,
    tensors: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
    wanted: tuple[int, ...],
):
    """The gradients of x and w, from one op that makes the logits again."""
    static, env, label = call.static, call.transposed(), call.static.label
    (x, w, labels), (_, lse), (g, of_lse) = tensors, results, grads
    assert g is not None and of_lse is None, "the logsumexp is for backward alone"
    shown = frozenset((*static.logits.axes, *static.w.axes, static.embed))
    every = tuple(dict.fromkeys(hidden for y in (x, w, labels, lse, g) for hidden in hidden_axes(y, env, shown)))
    own = static.x.resolve(hidden_axes(x, env, shown), env)
    x = lift(static.x, x, every, env, label)
    labels, lse, g = (lift(static.rows, y, every, env, label) for y in (labels, lse, g))
    terms = tuple(Term(result, (0, 1, 2, 3, 4)) for result in range(2))
    typed = Contraction((static.x, static.w, *3 * [static.rows]), (static.w, static.logits), terms, ())
    full, (hidden, _) = resolve(typed, (x, w, labels, lse, g), env, label)
    (of_x, of_w, *_), (of_dw, logits) = full.operands, full.results
    both = (static.x.axes, own, of_x), (static.w.axes, of_w, of_dw)
    check_cotangents([both[i] for i in wanted], label, env)
    places = _places(of_x, of_w, of_dw, logits, static.embed, static.vocab)
    static = static._replace(places=places, sizes=full.sizes, wanted=wanted)
    return apply(Call(_GRADIENTS, env, static, hidden, (every,) * len(wanted)), x, w, labels, lse, g)


def _run_gradients(call: Call, x: Tensor, w: Tensor, labels: Tensor, lse: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """d logits = softmax (1 + 2 z lse) g - onehot g, nothing where labels are ignored; and what of it is wanted."""
    static, env, options, places = call.static, call.env, call.static.options, call.static.places
    g = torch.where(labels == options.ignore_index, 0.0, g)
    of_lse = g * (1 + 2 * options.z_loss * lse) if options.z_loss else g
    given = [_flat(static, y) for y in (lse, of_lse, g)]
    matmuls = _matmuls(static, x, w, labels, env)
    dx = x.new_zeros(_shape(static, places.work_x, env)) if 0 in static.wanted else None
    dw = None
    if 1 in static.wanted:
        dw = x.new_zeros(_shape(static, places.work_w, env), dtype=high(x.dtype))
    for i, (rows, own) in enumerate(matmuls):
        of_x = None if dx is None else dx.view(len(matmuls), *rows.x.shape)[i]
        of_w = None if dw is None else _columns(static, dw, env)[i]
        gradients(rows, Cotangents._make(y[i] for y in given), own, _chunk(static, rows, own), of_x, of_w)
    out = []
    if dx is not None:
        out.append(_bring(static, dx, places.work_x, places.x, env))
    if dw is not None:
        out.append(_bring(static, dw, places.work_w, places.dw, env).to(w.dtype))
    return tuple(out)


def _no_derivative(call: Call, *_: Any) -> Any:
    what = f"linear_cross_entropy({call.static.label.pattern!r}), a derivative other than the first reverse one"
    raise FunctitanError(report(what, [_ONCE], _FIX))


def _show(call: Call, hidden: Hidden, operands: tuple[bool, ...], results: tuple[bool, ...]) -> _Static:
    static, env = call.static, call.env
    x, w = (t.shown(hidden if here else None, env) for t, here in zip(static[:2], operands, strict=False))
    return static._replace(x=x, w=w, logits=static.logits.shown(hidden, env))


LINEAR_LOSS = Op("linear_cross_entropy", _run, _vjp, _no_derivative, _show, saves_results=True)
_GRADIENTS = Op(  # without derivatives, it needs neither its operands nor types where vmaps' axes show
    "gradients of linear_cross_entropy", _run_gradients, _no_derivative, _no_derivative,
    lambda call, *_: call.static, saves_operands=False,
)  # fmt: skip


def _matmuls(static: _Static, x: Tensor, w: Tensor, labels: Tensor, env: Env) -> list[tuple[Rows, Tensor]]:
    """The matmuls of this rank: rows and the columns of the weight that are no padding, where both now are."""
    places, labels = static.places, _flat(static, labels)
    w = _columns(static, _bring(static, w.to(x.dtype), places.w, places.work_w, env), env)
    x = _bring(static, x, places.x, places.work_x, env)
    x = x.reshape(*labels.shape, x.shape[-1])
    at, inside = own_labels(labels, _first(static, env), w.shape[-1], static.options.ignore_index)
    return [(Rows._make(own), of_w) for *own, of_w in zip(x, at, inside, w, strict=True)]


def _chunk(static: _Static, rows: Rows, w: Tensor) -> int:
    return static.options.chunk or default_chunk(rows.x.shape[0], *w.shape)


def _bring(static: _Static, x: Tensor, now: Layout, then: Layout, env: Env) -> Tensor:
    """An operand to the matmuls, or a gradient back from there."""
    sizes = _sizes(static, then, env)
    new = tuple((axis, sizes[axis]) for axis in then.axes if axis not in now.axes)
    return move(Type(now.axes, layout=now), Type(then.axes, layout=then), x, env, static.label, new)


def _columns(static: _Static, w: Tensor, env: Env) -> Tensor:
    """A view of a weight in the matmuls as [shared, embed, vocab], without the columns that are padding."""
    w = w.flatten(0, -3)
    w = w if static.places.work_w.axes[-1] == static.vocab else w.transpose(1, 2)
    return w[..., : max(0, static.options.vocab_size - _first(static, env))]


def _first(static: _Static, env: Env) -> int:
    """The column of the whole weight at which this rank's part of the vocabulary begins."""
    assert env.mesh is not None
    dims = static.places.logits.of(static.vocab)
    return env.mesh.index(dims) * (dict(static.sizes)[static.vocab] // env.mesh.sizes.size(dims))


def _flat(static: _Static, y: Tensor) -> Tensor:
    """A tensor of rows as [shared, rows], in the order of the matmuls."""
    logits, work = static.places.logits, static.places.work_x.axes[1:-1]
    y = product((tuple(axis for axis in logits.axes if axis != static.vocab),), work, (y,))
    shared = len(static.places.work_w.axes) - 3
    return y.reshape(math.prod(y.shape[:shared]), math.prod(y.shape[shared:]))


def _unflat(static: _Static, y: Tensor, env: Env) -> Tensor:
    """The inverse of `_flat`."""
    logits, work = static.places.logits, static.places.work_x
    y = y.view(_shape(static, work, env)[1:-1])
    return product((work.axes[1:-1],), tuple(axis for axis in logits.axes if axis != static.vocab), (y,))


def _places(x: Layout, w: Layout, dw: Layout, logits: Layout, embed: str, vocab: str) -> _Places:
    shared = tuple(axis for axis in dw.axes if axis not in (embed, vocab))
    others = tuple(axis for axis in logits.axes if axis != vocab and axis not in shared)
    matrix = tuple(axis for axis in dw.axes if axis not in shared)

    def work(replicas: tuple[str, ...], *axes: str) -> Layout:
        return Layout((_REPLICA, *axes), (replicas, *map(logits.of, axes)))

    over_rows = tuple(dim for axis in others for dim in logits.of(axis))
    work_x, work_w = work(logits.of(vocab), *shared, *others, embed), work(over_rows, *shared, *matrix)
    return _Places(x, w, dw, logits, work_x, work_w)


def _sizes(static: _Static, layout: Layout, env: Env) -> dict[str, int]:
    """Global sizes of axes; one replica is on each rank."""
    assert env.mesh is not None
    return {**dict(static.sizes), _REPLICA: env.mesh.sizes.size(layout.of(_REPLICA))}


def _shape(static: _Static, layout: Layout, env: Env) -> list[int]:
    """The shape of this rank's part of a tensor."""
    assert env.mesh is not None
    sizes = _sizes(static, layout, env)
    return [sizes[axis] // env.mesh.sizes.size(layout.of(axis)) for axis in layout.axes]


_ONCE = "it keeps no logits: it has the one derivative that makes them again"
_FIX = "use ft.cross_entropy of ft.einsum for forward mode and for second derivatives"
