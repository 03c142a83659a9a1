"""`ft.cross_entropy`: the loss of logits whose vocabulary may be sharded (loss parallelism).

Invariant: logits never move. One maximum and one sum over the ranks that share a row suffice in forward; backward is
local.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from functitan.axes import Axes, parse_operands, parse_signature, write_axes
from functitan.errors import PatternError, report
from functitan.ops.contraction import contract, lift, move
from functitan.ops.function import Call, Hidden, Op, apply, hidden_axes
from functitan.ops.labels import IGNORE, check_labels, own_labels, poisoned
from functitan.ops.local import product
from functitan.ops.operands import Operand, check_operands
from functitan.ops.remembered import made
from functitan.ops.types import Type, check_cotangents, resolve
from functitan.sharding.context import current
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout
from functitan.sharding.message import Label
from functitan.sharding.moves import Step
from functitan.sharding.steps import run_step


def cross_entropy(pattern: str, logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE) -> Tensor:
    """-log softmax(logits)[label] over the axis that the labels lack: `"batch seq vocab, batch seq -> batch seq"`.

    Without `->` the result has the labels' pattern; a shorter result is summed. Labels are global, int64; those equal
    to `ignore_index` give 0 and no gradient. Computed in float32 or better. Raises `PatternError`, and `FunctitanError`
    for other labels outside the vocabulary on the CPU; elsewhere, on a mesh, their loss is NaN.

    >>> cross_entropy("batch vocab, batch -> batch", torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor([1.3863, 0.0000])
    """
    axes, rows, result, vocab = _parse(pattern)
    given = Operand("logits", logits, axes, "float"), Operand("labels", labels, rows, "int64")
    check_operands(f"cross_entropy({pattern!r})", *given)
    env, label = current(), Label("cross_entropy", pattern)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if env.mesh is not None or env.is_captured:  # torch's gradient, captured, takes twice the passes
        alone = env.on_one_rank(axes)
        return _sharded(axes, rows, result, vocab, logits, labels, ignore_index, alone, label)
    check_labels(labels, logits.shape[axes.index(vocab)], ignore_index, env, label)
    order = tuple(axis for axis in axes if axis != vocab)
    flat, turned = logits.movedim(axes.index(vocab), -1), product((rows,), order, (labels,))
    flat = flat.reshape(-1, flat.shape[-1])
    with env.span(*label):
        loss = functional.cross_entropy(flat, turned.reshape(-1), reduction="none", ignore_index=ignore_index)
    return product((order,), result, (loss.view(turned.shape),))


class _Static(NamedTuple):
    axes: Axes  # visible, of the logits
    vocab: str
    layout: Layout  # full, of the logits
    sizes: tuple[tuple[str, int], ...]
    ignore_index: int
    label: Label

    def row_type(self, axes: Axes) -> Type:
        """Tensors without the vocabulary, where the logits lie."""
        return Type(tuple(axis for axis in axes if axis != self.vocab), layout=self.layout)


def _sharded(
    axes: Axes,
    rows: Axes,
    result: Axes,
    vocab: str,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    env: Env,
    label: Label,
) -> Tensor:
    given = labels
    every = tuple(sorted({*hidden_axes(logits, env), *hidden_axes(labels, env)}))
    logits, labels = lift(Type(axes), logits, every, env, label), lift(Type(rows), labels, every, env, label)
    typed = Contraction((Type(axes), Type(rows)), (Type(axes),), (Term(0, (0, 1)),), ())
    full, _ = resolve(typed, (logits, labels), env, label)
    static = _Static(axes, vocab, full.results[0], full.sizes, ignore_index, label)  # type: ignore[arg-type]
    check_labels(given, dict(full.sizes)[vocab], ignore_index, env, label)
    inner = static.row_type(axes)
    labels = move(Type(rows), inner, labels, env, label)
    call = Call(_CROSS_ENTROPY, env, static, (every, every), (every, every))
    loss, _ = apply(call, logits, labels)
    return made("cross_entropy", result, move(inner, Type(result), loss, env, label), env)


def _run(call: Call, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, logsumexp), both as the logits lie, without the vocabulary."""
    static: _Static = call.static
    place, dims = static.layout.axes.index(static.vocab), static.layout.of(static.vocab)
    step = Step("all_reduce", dims)
    top = logits.amax(place)
    top = run_step(top, step, call.env, static.label, "max") if dims else top
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    total = (logits - top.unsqueeze(place)).exp_().sum(place)
    at, inside = _own(static, labels, logits.shape[place], call.env)
    picked = torch.where(inside, logits.gather(place, at.unsqueeze(place)).squeeze(place), 0.0)
    if dims:
        total, picked = run_step(torch.stack([total, picked]), step, call.env, static.label).unbind()
    lse = poisoned(total.log() + top, labels, dict(static.sizes)[static.vocab], static.ignore_index)
    return torch.where(labels == static.ignore_index, 0.0, lse - picked), lse


def _own(static: _Static, labels: Tensor, size: int, env: Env) -> tuple[Tensor, Tensor]:
    assert env.mesh is not None
    return own_labels(labels, env.mesh.index(static.layout.of(static.vocab)) * size, size, static.ignore_index)


def _chosen(static: _Static, logits: Tensor, labels: Tensor, env: Env) -> Tensor:
    """Where a logit is its label's: bool, like the logits."""
    place = static.axes.index(static.vocab)
    at, inside = _own(static, labels, logits.shape[place], env)
    positions = torch.arange(logits.shape[place], device=logits.device)
    spread = positions.view([-1 if i == place else 1 for i in range(logits.dim())])
    return (spread == at.unsqueeze(place)) & inside.unsqueeze(place)


def _vjp(
    call: Call,
    tensors: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
    wanted: tuple[int, ...],
):
    """d logits = softmax * (g_loss + g_lse) - onehot * g_loss, every factor where the logits lie."""
    static: _Static = call.static
    env = call.transposed()
    (logits,), (labels, lse, g_loss, g_lse) = _together(static, [tensors[0]], [tensors[1], results[1], *grads], env)
    spread = lambda x: _spread(static, x, env)
    chosen, soft = _chosen(static, logits, labels, env), (logits - spread(lse)).exp()
    out = None
    if g_loss is not None:
        counted = spread(torch.where(labels == static.ignore_index, 0.0, g_loss))
        out = torch.where(chosen, soft - 1, soft) * counted
    if g_lse is not None:
        out = soft * spread(g_lse) if out is None else out + soft * spread(g_lse)
    return (out,)


def _together(static: _Static, wide: list[Any], rows: list[Any], env: Env) -> list[list[Any]]:
    """Tensors like the logits and like rows, with every hidden axis that any has: derivatives may bring new ones."""
    every = tuple(
        sorted(
            {hidden for x in (*wide, *rows) if x is not None for hidden in hidden_axes(x, env, frozenset(static.axes))}
        )
    )
    types = Type(static.axes, layout=static.layout), static.row_type(static.axes)
    check_cotangents([(static.axes, static.layout, types[0].resolve(every, env))], static.label, env)
    return [
        [None if x is None else lift(own, x, every, env, static.label) for x in tensors]
        for own, tensors in zip(types, (wide, rows), strict=True)
    ]


def _spread(static: _Static, x: Tensor, env: Env) -> Tensor:
    """Rows over the vocabulary again; its transpose sums over the ranks that share a row."""
    typed = Contraction(
        (static.row_type(static.axes),), (Type(static.axes, layout=static.layout),), (Term(0, (0,)),), ()
    )  # type: ignore[arg-type]
    assert env.mesh is not None
    size = env.mesh.sizes.size(static.layout.of(static.vocab))  # local size 1, which elementwise ops expand
    return contract(typed._replace(sizes=((static.vocab, size),)), (x,), env, static.label)[0]


def _jvp(call: Call, tensors: tuple[Tensor, ...], results: tuple[Tensor, ...], given: tuple[Tensor | None, ...]):
    """Tangents of (loss, logsumexp): <softmax - onehot, t> and <softmax, t> over the whole vocabulary."""
    static: _Static = call.static
    env = call.env
    (logits, t), (labels, lse) = _together(static, [tensors[0], given[0]], [tensors[1], results[1]], env)
    assert t is not None
    chosen, soft = _chosen(static, logits, labels, env), (logits - _spread(static, lse, env)).exp()
    typed = Contraction(
        (Type(static.axes, layout=static.layout),), (static.row_type(static.axes),), (Term(0, (0,)),), static.sizes
    )  # type: ignore[arg-type]
    of_lse = contract(typed, (soft * t,), env, static.label)[0]
    picked = contract(typed, (torch.where(chosen, t, 0.0),), env, static.label)[0]
    return torch.where(labels == static.ignore_index, 0.0, of_lse - picked), of_lse


def _show(call: Call, hidden: Hidden, operands: tuple[bool, bool], results: tuple[bool, bool]) -> _Static:
    static: _Static = call.static
    return static._replace(axes=(hidden.axis, *static.axes))


_CROSS_ENTROPY = Op("cross_entropy", _run, _vjp, _jvp, _show, saves_results=True)


@cache
def _parse(pattern: str) -> tuple[Axes, Axes, Axes, str]:
    if isinstance(pattern, str) and "->" in pattern:
        operands, results = parse_signature(pattern)
    else:
        operands = parse_operands(pattern)
        results = operands[1:]
    problems = []
    if len(operands) != 2 or len(results) != 1:
        problems.append(f"{len(operands)} operands and {len(results)} results: logits and labels give one loss")
    else:
        gone = [axis for axis in operands[0] if axis not in operands[1]]
        if len(gone) != 1 or len(operands[1]) != len(operands[0]) - 1:
            problems.append(
                f"labels {write_axes(operands[1])!r} must have all axes of logits {write_axes(operands[0])!r} "
                f"but the vocabulary"
            )
        problems += [f"result axis {axis!r} is not in the labels" for axis in results[0] if axis not in operands[1]]
    if problems:
        fix = "write as in 'batch seq vocab, batch seq -> batch seq'"
        raise PatternError(report(f"cross_entropy({pattern!r})", problems, fix))
    return operands[0], operands[1], results[0], gone[0]
